"""Grammars over HTTP on the demo model: results fit them, however they are asked for, and hostile ones hurt nobody."""

import json
import random
import re
import signal
import unicodedata
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from harness import Json, Server, together, wait_until

PROMPT = "Answer in JSON: what is asyncio?\n"
SAMPLED: Json = {"do_sample": True, "temperature": 1.0, "max_new_tokens": 400}

SHORT = {"type": "string", "maxLength": 12}
SCHEMAS: dict[str, Json] = {
    "flat": {
        "type": "object",
        "properties": {
            "name": SHORT,
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "ok": {"type": "boolean"},
        },
        "required": ["name", "age", "ok"],
    },
    "nested": {
        "type": "object",
        "properties": {
            "a": {
                "type": "object",
                "properties": {"b": {"type": "object", "properties": {"c": SHORT}, "required": ["c"]}},
            },
            "n": {"type": "null"},
        },
        "required": ["a", "n"],
        "additionalProperties": False,
    },
    "enumerations": {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "grün", "青", 7, None, {"x": [1]}]}, "kind": {"const": 'fix"ed\\'}},
        "required": ["colour", "kind"],
    },
    "arrays": {
        "type": "object",
        "properties": {
            "numbers": {"type": "array", "items": {"type": "number", "multipleOf": 0.5}, "minItems": 2, "maxItems": 4},
            "pair": {"prefixItems": [SHORT, {"type": "boolean"}], "items": False, "minItems": 2, "type": "array"},
        },
        "required": ["numbers", "pair"],
    },
    "references": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"type": "integer", "maximum": 99},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["v", "next"],
            }
        },
        "type": "object",
        "properties": {"first": {"$ref": "#/$defs/node"}},
        "required": ["first"],
    },
    "patterns": {
        "type": "object",
        "properties": {
            "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
            "day": {"type": "string", "format": "date"},
            "at": {"type": "string", "format": "date-time"},
            "mail": {"type": "string", "pattern": "^[a-z]{1,8}@[a-z]{1,8}\\.(org|net)$"},
            "uuid": {"type": "string", "format": "uuid"},
        },
        "required": ["id", "day", "at", "mail", "uuid"],
    },
    "unicode": {
        "type": "object",
        "properties": {
            "größe": {"type": "integer", "maximum": 9},
            "名前": {"enum": ["花子", "太郎"]},
            "😀": {"type": "string", "pattern": "^[α-ω]{3}$"},
        },
        "required": ["größe", "名前", "😀"],
    },
    "unions": {
        "type": "object",
        "properties": {
            "shape": {
                "oneOf": [
                    {
                        "type": "object",
                        "properties": {"kind": {"const": "circle"}, "r": {"type": "integer"}},
                        "required": ["kind", "r"],
                    },
                    {
                        "type": "object",
                        "properties": {"kind": {"const": "line"}, "to": SHORT},
                        "required": ["kind", "to"],
                    },
                ]
            },
            "either": {"type": ["string", "integer"], "maxLength": 5},
        },
        "required": ["shape", "either"],
    },
    "all optional": {"type": "object", "properties": {"a": SHORT, "b": {"type": "integer"}, "c": {"type": "boolean"}}},
    "more properties": {
        "type": "object",
        "properties": {"a": {"const": 1}},
        "required": ["a"],
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 3,
    },
    "several parts": {
        "allOf": [
            {"type": "object", "properties": {"a": SHORT}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]},
        ],
        "additionalProperties": False,
        "properties": {"a": {}, "b": {}},
    },
    "top-level array": {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 1, "maxItems": 5},
}
REGEXES = [
    "[0-9]{3}-[0-9]{4}",
    "(yes|no|perhaps)[.!?]",
    r"\d{1,3}(\.\d{1,3}){3}",
    "[A-Z][a-z]{2,8}( [A-Z][a-z]{2,8}){1,2}",
    "^anchored$",
    "[^a-z]{5}",
    "(日本|中国|한국){2,3}[😀-😃]",
    "(a{0,3}b{1,4}c?){2}",
    r"/[^/\n]{1,9}/\"quoted\"\\",
]
"""Regular expressions of the dialect that Python and the server share."""


def finished(choice: Json) -> bool:
    return bool(choice["finish_reason"] in ("stop", "eos_token"))


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_is_valid_against_its_schema(server: Server, name: str) -> None:
    schema = SCHEMAS[name]
    asked = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    chat = {"messages": [{"role": "user", "content": PROMPT}], "response_format": asked, "max_tokens": 400}

    def answers(seed: int) -> list[Json]:
        generated = server.generate(
            PROMPT, **SAMPLED, seed=seed, details=True, grammar={"type": "json", "value": schema}
        )
        reason = generated["details"]["finish_reason"]
        response = server.post("/v1/chat/completions", {**chat, "seed": seed})
        assert response.status == 200, response.text
        (choice,) = response.json["choices"]
        return [
            {"finish_reason": reason, "text": generated["generated_text"]},
            {"finish_reason": choice["finish_reason"], "text": choice["message"]["content"]},
        ]

    found = [answer for both in together(answers, range(4)) for answer in both]
    complete = [answer for answer in found if finished(answer)]
    assert complete  # a lively sample of a schema without end may be cut off
    for answer in complete:
        validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
        validator.validate(json.loads(answer["text"]))


