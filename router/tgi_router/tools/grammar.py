"""The grammar of messages that call tools, as Lark source for llguidance: arguments always fit their schemas.

Forced, a message is nothing but calls in the model's own format. Otherwise it is free text until a call begins; from
there on only a valid call can follow. A marker that is one token of the vocabulary is that token, `<[id]>`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .base import Tool, ToolFormat

_ANYTHING = "/(?s:.*)/"


def lark(
    style: ToolFormat, tools: Sequence[Tool], token_id: Callable[[str], int | None], *, forced: bool, parallel: bool
) -> str:
    """The source; its rule is `start`. token_id: of the token with a text, if there is one.

    parallel: several calls may follow each other.
    """

    def marker(text: str) -> str:
        number = token_id(text)
        return json.dumps(text) if number is None else f"<[{number}]>"

    places = style.places(marker)
    more = f" ({places.between} call)*" if parallel else ""
    lines = [f"calls: {places.first} call{more} {places.last}"]
    lines.append("call: " + " | ".join(f"call_{number}" for number in range(len(tools))))
    for number, tool in enumerate(tools):
        source = places.call.replace("{name}", tool.name).replace("{arguments}", f"arguments_{number}")
        lines.append(f"call_{number}: {source}")
        lines.append(f"arguments_{number}: %json {json.dumps(closed(tool.parameters), ensure_ascii=False)}")
    if forced:
        opening = "" if style.starts else marker(style.opening)
        return "\n".join([f"start: {opening} calls", *lines])
    return "\n".join([*_free(style, token_id), *lines])


def _free(style: ToolFormat, token_id: Callable[[str], int | None]) -> list[str]:
    """The rules of free text that may end in calls."""
    ways = ["TEXT"]
    rules = [f"TEXT: {_ANYTHING}"]
    if style.starts:
        ways.append("calls")
        rules[0] += rf" & ~/(?s:[ \n]*{style.starts}.*)/"
    if style.opening:
        number = token_id(style.opening)
        if number is not None:
            ways.append(f"TEXT <[{number}]> calls")
        ways.append("opened calls")  # the opening spelled out in other tokens
        rules.append(f"opened[lazy]: TEXT {json.dumps(style.opening)}")
    return ["start: " + " | ".join(ways), *rules]


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """`schema` of an object; where it only lists properties, there are no others, as in TGI."""
    closes = "additionalProperties" not in schema and not schema.keys() & {"$ref", "allOf", "anyOf", "oneOf"}
    return {"type": "object", **schema, **({"additionalProperties": False} if closes else {})}
