"""What a request says about its output, in TGI's words or OpenAI's, becomes a Grammar; what is too large does not."""

import json
from typing import Any

import msgspec
import pytest
from llguidance import regex_to_lark
from tgi_router import grammars, json_schemas
from tgi_router.errors import ValidationError
from tgi_router.grammars import GivenGrammar, Grammar

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}, "required": ["b"]}
AS_JSON = json.dumps(SCHEMA, separators=(",", ":"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"type": "json", "value": SCHEMA}, ("json_schema", AS_JSON)),
        ({"type": "json", "value": json.dumps(SCHEMA)}, ("json_schema", AS_JSON)),
        ({"type": "json_object", "value": SCHEMA}, ("json_schema", AS_JSON)),
        ({"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}, ("json_schema", AS_JSON)),
        ({"type": "json_schema", "value": {"schema": SCHEMA, "strict": True}}, ("json_schema", AS_JSON)),
        ({"type": "regex", "value": "[0-9]+"}, ("regex", "[0-9]+")),
        ({"type": "json", "value": {"type": "array"}}, ("json_schema", '{"type":"array"}')),
    ],
)
def test_tgis_grammars(given: dict[str, Any], expected: tuple[str, str]) -> None:
    grammar = grammars.from_tgi(msgspec.convert(given, GivenGrammar))
    assert (grammar.kind, grammar.text, grammar.param) == (*expected, "grammar")
    response_format = grammars.from_response_format(given)
    assert response_format == Grammar(*expected, "response_format")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"type": "json", "value": "{"}, "grammar is not valid: "),
        ({"type": "json", "value": "[" * 100_000}, "grammar is not valid: "),
        ({"type": "json", "value": {"foo": 1}}, "grammar is not valid: Grammar must have a 'properties' field"),
        ({"type": "json", "value": 3}, "grammar is not supported"),
        ({"type": "json", "value": "3"}, "grammar is not supported"),
        ({"type": "json_schema", "value": {"name": "x"}}, "grammar is not supported"),
        ({"type": "json_schema", "value": "x"}, "grammar is not supported"),
        ({"type": "regex", "value": {"a": 1}}, "grammar is not supported"),
        ({"type": "regex", "value": "a" * 262_145}, "`grammar` must have at most 262144 bytes. Given: 262145"),
        ({"type": "regex", "value": "((a{100}){100}){2}"}, "`grammar` has 20000 characters when its repetitions are"),
        ({"type": "json", "value": {"properties": {"a": {"pattern": "(a{999}){99}"}}}}, "`grammar` has a pattern of"),
        ({"type": "json", "value": {"patternProperties": {"(a{999}){99}": {}}}}, "`grammar` has a pattern of 98901"),
    ],
)
def test_what_cannot_be_a_grammar_is_refused_with_tgis_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        grammars.from_tgi(msgspec.convert(given, GivenGrammar))
    assert caught.value.message.startswith("Input validation error: " + sentence)
    assert caught.value.param == "grammar"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, '{"type":"object"}'),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}, AS_JSON),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": None}}, "{}"),
    ],
)
def test_openais_response_formats(given: dict[str, Any] | None, expected: str | None) -> None:
    grammar = grammars.from_response_format(given)
    assert grammar == (None if expected is None else Grammar("json_schema", expected, "response_format"))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"type": "yaml"},
        {"type": "yaml", "value": {}},
        {"type": 1},
        {"type": "json"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"schema": []}},
    ],
)
def test_a_wrong_response_format_is_refused_by_name(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="`response_format`") as caught:
        grammars.from_response_format(given)
    assert caught.value.param == "response_format"


def test_a_schema_may_be_nested_a_hundred_levels() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(99):
        schema = {"items": schema}
    assert grammars.from_json_schema(schema)
    with pytest.raises(ValidationError, match="`tools` is nested more than 100 levels deep"):
        grammars.from_json_schema({"items": schema}, "tools")


@pytest.mark.parametrize(
    ("regex", "size"),
    [
        ("", 0),
        ("abc", 3),
        ("a|bc", 3),
        ("(a|b)*c+", 3),
        ("a{20}", 20),
        ("(a{20}b){5}", 105),
        ("a{2}{3}", 6),
        ("a{,5}b{3,}c{2,4}", 12),
        (r"\{3}\\{3}\d{2}", 1 + 1 + 1 + 3 + 2),
        (r"\u{1234}{2}\x{41}\p{Lu}{3}\u{", 2 + 1 + 3 + 2),
        ("[a-z{5}]{3}", 3),
        ("[]x]{2}[^]x]{2}", 4),
        ("[[:alpha:]&&[^x]]{4}", 4),
        ("x{", 2),
        ("x{a}", 4),
        ("{5}", 0),
        (")(", 1),
        ("[a", 1),
        ("((((a{99}){99}){99}){99}){99}", 99**5),
    ],
)
def test_the_size_of_a_regular_expression_counts_repetitions(regex: str, size: int) -> None:
    assert json_schemas.regex_size(regex) == size


@pytest.mark.parametrize(
    "regex",
    ["a/b", r"a\/b", r"a\\/b", r"\d\D\w\W\s\S", r"[\d/]{2}", "a\nb", r"\n\\n", r"\u{41}\p{L}\x41", "", r"\\d", '"é😀'],
)
def test_a_regular_expression_in_lark_is_what_llguidance_makes_of_it(regex: str) -> None:
    assert json_schemas.lark_regex(regex) == f"/{regex_to_lark(regex, 'dws')}/"


def test_objects_are_closed_as_in_tgi() -> None:
    schema = {
        "properties": {"a": {"properties": {"x": {}}}, "b": {"items": {"type": "object", "properties": {}}}},
        "$defs": {"c": {"properties": {"y": {"type": "string"}}, "additionalProperties": {"type": "integer"}}},
        "enum": [{"properties": {}}],
    }
    assert json_schemas.closed(schema) == {
        "properties": {
            "a": {"properties": {"x": {}}, "type": "object", "additionalProperties": False},
            "b": {"items": {"type": "object", "properties": {}, "additionalProperties": False}},
        },
        "$defs": {
            "c": {
                "properties": {"y": {"type": "string"}},
                "additionalProperties": {"type": "integer"},
                "type": "object",
            }
        },
        "enum": [{"properties": {}}],
        "type": "object",
        "additionalProperties": False,
    }


@pytest.mark.parametrize("keyword", ["allOf", "anyOf", "oneOf"])
def test_an_object_put_together_from_parts_stays_open(keyword: str) -> None:
    schema = {"properties": {"a": {}}, keyword: [{"properties": {"b": {}}}]}
    assert json_schemas.closed(schema) == schema
