"""Keeps a shard group and its router running: start by phases, crash recovery within a budget, drain on SIGTERM.

One loop takes one event at a time (a record of a child, the end of a child, a signal, a deadline), so there is no state
that two tasks share. `plan.py` decided what children are told, `process.py` runs them, `explain.py` words a death.
"""

import asyncio
import logging
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tgi_proto.channel import socket_path

from .console import Console
from .errors import ShardCannotStart, ShardFailed, WebserverCannotStart, WebserverFailed
from .explain import Death, Evidence, Explanation, explain, first_cause
from .guard import Guard, remove
from .process import Child, Command, Exited, Record
from .restart import RestartBudget
from .startup import Startup

ATTRIBUTION_S = 0.25  # ranks that die within this time of each other are judged together
SHARD_STOP_S = 5.0
ABORT_STOP_S = 5.0  # for a router that has nothing left to wait for
WAITING_NOTE_S = 10.0
PROGRESS_NOTE_S = 2.0
DUMP_S = 0.5

_log = logging.getLogger("tgi_launcher")


@dataclass(frozen=True, slots=True)
class Signalled:
    """The launcher itself got a signal."""

    number: int


@dataclass(frozen=True, slots=True)
class Settings:
    """How to supervise. Times in seconds."""

    shards: tuple[Command, ...]
    router: Command
    uds_path: str
    stall_timeout_s: float
    grace_s: float
    restart_budget: int
    begun_s: float  # time.monotonic() when the launcher started
    curl: Callable[[str], str]  # address → a command line to try


Event = Record | Exited | Signalled


