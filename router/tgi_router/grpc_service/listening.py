"""The gRPC port: address, TLS, limits, key, and the services behind it.

Called by cli.py when `--grpc-port` is given.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2
from tgi_proto import inference_pb2 as pb

from ..config import RouterConfig
from ..errors import StartupError, Unauthorized
from ..server import Server
from . import health, tls
from .calls import Calls, Streamed, Whole
from .errors import code, trailing_metadata
from .health import Health
from .methods import Methods

logger = logging.getLogger(__name__)

# The second name is what newer tools ask for first; the messages are the same.
_REFLECTION = (reflection.SERVICE_NAME, "grpc.reflection.v1.ServerReflection")
_LAST_WORDS_S = 3.0  # for clients to read the end of their answers when the server ends
_INFERENCE = pb.DESCRIPTOR.services_by_name["Inference"]


@contextlib.asynccontextmanager
async def listening(server: Server, host: str) -> AsyncIterator[None]:
    """Serves on `--grpc-port` until the block ends. Raises StartupError."""
    config = server.config
    grpc_server = grpc.aio.server(interceptors=(_KeyCheck(server),), options=_options(config))
    calls = Calls(server)
    wellness = Health(server, frozenset({_INFERENCE.full_name, health.SERVICE}))
    grpc_server.add_generic_rpc_handlers((_inference(server, calls), wellness.handlers(), *_reflection()))
    _bind(grpc_server, config, host)
    await grpc_server.start()
    server.batcher.on_state = wellness.changed
    logger.info("gRPC on port %d, %s", config.grpc_port, "with TLS" if config.grpc_tls_cert else "without TLS")
    try:
        yield
    finally:
        wellness.end()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(calls.ended(), _LAST_WORDS_S)
        await grpc_server.stop(grace=0.5)


def _inference(server: Server, calls: Calls) -> Any:
    """The handlers of inference.proto's service; a method without a behaviour is an error at once."""
    methods = Methods(server)
    whole: dict[str, Whole] = {
        "Generate": methods.generate,
        "Chat": methods.chat,
        "Tokenize": methods.tokenize,
        "Info": methods.info,
    }
    streamed: dict[str, Streamed] = {"GenerateStream": methods.generate_stream, "ChatStream": methods.chat_stream}
    return grpc.method_handlers_generic_handler(
        _INFERENCE.full_name,
        {
            method.name: calls.streamed(method, streamed[method.name])
            if method.server_streaming
            else calls.whole(method, whole[method.name])
            for method in _INFERENCE.methods
        },
    )


def _reflection() -> list[Any]:
    """Reflection under both of its names, so that tools need no .proto file."""
    servicer = reflection.aio.ReflectionServicer((_INFERENCE.full_name, health.SERVICE, reflection.SERVICE_NAME))
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return [grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler}) for name in _REFLECTION]


def _options(config: RouterConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.payload_limit),
        ("grpc.max_send_message_length", -1),
        # A compressed message is measured before it is unpacked, so none is accepted: bit 0 is "identity".
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.so_reuseport", 0),  # a port that is taken is an error, not a share
        ("grpc.server_handshake_timeout_ms", 30_000),
        # A client that is gone without a word is noticed after a minute, and its generation ended.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 30_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # of clients; more often is too often
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def _bind(grpc_server: Any, config: RouterConfig, host: str) -> None:
    """Raises StartupError."""
    address = f"[{host}]:{config.grpc_port}" if ":" in host else f"{host}:{config.grpc_port}"
    try:
        if config.grpc_tls_cert is None or config.grpc_tls_key is None:
            grpc_server.add_insecure_port(address)
        else:
            grpc_server.add_secure_port(address, tls.credentials(config.grpc_tls_cert, config.grpc_tls_key))
    except RuntimeError as error:
        raise StartupError(f"`--grpc-port` {config.grpc_port} of {host} cannot be bound") from error


class _KeyCheck(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls without the API key, whatever their service; health says only whether the server is well."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(details)
        if handler is None or details.method.startswith(f"/{health.SERVICE}/"):
            return handler
        given = dict(details.invocation_metadata).get("authorization", "")
        return handler if self._server.admits(str(given)) else _refusing(handler, details.method)


def _refusing(handler: Any, path: str) -> Any:
    """A handler for the same kind of method that refuses."""
    error = Unauthorized()

    async def refuse(_: Any, context: Any) -> None:
        fields = {"status": code(error).name, "path": path, "client": context.peer()}
        logger.info("Refused: %s", error.message, extra=fields)
        await context.abort(code(error), error.message, trailing_metadata(error))

    if handler.request_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse)
    return grpc.unary_unary_rpc_method_handler(refuse)
