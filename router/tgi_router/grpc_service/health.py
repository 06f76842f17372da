"""The standard health service, grpc.health.v1: SERVING exactly while GET /health says 200.

The messages are grpcio-health-checking's. Its servicer is not used: it holds a lock while it writes to a watcher, so
that one who does not read would keep the status from everybody else. Used by listening.py.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from ..server import Server

SERVICE = "grpc.health.v1.Health"

Response = health_pb2.HealthCheckResponse


class Health:
    """One per server; it is told of every change of the server's state."""

    def __init__(self, server: Server, services: frozenset[str]) -> None:
        """services: the names that can be asked for, beside "" for the whole server."""
        self._server = server
        self._services = services | {""}
        self._watchers: dict[int, asyncio.Event] = {}  # by the order of their coming
        self._num_watchers = 0
        self._ending = False

    def changed(self) -> None:
        """The server's health may be another one."""
        for watcher in self._watchers.values():
            watcher.set()

    def end(self) -> None:
        """Ends every watch."""
        self._ending = True
        self.changed()

    def handlers(self) -> Any:
        """What gRPC serves."""
        parse, serialize = health_pb2.HealthCheckRequest.FromString, Response.SerializeToString
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Check": grpc.unary_unary_rpc_method_handler(self._check, parse, serialize),
                "Watch": grpc.unary_stream_rpc_method_handler(self._watch, parse, serialize),
            },
        )

    def _status(self, service: str) -> Any:
        if service not in self._services:
            return Response.SERVICE_UNKNOWN
        return Response.SERVING if self._server.healthy else Response.NOT_SERVING

    async def _check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:
        status = self._status(request.service)
        if status == Response.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"There is no service `{request.service[:256]}`")
        return Response(status=status)

    async def _watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> AsyncIterator[Any]:
        """The status now and whenever it changes; changes that are over before they are read are left out."""
        self._num_watchers += 1
        number = self._num_watchers
        changed = self._watchers[number] = asyncio.Event()
        last = None
        try:
            while not self._ending:
                changed.clear()
                status = self._status(request.service)
                if status != last:
                    yield Response(status=status)
                    last = status
                await changed.wait()
        finally:
            del self._watchers[number]
