"""Sampling parameters from every route to the shard, and what the router itself does for them: lengths and stops."""

from typing import Any

import pytest
from api_kit import Api, serving
from tgi_proto import generate_pb2 as pb

ASKED: dict[str, Any] = {
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.75,
    "typical_p": 0.875,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "frequency_penalty": -0.5,
    "presence_penalty": 1.25,
    "logit_bias": {"5": -100, "6": 2.5},
    "seed": 11,
}
EXPECTED = pb.SamplingParameters(
    temperature=0.5,
    top_k=7,
    top_p=0.75,
    typical_p=0.875,
    do_sample=True,
    seed=11,
    repetition_penalty=1.5,
    frequency_penalty=-0.5,
    presence_penalty=1.25,
    min_p=0.125,
    logit_bias={5: -100.0, 6: 2.5},
    min_new_tokens=2,
    end_token_ids=[9],
)
MESSAGES = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"inputs": "hi", "parameters": {**ASKED, "min_new_tokens": 2, "max_new_tokens": 4}},
    "/v1/completions": {"prompt": "hi", **ASKED, "min_tokens": 2, "max_tokens": 4},
    "/v1/chat/completions": {"messages": MESSAGES, **ASKED, "min_tokens": 2, "max_tokens": 4},
}


def admissions(api: Api) -> list[pb.Admission]:
    """What the first shard is told about every request from now on."""
    seen: list[pb.Admission] = []
    engine = api.group.servers[0].engine
    admit = engine.admit

    def remember(admission: pb.Admission) -> None:
        seen.append(admission)
        admit(admission)

    engine.admit = remember  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("path", BODIES)
async def test_every_parameter_reaches_the_shard(path: str) -> None:
    async with serving(eos=9) as api:
        seen = admissions(api)
        answer = await api.post(path, BODIES[path])
        assert answer.status == 200, answer.json
        assert "x-ignored-params" not in answer.headers
        assert [admission.sampling for admission in seen] == [EXPECTED]
        await api.idle()


async def test_a_request_that_asks_for_nothing_sends_nothing() -> None:
    async with serving() as api:
        seen = admissions(api)
        await api.post("/v1/completions", {"prompt": "hi", "max_tokens": 2, "temperature": 0})
        plain = pb.SamplingParameters(temperature=1, top_p=1, typical_p=1, repetition_penalty=1)
        assert [admission.sampling for admission in seen] == [plain]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_does_not_count_before_the_minimum(stream: bool) -> None:
    async with serving() as api:
        whole = api.expected_text("hello", 9)
        early, late = whole[0], whole[-2:]
        assert whole.index(late) == len(whole) - 2, "it comes with the last token only"

        async def text(**values: Any) -> str:
            body = {"prompt": "hello", "max_tokens": 9, "temperature": 0, "stream": stream, **values}
            answer = await api.post("/v1/completions", body)
            choices = [event["choices"][0] for event in answer.events[:-1]] if stream else answer.json["choices"]
            return "".join(choice["text"] for choice in choices)

        assert await text(stop=early) == ""
        assert await text(stop=early, min_tokens=9) == whole
        assert await text(stop=[early, late], min_tokens=5) == whole[: whole.index(late)]
        await api.idle()


async def test_choices_of_a_seed_differ_and_come_again_streamed_too() -> None:
    async with serving() as api:
        body = {"prompt": ["hello", "world"], "n": 3, "seed": 5, "max_tokens": 6}
        first = (await api.post("/v1/completions", body)).json["choices"]
        again = (await api.post("/v1/completions", body)).json["choices"]
        assert first == again
        assert len({choice["text"] for choice in first}) == 6
        texts = [""] * 6
        for event in (await api.post("/v1/completions", {**body, "stream": True})).events[:-1]:
            texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
        assert texts == [choice["text"] for choice in first]
        without = {name: value for name, value in body.items() if name != "seed"}
        assert (await api.post("/v1/completions", without)).json["choices"] != first
        random = {**body, "seed": -1}
        assert (await api.post("/v1/completions", random)).json["choices"] != first
        await api.idle()


async def test_as_many_choices_as_openais_clients_may_ask_for() -> None:
    async with serving(max_rows=8) as api:
        body = {"prompt": "hello", "n": 128, "seed": 1, "max_tokens": 2, "stream": True}
        events = (await api.post("/v1/completions", body)).events[:-1]
        assert {event["choices"][0]["index"] for event in events} == set(range(128))
        assert len(events) == 256
        await api.idle()
