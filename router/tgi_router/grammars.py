"""What an output must spell: a `Grammar`, made from what a request says in TGI's words or in OpenAI's, or by our code.

Pure: it only understands requests. Whether a grammar can be compiled, and what travels to the shards, is found by
grammar_compiler.py. Called by validation.py (`parameters.grammar`), by the OpenAI routes (`response_format`) and by
whatever else constrains an output (tools).
"""

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from .errors import ValidationError
from .json_schemas import MAX_REGEX_SIZE, problem, regex_size

MAX_BYTES = 256 << 10  # of a schema or regular expression

# A schema with none of these says nothing about the output; TGI insisted on the first.
_TELLING = frozenset(
    "properties type enum const $ref anyOf oneOf allOf items prefixItems required patternProperties".split()
    + "additionalProperties minProperties maxProperties minItems maxItems pattern format minLength maxLength".split()
    + "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split()
)


class GivenGrammar(msgspec.Struct, kw_only=True):
    """TGI's `grammar`, which is also its `response_format`."""

    type: Literal["json", "json_object", "regex", "json_schema"]
    value: Annotated[
        Any,
        Meta(
            description="`json`: a JSON schema, as an object or JSON text. `json_schema`: an object with a `schema`. "
            "`regex`: a regular expression, which the whole output matches."
        ),
    ]


@dataclass(frozen=True, slots=True)
class Grammar:
    """kind, text: a JSON schema as JSON, a regular expression, or a grammar in llguidance's Lark.

    param: the request's field it comes from, for errors. Equal grammars are compiled once.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    param: str = "grammar"


def from_json_schema(schema: dict[str, Any], param: str = "grammar") -> Grammar:
    """JSON that is valid against `schema`. Raises ValidationError when the schema is too large or too deep."""
    check_schema(schema, param)
    return _sized(Grammar("json_schema", json.dumps(schema, ensure_ascii=False, separators=(",", ":")), param))


def from_regex(regex: str, param: str = "grammar") -> Grammar:
    """Text that matches `regex` as a whole. Raises ValidationError when it is too large."""
    grammar = _sized(Grammar("regex", regex, param))
    size = regex_size(regex)
    if size > MAX_REGEX_SIZE:
        raise ValidationError(
            f"`{param}` has {size} characters when its repetitions are written out; at most {MAX_REGEX_SIZE} may be",
            param=param,
        )
    return grammar


def from_lark(lark: str, param: str = "grammar") -> Grammar:
    """Text that llguidance's Lark describes; schemas in `%json {...}` must have passed `check_schema`.

    Raises ValidationError when it is too large.
    """
    return _sized(Grammar("lark", lark, param))


def check_schema(schema: dict[str, Any], param: str = "grammar") -> None:
    """Raises ValidationError when a client's schema is too costly to look at."""
    found = problem(schema)
    if found is not None:
        raise ValidationError(f"`{param}` {found}", param=param)


def from_tgi(given: GivenGrammar, param: str = "grammar") -> Grammar:
    """TGI's types `json` (or `json_object`), `json_schema` and `regex`. Raises ValidationError."""
    value = given.value
    if given.type == "regex":
        if not isinstance(value, str):
            raise ValidationError("grammar is not supported: a `regex` must be a string", param=param)
        return from_regex(value, param)
    if given.type == "json_schema":
        value = value.get("schema") if isinstance(value, dict) else None
        if not isinstance(value, dict):
            raise ValidationError(
                "grammar is not supported: a `json_schema` must be an object with an object `schema`", param=param
            )
        return from_json_schema(_telling(value, param), param)
    return from_json_schema(_telling(_object(value, param), param), param)


def from_response_format(given: dict[str, Any] | None) -> Grammar | None:
    """OpenAI's `response_format`, and TGI's with a `value`. None when any text will do. Raises ValidationError."""
    param = "response_format"
    kind = "text" if given is None else given.get("type")
    if given is None or kind == "text":
        return None
    if given.get("value") is not None:
        try:
            return from_tgi(msgspec.convert(given, GivenGrammar), param)
        except msgspec.ValidationError as error:
            raise ValidationError(f"`response_format` is wrong: {error}", param=param) from None
    if kind == "json_object":
        return from_json_schema({"type": "object"}, param)
    if kind == "json_schema":
        wrapper = given.get("json_schema")
        schema = wrapper.get("schema") if isinstance(wrapper, dict) else None
        if not isinstance(schema, dict):
            raise ValidationError(
                '`response_format` of type "json_schema" needs an object `json_schema` with an object `schema`',
                param=param,
            )
        return from_json_schema(schema, param)
    raise ValidationError(
        '`response_format` must have the type "text", "json_object" or "json_schema", or TGI\'s "json", "regex" or '
        f'"json_schema" with a `value`. Given: {json.dumps(kind)}',
        param=param,
    )


def _object(value: Any, param: str) -> dict[str, Any]:
    """The schema itself, or in a string."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValidationError(f"grammar is not valid: {error}", param=param) from None
    if not isinstance(value, dict):
        raise ValidationError("grammar is not supported: a `json` grammar must be an object", param=param)
    return value


def _telling(schema: dict[str, Any], param: str) -> dict[str, Any]:
    if _TELLING.isdisjoint(schema):
        raise ValidationError("grammar is not valid: Grammar must have a 'properties' field", param=param)
    return schema


def _sized(grammar: Grammar) -> Grammar:
    size = len(grammar.text.encode(errors="surrogatepass"))
    if size > MAX_BYTES:
        raise ValidationError(
            f"`{grammar.param}` must have at most {MAX_BYTES} bytes. Given: {size}", param=grammar.param
        )
    return grammar
