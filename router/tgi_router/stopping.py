"""When a generation ends, and what of its text may be shown: length, then end-of-sequence, then stop strings.

Stop strings are found across token boundaries and anywhere in a token's text. The one that is complete first wins, and
of those the one that began first, so the result does not depend on how the text was cut into tokens. TGI's routes
keep the stop string in the text (and a line break that directly follows it at the end, as TGI's pattern did); OpenAI's
routes remove it, so text that may be the beginning of one is held back until that is decided. Pure: one per choice.
"""

from collections.abc import Sequence


class StopStrings:
    """Looks for stop strings in a growing text. `add` takes each new piece and returns what may be shown."""

    __slots__ = ("_held", "_keep", "_max_held", "_stops", "_tail", "found")

    def __init__(self, stops: Sequence[str], *, keep: bool) -> None:
        """keep: the stop string stays in the text (TGI), else it is removed (OpenAI)."""
        self._stops = tuple(stops)
        self._keep = keep
        self._max_held = max(map(len, stops)) - 1  # most characters that can be an unfinished stop string
        self._tail = ""  # keep: the last shown characters, enough to complete a stop string
        self._held = ""  # not keep: characters not shown yet
        self.found = False

    def add(self, piece: str, *, counts: bool = True) -> str:
        """The text that may be shown now. Sets `found`; nothing may be added after that.

        counts: false while a stop string that is complete with this piece does not end the generation.
        """
        if not piece:
            return ""
        text = (self._tail if self._keep else self._held) + piece
        match = self._first_match(text, len(text) - len(piece)) if counts else None
        if match is None:
            return self._show_unmatched(text, piece)
        start, end = match
        self.found = True
        if not self._keep:
            self._held = ""
            return text[:start]
        if text[end:] == "\n":
            end += 1
        return text[len(text) - len(piece) : end]

    def end(self) -> str:
        """What was held back, when the generation ends for another reason."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str, old: int) -> tuple[int, int] | None:
        """(start, end) of the stop string that is complete first; of several, the one that begins first.

        old: characters of `text` that were looked at before; what is complete within them has not counted.
        """
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = text.find(stop, max(0, old - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < (best[1], best[0])):
                best = (start, start + len(stop))
        return best

    def _show_unmatched(self, text: str, piece: str) -> str:
        if self._keep:
            self._tail = text[-self._max_held :] if self._max_held else ""
            return piece
        for length in range(min(self._max_held, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                self._held = text[-length:]
                return text[:-length]
        self._held = ""
        return text
