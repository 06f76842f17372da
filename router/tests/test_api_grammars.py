"""Grammars on the wire: TGI's sentences and error types, OpenAI's error objects, and what reaches the shards."""

from typing import Any

import pytest
from api_kit import serving
from fake_shard import FakeEngine
from tgi_proto import generate_pb2 as pb

SCHEMA = {"properties": {"a": {"type": "integer"}}, "required": ["a"]}
REFUSALS: list[tuple[Any, str]] = [
    ({"type": "json", "value": "{"}, "grammar is not valid: "),
    ({"type": "json", "value": {"foo": 1}}, "grammar is not valid: Grammar must have a 'properties' field"),
    ({"type": "json", "value": 3}, "grammar is not supported"),
    ({"type": "json_schema", "value": {"name": "x"}}, "grammar is not supported"),
    ({"type": "json", "value": {"properties": {"a": {"type": "nothing"}}}}, "grammar is not valid: Invalid type"),
    ({"type": "json", "value": {"properties": {"a": {"not": {}}}}}, "cannot compile regex from schema: "),
    ({"type": "regex", "value": "(a"}, "grammar is not valid: "),
]


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The grammars of every admission, in order."""
    grammars: list[str] = []
    admit = FakeEngine.admit

    def watched(engine: FakeEngine, admission: pb.Admission) -> None:
        grammars.append(admission.grammar)
        admit(engine, admission)

    monkeypatch.setattr(FakeEngine, "admit", watched)
    return grammars


async def test_a_grammar_is_refused_in_tgis_words_and_openais_shape(carried: list[str]) -> None:
    async with serving() as api:
        for grammar, sentence in REFUSALS:
            answer = await api.post("/generate", {"inputs": "hello", "parameters": {"grammar": grammar}})
            assert answer.status == 422
            assert answer.json["error_type"] == "validation"
            assert answer.json["error"].startswith("Input validation error: " + sentence)
            stream = await api.post("/generate_stream", {"inputs": "hello", "parameters": {"grammar": grammar}})
            assert stream.status == 200
            assert stream.events == [answer.json]
            for path, body in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": [_message()]})):
                answer = await api.post(f"/v1/{path}", {**body, "response_format": grammar})
                assert answer.status == 422
                assert answer.json["error"]["type"] == "invalid_request_error"
                assert answer.json["error"]["param"] == "response_format"
                assert answer.json["error"]["message"].startswith("Input validation error: " + sentence)
        await api.idle()
    assert carried == []


async def test_an_unknown_type_is_a_wrong_shape() -> None:
    async with serving() as api:
        body = {"inputs": "x", "parameters": {"grammar": {"type": "yaml", "value": 1}}}
        answer = await api.post("/generate", body)
    assert answer.status == 422
    assert answer.json["error"].startswith(
        "Failed to deserialize the JSON body into the target type: parameters.grammar"
    )


async def test_what_was_asked_for_reaches_the_shards(carried: list[str]) -> None:
    asked = {"type": "json", "value": SCHEMA}
    async with serving() as api:
        parameters = {"max_new_tokens": 2, "grammar": asked}
        assert (await api.post("/generate", {"inputs": "hello", "parameters": parameters})).status == 200
        for path, body in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": [_message()]})):
            answer = await api.post(f"/v1/{path}", {**body, "max_tokens": 2, "n": 2, "response_format": asked})
            assert answer.status == 200
        nothing = {"prompt": "x", "max_tokens": 2, "response_format": {"type": "text"}}
        assert (await api.post("/v1/completions", nothing)).status == 200
        assert (await api.post("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 2}})).status == 200
        await api.idle()
    assert len(carried) == 1 + 2 + 2 + 2
    assert len(set(carried[:5])) == 1
    assert '"integer"' in carried[0]
    assert carried[5:] == ["", ""]


async def test_without_support_every_grammar_is_refused() -> None:
    sentence = "grammar is not supported: the server was started with `--disable-grammar-support`"
    async with serving(disable_grammar_support=True) as api:
        grammar = {"type": "regex", "value": "a"}
        answer = await api.post("/generate", {"inputs": "hello", "parameters": {"grammar": grammar}})
        assert answer.status == 422
        assert answer.json == {"error": "Input validation error: " + sentence, "error_type": "validation"}
        chat = {"messages": [_message()], "response_format": {"type": "json_object"}}
        answer = await api.post("/v1/chat/completions", chat)
        assert answer.status == 422
        assert answer.json["error"]["message"] == "Input validation error: " + sentence
        await api.idle()


def _message() -> dict[str, str]:
    return {"role": "user", "content": "hi"}
