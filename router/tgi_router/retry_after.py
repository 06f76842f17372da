"""When to come back: the `Retry-After` of a refusal, from how long permits have been held lately. PURE.

The clock is an argument. Owned by infer.py, which takes and returns the permits; errors.py carries the number.
"""

import math
from collections import deque

MAX_S = 60
_REMEMBERED = 64  # requests whose holding times make the mean


def seconds_until_free(mean_held_s: float, permits: int, ahead: int) -> float:
    """How long until `ahead` permits have come back while all `permits` are out, each for `mean_held_s` (Little)."""
    return ahead * mean_held_s / permits


class RetryAfter:
    """Gives the refused clients places in a line, so that not all of them come back for the same permit."""

    def __init__(self, permits: int) -> None:
        """permits: how many there are."""
        self._permits = permits
        self._held_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._refusing_since_s: float | None = None  # since when nothing has come back while there were refusals
        self._line_s = 0.0  # when the last one in the line is to come back

    def returned(self, held_s: float) -> None:
        """A request has ended that held its permits for `held_s`."""
        self._held_s.append(held_s)
        self._refusing_since_s = None

    def refused(self, count: int, now_s: float) -> int:
        """Whole seconds, 1 to 60, until `count` permits may be there for the client that is refused now."""
        if self._refusing_since_s is None:
            self._refusing_since_s = now_s
        self._line_s = min(max(self._line_s, now_s) + self._until_free(count), now_s + MAX_S)
        silent_s = now_s - self._refusing_since_s  # what has lasted so long is likely to last as long again
        return _whole(max(self._line_s - now_s, silent_s))

    def until_all_returned(self, count: int) -> int:
        """Whole seconds, 1 to 60, until the `count` permits that are out may be back."""
        return _whole(self._until_free(count))

    def _until_free(self, ahead: int) -> float:
        mean_s = sum(self._held_s) / len(self._held_s) if self._held_s else 0.0
        return seconds_until_free(mean_s, self._permits, ahead)


def _whole(seconds: float) -> int:
    return min(max(math.ceil(seconds), 1), MAX_S)
