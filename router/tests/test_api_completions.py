"""/v1/completions: one or several prompts, as text or ids, streamed and not."""

from typing import Any

import openai
import pytest
from api_kit import serving
from fake_shard import logprob

MID = ["object", "id", "created", "choices", "model", "system_fingerprint"]
LAST = ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]


def body(**values: Any) -> dict[str, Any]:
    return {"model": "tgi", "prompt": "hello", "max_tokens": 6, "temperature": 0, **values}


def as_text(token: str) -> str:
    """What a token of the old log-probabilities adds to the text, when none is a part of a valid character."""
    return "\ufffd" if token.startswith("bytes:") else token


def texts(events: list[Any]) -> dict[int, str]:
    result: dict[int, str] = {}
    for event in events[:-1]:
        for choice in event["choices"]:
            result[choice["index"]] = result.get(choice["index"], "") + choice["text"]
    return result


async def test_a_whole_answer_has_openais_shape() -> None:
    async with serving() as api:
        answer = await api.post("/v1/completions", body())
        assert list(answer.json) == LAST
        assert answer.json["object"] == "text_completion"
        assert answer.json["id"].startswith("cmpl-")
        assert answer.json["choices"] == [
            {"index": 0, "text": api.expected_text("hello", 6), "logprobs": None, "finish_reason": "length"}
        ]
        prompt = len(api.encode("hello"))
        assert answer.json["usage"]["total_tokens"] == prompt + 6
        assert "x-compute-time" not in answer.headers
        assert answer.headers["x-generated-tokens"] == "6"
        await api.idle()


async def test_several_prompts_are_answered_in_their_order_and_counted_together() -> None:
    async with serving() as api:
        ids = api.encode("this is")
        request = body(prompt=["hello", "world", "a test"])
        answer = await api.post("/v1/completions", request)
        expected = [api.expected_text(prompt, 6) for prompt in request["prompt"]]
        assert [choice["text"] for choice in answer.json["choices"]] == expected
        assert [choice["index"] for choice in answer.json["choices"]] == [0, 1, 2]
        assert answer.json["usage"]["completion_tokens"] == 18
        assert answer.headers["x-generated-tokens"] == "18"
        assert answer.headers["x-compute-characters"] == str(len("".join(request["prompt"])))
        streamed = (await api.post("/v1/completions", {**request, "stream": True})).events
        assert texts(streamed) == dict(enumerate(expected))
        as_ids = await api.post("/v1/completions", body(prompt=[ids, api.encode("hello")]))
        assert [choice["text"] for choice in as_ids.json["choices"]] == [api.expected_text("this is", 6), expected[0]]
        one = await api.post("/v1/completions", body(prompt=ids))
        assert [choice["text"] for choice in one.json["choices"]] == [api.expected_text("this is", 6)]
        await api.idle()


async def test_chunks_are_tgis_with_null_until_the_end_and_usage_in_each_prompts_last() -> None:
    async with serving() as api:
        events = (await api.post("/v1/completions", body(prompt=["hello", "world"], stream=True))).events
        assert events[-1] == "[DONE]"
        lasts = [event for event in events[:-1] if event["choices"][0]["finish_reason"] is not None]
        assert [list(event) for event in lasts] == [LAST, LAST]
        assert [event["usage"]["completion_tokens"] for event in lasts] == [6, 6]
        others = [event for event in events[:-1] if event not in lasts]
        assert {tuple(event) for event in others} == {tuple(MID)}
        assert len(others) == 10
        assert len({(event["id"], event["created"]) for event in events[:-1]}) == 1


async def test_usage_can_be_asked_for_at_the_end_or_always() -> None:
    async with serving() as api:
        request = body(prompt=["hello", "world"], stream=True, stream_options={"include_usage": True})
        events = (await api.post("/v1/completions", request)).events
        assert (events[-2]["choices"], events[-2]["usage"]["completion_tokens"]) == ([], 12)
        assert all(event["usage"] is None for event in events[:-2])
        request["stream_options"] = {"continuous_usage_stats": True}
        events = (await api.post("/v1/completions", request)).events
        assert [event["usage"]["completion_tokens"] for event in events[:-1]] == list(range(1, 13))


async def test_logprobs_in_the_old_shape_are_equal_streamed_and_not() -> None:
    async with serving() as api:
        ids = api.expected_ids(api.encode("hello"), 6)
        whole = (await api.post("/v1/completions", body(logprobs=2))).json["choices"][0]["logprobs"]
        assert list(whole) == ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
        assert whole["token_logprobs"] == [logprob(token_id) for token_id in ids]
        assert "".join(map(as_text, whole["tokens"])) == api.expected_text("hello", 6)
        assert [len(top) for top in whole["top_logprobs"]] == [2] * 6
        assert all(token in top for token, top in zip(whole["tokens"], whole["top_logprobs"], strict=True))
        assert whole["text_offset"] == [len("".join(map(as_text, whole["tokens"][:count]))) for count in range(6)]
        events = (await api.post("/v1/completions", body(logprobs=2, stream=True))).events
        for name in whole:
            assert [event["choices"][0]["logprobs"][name][0] for event in events[:-1]] == whole[name]


