"""What the answer of a chat must spell: tool calls, a `response_format`, and before either the model's thoughts.

    thoughts    anything up to their closing mark; the answer's grammar applies after it
    answer      what `response_format` asks for, or free text in which tools may be called, or nothing but calls

As Lark source for llguidance. Pure. Called by chat_requests.py; compiled like every other grammar.
"""

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from .dialect import Dialect
from .errors import ValidationError
from .grammars import MAX_BYTES, Grammar, check_schema, from_lark
from .json_schemas import closed, lark_regex
from .reasoning import Marks
from .tools.base import Tool
from .tools.grammar import ANYTHING, CallableTool, TokenId, marker, rules, until
from .tools.offer import Offer


def answer_grammar(
    dialect: Dialect, tools: Offer | None, response: Grammar | None, *, in_thoughts: bool
) -> Grammar | None:
    """None when any answer will do. Raises ValidationError for schemas that are too large or too deep.

    response: of `response_format`. in_thoughts: the prompt has begun them; else they may follow, if the model has any.
    """
    if tools is None and (response is None or dialect.marks is None):
        return response
    lines = [f"response: {_embedded(response)}"] if response is not None else []
    if tools is None:
        lines.append("answer: response")
    else:
        instead = None if tools.forced else "TEXT" if response is None else "response"
        lines += rules(dialect.style, _checked(tools.tools), dialect.token_id, parallel=tools.parallel, instead=instead)
    start = _after_thoughts(dialect.marks, dialect.token_id, in_thoughts) if dialect.marks else ["start: answer"]
    return from_lark("\n".join([*start, *lines]), "response_format" if tools is None else "tools")


def _checked(tools: Sequence[Tool]) -> list[CallableTool]:
    """Raises ValidationError."""
    size = len(msgspec.json.encode([tool.parameters for tool in tools]))  # before anything that takes longer
    if size > MAX_BYTES:
        raise ValidationError(f"`tools` must have at most {MAX_BYTES} bytes of schemas. Given: {size}", param="tools")
    for tool in tools:
        check_schema(tool.parameters, "tools")
    return [
        CallableTool(tool.name, _schema({"type": "object", **tool.parameters}, lenient=not tool.strict))
        for tool in tools
    ]


def _schema(schema: dict[str, Any], *, lenient: bool = False) -> dict[str, Any]:
    """A client's schema as one that stands alone is compiled (grammar_trial.py): closed, with little white space.

    lenient: keywords that llguidance does not know are passed over.
    """
    options = {"whitespace_pattern": "[ ]?", "lenient": lenient}
    return {**closed(schema), "x-guidance": options}


def _embedded(grammar: Grammar) -> str:
    """A schema or regular expression within Lark."""
    if grammar.kind == "json_schema":
        return f"%json {json.dumps(_schema(json.loads(grammar.text)), ensure_ascii=False)}"
    return lark_regex(grammar.text)


def _after_thoughts(marks: Marks, token_id: TokenId, in_thoughts: bool) -> list[str]:
    """The rule `start`: thoughts, if there are any, and the rule `answer`."""
    gap = "GAP: /[ \\t\\r\\n]{0,8}/"
    thoughts = until("thoughts", "THOUGHTS", marks.closing, token_id)
    anything = f"THOUGHTS: {ANYTHING}"
    if in_thoughts:
        return ["start: thoughts GAP answer", gap, anything, *thoughts]
    opening = marker(marks.opening, token_id)
    return [f"start: answer | GAP {opening} thoughts GAP answer", gap, anything, *thoughts]
