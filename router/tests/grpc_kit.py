"""The router of api_kit.py with its public gRPC port, and clients made by the protobuf compiler.

async with serving() as api, client(api) as stub:
    answer = await stub.Generate(pb.GenerateRequest(inputs="hello"))
"""

import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import api_kit
import grpc
from api_kit import Api
from tgi_proto import inference_pb2_grpc
from tgi_router.grpc_service.listening import listening


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.asynccontextmanager
async def serving(**changes: Any) -> AsyncIterator[Api]:
    """As api_kit.serving, with gRPC beside HTTP."""
    async with api_kit.serving(**{"grpc_port": free_port(), **changes}) as api, listening(api.server, "127.0.0.1"):
        yield api


def address(api: Api) -> str:
    return f"127.0.0.1:{api.server.config.grpc_port}"


@contextlib.asynccontextmanager
async def client(api: Api) -> AsyncIterator[Any]:
    """The generated asynchronous stub."""
    async with grpc.aio.insecure_channel(address(api)) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


async def failure(call: Any) -> tuple[grpc.aio.AioRpcError, dict[str, Any]]:
    """The error that `call` ends with, and its trailing metadata."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error, dict(error.trailing_metadata() or ())
    raise AssertionError("the call has succeeded")
