"""What tool calling is made of: the tools a request offers, the events a parser reports, and a format of calls.

A `ToolFormat` is how one kind of model writes its calls: a parser that finds them in the generated text, and the
grammar that forces them. Formats are registered in __init__.py; offer.py reads tools out of requests.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


class Text(NamedTuple):
    """A piece of the message's content."""

    text: str


class CallBegin(NamedTuple):
    """A call of the tool `name`; its arguments follow."""

    name: str


class CallArguments(NamedTuple):
    """A piece of the arguments of the call that began last, as the model wrote them: JSON text."""

    text: str


class CallEnd(NamedTuple):
    """The arguments of the call that began last are complete."""


Event = Text | CallBegin | CallArguments | CallEnd


class ToolParser(Protocol):
    """Reads one choice's text. A pure state machine: how the text is cut into pieces changes no result.

    What is no call of an offered tool is text, to the letter; only white space around calls may get lost.
    """

    def feed(self, text: str) -> list[Event]:
        """What the next piece of text says."""

    def end(self) -> list[Event]:
        """What was held back when the text ends."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call. parameters: JSON schema of its arguments.

    strict: what cannot be enforced of the schema is an error; else it is left to the model, as OpenAI does.
    """

    name: str
    parameters: dict[str, Any]
    strict: bool = False


class Places(NamedTuple):
    """Lark source of what stands around calls in a grammar (grammar.py): opening first call (between call)* last.

    call: one call, where {name} stands for the tool's name and {arguments} for the rule of its arguments.
    """

    first: str
    call: str
    between: str
    last: str


def json_arguments(rule: str, schema: dict[str, Any]) -> list[str]:
    """Arguments as JSON text."""
    return [f"{rule}: %json {json.dumps(schema, ensure_ascii=False)}"]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a kind of model writes calls.

    fits: whether a model with this chat template and these added tokens writes so; asked in order of registration.
    parser: for the offered tools.
    places: the grammar's parts; its argument gives a marker's Lark source.
    arguments: the grammar's rules for arguments that fit a schema, the first with the given name.
    opening: text that begins calls; "" = none.
    starts: regular expression of what a message begins with that is a call without an opening; "" = there is none.
    markers: further texts whose special tokens the parser must see.
    id_length: the template demands ids of exactly so many letters and digits.
    """

    fits: Callable[[str, Sequence[str]], bool]
    parser: Callable[[Sequence[Tool]], ToolParser]
    places: Callable[[Callable[[str], str]], Places]
    arguments: Callable[[str, dict[str, Any]], list[str]] = json_arguments
    opening: str = ""
    starts: str = ""
    markers: tuple[str, ...] = ()
    id_length: int | None = None


def merged(events: Sequence[Event]) -> list[Event]:
    """`events` with neighbouring pieces of the same text joined."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, Text) and isinstance(last, Text):
            result[-1] = Text(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments):
            result[-1] = CallArguments(last.text + event.text)
        else:
            result.append(event)
    return result
