"""Scoring and steering on /v1/completions against transformers on the same weights.

Requests are written as lm-evaluation-harness writes them: token ids, `echo`, `logprobs`, and `max_tokens` 0 or 1.
"""

from typing import Any

import pytest
import torch
from harness import MODEL_DIR, Json, Server
from transformers import AutoModelForCausalLM, AutoTokenizer

CONTEXTS = ["import os\n\n\ndef read(", "class Node:\n    def __init__(self", "for i in "]
CONTINUATIONS = ["path):\n    return os.path", ", value):\n", "range(10):\n    print(i)\n"]


class Reference:
    """The model as transformers runs it, in float32."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
        self.model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text).input_ids)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """`[T, V]`"""
        return self.model(torch.tensor([ids])).logits[0].float()

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """`[T, V]`: row i is about token i + 1."""
        return self.logits(ids).log_softmax(-1)

    def greedy(self, ids: list[int], count: int, **options: Any) -> list[int]:
        """What `generate` makes of it; no end of sequence unless `options` names one."""
        options = {"eos_token_id": None, **options}
        with torch.inference_mode():
            out = self.model.generate(
                torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0, **options
            )
        return list(out[0, len(ids) :].tolist())


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def complete(server: Server, **fields: Any) -> Json:
    response = server.post("/v1/completions", {"model": "demo", "temperature": 0, "seed": 1234, **fields})
    assert response.status == 200, response.text
    answer: Json = response.json
    return answer


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_prompts_of_token_ids_are_scored_as_transformers_scores_them(
    server: Server, reference: Reference, max_tokens: int
) -> None:
    contexts = [reference.ids(text) for text in CONTEXTS]
    prompts = [context + reference.ids(text)[:9] for context, text in zip(contexts, CONTINUATIONS, strict=True)]
    answer = complete(server, prompt=prompts, max_tokens=max_tokens, logprobs=1, echo=True)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 3 * max_tokens
    for prompt, context, choice in zip(prompts, contexts, answer["choices"], strict=True):
        scores = choice["logprobs"]
        expected = reference.logprobs(prompt)
        length = len(prompt)
        assert len(scores["token_logprobs"]) == length + max_tokens
        assert scores["token_logprobs"][0] is scores["top_logprobs"][0] is None
        values = expected[torch.arange(length - 1), torch.tensor(prompt[1:])].tolist()
        assert scores["token_logprobs"][1:length] == pytest.approx(values, abs=2e-3)
        # the harness' sum over the continuation, and its question whether that is what greedy decoding would say
        end = length if max_tokens == 0 else -1
        pairs = list(zip(scores["token_logprobs"], scores["top_logprobs"], strict=True))[len(context) : end]
        assert sum(value for value, _ in pairs) == pytest.approx(sum(values[len(context) - 1 :]), abs=1e-2)
        greedy = all(value == max(top.values()) for value, top in pairs)
        best = expected.argmax(-1)[len(context) - 1 : length - 1].tolist()
        assert greedy is (best == prompt[len(context) :])


def test_what_the_model_would_say_itself_is_greedy(server: Server, reference: Reference) -> None:
    context = reference.ids(CONTEXTS[0])
    prompt = context + reference.greedy(context, 8)
    scores = complete(server, prompt=prompt, max_tokens=1, logprobs=1, echo=True)["choices"][0]["logprobs"]
    pairs = zip(scores["token_logprobs"][len(context) : -1], scores["top_logprobs"][len(context) : -1], strict=True)
    assert all(value == max(top.values()) for value, top in pairs)


def test_a_text_is_scored_like_its_tokens_and_its_offsets_cut_it(server: Server, reference: Reference) -> None:
    text = CONTEXTS[1] + CONTINUATIONS[1] + "    # ünïcödé 日本\n"
    by_text = complete(server, prompt=text, max_tokens=0, logprobs=2, echo=True)["choices"][0]
    by_ids = complete(server, prompt=reference.ids(text), max_tokens=0, logprobs=2, echo=True)["choices"][0]
    assert by_text["text"] == by_ids["text"] == text
    assert by_text["logprobs"]["tokens"] == by_ids["logprobs"]["tokens"]
    assert by_text["logprobs"]["token_logprobs"] == by_ids["logprobs"]["token_logprobs"]
    top = reference.logprobs(reference.ids(text))[:-1].topk(2)
    for found, expected in zip(by_text["logprobs"]["top_logprobs"][1:], top.values.tolist(), strict=True):
        assert list(found.values())[:2] == pytest.approx(expected, abs=2e-3)
    starts = by_text["logprobs"]["text_offset"]
    for name, start in zip(by_text["logprobs"]["tokens"], starts, strict=True):
        assert name.startswith("bytes:") or text.startswith(name, start)


def test_a_long_prompt_is_scored_in_several_steps(server: Server, reference: Reference) -> None:
    prompt = reference.ids("\n".join(CONTEXTS * 60))[:700]
    scores = complete(server, prompt=prompt, max_tokens=0, logprobs=0, echo=True)["choices"][0]["logprobs"]
    expected = reference.logprobs(prompt)[torch.arange(699), torch.tensor(prompt[1:])]
    assert scores["token_logprobs"][1:] == pytest.approx(expected.tolist(), abs=5e-3)


def test_a_logit_bias_steers_as_in_transformers(server: Server, reference: Reference) -> None:
    context, count = reference.ids(CONTEXTS[0]), 12
    plain = reference.greedy(context, count)
    biases = {plain[0]: -100.0, plain[3]: 2.5, 300: 1.0}
    options: dict[str, Any] = {"logprobs": 0, "max_tokens": count, "prompt": context, "ignore_eos": True}

    def tokens(**fields: Any) -> list[str]:
        return list(complete(server, **options, **fields)["choices"][0]["logprobs"]["tokens"])

    def names(ids: list[int]) -> list[str]:
        return [reference.tokenizer.decode([token]) for token in ids]

    assert tokens() == names(plain)
    expected = reference.greedy(context, count, sequence_bias=[[[token], bias] for token, bias in biases.items()])
    assert expected != plain
    assert tokens(logit_bias={str(token): bias for token, bias in biases.items()}) == names(expected)
    forced = reference.greedy(context, count, sequence_bias=[[[1234], 100.0]])
    assert tokens(logit_bias={"1234": 100}) == names(forced) == names([1234] * count)


@pytest.mark.parametrize(("frequency", "presence"), [(0.0, 2.0), (0.6, -0.5)])
def test_penalties_are_openais_formula(server: Server, reference: Reference, frequency: float, presence: float) -> None:
    context, generated = reference.ids(CONTEXTS[2]), []
    values = []
    for _ in range(16):
        counts = torch.bincount(torch.tensor(generated, dtype=torch.int64), minlength=6144)
        logits = reference.logits(context + generated)[-1] - counts * frequency - (counts > 0) * presence
        generated.append(int(logits.argmax()))
        values.append(logits.log_softmax(-1).max().item())
    answer = complete(
        server,
        prompt=context,
        max_tokens=16,
        logprobs=0,
        ignore_eos=True,
        frequency_penalty=frequency,
        presence_penalty=presence,
    )
    scores = answer["choices"][0]["logprobs"]
    assert scores["tokens"] == [reference.tokenizer.decode([token]) for token in generated]
    assert scores["token_logprobs"] == pytest.approx(values, abs=2e-3)


def test_nothing_ends_before_the_minimum(server: Server, reference: Reference) -> None:
    options: dict[str, Any] = {"prompt": CONTEXTS[0], "max_tokens": 10, "logit_bias": {"2": 100}}
    ended = complete(server, **options)
    assert ended["usage"]["completion_tokens"] == 1
    assert ended["choices"][0]["finish_reason"] == "stop"
    for least in (3, 10):
        held = complete(server, **options, min_tokens=least)
        assert held["usage"]["completion_tokens"] == min(least + 1, 10)
        assert held["choices"][0]["finish_reason"] == ("stop" if least < 10 else "length")
    whole = complete(server, prompt=CONTEXTS[0], max_tokens=10, ignore_eos=True)["choices"][0]["text"]
    cut = complete(server, prompt=CONTEXTS[0], max_tokens=10, ignore_eos=True, stop=whole[1])["choices"][0]
    assert cut["text"] == whole[:1]
    held = complete(server, prompt=CONTEXTS[0], max_tokens=10, ignore_eos=True, stop=whole[1], min_tokens=10)
    assert held["choices"][0]["text"] == whole


def test_min_p_of_one_is_greedy(server: Server) -> None:
    options: dict[str, Any] = {"prompt": CONTEXTS[1], "max_tokens": 12}
    greedy = complete(server, **options)["choices"][0]["text"]
    assert complete(server, **{**options, "temperature": 1.5, "min_p": 1.0})["choices"][0]["text"] == greedy
    assert complete(server, **{**options, "temperature": 1.5, "top_p": 0})["choices"][0]["text"] == greedy


def test_choices_of_a_seed_differ_and_come_again(server: Server) -> None:
    options: dict[str, Any] = {"prompt": CONTEXTS, "max_tokens": 12, "temperature": 1.0, "n": 5}
    first, again = (complete(server, **options)["choices"] for _ in range(2))
    assert first == again
    assert [choice["index"] for choice in first] == list(range(15))
    assert len({choice["text"] for choice in first[:5]}) == 5


def test_a_grammar_that_is_at_its_end_ends_the_text_in_spite_of_the_minimum(server: Server) -> None:
    regex = {"type": "regex", "value": "abc"}
    answer = complete(server, prompt=CONTEXTS[0], max_tokens=30, min_tokens=20, response_format=regex)
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("abc", "stop")


def test_a_bias_chooses_among_what_a_grammar_allows(server: Server, reference: Reference) -> None:
    (seven,) = reference.ids("7")
    options: dict[str, Any] = {
        "prompt": CONTEXTS[0],
        "max_tokens": 9,
        "response_format": {"type": "regex", "value": "[0-9]{4}"},
    }
    biased = complete(server, **options, logit_bias={str(seven): 100})
    assert biased["choices"][0]["text"] == "7777"
    assert "7" not in complete(server, **options, logit_bias={str(seven): -100})["choices"][0]["text"]
