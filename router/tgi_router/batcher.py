"""THE loop: plan a step, send it to every shard, apply the oldest answer, hand the tokens to the sinks.

Owns the one asyncio task that drives the scheduler and the shard client, and the life of the connection to the shards:
starting, serving, recovering after a crash, draining. Decides nothing about scheduling and knows no text and no HTTP.
Called by infer.py (submit, cancel), health and metrics routes (state, info), app.py (start, drain, stop).
"""

from enum import Enum

from tgi_proto import generate_pb2 as pb

from .config import RouterConfig
from .metrics import Metrics
from .request import Request, TokenSink, ValidRequest


class State(Enum):
    """What /health says: only SERVING is healthy."""

    STARTING = "starting"  # waits for the shards' sockets
    SERVING = "serving"
    RECOVERING = "recovering"  # a shard died or hung; requests wait for the launcher to restart the group
    DRAINING = "draining"  # finishes what it has, accepts nothing
    STOPPED = "stopped"


class Batcher:
    """One per router. Every method is called from the event loop's thread; none blocks it."""

    def __init__(self, config: RouterConfig, metrics: Metrics) -> None:
        self.state = State.STARTING
        self.reason = "waiting for the shards"  # one sentence (part) for logs and /health, without a full stop

    async def start(self) -> None:
        """Connects to the shards, however long they load, then starts the loop. After it `info` is valid.

        Raises StartupError when shards and configuration do not go together (e.g. no KV block).
        """
        raise NotImplementedError

    @property
    def healthy(self) -> bool:
        """True while the shards answer and new requests are accepted."""
        return self.state is State.SERVING

    @property
    def info(self) -> pb.InfoResponse:
        """Rank 0's facts about model and pool, of the latest (re)start. Raises Bug before `start` is done."""
        raise NotImplementedError

    @property
    def max_total_tokens(self) -> int:
        """Longest prompt + output that the model and the KV pool can hold, whatever the configuration allows."""
        raise NotImplementedError

    def submit(self, valid: ValidRequest, sink: TokenSink) -> Request:
        """Queues a request; its tokens arrive at `sink` from later turns of the event loop, never from within this call.

        Also accepted while recovering: served when the shards are back. Raises ValidationError when it can never fit
        into the KV pool, ShuttingDown while draining.

        The sink ends the request by returning a reason; it must return one (LENGTH) with token number max_new_tokens.
        An exception out of the sink fails its request alone (`sink.failed(InternalError())` is tried).
        The returned Request carries the times (arrived_s, admitted_s, first_token_s, finished_s; time.monotonic()),
        num_cached_tokens and the finish reason; read it, do not change it.
        """
        raise NotImplementedError

    def cancel(self, request: Request) -> None:
        """Ends a request whose client left: no sink call follows. Nothing happens when it is already over."""
        raise NotImplementedError

    async def drain(self) -> None:
        """From now on refuses new requests; returns when the last one has ended."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Ends the loop and the connections. Requests that are left get `failed(IncompleteGeneration())`."""
        raise NotImplementedError