@pytest.mark.parametrize("regex", REGEXES)
def test_text_matches_its_regular_expression(server: Server, regex: str) -> None:
    grammar = {"type": "regex", "value": regex}

    def text(parameters: Json) -> str:
        answer = server.generate(PROMPT, max_new_tokens=60, grammar=grammar, details=True, **parameters)
        assert answer["details"]["finish_reason"] == "eos_token", answer
        return str(answer["generated_text"])

    sampled = [{"do_sample": True, "temperature": 1.2, "seed": seed} for seed in range(4)]
    for found in together(text, [{}, {"top_k": 5, "top_p": 0.9, "seed": 1}, *sampled]):
        assert re.fullmatch(regex, found), found


def test_streamed_equals_not_streamed_on_every_route(server: Server) -> None:
    schema = SCHEMAS["flat"]
    grammar = {"type": "json", "value": schema}
    whole = server.generate(PROMPT, **SAMPLED, seed=5, details=True, top_n_tokens=2, grammar=grammar)
    events = server.generate_stream(PROMPT, **SAMPLED, seed=5, details=True, top_n_tokens=2, grammar=grammar)
    assert [event["token"] for event in events] == whole["details"]["tokens"]
    assert events[-1]["generated_text"] == whole["generated_text"]
    asked: Json = {
        "response_format": {"type": "json_schema", "value": {"schema": schema}},
        "max_tokens": 300,
        "seed": 5,
    }
    chat = {**asked, "messages": [{"role": "user", "content": "hi"}]}
    with server.stream("/v1/chat/completions", {**chat, "stream": True}) as stream:
        streamed = "".join(event["choices"][0]["delta"].get("content") or "" for event in stream.events())
    assert streamed == server.post("/v1/chat/completions", chat).json["choices"][0]["message"]["content"]
    completion = {**asked, "prompt": PROMPT}
    with server.stream("/v1/completions", {**completion, "stream": True}) as stream:
        streamed = "".join(event["choices"][0]["text"] for event in stream.events())
    assert streamed == server.post("/v1/completions", completion).json["choices"][0]["text"]
    json.loads(streamed)


def test_every_way_to_ask_for_json_gives_the_same(server: Server) -> None:
    schema = SCHEMAS["flat"]
    ways: list[Json] = [
        {"type": "json", "value": schema},
        {"type": "json", "value": json.dumps(schema)},
        {"type": "json_object", "value": schema},
        {"type": "json_schema", "value": {"name": "x", "schema": schema}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    ]
    chat = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 200}
    answers = together(lambda way: server.post("/v1/chat/completions", {**chat, "response_format": way}), ways)
    assert {answer.status for answer in answers} == {200}
    assert len({answer.json["choices"][0]["message"]["content"] for answer in answers}) == 1


def test_text_needs_no_grammar_and_json_object_any_object(server: Server) -> None:
    completion: Json = {"prompt": PROMPT, "temperature": 0, "max_tokens": 20}
    plain = server.post("/v1/completions", completion).json["choices"][0]["text"]
    for nothing in ({"type": "text"}, None):
        answer = server.post("/v1/completions", {**completion, "response_format": nothing})
        assert answer.json["choices"][0]["text"] == plain
    asked = {**completion, "max_tokens": 400, "response_format": {"type": "json_object"}, "n": 2, "temperature": 1}
    for seed in range(3):
        for choice in server.post("/v1/completions", {**asked, "seed": seed}).json["choices"]:
            assert not finished(choice) or isinstance(json.loads(choice["text"]), dict)


def spelled(server: Server, text: str) -> str:
    """What a grammar of exactly `text` generates, streamed."""
    regex = "".join(f"\\u{{{ord(character):x}}}" for character in text)
    size = len(text.encode())
    events = server.generate_stream(PROMPT, max_new_tokens=size + 1, grammar={"type": "regex", "value": regex})
    assert "token" in events[-1], events[-1]
    pieces = "".join(event["token"]["text"] for event in events if not event["token"]["special"])
    assert pieces == events[-1]["generated_text"]
    return pieces


def sweep(server: Server, characters: list[str]) -> None:
    """Every character comes out as it is, and what is streamed adds up."""
    chunks = ["".join(characters[start : start + 100]) for start in range(0, len(characters), 100)]
    for start in range(0, len(chunks), 48):
        some = chunks[start : start + 48]
        assert together(lambda chunk: spelled(server, chunk), some) == some


def every_character() -> list[str]:
    """Every Unicode scalar value."""
    return [chr(number) for number in range(0x110000) if not 0xD800 <= number < 0xE000]


def test_characters_come_out_as_they_are(server: Server) -> None:
    chance = random.Random(7)
    assigned = [character for character in every_character() if unicodedata.category(character) not in ("Cn", "Co")]
    latin, rest = every_character()[:0x180], chance.sample(assigned, 1200)
    borders = [chr(number) for number in (0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFD, 0xFFFF, 0x10000, 0x10FFFF)]
    sweep(server, latin + borders + rest)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_character_of_unicode_comes_out_as_it_is(server: Server) -> None:
    sweep(server, every_character())


