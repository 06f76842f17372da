"""Helpers for tests with real connections: fake shards as processes that can be killed and stopped, and patience."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

FAKE_SHARD = Path(__file__).with_name("fake_shard.py")


async def until(condition: Callable[[], object], timeout_s: float = 60.0) -> float:
    """Waits for `condition`; the seconds it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, "waited in vain"
        await asyncio.sleep(0.005)
    return time.monotonic() - started


class ShardProcess:
    """`python fake_shard.py` for one rank, with real signals."""

    def __init__(self, uds_path: str, *options: str, rank: int = 0, world_size: int = 1) -> None:
        self._arguments = ["--uds-path", uds_path, "--rank", str(rank), "--world-size", str(world_size), *options]

    async def start(self) -> "ShardProcess":
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, str(FAKE_SHARD), *self._arguments, stdout=asyncio.subprocess.PIPE
        )
        assert self.process.stdout is not None
        assert b"ready" in await self.process.stdout.readline()
        return self

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    async def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ends it, stopped or not; its exit code."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                self.send(number)
                self.send(signal.SIGCONT)
        return await self.process.wait()