async def test_n_choices_of_every_prompt_and_the_best_of_more() -> None:
    async with serving() as api:
        request = body(prompt=["hello", "world"], n=2, temperature=1.0, seed=3)
        choices = (await api.post("/v1/completions", request)).json["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
        assert choices[0]["text"] == api.expected_text("hello", 6, 3)
        assert choices[2]["text"] == api.expected_text("world", 6, 3)
        ranked = (await api.post("/v1/completions", body(best_of=4, n=2, temperature=1.0, seed=3, logprobs=0))).json
        every = (await api.post("/v1/completions", body(n=4, temperature=1.0, seed=3, logprobs=0))).json["choices"]
        means = {choice["text"]: sum(choice["logprobs"]["token_logprobs"]) for choice in every}
        best = sorted(means, key=lambda text: -means[text])[:2]
        assert {choice["text"] for choice in ranked["choices"]} == set(best)
        assert ranked["usage"]["completion_tokens"] == 24
        await api.idle()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"suffix": "x"}, "Suffix is not supported and can be achieved by preprocessing the prompt."),
    ({"prompt": ["a"] * 5}, "Number of prompts exceeds the maximum allowed batch size of 4. `--max-client-batch-size`"),
    ({"prompt": []}, "Empty array detected. Do not use an empty array for the prompt."),
    ({"prompt": [1, "a"]}, "prompt: Expected `str`"),
    ({"prompt": [True]}, "prompt: Expected `str`"),
    ({"prompt": [600]}, "`prompt` must contain token ids >= 0 and < 511. Given: 600"),
    ({"prompt": [-1]}, "`prompt` must contain token ids >= 0"),
    ({"prompt": [[]]}, "`inputs` must have at least one token. Given: 0"),
    ({"prompt": ""}, "`inputs` cannot be empty"),
    ({"max_tokens": 0}, "`max_tokens` must be strictly positive"),
    ({"n": 0}, "`n` must be >= 1 and <= 128. Given: 0"),
    ({"n": 129}, "`n` must be >= 1 and <= 128. Given: 129"),
    ({"best_of": 1, "n": 2}, "`best_of` must be >= 2 and <= 128. Given: 1"),
    (
        {"n": 65, "prompt": ["a", "b"]},
        "`n` times the number of prompts must be <= 128. Given: 65 for 2 prompts. `--max-concurrent-requests` raises",
    ),
    ({"best_of": 2, "stream": True}, "`best_of` > `n` is not supported when streaming tokens"),
    ({"logprobs": 6}, "`logprobs` must be >= 0 and <= 5. Given: 6"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "`stop` supports up to 4 stop sequences. Given: 5"),
]


@pytest.mark.parametrize(("values", "sentence"), REFUSED, ids=[str(values) for values, _ in REFUSED])
async def test_what_is_not_built_or_wrong_is_refused_by_name(values: dict[str, Any], sentence: str) -> None:
    async with serving() as api:
        answer = await api.post("/v1/completions", body(**values))
        assert answer.status == 422
        assert sentence in answer.json["error"]["message"]
        assert "error_type" in answer.json
        await api.idle()


async def test_if_one_prompt_is_wrong_the_whole_request_is() -> None:
    async with serving() as api:
        answer = await api.post("/v1/completions", body(prompt=["hello", "", "world"]))
        assert answer.status == 422
        await api.idle()


async def test_a_prompt_as_ids_is_limited_like_a_text() -> None:
    async with serving(max_input_tokens=4, max_total_tokens=20) as api:
        answer = await api.post("/v1/completions", body(prompt=[5] * 5))
        assert "must have less than 4 tokens. Given: 5" in answer.json["error"]["message"]
        assert answer.json["error"]["code"] == "context_length_exceeded"


async def test_the_openai_client_completes() -> None:
    async with serving() as api:
        client = openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="-", max_retries=0)
        options: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 6, "temperature": 0}
        answer = await client.completions.create(**options)
        assert answer.choices[0].text == api.expected_text("hello", 6)
        chunks = [chunk async for chunk in await client.completions.create(**options, stream=True)]
        assert "".join(chunk.choices[0].text for chunk in chunks) == api.expected_text("hello", 6)
        assert [model.id async for model in client.models.list()] == ["tiny"]
        await client.close()
