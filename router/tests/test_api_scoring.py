"""`echo` on /v1/completions: the prompt before the text, and what scoring clients read: the prompt's log-probabilities.

A client such as lm-evaluation-harness sends token ids with `echo`, `logprobs` and `max_tokens` 0 or 1.
"""

from typing import Any

import pytest
from api_kit import VOCAB, Api, serving
from fake_shard import logprob, top_tokens

PATH = "/v1/completions"
TEXT = "hello \u65e5\u672c \U0001f600 test"  # has tokens that are parts of characters


def body(**values: Any) -> dict[str, Any]:
    return {"prompt": TEXT, "max_tokens": 4, "temperature": 0, "echo": True, **values}


async def choice(api: Api, **values: Any) -> dict[str, Any]:
    answer = await api.post(PATH, body(**values))
    assert answer.status == 200, answer.json
    (only,) = answer.json["choices"]
    return dict(only)


async def test_the_prompt_stands_before_the_text_as_it_was_given() -> None:
    async with serving() as api:
        generated = api.expected_text(TEXT, 4)
        assert (await choice(api))["text"] == TEXT + generated
        ids = api.encode(TEXT)
        assert (await choice(api, prompt=ids))["text"] == TEXT + generated, "ids as the text they stand for"
        several = (await api.post(PATH, body(prompt=["hello", TEXT], n=2))).json["choices"]
        hello = "hello" + api.expected_text("hello", 4)
        assert [one["text"] for one in several] == [hello, hello, TEXT + generated, TEXT + generated]
        await api.idle()


@pytest.mark.parametrize("as_ids", [False, True])
async def test_every_token_but_the_first_has_a_log_probability_and_alternatives(as_ids: bool) -> None:
    async with serving() as api:
        ids = api.encode(TEXT)
        found = await choice(api, logprobs=2, **({"prompt": ids} if as_ids else {}))
        scores = found["logprobs"]
        every = [*ids, *api.expected_ids(ids, 4)]
        assert scores["token_logprobs"] == [None, *(logprob(token) for token in every[1:])]
        assert scores["tokens"][0] == "<s>"
        assert any(token.startswith("bytes:") for token in scores["tokens"])
        assert scores["top_logprobs"][0] is None
        for token, name, top in zip(every[1:], scores["tokens"][1:], scores["top_logprobs"][1:], strict=True):
            assert next(iter(top)) == name, "the fake's likeliest token is always the one that stands there"
            assert list(top.values()) == [logprob(one) for one in top_tokens(token, 2, VOCAB - 1)]
        starts = scores["text_offset"]
        assert len(starts) == len(every)
        assert starts == sorted(starts)
        assert starts[0] == starts[1] == 0, "the tokenizer's own first token has no text"
        for name, start in zip(scores["tokens"][: len(ids)], starts[: len(ids)], strict=True):
            if not name.startswith(("bytes:", "<s>")):
                assert found["text"][start:].startswith(name)
        await api.idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_can_be_scored_without_generating(stream: bool) -> None:
    async with serving() as api:
        ids = api.encode(TEXT)
        request = body(max_tokens=0, logprobs=1, stream=stream, prompt=[ids, ids[:3]])
        answer = await api.post(PATH, request)
        if stream:
            events = answer.events[:-1]
            choices = sorted((event["choices"][0] for event in events), key=lambda one: int(one["index"]))
            usages = [event["usage"] for event in events]
            assert {usage["completion_tokens"] for usage in usages} == {0}
        else:
            choices = answer.json["choices"]
            total = len(ids) + 3
            assert answer.json["usage"]["completion_tokens"] == 0
            assert answer.json["usage"]["total_tokens"] == total
            assert answer.headers["x-generated-tokens"] == "0"
        assert [one["text"] for one in choices] == [TEXT, api.tokenizer.decode(ids[:3])]
        assert [one["finish_reason"] for one in choices] == ["length", "length"]
        assert choices[0]["logprobs"]["token_logprobs"] == [None, *(logprob(token) for token in ids[1:])]
        await api.idle()


async def test_max_tokens_zero_without_log_probabilities_is_the_prompt() -> None:
    async with serving() as api:
        found = await choice(api, max_tokens=0)
        assert (found["text"], found["logprobs"], found["finish_reason"]) == (TEXT, None, "length")


async def test_a_prompt_of_one_token_has_nothing_but_a_null() -> None:
    async with serving() as api:
        scores = (await choice(api, prompt=[5], max_tokens=0, logprobs=1))["logprobs"]
        assert (scores["token_logprobs"], scores["top_logprobs"], scores["text_offset"]) == ([None], [None], [0])


async def test_a_scored_prompt_is_computed_whole_although_it_is_cached() -> None:
    async with serving() as api:
        first = await choice(api, max_tokens=0, logprobs=1)
        again = await choice(api, max_tokens=0, logprobs=1)
        assert first == again
        await api.idle()


async def test_the_token_that_stands_there_is_among_the_alternatives_whatever_was_asked_for() -> None:
    async with serving() as api:
        scores = (await choice(api, max_tokens=0, logprobs=0))["logprobs"]
        assert [list(top) for top in scores["top_logprobs"][1:]] == [[name] for name in scores["tokens"][1:]]


async def test_the_stream_begins_with_the_prompt_and_adds_up_to_the_answer() -> None:
    async with serving() as api:
        whole = await choice(api, logprobs=1)
        events = (await api.post(PATH, body(logprobs=1, stream=True))).events[:-1]
        chunks = [event["choices"][0] for event in events]
        assert chunks[0]["text"] == TEXT
        assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
        for name in whole["logprobs"]:
            assert [value for chunk in chunks for value in chunk["logprobs"][name]] == whole["logprobs"][name]
        await api.idle()
