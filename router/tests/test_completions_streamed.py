"""Streamed equals not streamed on /v1/completions, whatever is asked for together."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from api_kit import Api, one_server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PATH = "/v1/completions"
# Of these ids the fake generates all; the first hundreds are single bytes, so texts are full of broken characters.
VOCABULARY, END = 320, 300

Body = dict[str, Any]
Check = Callable[[Body, tuple[int, int] | None], None]

texts = st.sampled_from(["hello", "hello world, this is", "日本語 😀", "x"])
ids = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9)
prompts = texts | ids | st.lists(texts, min_size=1, max_size=3) | st.lists(ids, min_size=1, max_size=3)
optional = {
    "n": st.integers(1, 3),
    "logprobs": st.integers(0, 5),
    "echo": st.booleans(),
    "stop": st.lists(st.text("abehlo 語\ufffd", min_size=1, max_size=2), max_size=2),
    "include_stop_str_in_output": st.booleans(),
    "ignore_eos": st.booleans(),
    "min_tokens": st.integers(0, 6),
    "presence_penalty": st.sampled_from([0.0, 1.0]),
    "min_p": st.sampled_from([0.0, 0.1]),
    "top_k": st.sampled_from([-1, 0, 7]),
    "logit_bias": st.dictionaries(st.integers(0, 9).map(str), st.floats(-100, 100), max_size=2),
    "user": st.just("someone"),
}
bodies = st.builds(
    lambda prompt, sampling, rest: {"prompt": prompt, **sampling, **rest},
    prompts,
    st.just({"temperature": 0.0})
    | st.builds(lambda seed: {"seed": seed}, st.integers(-9, 9).filter(lambda s: s != -1)),
    st.fixed_dictionaries({"max_tokens": st.integers(1, 12)}, optional=optional)
    | st.fixed_dictionaries(
        {"max_tokens": st.just(0), "echo": st.just(True)}, optional={"logprobs": st.integers(0, 2)}
    ),
)


@pytest.fixture(scope="module")
def check() -> Iterator[Check]:
    """Compares the two answers of one server to a body."""
    with one_server(vocab=VOCABULARY, eos=END, max_rows=16) as run:
        yield lambda body, part: run(lambda api: compare(api, body, part))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=bodies, part=st.none() | st.tuples(st.integers(0, 12), st.integers(1, 4)))
def test_the_parts_add_up_to_the_whole(check: Check, body: Body, part: tuple[int, int] | None) -> None:
    check(body, part)


async def compare(api: Api, body: Body, part: tuple[int, int] | None) -> None:
    """part: of the first text, to be a stop string that really comes."""
    if part is not None and body["max_tokens"]:
        plain = {**body, "stop": None, "min_tokens": 0, "echo": False}
        text = (await api.post(PATH, plain)).json["choices"][0]["text"]
        if stop := text[part[0] : part[0] + part[1]]:
            body = {**body, "stop": stop}
    body["min_tokens"] = min(body.get("min_tokens", 0), body["max_tokens"])
    whole = await api.post(PATH, body)
    assert whole.status == 200, whole.json
    streamed = await api.post(PATH, {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert streamed.status == 200, streamed.json
    *events, usage, done = streamed.events
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert {name: count for name, count in usage["usage"].items() if name != "prompt_tokens_details"} == {
        name: count for name, count in whole.json["usage"].items() if name != "prompt_tokens_details"
    }, "what was cached differs, because the second request finds the first one's tokens"
    assert joined(events) == whole.json["choices"]
    await api.idle()


def joined(events: list[Any]) -> list[Any]:
    """The choices that the chunks are the parts of."""
    choices: dict[int, Any] = {}
    for event in events:
        assert event["usage"] is None
        (chunk,) = event["choices"]
        choice = choices.setdefault(
            chunk["index"], {"index": chunk["index"], "text": "", "logprobs": None, "finish_reason": None}
        )
        assert choice["finish_reason"] is None, "a chunk after the last"
        choice["text"] += chunk["text"]
        choice["finish_reason"] = chunk["finish_reason"]
        if chunk["logprobs"] is not None:
            scores = choice["logprobs"] = choice["logprobs"] or {name: [] for name in chunk["logprobs"]}
            for name, values in chunk["logprobs"].items():
                scores[name] += values
    return [choices[index] for index in sorted(choices)]
