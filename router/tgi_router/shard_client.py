"""ShardedClient: one call becomes one call to every shard of the group, and one group lives or dies as a whole.

Owns the gRPC channels, the check that all ranks agree, and noticing that a shard died (its connection closes) or hangs
(no answer within the deadline; reported to the launcher, which kills it). Knows nothing of scheduling; a step is bytes.
Called by batcher.py only.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio
from tgi_proto import generate_pb2 as pb
from tgi_proto.channel import CHANNEL_OPTIONS, address, socket_path
from tgi_proto.logs import event
from tgi_proto.service import stub

logger = logging.getLogger(__name__)

RETRY_S = 0.1  # between two attempts to connect
PING_S = 0.25  # between two Health calls to a rank, and between two looks at the deadline
SURVIVOR_S = 10.0  # a shard of a lost group that still answers after so long has been forgotten by the launcher

_EMPTY = pb.HealthRequest().SerializeToString()  # of Info, Reset and Health alike


class ShardsLost(Exception):
    """The group cannot go on and has to be restarted by the launcher. `cause`: one sentence part for logs."""

    def __init__(self, cause: str, hung_ranks: tuple[int, ...] = ()) -> None:
        super().__init__(cause)
        self.cause = cause
        self.hung_ranks = hung_ranks  # alive, and to be killed


class _Shard:
    """The connection to one rank."""

    def __init__(self, uds_path: str, rank: int) -> None:
        self.rank = rank
        self.channel = grpc.aio.insecure_channel(address(uds_path, rank), options=CHANNEL_OPTIONS)
        self.health = stub(self.channel, "Health")
        self.steps = {"Prefill": stub(self.channel, "Prefill"), "Decode": stub(self.channel, "Decode")}
        self.info = pb.InfoResponse()
        self.answered_s = time.monotonic()  # last sign of life

    async def greet(self, timeout_s: float) -> None:
        """Resets the shard and asks for its facts. Raises grpc.RpcError."""
        await stub(self.channel, "Reset")(_EMPTY, timeout=timeout_s)
        self.info = await stub(self.channel, "Info")(_EMPTY, timeout=timeout_s)


class ShardedClient:
    """The group behind `master_uds_path` (rank 0's socket). Found by `connect`, lost at most once per connection."""

    def __init__(self, master_uds_path: str, step_deadline_s: float, on_lost: Callable[[], None]) -> None:
        """on_lost: called from the event loop when `lost` is set."""
        self._uds_path = master_uds_path.removesuffix("-0")
        self._deadline_s = step_deadline_s
        self._on_lost = on_lost
        self._shards: list[_Shard] = []
        self._watchers: list[asyncio.Task[None]] = []
        self._num_unanswered = 0  # steps
        self._oldest_since_s = 0.0  # when the oldest of them became the oldest
        self._lost_pids: frozenset[int] = frozenset()
        self.lost: ShardsLost | None = None

    @property
    def infos(self) -> list[pb.InfoResponse]:
        """One per rank, in rank order; of the present connection."""
        return [shard.info for shard in self._shards]

    # ---- connecting

    async def connect(self) -> list[pb.InfoResponse]:
        """Waits, as long as it takes, until every rank answers; resets them. After a loss only new processes count.

        The launcher decides when waiting has no point; here a rank that listens and stays silent is reported as hung.
        """
        await self.close()
        self.lost = None
        silent_since: dict[int, float] = {}
        survivor_since: float | None = None
        while True:
            try:
                await self._greet_all(silent_since)
            except (grpc.RpcError, OSError) as error:
                logger.debug("the shards do not answer yet: %s", error)
            else:
                old = [shard.rank for shard in self._shards if shard.info.pid in self._lost_pids]
                if not old:
                    break
                now = time.monotonic()
                survivor_since = survivor_since or now
                if now - survivor_since > SURVIVOR_S:
                    self._report_hung(tuple(old), "still runs although its group was lost")
                    survivor_since = now
            await self._close_channels()
            await asyncio.sleep(RETRY_S)
        self._num_unanswered = 0
        self._watchers = [
            asyncio.create_task(watch) for shard in self._shards for watch in (self._watch(shard), self._ping(shard))
        ]
        return self.infos

    async def _greet_all(self, silent_since: dict[int, float]) -> None:
        """Fresh channels to all ranks: a restarted shard has replaced its socket file."""
        first = await self._greet(0, silent_since)
        others = range(1, first.info.world_size)
        await asyncio.gather(*(self._greet(rank, silent_since) for rank in others))
        self._shards.sort(key=lambda shard: shard.rank)

    async def _greet(self, rank: int, silent_since: dict[int, float]) -> _Shard:
        path = socket_path(self._uds_path, rank)
        if not os.path.exists(path):  # noqa: ASYNC240 a stat of a local socket
            raise FileNotFoundError(f"{path} does not exist yet")
        shard = _Shard(self._uds_path, rank)
        self._shards.append(shard)
        try:
            await shard.greet(self._deadline_s)
        except grpc.RpcError:
            await self._note_silence(rank, path, silent_since)
            raise
        silent_since.pop(rank, None)
        return shard

    async def _note_silence(self, rank: int, path: str, silent_since: dict[int, float]) -> None:
        """Reports a rank whose kernel socket accepts connections for longer than the deadline while nobody answers."""
        try:
            _, writer = await asyncio.open_unix_connection(path)
        except OSError:
            silent_since.pop(rank, None)  # nobody listens: it is being started
            return
        writer.close()
        since = silent_since.setdefault(rank, time.monotonic())
        if time.monotonic() - since > self._deadline_s:
            self._report_hung((rank,), "listens on its socket and does not answer")
            silent_since.pop(rank)

    # ---- steps

    def send(self, method: str, message: bytes, step: int) -> "asyncio.Task[pb.StepResponse]":
        """Starts step number `step` on every rank with the same bytes.

        The task yields rank 0's answer with the row errors of all ranks, or raises ShardsLost.
        """
        shards = self._shards
        calls = [shard.steps[method](message) for shard in shards]
        if not self._num_unanswered:
            self._oldest_since_s = time.monotonic()
        self._num_unanswered += 1
        return asyncio.create_task(self._receive(shards, calls, step))

    async def _receive(
        self, shards: list[_Shard], calls: list[Awaitable[pb.StepResponse]], step: int
    ) -> pb.StepResponse:
        if len(calls) == 1:
            answers = [await self._one(shards, 0, calls[0])]
        else:
            answers = await asyncio.gather(*(self._one(shards, rank, call) for rank, call in enumerate(calls)))
        if shards is self._shards:
            self._oldest_since_s = time.monotonic()
            self._num_unanswered -= 1
        first = answers[0]
        if first.step != step:
            raise self._disagree(shards, f"step {step} was answered with step {first.step}")
        for rank, answer in enumerate(answers[1:], start=1):
            if (answer.step, answer.digest) != (first.step, first.digest):
                raise self._disagree(shards, f"ranks 0 and {rank} disagree about the tokens of step {step}")
            known = {failed.request_id for failed in first.errors}
            first.errors.extend(failed for failed in answer.errors if failed.request_id not in known)
        return first

    # ---- losing them

    def _lose(self, shards: list[_Shard], lost: ShardsLost) -> ShardsLost:
        """The first cause counts; hung ranks are reported once.

        shards: the connection that `lost` speaks of; a late word about an earlier one changes nothing.
        """
        if shards is not self._shards:
            return lost
        if self.lost is None:
            self.lost = lost
            self._lost_pids = frozenset(shard.info.pid for shard in shards)
            self._report_hung(lost.hung_ranks, lost.cause)
            self._on_lost()
        return self.lost

    async def _one(self, shards: list[_Shard], rank: int, call: Awaitable[pb.StepResponse]) -> pb.StepResponse:
        """One rank's answer. A shard that answers with an error is about to exit and says why in its own log."""
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise self._lose(shards, ShardsLost(f"rank {rank}: {error.details()}")) from error

    def _disagree(self, shards: list[_Shard], cause: str) -> ShardsLost:
        return self._lose(shards, ShardsLost(cause, tuple(shard.rank for shard in shards)))

    def _report_hung(self, ranks: tuple[int, ...], cause: str) -> None:
        for rank in ranks:
            message = f"shard {rank} must be restarted: {cause}"
            event(logger, "shard_hung", message, rank=rank, deadline_s=self._deadline_s)

    async def _watch(self, shard: _Shard) -> None:
        """Loses the group as soon as the connection closes, also when no call is under way."""
        shards, ready = self._shards, grpc.ChannelConnectivity.READY
        await shard.channel.wait_for_state_change(ready)
        self._lose(shards, ShardsLost(f"rank {shard.rank} closed its connection"))

    async def _ping(self, shard: _Shard) -> None:
        """Loses the group when the process does not answer (stopped), or a step takes longer than the deadline."""
        shards = self._shards
        while True:
            try:
                await shard.health(_EMPTY, timeout=self._deadline_s)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    cause = f"rank {shard.rank} has not answered for {self._deadline_s:g} s"
                    self._lose(shards, ShardsLost(cause, (shard.rank,)))
                else:
                    self._lose(shards, ShardsLost(f"rank {shard.rank}: {error.details()}"))
                return
            now = shard.answered_s = time.monotonic()
            if self._num_unanswered and now - self._oldest_since_s > self._deadline_s:
                self._lose(shards, self._overdue(now))
                return
            await asyncio.sleep(PING_S)

    def _overdue(self, now: float) -> ShardsLost:
        """A step is overdue. A rank that waits for a stopped one in a collective is itself fine: it answers pings."""
        silent = tuple(shard.rank for shard in self._shards if now - shard.answered_s > 4 * PING_S)
        ranks = silent or tuple(shard.rank for shard in self._shards)
        return ShardsLost(f"a step was not answered within {self._deadline_s:g} s", ranks)

    async def close(self) -> None:
        """Ends watching and closes the channels; calls under way are cancelled."""
        for watcher in self._watchers:
            watcher.cancel()
        for watcher in self._watchers:
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
        self._watchers = []
        await self._close_channels()

    async def _close_channels(self) -> None:
        shards, self._shards = self._shards, []
        for shard in shards:
            await shard.channel.close()
