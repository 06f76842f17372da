"""What holds for every call, whatever its method: id, deadline, refusal while draining, counting, failures.

A behaviour (methods.py) gets a parsed message and returns or writes messages; it raises ApiError like a REST route.
Messages are parsed and written here rather than by gRPC, so that a broken one is the caller's INVALID_ARGUMENT and not
our INTERNAL. Used by listening.py.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from .. import log_context
from ..errors import ShuttingDown, UnknownFields, presentable
from ..infer import Call, Deadline
from ..server import Server, request_id
from ..unknown_fields import header_value
from .errors import ClientTooSlow, MalformedMessage, code, sentence, trailing_metadata
from .messages import unknown_fields

if TYPE_CHECKING:
    from ..tracing import Trace

logger = logging.getLogger(__name__)

T = TypeVar("T")
Context = Any  # grpc.aio.ServicerContext, for which grpc has no types
Handler = Any  # grpc.RpcMethodHandler
Whole = Callable[[Any, Call], Awaitable[Message]]
Streamed = Callable[[Any, Call, "Writer"], Awaitable[None]]

PATIENCE_S = 60.0  # for a client to read a message
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
            async def work(call: Call) -> None:
                request = await self._accept(method, data, context, call)
                with Writer(context) as writer:
                    await behaviour(request, call, writer)

            await self._run(method, context, work)

        return grpc.unary_stream_rpc_method_handler(handle)

    async def _run(self, method: MethodDescriptor, context: Context, work: Callable[[Call], Awaitable[T]]) -> T:
        """`work` of a call; what it raises becomes the call's status."""
        metadata = dict(context.invocation_metadata() or ())
        trace = self._trace(method, metadata)
        call = Call(request_id(str(metadata.get("x-request-id", ""))), deadline=_deadline(context), trace=trace)
        path = f"/{method.containing_service.full_name}/{method.name}"
        traced = {} if trace is None else {"trace_id": trace.trace_id}
        log_context.enter(request_id=call.request_id, path=path, **traced)
        self._server.metrics.grpc_request_count.inc(method.name)
        self._num_open += 1
        self._idle.clear()
        status: grpc.StatusCode | None = None
        try:
            result = await work(call)
            status = grpc.StatusCode.OK
            return result
        except (ConnectionError, grpc.aio.InternalError) as gone:  # nobody listens any more; gRPC expects this then
            raise asyncio.CancelledError from gone
        except Exception as failure:
            error = presentable(failure)
            status = code(error)
        finally:
            if trace is not None:
                trace.end_rpc(None if status is None else status.value[0])
            self._num_open -= 1
            if self._num_open == 0:
                self._idle.set()
        if not error.logged:  # infer.py has a line for the others
            fields = {"status": code(error).name, "client": context.peer()}
            logger.info("Refused: %s", error.message, extra=fields)
        trailing = (("x-request-id", call.request_id), *trailing_metadata(error))
        try:
            return await context.abort(code(error), sentence(error), trailing)  # type: ignore[no-any-return]
        except grpc.aio.InternalError as gone:
            raise asyncio.CancelledError from gone

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
        except DecodeError as error:
            raise MalformedMessage(str(error)) from error
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
    return None if left_s is None else Deadline(left_s, time.monotonic() + left_s, "deadline")


class Writer:
    """Writes a stream's messages, and ends its call with ClientTooSlow when the client does not read them."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._task = asyncio.current_task()
        self._writing_since_s: float | None = None
        self._stalled = False
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> "Writer":
        self._timer = self._loop.call_later(PATIENCE_S, self._look)
        return self

    async def write(self, message: Message) -> None:
        """Raises ConnectionResetError when the client has left."""
        self._writing_since_s = time.monotonic()
        try:
            await self._context.write(message.SerializeToString())
        except grpc.aio.InternalError as error:
            raise ConnectionResetError("the client has left") from error
        self._writing_since_s = None

    def stall(self) -> None:
        """Too many tokens wait for the client."""
        if self._task is not None and not self._stalled:
            self._stalled = True
            self._task.cancel()

    def _look(self) -> None:
        """One timer per stream, moved on lazily: one per message would cost as much as the message."""
        now_s = time.monotonic()
        since_s = now_s if self._writing_since_s is None else self._writing_since_s
        if now_s - since_s >= PATIENCE_S:
            self.stall()
        else:
            self._timer = self._loop.call_later(since_s + PATIENCE_S - now_s, self._look)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._timer.cancel()
        if kind is asyncio.CancelledError and self._stalled and self._task is not None and self._task.uncancel() == 0:
            raise ClientTooSlow() from None
