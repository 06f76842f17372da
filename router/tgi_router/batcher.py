"""THE loop: plan a step, send it to every shard, apply the oldest answer, hand the tokens to the sinks.

Owns the one asyncio task that drives the scheduler and the shard client, and the life of the connection to the shards:
starting, serving, recovering after a crash, draining. Decides nothing about scheduling and knows no text and no HTTP.
Called by infer.py (submit, cancel), health and metrics routes (state, info), app.py (start, drain, stop).
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from enum import Enum
from itertools import count
from typing import NamedTuple

from tgi_proto import generate_pb2 as pb

from .config import RouterConfig
from .errors import Bug, IncompleteGeneration, InternalError, ShuttingDown, StartupError
from .metrics import Metrics
from .request import Phase, Request, Token, TokenSink, Top, ValidRequest
from .scheduler import Limits, Outcome, Scheduler
from .shard_client import ShardedClient, ShardsLost
from .step_plan import StepPlan, encode

logger = logging.getLogger(__name__)

GIVE_UP_S = 1.0  # pause after a bug of ours, so that one that comes back at once cannot spin
LARGE_BYTES = 65536  # of a step's message: HTTP/2's initial window
IDLE_CHECK_S = 5.0  # of idleness before the books are checked: that takes milliseconds with a large pool


class State(Enum):
    """What /health says: only SERVING is healthy."""

    STARTING = "starting"  # waits for the shards' sockets
    SERVING = "serving"
    RECOVERING = "recovering"  # a shard died or hung; requests wait for the launcher to restart the group
    DRAINING = "draining"  # finishes what it has, accepts nothing
    STOPPED = "stopped"


class _Sent(NamedTuple):
    """A step in flight."""

    plan: StepPlan
    answer: "asyncio.Task[pb.StepResponse]"
    sent_s: float
    large: bool


class Batcher:
    """One per router. Every method is called from the event loop's thread; none blocks it."""

    def __init__(self, config: RouterConfig, metrics: Metrics) -> None:
        self.state = State.STARTING
        self.reason = "waiting for the shards"  # one sentence (part) for logs and /health, without a full stop
        self.on_state: Callable[[], None] = lambda: None  # called after every change of the two; must not raise
        self._config = config
        self._metrics = metrics
        self._wake = asyncio.Event()  # an answer is here, a request came or went, the shards are lost
        self._drained = asyncio.Event()
        self._client = ShardedClient(config.master_shard_uds_path, config.step_deadline_s, self._wake.set)
        self._ids = count(1)
        self._scheduler: Scheduler | None = None
        self._info: pb.InfoResponse | None = None
        self._in_flight: deque[_Sent] = deque()
        self._max_in_flight = 1
        self._loop: asyncio.Task[None] | None = None
        self._draining = False
        self._skipped: list[
            int
        ] = []  # by requests that got several tokens in the step being delivered, so many less one

    # ---- what others see

    @property
    def healthy(self) -> bool:
        """True while the shards answer and new requests are accepted."""
        return self.state is State.SERVING

    @property
    def info(self) -> pb.InfoResponse:
        """Rank 0's facts about model and pool, of the latest (re)start. Raises Bug before `start` is done."""
        if self._info is None:
            raise Bug("The shards' facts were asked for before they were there. This is a bug.")
        return self._info

    @property
    def max_total_tokens(self) -> int:
        """Longest prompt + output that the model and the KV pool can hold, whatever the configuration allows."""
        limits = self._core.limits
        return min(self.info.max_model_tokens, limits.num_blocks * limits.block_size)

    @property
    def _core(self) -> Scheduler:
        if self._scheduler is None:
            raise Bug("The batcher was used before it was started. This is a bug.")
        return self._scheduler

    async def start(self) -> None:
        """Connects to the shards, however long they load, then starts the loop. After it `info` is valid.

        Raises StartupError when shards and configuration do not go together (e.g. no KV block).
        """
        limits = self._take_facts(await self._client.connect())
        self._scheduler = Scheduler(limits, self._ids)
        self._enter(State.SERVING, "the shards are ready")
        self._loop = asyncio.create_task(self._run(), name="batcher")

    def submit(self, valid: ValidRequest, sink: TokenSink, label: str = "") -> Request:
        """Queues a request; its tokens arrive at `sink` in later turns of the event loop, never within this call.

        Also accepted while recovering: served when the shards are back. Raises ValidationError when it can never fit
        into the KV pool, ShuttingDown while draining.

        The sink ends the request by returning a reason; it must return one (LENGTH) with token number max_new_tokens.
        An exception out of the sink fails its request alone (`sink.failed(InternalError())` is tried).
        The returned Request carries the times (arrived_s, admitted_s, first_token_s, finished_s; time.monotonic()),
        num_cached_tokens and, after the sink has returned it, the finish reason; read it, do not change it.
        label: the request's name in log lines.
        """
        if self.state in (State.DRAINING, State.STOPPED) or self._draining:
            raise ShuttingDown
        request = self._core.add(valid, sink, time.monotonic(), label)
        self._show()
        self._wake.set()
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request whose client left: no sink call follows. Nothing happens when it is already over."""
        self._core.finish(request, time.monotonic())
        self._show()
        self._note_drained()
        self._wake.set()

    async def drain(self) -> None:
        """From now on refuses new requests; returns when the last one has ended."""
        self._draining = True
        self._enter(State.DRAINING, "running requests are finished, new ones refused")
        self._note_drained()
        self._wake.set()
        await self._drained.wait()

    def _note_drained(self) -> None:
        """Also while the shards are gone: nobody waits for their return when there is nothing to finish."""
        if self._draining and (self._scheduler is None or self._scheduler.is_idle):
            self._drained.set()

    async def stop(self) -> None:
        """Ends the loop and the connections. Requests that are left get `failed(IncompleteGeneration())`."""
        self._draining = True
        if self._loop is not None:
            self._loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop
        self._drop_in_flight()
        await self._client.close()
        if self._scheduler is not None:
            for request in (*self._scheduler.running, *self._scheduler.waiting):
                self._scheduler.finish(request, time.monotonic())
                self._fail(request, IncompleteGeneration())
        self._drained.set()
        self._enter(State.STOPPED, "nothing runs any more")

    # ---- the loop

    async def _run(self) -> None:
        """Serves for ever; comes back from every loss of the shards, and from our own bugs without the requests hit."""
        connected = True
        while True:
            try:
                if not connected:
                    await self._reconnect()
                    connected = True
                await self._serve()
            except ShardsLost as lost:
                connected = False
                self._interrupt(lost)
            except Exception:
                connected = False
                logger.exception("the batching loop failed; all requests are given up")
                self._give_up()
                await asyncio.sleep(GIVE_UP_S)

    async def _serve(self) -> None:
        """Keeps up to `max_steps_in_flight` steps unanswered; applies answers in the order of the steps."""
        in_flight, wake = self._in_flight, self._wake
        while True:
            while self._may_send() and self._send():
                pass
            self._note_drained()
            if in_flight or not self._core.is_idle:
                await wake.wait()
            else:
                await self._idle()
            wake.clear()
            if self._client.lost is not None:
                raise self._client.lost
            if in_flight and in_flight[0].answer.done():
                self._apply(in_flight.popleft())
                if in_flight and in_flight[0].answer.done():
                    wake.set()

    def _may_send(self) -> bool:
        """The window is open. gRPC may let a small message overtake a large one, so nothing follows a large one."""
        in_flight = self._in_flight
        return not in_flight or (len(in_flight) < self._max_in_flight and not in_flight[-1].large)

    async def _idle(self) -> None:
        """Waits for work; uses a longer pause to check the books."""
        try:
            async with asyncio.timeout(IDLE_CHECK_S):  # not wait_for, which can swallow a cancellation
                await self._wake.wait()
        except TimeoutError:
            self._core.check_integrity()
            await self._wake.wait()

    def _send(self) -> bool:
        """Plans and sends one step; False when there is nothing to send."""
        now = time.monotonic()
        plan = self._core.plan(now)
        if plan is None:
            return False
        method, message = encode(plan)
        answer = self._client.send(method, message, plan.step)
        answer.add_done_callback(self._answered)
        self._in_flight.append(_Sent(plan, answer, now, len(message) > LARGE_BYTES))
        self._count_sent(plan)
        return True

    def _answered(self, answer: "asyncio.Task[pb.StepResponse]") -> None:
        if not answer.cancelled():
            answer.exception()  # seen: `_apply` raises it, or the group is lost already
        self._wake.set()

    def _apply(self, sent: _Sent) -> None:
        """Takes in the answer of the oldest step. Raises ShardsLost."""
        response = sent.answer.result()
        now = time.monotonic()
        outcome = self._core.apply(response, now)
        self._deliver(outcome, now)
        self._count_answered(sent, response, now)

    def _deliver(self, outcome: Outcome, now: float) -> None:
        """Hands tokens and failures to the sinks; what goes wrong in a sink stays with its request."""
        for request, generation in outcome.generations:
            if request.phase is Phase.FINISHED:
                continue  # cancelled by another sink just now
            try:
                self._deliver_one(request, generation, now)
            except Exception:
                logger.exception("delivering a token failed", extra=_named(request))
                self._core.finish(request, now)
                self._fail(request, InternalError())
        for request, error in outcome.failed:
            self._fail(request, error)

    def _deliver_one(self, request: Request, generation: pb.Generation, now: float) -> None:
        valid, sink = request.valid, request.sink
        if valid.prompt_logprobs and generation.prompt_logprobs:
            start, fresh, alternatives = self._core.take_prompt_logprobs(request, generation)
            if fresh:
                sink.prompt_logprobs(start, fresh, alternatives)
        token_ids, logprobs = generation.token_ids, generation.logprobs
        if len(token_ids) > 1:
            self._skipped.append(len(token_ids) - 1)
        for index, token_id in enumerate(token_ids):
            top: Top = ()
            if valid.top_n_tokens:
                tops = generation.top_tokens[index]
                top = tuple(zip(tops.ids, tops.logprobs, strict=True))
            reason = sink.token(Token(token_id, logprobs[index], top))
            if reason is not None:
                self._core.finish(request, now, reason)
                return
        if len(request.token_ids) >= request.max_tokens:
            raise Bug(f"The sink of request {request.id} does not end at `max_new_tokens`. This is a bug.")

    def _fail(self, request: Request, error: Exception) -> None:
        """Tells the sink of a request that is already out of the scheduler."""
        logger.debug("a request has failed: %s", error, extra=_named(request))  # infer.py's line says it, too
        try:
            request.sink.failed(error)
        except Exception:
            logger.exception("the sink of a failed request failed itself", extra=_named(request))

    # ---- losing and finding the shards

    def _interrupt(self, lost: ShardsLost) -> None:
        logger.error("the shards are lost (%s); %d requests wait for them", lost.cause, len(self._core.running))
        self._enter(State.RECOVERING, f"the shards are being restarted: {lost.cause}")
        for sent in self._in_flight:
            self._metrics.batch_inference_failure.inc(_method(sent.plan))
        self._drop_in_flight()
        for request, error in self._core.interrupt(time.monotonic()):
            self._fail(request, error)
        self._show()

    def _give_up(self) -> None:
        """After a bug of ours the books cannot be trusted: every request fails, loudly, and the books are new."""
        self._enter(State.RECOVERING, "an internal error; see the log")
        self._drop_in_flight()
        broken = self._core
        self._scheduler = Scheduler(broken.limits, self._ids)
        for request in (*broken.running, *broken.waiting):
            request.phase = Phase.FINISHED
            self._fail(request, InternalError())

    async def _reconnect(self) -> None:
        infos = await self._client.connect()
        for request, error in self._core.resume(self._take_facts(infos), time.monotonic()):
            self._fail(request, error)
        self._metrics.shard_restarts.inc()
        if self._draining:
            self._enter(State.DRAINING, "running requests are finished, new ones refused")
        else:
            self._enter(State.SERVING, "the shards are ready")

    def _drop_in_flight(self) -> None:
        for sent in self._in_flight:
            sent.answer.cancel()
        self._in_flight.clear()

    def _take_facts(self, infos: list[pb.InfoResponse]) -> Limits:
        """Limits for the scheduler: what every rank has, further limited by the configuration."""
        config, info = self._config, infos[0]
        num_blocks = min(info.num_blocks for info in infos)
        if config.max_batch_total_tokens is not None:
            num_blocks = min(num_blocks, config.max_batch_total_tokens // info.block_size)
        if num_blocks < 1:
            raise StartupError(
                f"The KV pool has no block of {info.block_size} tokens. Give the shards more memory or raise "
                "`--max-batch-total-tokens`."
            )
        self._info = info
        self._max_in_flight = max(1, info.max_steps_in_flight)
        self._metrics.kv_blocks.set(num_blocks)
        self._metrics.batch_max_total_tokens.set(num_blocks * info.block_size)
        return Limits(
            num_blocks=num_blocks,
            block_size=info.block_size,
            max_step_tokens=min(info.max_step_tokens, config.max_batch_prefill_tokens),
            max_running=min(info.max_rows, config.max_batch_size or info.max_rows),
        )

    def _enter(self, state: State, reason: str) -> None:
        if state is not self.state:
            logger.info("%s: %s", state.value, reason)
        self.state, self.reason = state, reason
        self.on_state()

    # ---- numbers

    def _show(self) -> None:
        metrics, core, blocks = self._metrics, self._core, self._core.blocks
        metrics.queue_size.set(len(core.waiting))
        metrics.batch_current_size.set(len(core.running))
        metrics.batch_current_max_tokens.set(blocks.num_used * blocks.block_size)
        metrics.kv_blocks_used.set(blocks.num_used)
        metrics.kv_blocks_cached.set(blocks.num_kept)

    def _count_sent(self, plan: StepPlan) -> None:
        metrics = self._metrics
        metrics.batch_inference_count.inc(_method(plan))
        self._show()
        if plan.admissions:
            metrics.batch_next_size.observe(len(plan.admissions))
            if len(plan.scheduled) > len(plan.admissions):
                metrics.batch_concat.inc("chunking")
                metrics.batch_concat_duration.observe(0.0, "decode")

    def _count_answered(self, sent: _Sent, response: pb.StepResponse, now: float) -> None:
        metrics = self._metrics
        method = _method(sent.plan)
        metrics.batch_inference_success.inc(method)
        metrics.batch_inference_duration.observe(now - sent.sent_s, method)
        metrics.batch_forward_duration.observe(response.forward_ns / 1e9, method)
        metrics.batch_decode_duration.observe((response.total_ns - response.forward_ns) / 1e9, method)
        metrics.batch_filter_duration.observe(time.monotonic() - now, method)
        metrics.request_skipped_tokens.observe(*self._skipped)
        metrics.request_skipped_tokens.observe(*[0] * (len(response.generations) - len(self._skipped)))
        self._skipped.clear()
        self._show()
        counts = self._core.take_counts()
        metrics.request_preemptions.inc(amount=counts.preemptions)
        metrics.prefix_cache_query_tokens.inc(amount=counts.queried_tokens)
        metrics.prefix_cache_hit_tokens.inc(amount=counts.hit_tokens)


def _named(request: Request) -> dict[str, str]:
    """Fields of log lines about `request`."""
    return {"request_id": request.label or str(request.id)}


def _method(plan: StepPlan) -> str:
    """TGI's label for a step."""
    return "prefill" if plan.admissions else "decode"
