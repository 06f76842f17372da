"""The facade routes call: permit, validation, submission; and the account of every request when it is over.

`Infer.open` yields a `Stream` of choices. Leaving it in any way, be it the end, an error or a client that left (which
cancels the handler), cancels what still runs and gives the permits back. Called by routes/*; calls validation.py and
batcher.py; the text side lies in stream.py.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from .batcher import Batcher
from .errors import ApiError, Bug, DeadlineExceeded, Overloaded
from .retry_after import RetryAfter
from .stream import Choice, Rules, Scoring, Shared, Stream
from .validation import Prompt, Validator, check_copies, check_streamable

if TYPE_CHECKING:  # it imports opentelemetry, which only `--otlp-endpoint` needs
    from .tracing import Trace

logger = logging.getLogger(__name__)


class Deadline(NamedTuple):
    """When a request must be finished."""

    timeout_s: float  # as the client gave it
    at_s: float  # time.monotonic()
    name: str = "`x-request-timeout`"  # where it gave it


@dataclass(frozen=True, slots=True)
class Call:
    """One request, from when its body was understood.

    request_id: for the log; the client sees it, too. deadline: after it the request fails with DeadlineExceeded.
    trace: where its spans go when tracing is on.
    """

    request_id: str
    started_s: float = field(default_factory=time.monotonic)
    deadline: Deadline | None = None
    trace: "Trace | None" = None


@dataclass(frozen=True, slots=True)
class Timings:
    """Of one finished choice, in seconds."""

    total: float  # since the call began
    validation: float  # until it was submitted
    queue: float  # until it had a row
    inference: float  # until its last token
    per_token: float

    @classmethod
    def of(cls, choice: Choice, call: Call) -> "Timings":
        request = choice.request
        if request is None or request.admitted_s is None:
            raise Bug("a choice has finished without having run. This is a bug.")
        now_s = time.monotonic()
        inference = (request.finished_s or now_s) - request.admitted_s
        return cls(
            total=now_s - call.started_s,
            validation=max(0.0, request.arrived_s - call.started_s),
            queue=request.admitted_s - request.arrived_s,
            inference=inference,
            per_token=inference / max(1, choice.num_tokens),
        )


class Infer:
    """One per server."""

    def __init__(self, batcher: Batcher, validator: Validator, shared: Shared, max_concurrent_requests: int) -> None:
        self.batcher = batcher
        self.validator = validator
        self.shared = shared
        self.num_running = 0  # permits taken
        self._max_running = max_concurrent_requests
        self._retry_after = RetryAfter(max_concurrent_requests)

    @contextlib.asynccontextmanager
    async def open(
        self, prompts: Sequence[Prompt], rules: Rules, call: Call, *, copies: int = 1
    ) -> AsyncIterator[Stream]:
        """Yields `copies` choices for each prompt, prompt 0's first. Raises ApiError, also from the stream."""
        stream = Stream(streaming=rules.streaming, copies=copies)
        with self._traced(stream, prompts, call, copies), self._failures(stream, call), self._deadline(stream, call):
            if rules.streaming:
                for prompt in prompts:
                    check_streamable(prompt.parameters)
            if copies > 1:
                for prompt in prompts:
                    check_copies(prompt.parameters, self.validator.limits)
            with self._permits(len(prompts) * copies):
                try:
                    await self._submit(stream, prompts, rules, call, copies)
                    yield stream
                    self._account(stream, call)
                finally:
                    self._cancel(stream)

    @property
    def drained_in_s(self) -> int:
        """Whole seconds until what runs now is likely to be finished."""
        return self._retry_after.until_all_returned(self.num_running)

    @contextlib.contextmanager
    def _traced(self, stream: Stream, prompts: Sequence[Prompt], call: Call, copies: int) -> Iterator[None]:
        if call.trace is None:
            yield
            return
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
            raise
        finally:
            call.trace.generation(call, prompts, stream, failure, copies)

    @contextlib.contextmanager
    def _failures(self, stream: Stream, call: Call) -> Iterator[None]:
        """Counts and logs what goes wrong."""
        try:
            yield
        except (asyncio.CancelledError, ConnectionError):
            self._count_cancelled(stream, call)
            raise
        except ApiError as error:
            self.count_failure(error, call)
            raise
        except Exception:  # a mistake of ours: `presentable` writes its line
            self.shared.metrics.request_failure.inc("generation")
            raise

    @contextlib.contextmanager
    def _deadline(self, stream: Stream, call: Call) -> Iterator[None]:
        """Ends `stream` when the time is over that its client gave, also when its handler waits for something else."""
        if call.deadline is None:
            yield
            return
        error = DeadlineExceeded(call.deadline.timeout_s, call.deadline.name)

        def expire() -> None:
            stream.fail(error)
            self._cancel(stream)

        left_s = max(0.0, call.deadline.at_s - time.monotonic())
        timer = asyncio.get_running_loop().call_later(left_s, expire)
        try:
            yield
        finally:
            timer.cancel()

    @contextlib.contextmanager
    def _permits(self, count: int) -> Iterator[None]:
        started_s = time.monotonic()
        if self.num_running + count > self._max_running:
            raise Overloaded(self._retry_after.refused(count, started_s))
        self.num_running += count
        try:
            yield
        finally:
            self.num_running -= count
            self._retry_after.returned(time.monotonic() - started_s)

    async def _submit(self, stream: Stream, prompts: Sequence[Prompt], rules: Rules, call: Call, copies: int) -> None:
        validated = await asyncio.gather(*(self.validator.validate(prompt, copies) for prompt in prompts))
        metrics = self.shared.metrics
        for group in validated:
            metrics.request_input_length.observe(len(group[0].request.token_ids))
            metrics.request_max_new_tokens.observe(group[0].request.max_new_tokens)
            for one in group:
                kind = Choice if one.generates else Scoring
                choice = kind(one, stream, self.shared, rules)
                choice.request = self.batcher.submit(one.request, choice, call.request_id)

    def _cancel(self, stream: Stream) -> None:
        """Ends what still runs, whatever the reason."""
        stream.close()
        for choice in stream.choices:
            if choice.finish_reason is None and choice.request is not None:
                self.batcher.cancel(choice.request)

    def _count_cancelled(self, stream: Stream, call: Call) -> None:
        """The client left, or the server's patience with open streams has ended."""
        self.shared.metrics.request_cancelled.inc()
        self.shared.metrics.request_failure.inc("dropped")
        generated = sum(choice.num_tokens for choice in stream.choices)
        logger.info("Cancelled", extra={**_how_long(call), "generated_tokens": generated})

    def refuse_endless(self, count: int, call: Call) -> None:
        """Raises Overloaded, counted, for more generations of one request than there are permits in all.

        For routes that take a permit for each generation by itself: before any work is spent on the list.
        """
        if count > self._max_running:
            error = Overloaded()
            self.count_failure(error, call)
            raise error

    def count_failure(self, error: ApiError, call: Call) -> None:
        """The metric and the log line of a failed request; routes call it for what they refuse themselves."""
        if error.failure is not None:
            self.shared.metrics.request_failure.inc(error.failure)
        ours = error.failure in ("generation", "incomplete")  # the others are the client's, or pass by themselves
        level = logging.ERROR if ours else logging.INFO
        logger.log(level, "%s", error.message, extra={**_how_long(call), "error_type": error.error_type})
        error.logged = True

    def _account(self, stream: Stream, call: Call) -> None:
        """Metrics and the log line of every prompt; of several copies the first stands for all, as in TGI."""
        metrics = self.shared.metrics
        for choice in stream.first_choices:
            if choice.finish_reason is None:
                raise Bug("a handler has left before its choices were over. This is a bug.")
            times = Timings.of(choice, call)
            metrics.request_success.inc()
            metrics.request_duration.observe(times.total)
            metrics.request_validation_duration.observe(times.validation)
            metrics.request_queue_duration.observe(times.queue)
            metrics.request_inference_duration.observe(times.inference)
            metrics.request_mean_time_per_token_duration.observe(times.per_token)
            metrics.request_generated_tokens.observe(choice.num_tokens)
            logger.info("Success", extra={"request_id": call.request_id, **log_fields(choice, times)})


