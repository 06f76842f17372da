"""Names and (de)serialisers of the `tgi.shard.v1.Shard` methods.

Written by hand instead of generated stubs for one reason: the router encodes a step once and sends the same bytes to
every shard, so its request serialiser is the identity.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from . import generate_pb2 as pb

SERVICE = "tgi.shard.v1.Shard"

# method -> (request type, response type)
METHODS: dict[str, tuple[type[Any], type[Any]]] = {
    "Info": (pb.InfoRequest, pb.InfoResponse),
    "Reset": (pb.ResetRequest, pb.ResetResponse),
    "Prefill": (pb.PrefillRequest, pb.StepResponse),
    "Decode": (pb.DecodeRequest, pb.StepResponse),
    "Health": (pb.HealthRequest, pb.HealthResponse),
}


def stub(channel: grpc.aio.Channel, method: str) -> grpc.aio.UnaryUnaryMultiCallable[bytes, Any]:
    """A callable for `method` that takes an already serialised request and returns the parsed response."""
    _, response_type = METHODS[method]
    return channel.unary_unary(
        f"/{SERVICE}/{method}", request_serializer=None, response_deserializer=response_type.FromString
    )


def handlers(behaviours: dict[str, Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Awaitable[Any]]]) -> Any:
    """A generic handler that serves `behaviours` (method name -> coroutine function) under SERVICE."""
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            name: grpc.unary_unary_rpc_method_handler(
                behaviour,
                request_deserializer=METHODS[name][0].FromString,
                response_serializer=METHODS[name][1].SerializeToString,
            )
            for name, behaviour in behaviours.items()
        },
    )
