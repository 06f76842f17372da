"""The grammar of messages that call tools, as Lark source for llguidance: arguments always fit their schemas.

Forced, a message is nothing but calls in the model's own format. Otherwise it is free text until a call begins; from
there on only a valid call can follow. A marker that is one token of the vocabulary is that token, `<[id]>`; in free
text it may be spelled out in other tokens, too. Called by chat_grammar.py.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .base import ToolFormat

ANYTHING = "/(?s:.*)/"

TokenId = Callable[[str], int | None]  # of the vocabulary's token with a text, if there is one


@dataclass(frozen=True, slots=True)
class CallableTool:
    """A tool in a grammar. schema: of its arguments, with llguidance's options."""

    name: str
    schema: dict[str, Any]


def rules(
    style: ToolFormat, tools: Sequence[CallableTool], token_id: TokenId, *, parallel: bool, instead: str | None
) -> list[str]:
    """Rules whose first one is `answer`. parallel: several calls may follow each other.

    instead: a rule for answers that call nothing, TEXT for any text; None = a call is forced.
    """
    places = style.places(lambda text: marker(text, token_id))
    more = f" ({places.between} call)*" if parallel else ""
    lines = [f"calls: {places.first} call{more} {places.last}"]
    lines.append("call: " + " | ".join(f"call_{number}" for number in range(len(tools))))
    for number, tool in enumerate(tools):
        source = places.call.replace("{name}", tool.name).replace("{arguments}", f"arguments_{number}")
        lines += [f"call_{number}: {source}", f"// `parameters` of the tool {tool.name}"]
        lines += style.arguments(f"arguments_{number}", tool.schema)
    opened = "calls" if style.starts else f"{marker(style.opening, token_id)} calls"
    if instead == "TEXT":
        return [*_in_text(style, token_id), *lines]
    return ["answer: " + " | ".join(way for way in (instead, opened) if way), *lines]


def _in_text(style: ToolFormat, token_id: TokenId) -> list[str]:
    """The rules of free text that may end in calls."""
    ways, text = ["TEXT"], f"TEXT: {ANYTHING}"
    if style.starts:
        ways.append("calls")
        text += rf" & ~/(?s:[ \n]*{style.starts}.*)/"
    if not style.opening:
        return ["answer: " + " | ".join(ways), text]
    ways.append("opened calls")
    return ["answer: " + " | ".join(ways), text, *until("opened", "TEXT", style.opening, token_id)]


def until(name: str, before: str, text: str, token_id: TokenId) -> list[str]:
    """The rule `name`: the terminal `before`, which ends at the first marker `text`, and the marker."""
    spelled = f"{name}_spelled[lazy]: {before} {json.dumps(text)}"
    number = token_id(text)
    token = f"{before} <[{number}]> | " if number is not None else ""
    return [f"{name}: {token}{name}_spelled", spelled]


def marker(text: str, token_id: TokenId) -> str:
    """A marker as Lark source."""
    number = token_id(text)
    return json.dumps(text) if number is None else f"<[{number}]>"
