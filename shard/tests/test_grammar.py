"""Rows with a grammar: what they generate follows it, alone, in a crowd, interrupted and split over two ranks."""

import re
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import BLOCK_SIZE, NUM_BLOCKS, SAMPLED, Driver, Live, ShardGroup, load_tiny, make_shape, save_tiny_llama
from llguidance import LLMatcher
from tgi_demo import model_path
from tgi_proto.grammar import load_tokenizer, make_matcher
from tgi_shard import warmup
from tgi_shard.engine import Engine
from tgi_shard.faults import Faults
from tgi_shard.grammar.masks import GrammarMasks
from tgi_shard.models.decoder import Decoder
from tgi_shard.parallel import Parallel
from tokenizers import Tokenizer

torch.set_num_threads(1)

VOCAB = 6144  # of the demo model's tokenizer
EOS = 0
DATE = r"[12][0-9]{3}-(0[1-9]|1[0-2])-[0-3][0-9]"
PROMPT = [17, 230, 4001, 8, 99]
tokenizer = Tokenizer.from_file(str(model_path() / "tokenizer.json"))
vocabulary = partial(load_tokenizer, model_path(), VOCAB, [EOS])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_llama(tmp_path_factory.mktemp("model"), vocab_size=VOCAB, eos_token_id=EOS)
    (directory / "tokenizer.json").symlink_to(model_path() / "tokenizer.json")
    return directory


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Decoder:
    return load_tiny(model_dir)


def engine_of(model: Decoder, load: Any = vocabulary, deadline_s: float = 60.0) -> Engine:
    grammars = GrammarMasks(load, VOCAB, Parallel.single(), deadline_s)
    return warmup.build_engine(model, make_shape(model), NUM_BLOCKS, Faults(None), 0, grammars)


def regex(pattern: str) -> str:
    grammar: str = LLMatcher.grammar_from_regex(pattern)
    return grammar


def add(driver: Driver, grammar: str = "", prompt: list[int] = PROMPT, **fields: Any) -> Live:
    live = driver.add(prompt, **fields)
    live.grammar = grammar
    return live


def generate(model: Decoder, grammar: str, num_steps: int = 24, **fields: Any) -> Live:
    driver = Driver(engine_of(model).step)
    live = add(driver, grammar, **fields)
    driver.run(num_steps)
    return live


def text_of(live: Live) -> str:
    """What it says before its end."""
    assert EOS in live.generated
    return tokenizer.decode(live.generated[: live.generated.index(EOS)], skip_special_tokens=False)


@pytest.mark.parametrize("fields", [{}, *({**SAMPLED, "seed": seed} for seed in range(4)), {"do_sample": True}])
def test_the_output_matches_the_grammar_and_then_ends(model: Decoder, fields: dict[str, Any]) -> None:
    live = generate(model, regex(DATE), **fields)

    assert re.fullmatch(DATE, text_of(live))
    assert set(live.generated[live.generated.index(EOS) :]) == {EOS}  # whoever goes on gets nothing else


def test_log_probabilities_are_those_of_the_allowed_tokens(model: Decoder) -> None:
    grammar = regex("(yes|no|perhaps)[.]")
    driver = Driver(engine_of(model).step)
    driver.add(PROMPT, top_n=VOCAB)
    (everything,) = driver.step().generations[0].top_tokens
    logits = torch.full((VOCAB,), -torch.inf)
    logits[list(everything.ids)] = torch.tensor(list(everything.logprobs))
    mask = torch.frombuffer(bytearray(make_matcher(vocabulary(), grammar).compute_bitmask()), dtype=torch.uint8)
    allowed = ((mask.unsqueeze(1) >> torch.arange(8)) & 1).flatten()[:VOCAB].bool()
    expected = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)

    bound = generate(model, grammar, num_steps=1, top_n=VOCAB)

    assert sorted(bound.top[0]) == allowed.nonzero().squeeze(1).tolist()
    assert bound.generated[0] == int(expected.argmax())
    assert bound.logprobs[0] == pytest.approx(float(expected.max()), abs=1e-4)


def test_a_forced_token_has_log_probability_zero(model: Decoder) -> None:
    live = generate(model, regex("abc"), num_steps=8)

    assert text_of(live) == "abc"
    assert live.logprobs[live.generated.index(EOS)] == 0.0


def test_a_grammar_does_not_change_its_neighbours(model: Decoder) -> None:
    alone = [generate(model, grammar, 12, **fields) for grammar in ("", regex(DATE)) for fields in ({}, SAMPLED)]
    driver = Driver(engine_of(model).step)
    crowd = [add(driver, grammar, **fields) for grammar in ("", regex(DATE)) for fields in ({}, SAMPLED)]
    driver.run(12)

    assert [live.generated for live in crowd] == [live.generated for live in alone]


