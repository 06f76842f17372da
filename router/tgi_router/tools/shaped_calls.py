"""The parser of every format so far: what stands around the calls is data (`Shape`), a `CallReader` reads each call.

    free text <opening> { call } <closing> more text
    free text <opening> [ {call}, {call} ]
    { call } ; { call }                                a message that begins with a call (`bare`)
    <opening> name { arguments }                       (`after_name`)

Text that may still turn out to be a call is held back, and is text again, to the letter, when it does not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from .base import CallArguments, CallBegin, CallEnd, Event, Text, Tool, merged
from .call_object import CallObject, JsonValue
from .reading import CallReader, Reading

_SPACE = " \t\r\n"
_MAX_HEADER = 200  # characters of a name and the markers behind it


@dataclass(frozen=True, slots=True)
class Shape:
    """What stands around calls.

    openings: each begins calls. closing: may follow a call. bare: a message may begin with a call. lists: calls may
    stand in an array. separators: characters between calls that follow each other. after_name: not (): the name may
    stand before the arguments, followed by any of these markers. head: the first character of what reader reads.
    """

    openings: tuple[str, ...] = ()
    closing: str = ""
    bare: bool = False
    lists: bool = False
    separators: str = ""
    after_name: tuple[str, ...] = ()
    head: str = "{"
    reader: Callable[[Sequence[Tool]], CallReader] = CallObject


class _In(Enum):
    """What the next character belongs to."""

    TEXT = auto()
    OPENED = auto()  # a call must begin here
    CALL = auto()
    NAME = auto()  # of a call whose name stands before its arguments
    ARGUMENTS = auto()  # of such a call
    AFTER = auto()  # a call


class ShapedCalls:
    """See ToolParser."""

    def __init__(self, shape: Shape, tools: Sequence[Tool]) -> None:
        """tools: the offered ones."""
        self._shape = shape
        self._tools = tools
        self._names = frozenset(tool.name for tool in tools)
        self._events: list[Event] = []
        self._in = _In.TEXT
        self._held = ""  # read and not shown yet
        self._list = False  # within an array of calls
        self._num_calls = 0
        self._begun = False  # some text was shown, or a call
        self._call = shape.reader(tools)
        self._arguments = JsonValue()
        self._name_at = 0  # where in _held the name begins
        self._take = {
            _In.OPENED: self._opened,
            _In.CALL: self._in_call,
            _In.NAME: self._in_name,
            _In.ARGUMENTS: self._in_arguments,
            _In.AFTER: self._after,
        }

    def feed(self, text: str) -> list[Event]:
        """See ToolParser."""
        self._read(text)
        events, self._events = merged(self._events), []
        return events

    def end(self) -> list[Event]:
        """See ToolParser."""
        held, self._held = self._held, ""
        cut_off = self._in is _In.AFTER or (self._in is _In.CALL and self._call.is_call)
        if not cut_off and (not self._num_calls or held.strip(_SPACE + self._shape.separators + ",")):
            self._show(held)
        events, self._events = self._events, []
        return events

    def _show(self, text: str) -> None:
        if text:
            self._events.append(Text(text))
            self._begun = True

    def _report(self, events: list[Event]) -> None:
        """It is a call: what was held back belongs to it."""
        self._held = ""
        self._begun = True
        self._num_calls += sum(isinstance(event, CallBegin) for event in events)
        self._events += events

    def _read(self, text: str) -> None:
        """Takes the next piece. Long runs are taken at once, all else a character at a time."""
        place = 0
        while place < len(text):
            if self._in is _In.TEXT:
                place = self._in_text(text, place)
                continue
            start = place
            if self._in is _In.CALL:
                place = self._call.skip(text, start)
                self._held += text[start:place]
                if events := self._call.take_events():
                    self._report(events)
            elif self._in is _In.ARGUMENTS:
                place = self._arguments.skip(text, start)
                if place > start:
                    self._report([CallArguments(text[start:place])])
            if place < len(text):
                self._take[self._in](text[place])
                place += 1

    def _in_text(self, text: str, start: int) -> int:
        """Takes `text` from `start` on, up to an opening; returns the place after it.

        Holds back white space (which may stand before a call) and what may be an opening.
        """
        before, shape = len(self._held), self._shape
        held = self._held + text[start:]
        if shape.bare and not self._begun:
            first = held.lstrip(_SPACE)[:1]
            if first == shape.head or (first == "[" and shape.lists):
                place = held.index(first)
                self._held = held[:place]
                self._opened(first)
                return start + place + 1 - before
        found = [(place + len(one), one) for one in shape.openings if (place := held.find(one)) >= 0]
        if found:
            end, opening = min(found)
            held, place = held[:end], start + end - before
            tail, self._in = len(opening), _In.OPENED
        else:
            place = len(text)
            tail = max((_overlap(held, opening) for opening in shape.openings), default=0)
        shown = held[: len(held) - tail].rstrip(_SPACE)
        self._held = held[len(shown) :]
        self._show(shown)
        return place

    def _fall_back(self) -> None:
        """It is no call. The last character may begin another one."""
        held, self._held = self._held, ""
        self._in, self._list = _In.TEXT, False
        self._show(held[:-1])
        self._in_text(held[-1], 0)

    def _opened(self, c: str) -> None:
        self._in = _In.OPENED
        self._held += c
        if c in _SPACE:
            return
        if c == self._shape.head:
            self._in = _In.CALL
            self._call = self._shape.reader(self._tools)
            self._call.add(c)
        elif c == "[" and self._shape.lists and not self._list:
            self._list = True
        elif self._shape.after_name and not self._list:
            self._in, self._name_at = _In.NAME, len(self._held) - 1
            self._in_name("")
        else:
            self._fall_back()

    def _in_call(self, c: str) -> None:
        self._held += c
        reading = self._call.add(c)
        held = self._held
        if events := self._call.take_events():
            self._report(events)
        if reading is Reading.DONE:
            self._in, self._held = _In.AFTER, ""
        elif reading is Reading.BROKEN:
            self._held = held  # it belongs to no call, even if one has just been ended for it
            self._fall_back()

    def _in_name(self, c: str) -> None:
        self._held += c
        header = self._held[self._name_at :]
        if c == "{":
            name = _named(header[:-1], self._names, self._shape.after_name)
            if name is None:
                self._fall_back()
                return
            self._report([CallBegin(name)])
            self._in, self._arguments = _In.ARGUMENTS, JsonValue()
            self._in_arguments(c)
        elif not any(name.startswith(header) for name in self._names) and (
            _named(header, self._names, self._shape.after_name) is None or len(header) > _MAX_HEADER
        ):
            self._fall_back()

    def _in_arguments(self, c: str) -> None:
        self._report([CallArguments(c)])
        if self._arguments.add(c):
            self._report([CallEnd()])
            self._in = _In.AFTER

    def _after(self, c: str) -> None:
        """What may follow a call: the rest of its array, a separator, the closing."""
        shape = self._shape
        self._held += c
        seen = self._held.strip(_SPACE)
        if not seen:
            return
        if self._list:
            if c == ",":
                self._in = _In.OPENED
            elif c == "]":
                self._list, self._held = False, ""
            else:
                self._fall_back()
        elif shape.closing and shape.closing.startswith(seen):
            if seen == shape.closing:
                self._in, self._held = _In.TEXT, ""
        elif seen in shape.separators:
            self._in = _In.OPENED
        elif seen == "{" and shape.separators:
            self._held = self._held[:-1]
            self._opened(c)
        else:
            self._read_again()

    def _read_again(self) -> None:
        """What was held back after a call is text, or begins another call."""
        held, self._held = self._held, ""
        self._in = _In.TEXT
        self._read(held)


def _overlap(text: str, opening: str) -> int:
    """Length of the longest end of `text` that begins `opening` and is not all of it."""
    if opening[0] not in text[1 - len(opening) :]:
        return 0
    for length in range(min(len(text), len(opening) - 1), 0, -1):
        if opening.startswith(text[-length:]):
            return length
    return 0


def _named(header: str, names: frozenset[str], after_name: tuple[str, ...]) -> str | None:
    """The name in what stands before the arguments: it alone, or followed by (the beginning of) a marker."""
    for name in sorted(names):
        if header.startswith(name):
            rest = header[len(name) :].lstrip(_SPACE)
            if not rest or any(rest.startswith(marker) or marker.startswith(rest) for marker in after_name):
                return name
    return None
