"""The phases of one child's start: which it is in, for how long, and whether it makes progress. PURE: time is given.

spawn → import → load x/y GiB → warmup → ready
"""

from dataclasses import dataclass, field

from .memory_fit import GIB


@dataclass(slots=True)
class Startup:
    """Where a child is on its way to being ready. Times in seconds of one monotonic clock."""

    started_s: float
    phase: str = "spawn"
    entered_s: float = 0.0
    progress_s: float = 0.0  # last time anything moved
    done: float = 0.0
    total: float = 0.0
    unit: str = ""
    durations_s: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.entered_s = self.progress_s = self.started_s

    @property
    def ready(self) -> bool:
        return self.phase == "ready"

    @property
    def total_s(self) -> float:
        """Time from the start to the entry of the current phase."""
        return self.entered_s - self.started_s

    def enter(self, phase: str, now_s: float) -> None:
        """The child entered `phase`."""
        self.durations_s[self.phase] = self.durations_s.get(self.phase, 0.0) + now_s - self.entered_s
        self.phase, self.entered_s, self.progress_s = phase, now_s, now_s
        self.done = self.total = 0.0
        self.unit = ""

    def advance(self, done: float, total: float, unit: str, now_s: float) -> None:
        """The child reported work done; only more of it than before is progress."""
        if done > self.done:
            self.progress_s = now_s
        self.done, self.total, self.unit = done, total, unit

    def stalls_at(self, timeout_s: float) -> float:
        """When it counts as stuck unless something moves before."""
        return self.progress_s + timeout_s

    def describe(self) -> str:
        """E.g. "load 1.2/3.4 GiB"."""
        if not self.total:
            return self.phase
        if self.unit == "bytes":
            scale, unit = (GIB, "GiB") if self.total >= GIB else (2**20, "MiB")
            return f"{self.phase} {self.done / scale:.1f}/{self.total / scale:.1f} {unit}"
        return f"{self.phase} {self.done:g}/{self.total:g} {self.unit}".rstrip()

    def summary(self) -> str:
        """The time each phase took, e.g. "spawn 0.1 s, import 1.9 s"."""
        return ", ".join(f"{phase} {duration:.2f} s" for phase, duration in self.durations_s.items())
