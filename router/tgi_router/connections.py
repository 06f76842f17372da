"""HTTP connections with deadlines, so that a client that stalls, by design or by accident, costs nothing for long.

aiohttp by itself waits an hour for a request's head and for ever for a client that does not read. Here a connection
is closed when a head does not arrive whole in time, and when what was written is not read in time; its handler is
cancelled then, and with it the generation. The deadline for a body is bodies.py's. Bytes that are no HTTP get TGI's
error JSON and one line in the log. Used by cli.py and the tests in place of `web.AppRunner`.
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a connection may take, in seconds."""

    head_s: float = 30.0  # from the first byte of a request's head, or from connecting, to the head's end
    idle_s: float = 630.0  # between requests: longer than load balancers keep theirs open, so that they close first
    write_s: float = 60.0  # for a client to read what stands in its full write buffer
    linger_s: float = 5.0  # for a client to stop sending a body whose request is answered already


class Connection(web.RequestHandler):
    """aiohttp's connection, with a deadline for each head and one for each wait for a full write buffer."""

    __slots__ = ("_begun", "_busy", "_head_timer", "_patience", "_write_timer")

    def __init__(self, manager: web.Server, patience: Patience) -> None:
        super().__init__(
            manager,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=patience.idle_s,
            lingering_time=patience.linger_s,
            access_log=None,  # type: ignore[arg-type]
        )
        self._patience = patience
        self._begun = False  # something has been received
        self._busy = False  # between a request's head and the end of its response
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        self._begun = True
        super().data_received(data)
        if self._head_timer is None and not self._busy:
            self._await_head()

    def head_complete(self) -> None:
        """Called when a request's handler is about to begin."""
        self._busy = True
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._busy = False

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = asyncio.get_running_loop().call_later(self._patience.write_s, self._cut_reader)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def connection_lost(self, exc: BaseException | None) -> None:
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What aiohttp answers when it could not make a request of the bytes; everything else is app.py's."""
        if status != 400:
            return super().handle_error(request, status, exc, message)
        detail = " ".join((message or "").split())[:200]
        logger.info("Refused bytes that are no HTTP request: %s", detail, extra={"client": self._client})
        error = {"error": f"The bytes are no HTTP request: {detail}", "error_type": "validation"}
        response = web.Response(status=400, body=msgspec.json.encode(error), content_type="application/json")
        response.force_close()
        return response

    def _await_head(self) -> None:
        self._head_timer = asyncio.get_running_loop().call_later(self._patience.head_s, self._head_is_late)

    def _head_is_late(self) -> None:
        """Looks once more in the next turn: in this one the head may have come, and its handler not begun yet."""
        self._head_timer = asyncio.get_running_loop().call_later(0, self._cut_head)

    def _cut_head(self) -> None:
        level = logging.INFO if self._begun else logging.DEBUG  # browsers open connections that they may not need
        text = "Closed a connection: no whole request head came within %g s"
        logger.log(level, text, self._patience.head_s, extra={"client": self._client})
        self.force_close()

    def _cut_reader(self) -> None:
        text = "Closed a connection: its client did not read a full buffer within %g s"
        logger.info(text, self._patience.write_s, extra={"client": self._client})
        if self.transport is not None:
            self.transport.abort()

    @property
    def _client(self) -> str | None:
        """The client's address."""
        peer = None if self.transport is None else self.transport.get_extra_info("peername")
        return str(peer[0]) if peer else None


class _Server(web.Server):
    """Makes the connections."""

    def __init__(self, like: web.Server, patience: Patience) -> None:
        super().__init__(
            like.request_handler, request_factory=self._begin, handler_cancellation=like.handler_cancellation
        )
        self._make = like.request_factory
        self._patience = patience

    def __call__(self) -> Connection:
        return Connection(self, self._patience)

    def _begin(self, message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        protocol.head_complete()
        return self._make(message, payload, protocol, writer, task)


class Runner(web.AppRunner):
    """`web.AppRunner` whose connections have deadlines and whose handlers are cancelled when their client leaves."""

    __slots__ = ("_patience",)

    def __init__(
        self, app: web.Application, patience: Patience | None = None, *, shutdown_timeout_s: float = 5.0
    ) -> None:
        # handler_cancellation: a client that leaves cancels its handler, which cancels its request
        super().__init__(app, handler_cancellation=True, shutdown_timeout=shutdown_timeout_s)
        self._patience = patience or Patience()

    async def _make_server(self) -> web.Server:
        return _Server(await super()._make_server(), self._patience)
