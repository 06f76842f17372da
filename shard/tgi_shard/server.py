"""gRPC ⇄ engine: one asyncio loop that answers calls, and one thread in which the engine executes them in order.

The loop is never blocked, so Health answers whatever the engine does. An exception in the engine thread is fatal: its
call and those behind it are answered with INTERNAL, and `serve` returns 1. Started by cli.py.
"""

import asyncio
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from tgi_proto import channel, service
from tgi_proto import generate_pb2 as pb

from .engine import Engine
from .errors import StepOrder

logger = logging.getLogger(__name__)

# How long answers that are on their way may take once the server stops, and the engine thread to end its step.
_GRACE_S = 1.0

_Work = tuple[Callable[[], Any], "asyncio.Future[Any]"]


class EngineThread:
    """Runs pieces of work strictly in order; the first exception other than StepOrder ends it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failed: asyncio.Future[BaseException] = loop.create_future()

    def start(self) -> None:
        self._thread.start()

    def submit(self, work: Callable[[], Any]) -> "asyncio.Future[Any]":
        """The future result of `work`, which runs after everything submitted before it."""
        future: asyncio.Future[Any] = self._loop.create_future()
        if self.failed.done():
            future.set_exception(self.failed.result())
        else:
            self._queue.put((work, future))
        return future

    def stop(self) -> bool:
        """Ends the thread after the work under way; false when that takes too long (a collective nobody answers)."""
        self._queue.put(None)
        self._thread.join(_GRACE_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            work, future = item
            try:
                result = work()
            except StepOrder as error:
                self._loop.call_soon_threadsafe(_finish, future, None, error)
            except BaseException as error:
                logger.critical("the engine failed: %s", one_line(error), exc_info=True)
                self._loop.call_soon_threadsafe(self._fail, future, error)
                return
            else:
                self._loop.call_soon_threadsafe(_finish, future, result, None)

    def _fail(self, future: "asyncio.Future[Any]", error: BaseException) -> None:
        _finish(future, None, error)
        while not self._queue.empty():
            if (item := self._queue.get()) is not None:
                _finish(item[1], None, error)
        if not self.failed.done():
            self.failed.set_result(error)


def _finish(future: "asyncio.Future[Any]", result: Any, error: BaseException | None) -> None:
    if future.done():  # cancelled: its caller went away
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def one_line(error: BaseException) -> str:
    """The exception as one line for people."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class ShardServer:
    """The five calls of the Shard service."""

    def __init__(self, engine: Engine, info: pb.InfoResponse, thread: EngineThread) -> None:
        self._engine = engine
        self._info = info
        self._thread = thread
        self._next_step = 1
        self._early: dict[int, asyncio.Future[None]] = {}  # step → to be resolved when it is its turn

    def behaviours(self) -> dict[str, Any]:
        """For tgi_proto.service.handlers."""
        return {
            "Info": self.info,
            "Reset": self.reset,
            "Prefill": self.prefill,
            "Decode": self.decode,
            "Health": self.health,
        }

    async def info(self, request: pb.InfoRequest, context: Any) -> pb.InfoResponse:
        return self._info

    async def health(self, request: pb.HealthRequest, context: Any) -> pb.HealthResponse:
        return pb.HealthResponse()

    async def reset(self, request: pb.ResetRequest, context: Any) -> pb.ResetResponse:
        self._next_step = 1
        for turn in self._early.values():
            _finish(turn, None, StepOrder("a reset came before the steps that this one follows"))
        self._early.clear()
        await self._run(self._engine.reset, context)
        return pb.ResetResponse()

    async def prefill(self, request: pb.PrefillRequest, context: Any) -> pb.StepResponse:
        return await self._step(list(request.admissions), request.plan, context)

    async def decode(self, request: pb.DecodeRequest, context: Any) -> pb.StepResponse:
        return await self._step([], request.plan, context)

    async def _step(self, admissions: list[pb.Admission], plan: pb.StepPlan, context: Any) -> pb.StepResponse:
        started = time.perf_counter_ns()
        await self._wait_for_turn(plan.step, context)
        response: pb.StepResponse = await self._run(lambda: self._engine.step(admissions, plan), context)
        response.total_ns = time.perf_counter_ns() - started
        return response

    async def _wait_for_turn(self, step: int, context: Any) -> None:
        """Puts calls in the order of their steps: a small one can overtake a large one on the way through HTTP/2."""
        ahead = step - self._next_step
        if not 0 <= ahead < max(self._info.max_steps_in_flight, 1) or step in self._early:
            text = f"step {step} came, step {self._next_step} is next"
            await context.abort(grpc.StatusCode.INTERNAL, text)
        if ahead:
            turn = asyncio.get_running_loop().create_future()
            self._early[step] = turn
            try:
                await turn
            except StepOrder as error:
                await context.abort(grpc.StatusCode.INTERNAL, one_line(error))
        # Between here and `submit` nothing is awaited, so the next step cannot slip in.
        self._next_step = step + 1
        follower = self._early.pop(self._next_step, None)
        if follower is not None and not follower.done():
            follower.set_result(None)

    async def _run(self, work: Callable[[], Any], context: Any) -> Any:
        try:
            return await self._thread.submit(work)
        except Exception as error:
            await context.abort(grpc.StatusCode.INTERNAL, one_line(error))


async def serve(engine: Engine, info: pb.InfoResponse, uds_path: str, ready: Callable[[], None]) -> int:
    """Serves until SIGTERM or SIGINT (returns 0) or the engine fails (returns 1). `ready`: the socket is open."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    thread = EngineThread(loop)
    thread.failed.add_done_callback(lambda _: stopped.set())
    server = grpc.aio.server(options=channel.SERVER_OPTIONS)
    server.add_generic_rpc_handlers((service.handlers(ShardServer(engine, info, thread).behaviours()),))
    path = Path(channel.socket_path(uds_path, info.rank))
    _bind(server, path)
    thread.start()
    await server.start()
    try:
        ready()
        await stopped.wait()
        await server.stop(_GRACE_S if thread.failed.done() else 0)
        ended = thread.stop()
    finally:
        _unlink(path)
    if not ended:
        logger.warning("leaving in the middle of a step: the engine thread does not end")
        logging.shutdown()
        os._exit(1 if thread.failed.done() else 0)
    return 1 if thread.failed.done() else 0


def _bind(server: grpc.aio.Server, path: Path) -> None:
    """Binds the Unix socket so that only this user can connect; replaces one that a killed process left."""
    _unlink(path)
    previous = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
    finally:
        os.umask(previous)


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
