"""One child process: started in its own process group, its logs read and shown, its death reported.

Knows nothing about shards or routers: what a record's `event` means is the supervisor's business. A child's stdout
carries log records (`tgi_proto/logs.py`), its stderr whatever libraries print; the end of stderr is kept as evidence.
"""

import asyncio
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tgi_proto import logs

from .console import Console
from .guard import Guard, kill_group

_STDERR_KEPT = 64 * 1024
_MAX_LINE = 1 << 20
_EXEC_CHILD = str(Path(__file__).with_name("exec_child.py"))
_PIPE_GRACE_S = 1.0  # a grandchild may hold the pipes open after the child's death

# Lines that libraries print to stderr on every healthy start. Shown at DEBUG only.
_NOISE = re.compile(
    r"Address family not supported by protocol|absl::InitializeLog|^I\d{4} |ev_poll_posix|fork_posix\.cc"
    r"|TORCH_NCCL_AVOID_RECORD_STREAMS|NNPACK|pynvml package is deprecated|^\s*import pynvml|^\s*$"
)


@dataclass(frozen=True, slots=True)
class Command:
    """How to start a child. `shown`: the line a person can run by hand to get the same process."""

    name: str  # "router", "shard-0", "download", "convert"
    argv: tuple[str, ...]
    environ: Mapping[str, str] = field(repr=False)
    rank: int | None = None

    @property
    def shown(self) -> str:
        return shlex.join(self.argv)


@dataclass(frozen=True, slots=True)
class Record:
    """A child logged something; the console has shown it already."""

    child: "Child"
    record: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Exited:
    """A child ended and both its pipes are read to their end."""

    child: "Child"


Post = Callable[[Record | Exited], None]


class Child:
    """A running child. Create with `Child.start(...)`."""

    def __init__(self, command: Command, process: subprocess.Popen[bytes], console: Console, post: Post) -> None:
        self.command = command
        self.started_s = time.monotonic()
        self.exited_s: float | None = None
        self.last_error: str | None = None  # the last record at ERROR or above
        self.stopped_because: str | None = None  # set when the launcher itself ended it
        self._process = process
        self._console = console
        self._post = post
        self._stderr = bytearray()
        self._dumps = False  # faulthandler's stacks are coming; the explanation of the death shows them, in one piece
        self._gone = asyncio.Event()

    @classmethod
    def start(cls, command: Command, console: Console, post: Post, guard: Guard) -> "Child":
        """Starts `command`; its records and its end are given to `post`. To be called in the event loop.

        Not asyncio's own subprocesses: those end only when every holder of their pipes has, grandchildren included.
        """
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", _EXEC_CHILD, str(os.getpid()), *command.argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(command.environ),
            process_group=0,
        )
        guard.watch_group(process.pid)
        child = cls(command, process, console, post)
        child._task = asyncio.create_task(child._follow(guard))
        return child

    _task: asyncio.Task[None]

    @property
    def name(self) -> str:
        return self.command.name

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return not self._gone.is_set()

    @property
    def returncode(self) -> int | None:
        """Exit status, or minus the number of the signal; None while it runs."""
        return self._process.returncode

    @property
    def stderr_tail(self) -> str:
        """The last 64 KiB of its stderr."""
        return self._stderr.decode(errors="replace")

    def signal(self, signum: int) -> None:
        """Sends `signum` to the child itself."""
        if self._process.returncode is None:
            try:
                self._process.send_signal(signum)
            except ProcessLookupError:
                return

    def kill(self, because: str) -> None:
        """SIGKILL to its whole process group."""
        if self._process.returncode is None:
            self.stopped_because = self.stopped_because or because
            kill_group(self.pid)

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it has ended, waiting for at most `timeout_s`."""
        try:
            await asyncio.wait_for(self._gone.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def stop(self, grace_s: float, because: str) -> None:
        """SIGTERM, then SIGKILL to the group after `grace_s`."""
        if not self.alive:
            return
        self.stopped_because = self.stopped_because or because
        self.signal(signal.SIGTERM)
        if not await self.wait(grace_s):
            self._console.text("launcher", "WARNING", f"Killing {self.name}: it did not stop within {grace_s:g} s")
            self.kill(because)
            await self.wait()

    async def _follow(self, guard: Guard) -> None:
        process = self._process
        streams = ((process.stdout, self._on_stdout), (process.stderr, self._on_stderr))
        readers = [asyncio.create_task(_lines(stream, handle)) for stream, handle in streams if stream is not None]
        ended = asyncio.Event()
        threading.Thread(target=self._reap, args=(asyncio.get_running_loop(), ended), daemon=True).start()
        await ended.wait()
        self.exited_s = time.monotonic()
        kill_group(self.pid)  # whatever it started and left behind
        guard.forget_group(self.pid)
        _, unfinished = await asyncio.wait(readers, timeout=_PIPE_GRACE_S)
        for reader in unfinished:
            reader.cancel()
        self._gone.set()
        self._post(Exited(self))

    def _reap(self, loop: asyncio.AbstractEventLoop, ended: asyncio.Event) -> None:
        """Waits for the process, in a thread of its own: no signal and no pidfd to depend on."""
        self._process.wait()
        try:
            loop.call_soon_threadsafe(ended.set)
        except RuntimeError:
            return  # the loop is closed: the launcher is ending and asked nobody to wait

    def _on_stdout(self, line: bytes) -> None:
        text = line.decode(errors="replace")
        record = logs.parse(text)
        if record is None:
            if text.strip():
                self._console.text(self.name, "INFO", text, **self._rank_field())
            return
        if record["level"] in ("ERROR", "CRITICAL"):
            self.last_error = str(record["message"])
        if record.get("event") != "progress":  # the supervisor shows progress
            self._console.show(self.name, record)
        self._post(Record(self, record))

    def _on_stderr(self, line: bytes) -> None:
        self._stderr += line + b"\n"
        del self._stderr[:-_STDERR_KEPT]
        text = line.decode(errors="replace")
        if not self._dumps and not _NOISE.search(text):
            self._console.text(self.name, "WARNING", text, **self._rank_field())
        self._dumps = self._dumps or text.startswith("Fatal Python error")

    def _rank_field(self) -> dict[str, int]:
        return {} if self.command.rank is None else {"rank": self.command.rank}


async def _lines(pipe: IO[bytes], handle: Callable[[bytes], None]) -> None:
    """Calls `handle` with each line of `pipe`, to its end; a line longer than 1 MiB comes in pieces."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    rest = b""
    try:
        while chunk := await reader.read(1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                handle(line)
            if len(rest) > _MAX_LINE:
                handle(rest)
                rest = b""
    finally:
        transport.close()
        if rest:
            handle(rest)
