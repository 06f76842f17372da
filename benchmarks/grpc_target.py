"""The load generator's target over gRPC: the same requests, to `GenerateStream` or `ChatStream`.

Used by router_cost.py. Answers stay bytes but for the last one: the generator shares its CPU with what it measures.
"""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import grpc.aio
from tgi_proto import inference_pb2 as pb

from benchmarks.apis import Api
from benchmarks.load import Target
from benchmarks.measure import Outcome

SERVICE = "tgi.inference.v1.Inference"


class GrpcTarget(Target):
    """A server under load, through one channel, as a program would have it."""

    def __init__(self, channel: grpc.aio.Channel, model: str, server_pid: int) -> None:
        super().__init__("gRPC ", None, model, server_pid)  # type: ignore[arg-type]
        self._channel = channel

    async def send(self, api: Api, body: bytes, start_s: float) -> Outcome:
        """See Target. body: of the route that `api` names, whose fields are the message's."""
        chat = api.path.endswith("/chat/completions")
        fields = json.loads(body)
        fields.pop("stream", None)
        request = pb.ChatRequest(**fields) if chat else pb.GenerateRequest(**fields)
        method = f"/{SERVICE}/{'ChatStream' if chat else 'GenerateStream'}"
        times_s: list[float] = []
        last, error = b"", None
        try:
            async for message in self._channel.unary_stream(method)(request.SerializeToString()):
                times_s.append(time.perf_counter())
                last = message
        except grpc.aio.AioRpcError as failure:
            error = failure.code().name
        if chat:
            usage = pb.ChatStreamResponse.FromString(last).usage
            counts = (usage.prompt_tokens, usage.completion_tokens)
        else:
            details = pb.GenerateStreamResponse.FromString(last).details
            counts = (details.input_length, details.generated_tokens)
        return Outcome(
            start_s=start_s,
            end_s=time.perf_counter(),
            first_s=times_s[0] if times_s else None,
            gaps_s=[after - before for before, after in pairwise(times_s)],
            prompt_tokens=counts[0],
            output_tokens=counts[1],
            error=error,
        )


@asynccontextmanager
async def connect(address: str, *, model: str, server_pid: int) -> AsyncIterator[Target]:
    """The server's gRPC port at `address`."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield GrpcTarget(channel, model, server_pid)
