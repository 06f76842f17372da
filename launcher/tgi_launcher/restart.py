"""When a crashed shard group is started again, and when it is given up. PURE: time is given."""

from dataclasses import dataclass, field

WINDOW_S = 600.0
MAX_DELAY_S = 8.0  # open streams wait meanwhile


@dataclass(slots=True)
class RestartBudget:
    """At most `limit` restarts within any `window_s`; the first at once, then after 1, 2, 4, 8, 8 ... s."""

    limit: int
    window_s: float = WINDOW_S
    _times_s: list[float] = field(default_factory=list)

    def spend(self, now_s: float) -> float | None:
        """Seconds to wait before the next restart; None when the budget is spent."""
        self._times_s = [t for t in self._times_s if now_s - t < self.window_s]
        if len(self._times_s) >= self.limit:
            return None
        delay = min(MAX_DELAY_S, 2.0 ** (len(self._times_s) - 1)) if self._times_s else 0.0
        self._times_s.append(now_s)
        return delay

    @property
    def spent(self) -> int:
        """Restarts counted at the moment."""
        return len(self._times_s)
