"""Fault points for tests: the ways a shard can fail, on demand. Inert unless armed with `--faults`.

    --faults "row.apply:raise:token=4242"       a request that contains token 4242 fails when it is admitted
    --faults "row.logits:nan:token=4242"        the logits of a row that contains it become NaN
    --faults "step:kill:n=20:once=/tmp/mark"    SIGKILL in the 20th step, unless /tmp/mark exists; creates it first
    --faults "step:hang:n=5;load:exit"          several, separated by semicolons

A fault is `POINT:ACTION[:KEY=VALUE]…`. Points: load, warmup, step, row.apply, row.logits. Actions: raise, exit
(status 1), kill (SIGKILL), stop (SIGSTOP), hang (the thread sleeps for ever), nan (row.logits only). Conditions, all of
which must hold: `n` the n-th time the point is reached, `token` a token id that is there, `rank` this rank, `once` a
file that does not exist yet.
"""

import os
import signal
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import StartError

POINTS = ("load", "warmup", "step", "row.apply", "row.logits")
ACTIONS = ("raise", "exit", "kill", "stop", "hang", "nan")


class InjectedFault(RuntimeError):
    """What `raise` raises; nothing expects it."""


@dataclass(slots=True)
class Fault:
    """One armed fault."""

    point: str
    action: str
    n: int | None = None
    token: int | None = None
    rank: int | None = None
    once: str | None = None
    hits: int = 0

    def applies(self, tokens: Iterable[int]) -> bool:
        if self.token is not None and self.token not in tokens:
            return False
        self.hits += 1
        if self.n is not None and self.hits != self.n:
            return False
        if self.once is not None:
            if Path(self.once).exists():
                return False
            Path(self.once).touch()
        return True

    def act(self) -> None:
        if self.action == "raise":
            raise InjectedFault(f"injected fault at {self.point}")
        if self.action == "exit":
            os._exit(1)
        if self.action == "hang":
            threading.Event().wait()
        if self.action in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if self.action == "kill" else signal.SIGSTOP)


class Faults:
    """The armed faults of this process."""

    def __init__(self, specification: str | None = None, rank: int = 0) -> None:
        faults = [_parse(part) for part in (specification or "").split(";") if part.strip()]
        self._faults = [fault for fault in faults if fault.rank in (None, rank)]

    def hit(self, point: str, tokens: Iterable[int] = ()) -> bool:
        """To be called at `point`; acts if a fault is armed there. True when the caller is to put NaN into the row."""
        if not self._faults:
            return False
        poisoned = False
        for fault in self._faults:
            if fault.point == point and fault.applies(tokens):
                poisoned |= fault.action == "nan"
                fault.act()
        return poisoned

    def armed(self, point: str) -> bool:
        """Whether `hit` could do anything: lets the caller spare the work of finding the tokens."""
        return any(fault.point == point for fault in self._faults)


def _parse(text: str) -> Fault:
    point, _, rest = text.strip().partition(":")
    action, *conditions = rest.split(":")
    if point not in POINTS or action not in ACTIONS or (action == "nan") != (point == "row.logits"):
        raise StartError(
            f"`--faults` {text!r}: want POINT:ACTION, points {', '.join(POINTS)}, actions {', '.join(ACTIONS)}"
        )
    fault = Fault(point, action)
    for condition in conditions:
        key, _, value = condition.partition("=")
        if key not in ("n", "token", "rank", "once") or not value:
            raise StartError(f"`--faults` {text!r}: {condition!r} is none of n=, token=, rank=, once=")
        setattr(fault, key, value if key == "once" else int(value))
    return fault
