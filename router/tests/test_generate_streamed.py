"""Streamed equals not streamed on TGI's own routes, whatever is asked for together."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from api_kit import Api, one_server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Of these ids the fake generates all; the first hundreds are single bytes, so texts are full of broken characters.
VOCABULARY, END = 320, 300

Body = dict[str, Any]
Check = Callable[[Body, tuple[int, int] | None], None]

parameters = st.builds(
    lambda sampling, rest: {**sampling, **rest},
    st.just({})
    | st.fixed_dictionaries(
        {"do_sample": st.just(True), "seed": st.integers(0, 2**64 - 1)}, optional={"typical_p": st.just(0.9)}
    ),
    st.fixed_dictionaries(
        {"max_new_tokens": st.integers(1, 12)},
        optional={
            "top_n_tokens": st.integers(1, 5),
            "stop": st.lists(st.text("abehlo 語\ufffd", min_size=1, max_size=2), max_size=2),
            "return_full_text": st.booleans(),
            "truncate": st.integers(1, 3),
            "repetition_penalty": st.sampled_from([1.0, 1.3]),
            "frequency_penalty": st.sampled_from([0.0, 0.5]),
            "watermark": st.booleans(),
        },
    ),
)
bodies = st.builds(
    lambda inputs, asked: {"inputs": inputs, "parameters": asked},
    st.sampled_from(["hello", "hello world, this is", "日本語 😀", "x"]),
    parameters,
)


@pytest.fixture(scope="module")
def check() -> Iterator[Check]:
    """Compares the answers of one server to a body."""
    with one_server(vocab=VOCABULARY, eos=END, max_rows=16) as run:
        yield lambda body, part: run(lambda api: compare(api, body, part))


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=bodies, part=st.none() | st.tuples(st.integers(0, 12), st.integers(1, 4)))
def test_the_events_add_up_to_the_answer(check: Check, body: Body, part: tuple[int, int] | None) -> None:
    check(body, part)


async def compare(api: Api, body: Body, part: tuple[int, int] | None) -> None:
    """part: of the first text, to be a stop sequence that really comes."""
    if part is not None:
        plain = {**body["parameters"], "stop": [], "return_full_text": False}
        text = (await api.post("/generate", {**body, "parameters": plain})).json["generated_text"]
        if stop := text[part[0] : part[0] + part[1]]:
            body = {**body, "parameters": {**body["parameters"], "stop": [stop]}}
    asked = {"return_full_text": False, **body["parameters"], "details": True}  # "/" returns it unless told not to
    detailed = {**body, "parameters": asked}
    whole = await api.post("/generate", detailed)
    assert whole.status == 200, whole.json
    for path, request in (("/generate_stream", detailed), ("/", {**detailed, "stream": True})):
        streamed = await api.post(path, request)
        assert streamed.status == 200, streamed.json
        agree(streamed.events, whole.json)
    await api.idle()


def agree(events: list[Any], whole: Any) -> None:
    """The events are the tokens of the answer, and the last one has its text and numbers."""
    details = whole["details"]
    assert [event["token"] for event in events] == details["tokens"]
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))
    if details.get("top_tokens"):
        assert [event.get("top_tokens", []) for event in events] == details["top_tokens"]
    assert all(event["generated_text"] is None and event["details"] is None for event in events[:-1])
    last = events[-1]
    assert last["generated_text"] == whole["generated_text"]
    assert {name: details[name] for name in last["details"] if name in details} == {
        name: value for name, value in last["details"].items() if name in details
    }
