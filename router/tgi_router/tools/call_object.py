"""One call as a JSON object, `{"name": ..., "arguments": {...}}`, read character by character.

As soon as the name is known to be one of an offered tool and the arguments have begun, it is a call and its arguments
are passed on as they come; before that, whatever does not fit makes it text again. Used by shaped_calls.py.
"""

import json
import re
from collections.abc import Sequence
from enum import Enum, auto

from .base import CallArguments, CallBegin, CallEnd, Event, Tool
from .reading import Reading

_SPACE = " \t\r\n"
_NAME_KEYS = ("name", "function")
_ARGUMENT_KEYS = ("arguments", "parameters")
# An object whose first key is another one is an answer in JSON, not a call.
_FIRST_KEYS = (*_NAME_KEYS, *_ARGUMENT_KEYS, "type", "id")


_IN_STRING = re.compile(r'["\\]')
_OUTSIDE = re.compile(r'["{}\[\]]')


class JsonValue:
    """Finds the end of a JSON string, object or array. Brackets are counted, not matched: it never fails."""

    __slots__ = ("_depth", "_escaped", "_in_string")

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def skip(self, text: str, start: int) -> int:
        """Takes `text` from `start` on, up to the returned place, where something may change."""
        if self._escaped:
            return start
        match = (_IN_STRING if self._in_string else _OUTSIDE).search(text, start)
        return len(text) if match is None else match.start()

    def add(self, c: str) -> bool:
        """Takes a character; whether the value ends with it."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif c == "\\":
                self._escaped = True
            elif c == '"':
                self._in_string = False
                return self._depth == 0
        elif c == '"':
            self._in_string = True
        elif c in "{[":
            self._depth += 1
        elif c in "}]":
            self._depth -= 1
            return self._depth <= 0
        return False


class _At(Enum):
    """What the next character belongs to."""

    START = auto()
    KEY_OR_END = auto()
    KEY = auto()
    COLON = auto()
    BEFORE_VALUE = auto()
    VALUE = auto()
    SCALAR = auto()
    AFTER_VALUE = auto()


class CallObject:
    """See CallReader."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        """tools: the offered ones."""
        self.is_call = False
        self._events: list[Event] = []
        self._names = frozenset(tool.name for tool in tools)
        self._name: str | None = None
        self._arguments: str | None = None  # once complete
        self._streams = False  # the value being read is the arguments, passed on as it comes
        self._num_keys = 0
        self._key = ""
        self._raw = ""  # of the key or value being read
        self._value = JsonValue()
        self._at = _At.START

    def take_events(self) -> list[Event]:
        """See CallReader."""
        events, self._events = self._events, []
        return events

    def _report(self, *events: Event) -> None:
        self.is_call = True
        self._events += events

    def skip(self, text: str, start: int) -> int:
        """See CallReader."""
        if self._at is not _At.VALUE and self._at is not _At.KEY:
            return start
        place = self._value.skip(text, start)
        if place > start:
            self._take(text[start:place])
        return place

    def _take(self, text: str) -> None:
        """A piece of a string, object or array; the key is a string, too."""
        if self._streams:
            self._report(CallArguments(text))
        else:
            self._raw += text

    def add(self, c: str) -> Reading:
        """See CallReader."""
        at = self._at
        if at is _At.VALUE or at is _At.KEY:
            return self._in_value(c)
        if at is _At.SCALAR:
            if c not in _SPACE and c not in ",}":
                self._raw += c
                return Reading.MORE
            self._at = _At.AFTER_VALUE
            if not self._value_ends():
                return Reading.BROKEN
            return self._between(c)
        return self._between(c)

    def _between(self, c: str) -> Reading:
        """Takes a character that is not part of a key or value."""
        at = self._at
        if at is _At.START:
            self._at = _At.KEY_OR_END
            return Reading.MORE if c == "{" else Reading.BROKEN
        if c in _SPACE:
            return Reading.MORE
        if at is _At.KEY_OR_END and c == '"':
            self._begin(c, _At.KEY)
        elif at is _At.COLON and c == ":":
            self._at = _At.BEFORE_VALUE
        elif at is _At.BEFORE_VALUE and c not in ",:}]":
            return self._value_begins(c)
        elif at is _At.AFTER_VALUE and c == ",":
            self._at = _At.KEY_OR_END
        elif at in (_At.AFTER_VALUE, _At.KEY_OR_END) and c == "}":
            return self._object_ends()
        else:
            return Reading.BROKEN
        return Reading.MORE

    def _begin(self, c: str, at: _At) -> None:
        self._raw, self._at, self._value = c, at, JsonValue()
        self._value.add(c)

    def _in_value(self, c: str) -> Reading:
        self._take(c)
        if not self._value.add(c):
            return Reading.MORE
        ok = self._key_ends() if self._at is _At.KEY else self._value_ends()
        return Reading.MORE if ok else Reading.BROKEN

    def _key_ends(self) -> bool:
        key = _decoded(self._raw)
        self._num_keys += 1
        self._at = _At.COLON
        if not isinstance(key, str) or (self._num_keys == 1 and key not in _FIRST_KEYS):
            return False
        self._key = key
        return True

    def _value_begins(self, c: str) -> Reading:
        if c not in '"{[':
            self._raw, self._at = c, _At.SCALAR
            return Reading.MORE
        self._begin(c, _At.VALUE)
        if c == "{" and self._expects_arguments and self._name is not None:
            self._streams = True
            self._report(CallBegin(self._name), CallArguments(c))
        return Reading.MORE

    @property
    def _expects_arguments(self) -> bool:
        return self._key in _ARGUMENT_KEYS and self._arguments is None

    def _value_ends(self) -> bool:
        """Takes note of the value just read; False when no call has such a one."""
        self._at = _At.AFTER_VALUE
        if self._streams:
            self._streams = False
            self._arguments = ""
            self._report(CallEnd())
            return True
        if self._key in _NAME_KEYS and self._name is None:
            value = _decoded(self._raw)
            self._name = value if isinstance(value, str) and value in self._names else None
            return self._name is not None
        if self._expects_arguments:
            self._arguments = _arguments(self._raw)
            return self._arguments is not None
        return True

    def _object_ends(self) -> Reading:
        if self._name is None:
            return Reading.BROKEN
        if not self.is_call:
            self._report(CallBegin(self._name), CallArguments(self._arguments or "{}"), CallEnd())
        return Reading.DONE


def _decoded(raw: str) -> object:
    """The JSON value in `raw`; None when there is none (which no caller takes)."""
    try:
        value: object = json.loads(raw, strict=False)
    except (ValueError, RecursionError):
        return None
    return value


def _arguments(raw: str) -> str | None:
    """Arguments that came before the name, or within a string: their JSON text, or None when they are none."""
    if raw == "null":
        return "{}"
    value = _decoded(raw)
    if isinstance(value, str):
        raw, value = value, _decoded(value)
    return raw if isinstance(value, dict) else None