def test_a_grammar_changes_nothing_for_its_neighbours(server: Server) -> None:
    plain: list[Json] = [{"max_new_tokens": 40}, {"max_new_tokens": 40, "do_sample": True, "seed": 3}]
    bound = [{**parameters, "grammar": {"type": "regex", "value": "[a-z ]{30}[.]"}} for parameters in plain]

    def text(parameters: Json) -> str:
        return str(server.generate(PROMPT, **parameters)["generated_text"])

    alone = [text(parameters) for parameters in plain + bound]
    assert together(text, plain + bound) == alone


def test_preemption_and_a_crash_do_not_show(launch: Callable[..., Server]) -> None:
    server = launch("--max-batch-total-tokens", "512", "--max-total-tokens", "400")
    grammar = {"type": "regex", "value": "([a-z]{3} ){60}end"}

    def text(seed: int) -> str:
        answer = server.generate(PROMPT, max_new_tokens=300, do_sample=True, seed=seed, grammar=grammar)
        return str(answer["generated_text"])

    alone = [text(seed) for seed in range(6)]
    assert all(re.fullmatch(grammar["value"], found) for found in alone)
    assert together(text, range(6)) == alone
    assert server.metric("tgi_request_preemptions") > 0
    with server.stream(
        "/generate_stream",
        {"inputs": PROMPT, "parameters": {"max_new_tokens": 300, "do_sample": True, "seed": 0, "grammar": grammar}},
    ) as stream:
        events = stream.events()
        next(events)
        server.shards()[0].signal(signal.SIGKILL)
        *_, last = events
    assert last["generated_text"] == alone[0]
    server.stop()


HOSTILE: list[Json] = [
    {"type": "regex", "value": "(((a{100}){100}){100}){100}"},
    {"type": "regex", "value": "a{1000000}"},
    {"type": "regex", "value": "(a|"},
    {"type": "regex", "value": "(?<=x)y"},
    {"type": "json", "value": {"type": "integer", "multipleOf": 1_000_003}},
    {"type": "json", "value": {"properties": {f"p{i}": {"type": "string"} for i in range(5000)}}},
    {"type": "json", "value": {"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(20)]}},
    {"type": "json", "value": {"$ref": "#"}},
    {"type": "json", "value": {"$ref": "http://127.0.0.1:1/schema"}},
    {"type": "json", "value": "[" * 5000},
    {"type": "json", "value": '{"items":' * 500 + "{}" + "}" * 500},
    {"type": "json", "value": {"enum": ["x" * 300_000]}},
]


def test_hostile_grammars_are_refused_and_others_go_on(server: Server) -> None:
    def ask(index: int) -> Json:
        if index >= 48:  # honest ones among them
            return {
                "text": server.generate(PROMPT, max_new_tokens=60, grammar={"type": "regex", "value": f"x{{{index}}}"})
            }
        hostile = dict(HOSTILE[index % len(HOSTILE)])
        response = server.post("/generate", {"inputs": PROMPT, "parameters": {"grammar": hostile}})
        return {"status": response.status, **response.json}

    before = server.generate(PROMPT, max_new_tokens=40)
    answers = together(ask, range(51))
    for answer in answers[:48]:
        assert answer["status"] == 422, answer
        assert answer["error_type"] == "validation"
        assert answer["error"].startswith("Input validation error: ")
        assert len(answer["error"]) < 500
    assert [answer["text"]["generated_text"] for answer in answers[48:]] == ["x" * size for size in (48, 49, 50)]
    assert server.generate(PROMPT, max_new_tokens=40) == before
    wait_until(lambda: server.metric("tgi_batch_current_size") == 0, within_s=60, what="nothing runs")


def test_refusals_have_the_shape_of_their_route(server: Server) -> None:
    bad: Any = {"type": "regex", "value": "(a"}
    events = server.generate_stream(PROMPT, grammar=bad)
    assert [event["error_type"] for event in events] == ["validation"]
    chat = {"messages": [{"role": "user", "content": "hi"}], "response_format": bad}
    answer = server.post("/v1/chat/completions", chat)
    assert answer.status == 422
    assert answer.json["error"]["param"] == "response_format"
    assert answer.json["error"]["type"] == "invalid_request_error"


def test_grammars_can_be_switched_off(launch: Callable[..., Server]) -> None:
    server = launch("--disable-grammar-support")
    start = "Input validation error: grammar is not supported"
    grammar = {"type": "regex", "value": "a"}
    answer = server.post("/generate", {"inputs": PROMPT, "parameters": {"grammar": grammar}})
    assert (answer.status, answer.json["error_type"]) == (422, "validation")
    assert answer.json["error"].startswith(start)
    chat = {"messages": [{"role": "user", "content": "hi"}], "response_format": {"type": "json_object"}}
    answer = server.post("/v1/chat/completions", chat)
    assert answer.status == 422
    assert answer.json["error"]["message"].startswith(start)
    server.stop()
