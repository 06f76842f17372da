"""What holds for every call, whatever its method: id, deadline, refusal while draining, counting, failures.

A behaviour (methods.py) gets a parsed message and gives messages back; it raises ApiError like a REST route. Messages
are parsed and written here rather than by gRPC, so that a broken one is the caller's INVALID_ARGUMENT and not our
INTERNAL. Used by listening.py.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from .. import log_context
from ..errors import MalformedBody, ShuttingDown, UnknownFields, presentable
from ..infer import Call, Deadline
from ..server import Server, request_id
from ..unknown_fields import header_value
from .errors import ClientTooSlow, code, sentence, trailing_metadata
from .messages import unknown_fields

if TYPE_CHECKING:
    from ..tracing import Trace

logger = logging.getLogger(__name__)

T = TypeVar("T")
Context = Any  # grpc.aio.ServicerContext, for which grpc has no types
Handler = Any  # grpc.RpcMethodHandler
Whole = Callable[[Any, Call], Awaitable[Message]]
Stall = Callable[[], None]  # ends the call, because its client does not read
Streamed = Callable[[Any, Call, Stall], AsyncGenerator[Message, None]]

ALWAYS_ANSWERED = ("Info",)  # also while draining, like REST's GET routes


class Calls:
    """Makes gRPC handlers of behaviours, and knows how many calls are open."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._num_open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def ended(self) -> None:
        """Waits until no call is open."""
        await self._idle.wait()

    def whole(self, method: MethodDescriptor, behaviour: Whole) -> Handler:
        """The handler of a method with one answer."""

        async def handle(data: bytes, context: Context) -> bytes:
            async def work(call: Call) -> bytes:
                request = await self._accept(method, data, context, call)
                return (await behaviour(request, call)).SerializeToString()

            return await self._run(method, context, work)

        return grpc.unary_unary_rpc_method_handler(handle)

    def streamed(self, method: MethodDescriptor, behaviour: Streamed) -> Handler:
        """The handler of a method with a stream of answers."""

        async def handle(data: bytes, context: Context) -> None:
            stall = _Stall()

            async def work(call: Call) -> None:
                request = await self._accept(method, data, context, call)
                async with contextlib.aclosing(behaviour(request, call, stall)) as messages:
                    async for message in messages:
                        await context.write(message.SerializeToString())

            await self._run(method, context, lambda call: stall.watch(work(call)))

        return grpc.unary_stream_rpc_method_handler(handle)

    async def _run(self, method: MethodDescriptor, context: Context, work: Callable[[Call], Awaitable[T]]) -> T:
        """`work` of a call; what it raises becomes the call's status."""
        metadata = dict(context.invocation_metadata() or ())
        trace = self._trace(method, metadata)
        call = Call(request_id(str(metadata.get("x-request-id", ""))), deadline=_deadline(context), trace=trace)
        log_context.enter(request_id=call.request_id, **({} if trace is None else {"trace_id": trace.trace_id}))
        self._server.metrics.grpc_request_count.inc(method.name)
        self._num_open += 1
        self._idle.clear()
        status = None
        try:
            result = await work(call)
            status = 200
            return result
        except Exception as failure:
            error = presentable(failure)
            status = error.status
        finally:
            if trace is not None:
                trace.end(status)
            self._num_open -= 1
            if self._num_open == 0:
                self._idle.set()
        if not error.logged:  # infer.py has a line for the others
            fields = {"status": code(error).name, "method": method.full_name, "client": context.peer()}
            logger.info("Refused: %s", error.message, extra=fields)
        trailing = (("x-request-id", call.request_id), *trailing_metadata(error))
        return await context.abort(code(error), sentence(error), trailing)  # type: ignore[no-any-return]

    def _trace(self, method: MethodDescriptor, metadata: dict[str, Any]) -> "Trace | None":
        tracing = self._server.tracing
        if tracing is None:
            return None
        service = method.containing_service.full_name
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method.name}
        return tracing.begin(f"{service}/{method.name}", metadata, attributes)

    async def _accept(self, method: MethodDescriptor, data: bytes, context: Context, call: Call) -> Message:
        """The request, and the initial metadata in return. Raises ApiError."""
        if self._server.draining and method.name not in ALWAYS_ANSWERED:
            raise ShuttingDown(self._server.infer.drained_in_s)
        try:
            request = GetMessageClass(method.input_type).FromString(data)
        except (DecodeError, RecursionError) as error:
            raise MalformedBody(str(error)) from error
        initial = [("x-request-id", call.request_id)]
        names = unknown_fields(request)
        if names:
            shown = header_value(names)
            if self._server.config.strict_params:
                raise UnknownFields(shown, names[0])
            initial.append(("x-ignored-params", shown))
        await context.send_initial_metadata(tuple(initial))
        return request


def _deadline(context: Context) -> Deadline | None:
    """The caller's, which Infer keeps; gRPC cancels our side as well, some milliseconds earlier or later."""
    left_s = context.time_remaining()
    return None if left_s is None else Deadline(left_s, time.monotonic() + left_s)


class _Stall:
    """Called when the client does not read: ends what `watch` awaits."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None
        self._called = False

    def __call__(self) -> None:
        self._called = True
        if self._task is not None:
            self._task.cancel()

    async def watch(self, work: Awaitable[None]) -> None:
        """Raises ClientTooSlow when called meanwhile."""
        task = self._task = asyncio.current_task()
        try:
            await work
        except asyncio.CancelledError:
            if not self._called or task is None or task.uncancel() > 0:
                raise
            raise ClientTooSlow() from None
        finally:
            self._task = None
