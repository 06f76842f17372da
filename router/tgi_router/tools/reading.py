"""How a single call is read: character by character, by a `CallReader` that shaped_calls.py gives them to."""

from enum import Enum, auto
from typing import Protocol

from .base import Event


class Reading(Enum):
    """How far a call has been read."""

    MORE = auto()
    DONE = auto()  # with this character
    BROKEN = auto()  # this character or what it completes cannot be part of a call


class CallReader(Protocol):
    """Reads one call. is_call: something was reported, so that it is a call for good and cannot be text again."""

    is_call: bool

    def add(self, c: str) -> Reading:
        """Takes the next character; nothing may follow DONE or BROKEN."""

    def skip(self, text: str, start: int) -> int:
        """Takes `text` from `start` on as far as nothing can happen; returns the place where something may."""

    def take_events(self) -> list[Event]:
        """What was reported since the last call."""
