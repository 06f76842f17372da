"""Reasoning models: what they think stands between two marks before the answer; `--reasoning-parser` names the marks.

    <think> ... </think> answer        many templates write the first mark into the prompt already

`ReasoningParser` splits a choice's text, as a pure state machine: how the text is cut into pieces changes no result.
White space around the thoughts is left out. A new format is a line in `MARKS`. Called by message.py.
"""

from enum import Enum, auto
from typing import NamedTuple

from .errors import StartupError

_SPACE = " \t\r\n"


class Marks(NamedTuple):
    """What stands before and after the thoughts."""

    opening: str
    closing: str


MARKS: dict[str, Marks] = {
    "deepseek": Marks("<think>", "</think>"),
    "mistral": Marks("[THINK]", "[/THINK]"),
    "seed_oss": Marks("<seed:think>", "</seed:think>"),
}


def choose(name: str, template: str) -> Marks | None:
    """The marks called `name`; for `auto` those that the chat template contains, if any. Raises StartupError."""
    if name == "none":
        return None
    if name == "auto":
        return next((marks for marks in MARKS.values() if marks.closing in template), None)
    if name not in MARKS:
        raise StartupError(f"`--reasoning-parser` must be auto, none or one of {', '.join(MARKS)}. Given: {name}")
    return MARKS[name]


def is_open(marks: Marks, prompt: str, *, continues: bool) -> bool:
    """Whether what follows `prompt` is thoughts. continues: the prompt ends within a message of the assistant."""
    _, opening, after = prompt.rpartition(marks.opening)
    if not opening:
        return False
    return not after.strip() or (continues and marks.closing not in after)


class Split(NamedTuple):
    """What a piece of text says: thoughts first, then answer."""

    reasoning: str
    text: str


class _In(Enum):
    START = auto()  # white space, or the beginning of the opening mark
    THOUGHTS = auto()
    GAP = auto()  # white space after the thoughts
    ANSWER = auto()


class ReasoningParser:
    """Splits one choice's text."""

    def __init__(self, marks: Marks, *, is_open: bool) -> None:
        """is_open: the prompt has the opening mark already."""
        self._marks = marks
        self._held = ""
        self._in = _In.THOUGHTS if is_open else _In.START
        self._thinks = False  # some thoughts were shown

    @property
    def thinks(self) -> bool:
        """Whether the next piece of text continues the thoughts."""
        return self._in is _In.THOUGHTS

    @property
    def over(self) -> bool:
        """The thoughts have ended, or there were none."""
        return self._in in (_In.GAP, _In.ANSWER)

    def feed(self, text: str) -> Split:
        """What the next piece of text says."""
        if self._in is _In.ANSWER:
            return Split("", text)
        self._held += text
        if self._in is _In.START:
            self._in = self._started()
        reasoning = self._thoughts() if self.thinks else ""
        if self._in is _In.GAP:
            self._held = self._held.lstrip(_SPACE)
            self._in = _In.ANSWER if self._held else _In.GAP
        return Split(reasoning, self._rest() if self._in is _In.ANSWER else "")

    def end(self) -> Split:
        """What was held back when the text ends."""
        rest = self._rest()
        return Split(rest, "") if self.thinks else Split("", rest)

    def _rest(self) -> str:
        held, self._held = self._held, ""
        return held

    def _started(self) -> _In:
        """What the text begins with: thoughts, an answer, or nothing that decides it yet."""
        begun = self._held.lstrip(_SPACE)
        opening = self._marks.opening
        if begun.startswith(opening):
            self._held = begun[len(opening) :]
            return _In.THOUGHTS
        return _In.START if opening.startswith(begun) else _In.ANSWER

    def _thoughts(self) -> str:
        """The thoughts in what is held, but white space and what may be the closing mark at its end."""
        if not self._thinks:
            self._held = self._held.lstrip(_SPACE)
        before, closing, after = self._held.partition(self._marks.closing)
        if closing:
            self._in, self._held = _In.GAP, after
            return before.rstrip(_SPACE)
        mark = self._marks.closing
        partial = max((n for n in range(1, min(len(before), len(mark)) + 1) if mark.startswith(before[-n:])), default=0)
        shown = before[: len(before) - partial].rstrip(_SPACE)
        self._held = before[len(shown) :]
        self._thinks = self._thinks or bool(shown)
        return shown