class Supervisor:
    """Runs one launch to its end. Create, then `await run()` once."""

    def __init__(
        self,
        settings: Settings,
        console: Console,
        guard: Guard,
        queue: "asyncio.Queue[Event]",
        evidence: Callable[[], Evidence],
    ) -> None:
        self._settings = settings
        self._console = console
        self._guard = guard
        self._queue = queue
        self._evidence = evidence
        self._budget = RestartBudget(settings.restart_budget)
        self._shards: list[Child] = []
        self._startups: list[Startup] = []
        self._router: Child | None = None
        self._router_since_s = 0.0
        self._address: str | None = None
        self._ever_ready = False
        self._group_ready = False
        self._announced = False
        self._first_failure: Explanation | None = None
        self._crashed_s = 0.0
        self._restart_at_s: float | None = None
        self._draining = False
        self._drain_until_s = 0.0
        self._noted_s = 0.0

    async def run(self) -> int:
        """Exit status 0 after an orderly stop, 128 + n after a second signal n; raises LauncherError otherwise."""
        graceful = False
        try:
            self._start_group()
            self._router = self._start(self._settings.router)
            self._router_since_s = time.monotonic()
            while True:
                status = await self._step()
                if status is not None:
                    graceful = status == 0
                    return status
        finally:
            self._console.status("")
            await self._stop_all(graceful)

    async def _step(self) -> int | None:
        """Handles one event or deadline; the exit status when that was the end."""
        match await next_event(self._queue, self._next_deadline()):
            case Signalled(number):
                return self._on_signal(number)
            case Exited(child) if child is self._router:
                return self._on_router_end(child)
            case Exited(child) if child in self._shards:
                await self._on_group_failure()
            case Record(child, record) if "event" in record:
                await self._on_event(child, record)
            case _:
                pass  # a plain log line, or the end of a child that was replaced
        return await self._on_time(time.monotonic())

    # -- deadlines

    def _next_deadline(self) -> float:
        now = time.monotonic()
        deadlines = [now + WAITING_NOTE_S]
        if self._restart_at_s is not None:
            deadlines.append(self._restart_at_s)
        if self._draining:
            deadlines.append(self._drain_until_s)
        deadlines += [startup.stalls_at(self._settings.stall_timeout_s) for _, startup in self._starting()]
        if self._group_ready and self._address is None:
            deadlines.append(self._router_stalls_at())
        return min(deadlines)

    def _router_stalls_at(self) -> float:
        ready_s = max((startup.entered_s for startup in self._startups), default=0.0)
        return max(self._router_since_s, ready_s) + self._settings.stall_timeout_s

    async def _on_time(self, now: float) -> int | None:
        if self._draining and now >= self._drain_until_s:
            _log.warning("the grace period is over: killing the router with requests unfinished")
            return 0
        if self._restart_at_s is not None and now >= self._restart_at_s:
            self._restart_at_s = None
            self._start_group()
        for child, startup in self._starting():
            if now >= startup.stalls_at(limit_s := self._settings.stall_timeout_s):
                await self._end_stuck(child, f"no progress for {limit_s:g} s in phase {startup.describe()}")
        if self._group_ready and self._address is None and now >= self._router_stalls_at():
            raise WebserverCannotStart(
                f"the router was not serving {self._settings.stall_timeout_s:g} s after the shards"
            )
        self._note_waiting(now)
        return None

    def _starting(self) -> list[tuple[Child, Startup]]:
        """The shards that live and are not ready yet."""
        pairs = zip(self._shards, self._startups, strict=True)
        return [(child, startup) for child, startup in pairs if child.alive and not startup.ready]

    def _note_waiting(self, now: float) -> None:
        waiting = self._starting()
        if waiting and now - self._noted_s >= WAITING_NOTE_S:
            self._noted_s = now
            where = ", ".join(f"{child.name} {startup.describe()}" for child, startup in waiting)
            _log.info("Waiting for shard to be ready... (%s)", where)

    # -- starting

    def _start(self, command: Command) -> Child:
        _log.info("Starting %s: %s", command.name, command.shown)
        return Child.start(command, self._console, self._queue.put_nowait, self._guard)

    def _start_group(self) -> None:
        for rank in range(len(self._settings.shards)):
            self._remove_socket(rank)
        self._group_ready = False
        self._shards = [self._start(command) for command in self._settings.shards]
        self._startups = [Startup(child.started_s) for child in self._shards]
        self._noted_s = time.monotonic()

    def _remove_socket(self, rank: int) -> None:
        path = Path(socket_path(self._settings.uds_path, rank))
        if path.is_socket():
            path.unlink(missing_ok=True)

    async def _on_event(self, child: Child, record: dict[str, object]) -> None:
        now = time.monotonic()
        if record["event"] == "serving" and child is self._router:
            self._address = str(record.get("address"))
        elif record["event"] == "shard_hung" and child is self._router:
            await self._on_hung(record)
        elif child in self._shards:
            self._on_progress(child, record, now)
        if self._group_ready and self._address is not None and not self._announced and not self._draining:
            self._announce()

    def _on_progress(self, child: Child, record: dict[str, object], now: float) -> None:
        startup = self._startups[self._shards.index(child)]
        if record["event"] == "phase":
            startup.enter(str(record.get("phase")), now)
            if self._console.is_terminal:  # elsewhere the shard's own line says it
                self._show_progress(now)
            if startup.ready:
                _log.info("Shard ready in %.2f s (%s: %s)", startup.total_s, child.name, startup.summary())
            if all(s.ready for s in self._startups):
                self._on_group_ready(now)
        elif record["event"] == "progress":
            done, total = (_number(record.get(key)) for key in ("done", "total"))
            startup.advance(done, total, str(record.get("unit", "")), now)
            self._show_progress(now)

    def _show_progress(self, now: float) -> None:
        text = ", ".join(f"{child.name}: {startup.describe()}" for child, startup in self._starting())
        if self._console.is_terminal:
            self._console.status(text)
        elif text and now - self._noted_s >= PROGRESS_NOTE_S:
            self._noted_s = now
            _log.info("%s", text)

    def _on_group_ready(self, now: float) -> None:
        self._group_ready = True
        if self._ever_ready:
            _log.info("The shards are back %.2f s after the crash", now - self._crashed_s)
        self._ever_ready = True

    def _announce(self) -> None:
        self._announced = True
        address = self._address or ""
        slowest = max(self._startups, key=lambda startup: startup.total_s)
        spawned = slowest.started_s - self._settings.begun_s
        now = time.monotonic()
        _log.info(
            "Ready in %.2f s: launcher %.2f s, shard %s, router %.2f s",
            now - self._settings.begun_s, spawned, slowest.summary(), now - slowest.entered_s,
        )  # fmt: skip
        if self._console.is_terminal:
            self._console.plain(f"\n  Serving at {reachable(address)}   (Ctrl-C to stop)\n")
            self._console.plain(f"  {self._settings.curl(address)}\n")
        else:
            _log.info("Serving at %s", address)
            _log.info("Try: %s", self._settings.curl(address))

    # -- what goes wrong

    async def _on_hung(self, record: dict[str, object]) -> None:
        rank = int(_number(record.get("rank")))
        if not self._group_ready or not 0 <= rank < len(self._shards):
            return  # a late report about a group that was replaced already
        await self._end_stuck(self._shards[rank], f"no answer within the step deadline of {record.get('deadline_s')} s")

    async def _end_stuck(self, child: Child, because: str) -> None:
        """Asks for a dump of the stacks (faulthandler answers SIGABRT), then kills. Its end comes as an event."""
        _log.error("%s is stuck: %s", child.name, because)
        child.stopped_because = because
        child.signal(signal.SIGABRT)
        if not await child.wait(DUMP_S):
            child.kill(because)
            await child.wait()

    async def _on_group_failure(self) -> None:
        """Some shard died. Finds the cause, kills the rest, schedules the restart or raises."""
        if len(self._shards) > 1:
            await asyncio.sleep(ATTRIBUTION_S)
        dead = sorted((c for c in self._shards if not c.alive), key=lambda c: c.exited_s or 0.0)
        if not dead:
            return
        startups = dict(zip(self._shards, self._startups, strict=True))
        cause = first_cause([_death(child, startups[child]) for child in dead])
        why = explain(cause, self._evidence())
        self._crashed_s = time.monotonic()
        _log.error("%s", why)
        for child in self._shards:
            child.kill("another shard of the group died")
        for child in self._shards:
            await child.wait()
        self._shards, self._startups, self._group_ready = [], [], False
        self._console.status("")
        rank = cause.name.removeprefix("shard-")
        if not self._ever_ready:
            _log.error("Shard %s failed to start", rank)
            raise ShardCannotStart(why.cause)
        _log.error("Shard %s crashed", rank)
        if self._budget.spent == 0 or self._first_failure is None:
            self._first_failure = why
        delay = self._budget.spend(self._crashed_s)
        if delay is None:
            _log.error(
                "the shards died more than --restart-budget %d times within %g minutes; the first cause was: %s",
                self._budget.limit, self._budget.window_s / 60, self._first_failure,
            )  # fmt: skip
            raise ShardFailed(self._first_failure.cause)
        _log.warning(
            "Restarting the shards %s (restart %d of %d); open requests wait",
            "at once" if delay == 0 else f"in {delay:g} s", self._budget.spent, self._budget.limit,
        )  # fmt: skip
        self._restart_at_s = self._crashed_s + delay

    def _on_router_end(self, router: Child) -> int:
        if self._draining:
            if router.returncode:
                _log.warning("the router exited with status %s while it drained", router.returncode)
            return 0
        phase = "serving" if self._address else "start"
        why = explain(_death(router, None, phase), self._evidence())
        _log.error("%s", why)
        _log.error("Webserver Crashed")
        raise (WebserverFailed if self._address else WebserverCannotStart)(why.cause)

    # -- stopping

    def _on_signal(self, number: int) -> int | None:
        name = signal.Signals(number).name
        if self._draining:
            _log.warning("%s again: stopping at once", name)
            return 128 + number
        if self._address is None or self._router is None or not self._router.alive:
            _log.info("%s: stopping before the server was ready", name)
            return 0
        _log.info("%s: draining; running requests have %g s to end", name, self._settings.grace_s)
        _log.info("Terminating webserver")
        _log.info("Waiting for webserver to gracefully shutdown")
        self._draining = True
        self._drain_until_s = time.monotonic() + self._settings.grace_s
        self._router.stopped_because = "the launcher is stopping"
        self._router.signal(signal.SIGTERM)
        return None

    def kill_all(self) -> None:
        """Ends every child at once; whoever waits for one finds it dead. For a second signal."""
        for child in self._children():
            child.kill("the launcher was told twice to stop")

    def _children(self) -> list[Child]:
        return [*([self._router] if self._router else []), *self._shards]

    async def _stop_all(self, graceful: bool) -> None:
        """Ends every child and removes the sockets. The router goes first: nothing may reach a shard that is gone."""
        if self._router is not None:
            if graceful and self._draining:  # it has had its time
                self._router.kill("the grace period is over")
                await self._router.wait()
            await self._router.stop(ABORT_STOP_S, "the launcher is stopping")
            _log.info("webserver terminated")
        if self._shards:
            _log.info("Shutting down shards")
        await asyncio.gather(*(shard.stop(SHARD_STOP_S, "the launcher is stopping") for shard in self._shards))
        for rank in range(len(self._settings.shards)):
            remove(socket_path(self._settings.uds_path, rank))


def reachable(address: str) -> str:
    """`address` as one can call it from this machine: 0.0.0.0 is where a server listens, not where it is."""
    return address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


async def next_event(queue: "asyncio.Queue[Event]", deadline_s: float) -> Event | None:
    """The next event; None at `deadline_s` (time.monotonic()). What is queued already comes before any deadline."""
    if not queue.empty():
        return queue.get_nowait()
    try:
        return await asyncio.wait_for(queue.get(), max(0.001, deadline_s - time.monotonic()))
    except TimeoutError:
        return None


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _death(child: Child, startup: Startup | None, phase: str = "serving") -> Death:
    where = phase if startup is None else "serving" if startup.ready else startup.describe()
    return Death(
        name=child.name,
        returncode=child.returncode or 0,
        phase=where,
        last_error=child.last_error,
        stderr=child.stderr_tail,
        stopped_because=child.stopped_because,
    )


def peak_rss_bytes() -> int:
    """Largest resident size any ended child had."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