def _how_long(call: Call) -> dict[str, str]:
    """Fields of the line of a request that did not succeed: clients that give up do so after a time of their own."""
    return {"request_id": call.request_id, "total_time": format_duration(time.monotonic() - call.started_s)}


def log_fields(choice: Choice, times: Timings) -> dict[str, str | int | None]:
    """What TGI's line of a finished request says; no text of the request."""
    return {
        "total_time": format_duration(times.total),
        "validation_time": format_duration(times.validation),
        "queue_time": format_duration(times.queue),
        "inference_time": format_duration(times.inference),
        "time_per_token": format_duration(times.per_token),
        "seed": f"Some({choice.validated.seed})" if choice.validated.seed is not None else "None",
        "input_tokens": len(choice.validated.request.token_ids),
        "cached_tokens": choice.request.num_cached_tokens if choice.request is not None else 0,
        "generated_tokens": choice.num_tokens,
        "finish_reason": choice.finish_reason.value if choice.finish_reason is not None else None,
    }


def format_duration(seconds: float) -> str:
    """As Rust prints a duration for people: `1.234567s`, `12.5ms`, `310.25µs`."""
    for unit, scale, digits in (("s", 1.0, 9), ("ms", 1e-3, 6), ("µs", 1e-6, 3)):
        if seconds >= scale:
            return f"{seconds / scale:.{digits}f}".rstrip("0").rstrip(".") + unit
    return f"{round(seconds * 1e9)}ns"
