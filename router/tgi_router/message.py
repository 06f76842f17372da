"""What a choice's text says: thoughts, content and tool calls, piece by piece as it is generated.

`MessageParser` is fed the text of one choice; `Message` is what its events add up to. Answers that stream and answers
that do not are made of the same events, so they say the same. Pure. Called by chat_answers.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .reasoning import ReasoningParser
from .tools.base import CallArguments, CallBegin, Event, Text, ToolParser


class Reasoning(NamedTuple):
    """A piece of what the model thinks before it answers."""

    text: str


MessageEvent = Event | Reasoning


class MessageParser:
    """One choice's."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None, max_calls: int | None) -> None:
        """None: there is no such thing in this text. max_calls: further ones are left out; None = all count."""
        self.num_reasoning_tokens = 0
        self._reasoning = reasoning
        self._tools = tools
        self._calls_left = max_calls

    @property
    def counts_tokens(self) -> bool:
        """The next token may be one of the thoughts; else its text may be fed together with what follows."""
        return self._reasoning is not None and not self._reasoning.over

    def feed(self, text: str) -> list[MessageEvent]:
        """The text of one more token."""
        thoughts = ""
        if self._reasoning is not None:
            thinks = self._reasoning.thinks
            thoughts, text = self._reasoning.feed(text)
            self.num_reasoning_tokens += thinks or self._reasoning.thinks
        return [*_reasoning(thoughts), *self._answer(text)]

    def end(self) -> list[MessageEvent]:
        """What was held back when the text ends."""
        events: list[MessageEvent] = []
        if self._reasoning is not None:
            thoughts, text = self._reasoning.end()
            events = [*_reasoning(thoughts), *self._answer(text)]
        if self._tools is not None:
            events += self._wanted(self._tools.end())
        return events

    def _answer(self, text: str) -> list[Event]:
        if self._tools is not None:
            return self._wanted(self._tools.feed(text))
        return [Text(text)] if text else []

    def _wanted(self, events: Sequence[Event]) -> list[Event]:
        """`events` without calls that are too many."""
        if self._calls_left is None:
            return list(events)
        wanted: list[Event] = []
        for event in events:
            if isinstance(event, CallBegin):
                self._calls_left -= 1
            if isinstance(event, Text) or self._calls_left >= 0:
                wanted.append(event)
        return wanted


def _reasoning(text: str) -> list[Reasoning]:
    return [Reasoning(text)] if text else []


@dataclass(slots=True)
class Call:
    """A tool call."""

    name: str
    arguments: str = ""
    complete: bool = False


@dataclass(slots=True)
class Message:
    """What the events of one choice add up to."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, event: MessageEvent) -> None:
        """The next event."""
        if isinstance(event, Text):
            self.content += event.text
        elif isinstance(event, Reasoning):
            self.reasoning += event.text
        elif isinstance(event, CallBegin):
            self.calls.append(Call(event.name))
        elif isinstance(event, CallArguments):
            self.calls[-1].arguments += event.text
        else:
            self.calls[-1].complete = True
