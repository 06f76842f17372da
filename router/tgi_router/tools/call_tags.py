"""One call as tags, `<function=NAME><parameter=KEY>VALUE</parameter>...</function>`, read character by character.

Values are plain text; what the tool's schema says decides what they are in JSON. With a known name it is a call, and
each parameter is passed on when it is complete. Used by shaped_calls.py.
"""

import json
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

from .base import CallArguments, CallBegin, CallEnd, Event, Tool
from .reading import Reading

_FUNCTION, _END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_SPACE = " \t\r\n"


class _At(Enum):
    """What the next character belongs to."""

    FUNCTION = auto()
    NAME = auto()
    TAG = auto()  # of a parameter, or the end of the function
    KEY = auto()
    VALUE = auto()


class CallTags:
    """See CallReader."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        """tools: the offered ones."""
        self.is_call = False
        self._tools = {tool.name: tool for tool in tools}
        self._events: list[Event] = []
        self._at = _At.FUNCTION
        self._raw = ""  # of what is being read
        self._schema: dict[str, Any] = {}
        self._key = ""
        self._num_parameters = 0

    def take_events(self) -> list[Event]:
        """See CallReader."""
        events, self._events = self._events, []
        return events

    def skip(self, text: str, start: int) -> int:
        """See CallReader."""
        if self._at is not _At.VALUE:
            return start
        place = text.find(">", start)  # with which a value's end ends
        place = len(text) if place < 0 else place
        self._raw += text[start:place]
        return place

    def add(self, c: str) -> Reading:
        """See CallReader."""
        self._raw += c
        if self._at is _At.VALUE:
            return self._in_value()
        if self._at in (_At.NAME, _At.KEY):
            return Reading.MORE if c != ">" else self._named(self._raw[:-1])
        return self._in_tag()

    def _in_tag(self) -> Reading:
        raw = self._raw = self._raw.lstrip(_SPACE)
        if self._at is _At.FUNCTION:
            if raw == _FUNCTION:
                self._go(_At.NAME)
            return Reading.MORE if _FUNCTION.startswith(raw) else Reading.BROKEN
        if raw == _END:
            return self._ends(Reading.DONE)
        if raw == _PARAMETER:
            self._go(_At.KEY)
        fits = _PARAMETER.startswith(raw) or _END.startswith(raw)
        return Reading.MORE if fits else self._ends(Reading.BROKEN)

    def _named(self, name: str) -> Reading:
        if self._at is _At.KEY:
            self._key = name
            self._go(_At.VALUE)
            return Reading.MORE
        tool = self._tools.get(name)
        if tool is None:
            return Reading.BROKEN
        self._schema = tool.parameters
        self.is_call = True
        self._events += [CallBegin(name), CallArguments("{")]
        self._go(_At.TAG)
        return Reading.MORE

    def _in_value(self) -> Reading:
        if self._raw.endswith(_PARAMETER_END):
            text = self._raw[: -len(_PARAMETER_END)].removeprefix("\n").removesuffix("\n")
            comma = ", " if self._num_parameters else ""
            value = json.dumps(converted(text, self._schema, self._key), ensure_ascii=False)
            self._events.append(CallArguments(f"{comma}{json.dumps(self._key, ensure_ascii=False)}: {value}"))
            self._num_parameters += 1
            self._go(_At.TAG)
        return Reading.MORE

    def _ends(self, reading: Reading) -> Reading:
        self._events += [CallArguments("}"), CallEnd()]
        return reading

    def _go(self, at: _At) -> None:
        self._at, self._raw = at, ""


def converted(text: str, schema: dict[str, Any], key: str) -> Any:
    """The value that `text` stands for: JSON, unless the schema of the parameter has it as text."""
    properties = schema.get("properties")
    wanted = properties.get(key) if isinstance(properties, dict) else None
    if is_text(resolved(wanted, schema)):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def resolved(wanted: Any, schema: dict[str, Any]) -> Any:
    """The definition that a parameter's schema refers to, when it does no more than that."""
    reference = wanted.get("$ref") if isinstance(wanted, dict) else None
    parts = reference.split("/") if isinstance(reference, str) else []
    definitions = schema.get(parts[1]) if len(parts) == 3 and parts[0] == "#" else None
    return definitions.get(parts[2], wanted) if isinstance(definitions, dict) else wanted


def is_text(wanted: Any) -> bool:
    """Whether a parameter with this schema is written as plain text."""
    if not isinstance(wanted, dict):
        return True
    if isinstance(kind := wanted.get("type"), str):
        return kind == "string"
    values = wanted.get("enum")
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
