"""What must not change a request's tokens: chunks, prefix hits, company, preemption, steps in flight."""

import random
from pathlib import Path

import driving
import pytest
import torch
from driving import SAMPLED, Driver
from tgi_shard.models.decoder import Decoder
from transformers import AutoModelForCausalLM

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return driving.save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(model_dir: Path, device: torch.device) -> Decoder:
    return driving.load_tiny(model_dir, device)


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, driving.VOCAB), k=length)


def driver(model: Decoder) -> Driver:
    return Driver(driving.make_engine(model).step)


def alone(model: Decoder, tokens: list[int], num_tokens: int = NEW_TOKENS, **fields: object) -> driving.Live:
    """The request computed whole, with nobody else."""
    d = driver(model)
    live = d.add(tokens, **fields)
    d.run(num_tokens)
    return live


def same(a: driving.Live, b: driving.Live) -> None:
    assert a.error is None
    assert b.error is None
    assert a.generated == b.generated
    assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


ADJUSTED = {
    **SAMPLED,
    "min_p": 0.01,
    "presence_penalty": 1.5,
    "logit_bias": {5: 4.0, 6: -100.0, 7: 3.0},
    "min_new_tokens": 7,
    "end_token_ids": [5, 9],
}
MODES = [
    pytest.param({}, id="greedy"),
    pytest.param(SAMPLED, id="sampled"),
    pytest.param(ADJUSTED, id="adjusted"),
]


def test_greedy_generation_is_transformers(model: Decoder, model_dir: Path):
    reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for seed in range(3):
        tokens = prompt(5 + 9 * seed, seed)
        out = reference.generate(
            torch.tensor([tokens]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ours = alone(model, tokens)
        assert ours.generated == out.sequences[0, len(tokens) :].tolist()
        expected = [z.log_softmax(-1).max().item() for z in out.logits]
        assert ours.logprobs == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("cuts", [[1] * 17, [5, 5, 7], [16, 1], [3, 13, 1]])
@pytest.mark.parametrize("fields", MODES)
def test_a_prompt_in_chunks_is_the_prompt_whole(model: Decoder, cuts: list[int], fields: dict):
    tokens = prompt(17)
    d = driver(model)
    live = d.add(tokens, prompt_logprobs=True, top_n=2, **fields)
    live.prompt_top_n = 3
    for cut in cuts:
        d.step({live: cut})
    d.run(NEW_TOKENS - 1)
    d = driver(model)
    whole = d.add(tokens, prompt_logprobs=True, top_n=2, **fields)
    whole.prompt_top_n = 3
    d.run(NEW_TOKENS)
    same(live, whole)
    assert live.top == whole.top
    assert live.prompt_logprobs == pytest.approx(whole.prompt_logprobs, abs=1e-4)
    assert live.prompt_top == whole.prompt_top


def test_prompt_logprobs_are_transformers(model: Decoder, model_dir: Path):
    tokens = prompt(30)
    reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    scores = reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
    expected = [scores[i, token].item() for i, token in enumerate(tokens[1:])]
    d = driver(model)
    live, plain = d.add(tokens, prompt_logprobs=True), d.add(tokens, prompt_logprobs=True)
    live.prompt_top_n = 3
    d.run(2)
    assert live.prompt_logprobs == pytest.approx(expected, abs=1e-3)
    assert live.prompt_top == scores[:-1].topk(3).indices.tolist()
    assert len(live.generated) == 2
    assert (plain.prompt_logprobs, plain.prompt_top) == (live.prompt_logprobs, [])


@pytest.mark.parametrize("fields", MODES)
def test_a_prefix_hit_is_a_cold_run(model: Decoder, fields: dict):
    shared = prompt(8)
    tokens = shared + prompt(5, 1)
    d = driver(model)
    first = d.add(shared + prompt(7, 2))
    d.run(2)
    hit = d.add_with_prefix_of(first, 2, tokens, **fields)
    d.run(NEW_TOKENS)
    same(hit, alone(model, tokens, **fields))


def test_generated_tokens_can_be_a_prefix(model: Decoder):
    d = driver(model)
    first = d.add(prompt(6))
    d.run(8)
    tokens = (first.prompt + first.generated)[:12] + prompt(3, 9)
    hit = d.add_with_prefix_of(first, 3, tokens)
    d.run(NEW_TOKENS)
    same(hit, alone(model, tokens))


@pytest.mark.parametrize("fields", MODES)
def test_a_request_in_a_crowd_is_the_request_alone(model: Decoder, fields: dict):
    d = driver(model)
    lives = []
    for i in range(8):
        own = fields | {"seed": i} if i % 2 else {"watermark": i == 4, "repetition_penalty": 1.0 + i / 10}
        lives.append((d.add(prompt(3 + 2 * i, i), top_n=i % 3, **own), own))
        d.step()  # they come one after another: prompts and decoding in one step
    d.run(NEW_TOKENS - 1)
    for i, (live, own) in enumerate(lives):
        single = alone(model, live.prompt, len(live.generated), top_n=i % 3, **own)
        same(live, single)
        assert live.top == single.top


@pytest.mark.parametrize("fields", [{}, SAMPLED, SAMPLED | {"repetition_penalty": 1.3, "frequency_penalty": 0.4}])
def test_a_preempted_request_goes_on_as_if_nothing_had_happened(model: Decoder, fields: dict):
    d = driver(model)
    live = d.add(prompt(9), **fields)
    other = d.add(prompt(4, 1))
    d.run(5)
    d.preempt(live)
    d.step({other: 1})
    d.step({other: 1, live: 3})  # computed again, in chunks
    d.run(NEW_TOKENS - 5)
    assert len(live.generated) == NEW_TOKENS
    same(live, alone(model, live.prompt, **fields))


@pytest.mark.parametrize("fields", MODES)
def test_two_steps_in_flight_are_one_after_the_other(model: Decoder, fields: dict):
    engine = driving.make_engine(model)
    d = Driver(engine.step)
    live, other = d.add(prompt(9), **fields), d.add(prompt(4, 1), **fields)
    unread = None
    for _ in range(NEW_TOKENS):
        planned = d.plan()  # made before the answer of the step before is known
        if unread is not None:
            d.read(unread)
        unread = engine.step(*planned)
    d.read(unread)
    same(live, alone(model, live.prompt, **fields))
    same(other, alone(model, other.prompt, **fields))


def test_a_restarted_shard_continues_sampled_streams_token_for_token(model: Decoder):
    d = driver(model)
    live = d.add(prompt(9), **SAMPLED)
    d.run(5)
    restarted = driver(model)
    again = restarted.add(live.prompt, **SAMPLED)
    again.generated = list(live.generated)
    restarted.run(NEW_TOKENS - 5)
    assert again.generated == alone(model, live.prompt, **SAMPLED).generated


def test_blocks_released_in_a_step_may_be_used_by_another_request_in_it(model: Decoder):
    engine = driving.make_engine(model, num_blocks=8)
    d = Driver(engine.step, num_blocks=8)
    first = d.add(prompt(20))
    d.run(3)
    d.preempt(first)
    second = d.add(prompt(21, 3), **SAMPLED)
    d.step({second: 21})
    d.run(0)
    for _ in range(4):
        d.step({second: 1})
    same(second, alone(model, second.prompt, 5, **SAMPLED))
