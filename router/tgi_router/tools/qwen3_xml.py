"""Qwen3-Coder and its kin: tags instead of JSON, `<tool_call><function=NAME><parameter=KEY>VALUE</parameter>...`.

In a grammar, parameters come in the schema's order. Those that are text may be any text (a schema's `pattern` and
lengths are not enforced), or one of an `enum`; all others are JSON that fits its part of the schema.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from .base import Places, ToolFormat
from .call_tags import CallTags, is_text, resolved
from .shaped_calls import Shape, ShapedCalls

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"
_END = r'"\n</parameter>\n"'


def _fits(template: str, tokens: Sequence[str]) -> bool:
    return "<function=" in template and "<parameter=" in template


def _places(marker: Callable[[str], str]) -> Places:
    opening, closing = marker(_OPENING), marker(_CLOSING)
    return Places(
        first=r'"\n"',
        call=r'"<function={name}>\n" {arguments} "</function>"',
        between=rf'"\n" {closing} "\n" {opening} "\n"',
        last=rf'"\n" {closing}',
    )


def _arguments(rule: str, schema: dict[str, Any]) -> list[str]:
    """Lark of a parameter after the other; of any parameters, where the schema does not list them."""
    text = f"{rule}_text"
    ending = f"{text}[lazy]: /(?s:.*)/ {_END}"
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return [rf'{rule}: ("<parameter=" /[^>\n]+/ ">\n" {text})*', ending]
    required = schema.get("required")
    parts, rules = [], [ending]
    for number, (key, wanted) in enumerate(properties.items()):
        part = f"{rule}_{number}"
        optional = not isinstance(required, list) or key not in required
        parts.append(f"{part}?" if optional else part)
        rules.append(f'{part}: {json.dumps(f"<parameter={key}>")} "\\n" {_value(wanted, schema, text)}')
    return [f"{rule}: {' '.join(parts)}" if parts else f'{rule}: ""', *rules]


def _value(wanted: Any, schema: dict[str, Any], text: str) -> str:
    wanted = resolved(wanted, schema)
    values = wanted.get("enum") if isinstance(wanted, dict) else None
    if is_text(wanted):
        if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
            return f"({' | '.join(map(json.dumps, values))}) {_END}"
        return text
    shared = {name: schema[name] for name in ("$defs", "definitions", "x-guidance") if name in schema}
    return f"%json {json.dumps({**wanted, **shared}, ensure_ascii=False)} {_END}"


FORMAT = ToolFormat(
    fits=_fits,
    parser=lambda tools: ShapedCalls(Shape(openings=(_OPENING,), closing=_CLOSING, head="<", reader=CallTags), tools),
    places=_places,
    arguments=_arguments,
    opening=_OPENING,
    markers=(_CLOSING,),
)