@pytest.mark.parametrize("fields", [{}, SAMPLED])
def test_a_preempted_row_goes_on_where_it_was(model: Decoder, fields: dict[str, Any]) -> None:
    driver = Driver(engine_of(model).step)
    live = add(driver, regex(DATE), **fields)
    for _ in range(5):
        driver.run(3)
        driver.preempt(live)

    assert live.generated == generate(model, regex(DATE), 15, **fields).generated


def test_steps_may_be_sent_before_the_answer_to_the_last_is_read(model: Decoder) -> None:
    step = engine_of(model).step
    driver = Driver(step)
    live = add(driver, regex(DATE), **SAMPLED)
    plans = [driver.plan() for _ in range(10)]
    for plan in plans:
        driver.read(step(*plan))

    assert live.generated == generate(model, regex(DATE), 10, **SAMPLED).generated


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ('{"grammars":[{"lark_grammar":"start: /(/"}]}', "invalid regex"),
        ('{"grammars":[{"json_schema":{"$ref":"#"}}]}', "cannot be followed further"),
        ("no JSON at all", "cannot be followed"),
    ],
)
def test_a_grammar_that_leads_nowhere_fails_its_own_row(model: Decoder, grammar: str, reason: str) -> None:
    driver = Driver(engine_of(model).step)
    other = add(driver, regex(DATE))
    bad = add(driver, grammar)
    plain = add(driver, prompt=[1, 2, 3])
    driver.run(12)

    assert bad.error is not None
    assert reason in bad.error
    assert not bad.generated
    assert re.fullmatch(DATE, text_of(other))
    assert len(plain.generated) == 12


def test_a_least_length_holds_the_end_off_as_long_as_the_grammar_goes_on(model: Decoder) -> None:
    driver = Driver(engine_of(model).step)
    short = add(driver, regex("abc"), min_new_tokens=10, end_token_ids=[EOS])
    long = add(driver, regex("a+"), min_new_tokens=10, end_token_ids=[EOS])
    driver.run(12)

    assert text_of(short) == "abc"
    assert EOS not in long.generated[:10]
    assert short.error is long.error is None


def test_a_grammar_that_never_answers_fails_its_own_row(model: Decoder) -> None:
    stop = threading.Event()
    driver = Driver(engine_of(model, load=stop.wait, deadline_s=0.2).step)
    bad = [add(driver, regex(DATE)) for _ in range(6)]  # more than there are threads
    plain = add(driver, prompt=[1, 2, 3])
    driver.run(3)
    stop.set()

    assert {live.error for live in bad} == {"the grammar took more than 0.2 s for one token"}
    assert len(plain.generated) == 3


def test_the_vocabulary_is_not_loaded_before_the_first_grammar(model: Decoder) -> None:
    loads: list[int] = []

    def load() -> Any:
        loads.append(1)
        return vocabulary()

    driver = Driver(engine_of(model, load=load).step)
    add(driver)
    driver.run(2)
    assert not loads
    live = [add(driver, regex(DATE)) for _ in range(3)]
    driver.run(12)
    assert len(loads) == 1
    assert all(re.fullmatch(DATE, text_of(one)) for one in live)


def test_a_vocabulary_smaller_than_the_head_masks_what_is_no_token(tmp_path: Path) -> None:
    wide = VOCAB + 70
    model = load_tiny(save_tiny_llama(tmp_path, vocab_size=wide, eos_token_id=EOS))
    grammars = GrammarMasks(partial(load_tokenizer, model_path(), wide, [EOS]), wide, Parallel.single(), 60.0)
    driver = Driver(warmup.build_engine(model, make_shape(model), NUM_BLOCKS, Faults(None), 0, grammars).step)
    lives = [add(driver, regex(".{4}"), do_sample=True, seed=seed) for seed in range(8)]
    driver.run(8)

    assert all(max(live.generated) < VOCAB for live in lives)
    assert all(len(text_of(live)) == 4 for live in lives)


def test_two_ranks_generate_what_one_does(model_dir: Path, tmp_path: Path, model: Decoder) -> None:
    with ShardGroup(model_dir, tmp_path, world_size=2, block_size=BLOCK_SIZE) as group:
        driver = Driver(group.step)
        lives = [add(driver, regex(DATE), **SAMPLED), add(driver, regex(DATE)), add(driver)]
        bad = add(driver, "no JSON")
        driver.run(10)
        driver.preempt(lives[0])
        driver.run(4)

    single = Driver(engine_of(model).step)
    expected = [add(single, regex(DATE), **SAMPLED), add(single, regex(DATE)), add(single)]
    single.run(14)
    assert [live.generated for live in lives] == [live.generated for live in expected]
    assert bad.error is not None
