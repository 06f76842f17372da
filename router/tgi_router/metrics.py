"""Every metric of the router, declared here and nowhere else, and its text exposition (Prometheus 0.0.4).

Names, types, labels and buckets are TGI's; those after the line "ours" are new. Everything exists at zero from the
start. The exposition is written here because TGI's counters have no `_total` suffix and integral numbers have no `.0`,
which the usual client library does not allow. Recording takes well under a microsecond: it happens per token.

Not declared, because nothing here corresponds to them: `tgi_batch_concat`, `tgi_batch_concat_duration` (batches are
never concatenated) and `tgi_batch_max_total_tokens` (TGI never exported it).
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import mul
from typing import Protocol

CONTENT_TYPE = "text/plain; charset=utf-8"  # TGI's: without a version

# 0.0001 * 1.5^k seconds, k = 1..35, by repeated multiplication as in TGI, so that the last digits agree.
DURATION_BUCKETS = tuple(accumulate([1.5] * 35, mul, initial=0.0001))[1:]
BATCH_SIZE_BUCKETS = tuple(float(size) for size in range(1, 1025))
QUANTILES = (0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0)
METHODS = ("prefill", "decode")
GRPC_METHODS = ("Generate", "GenerateStream", "Chat", "ChatStream", "Tokenize", "Info")
FAILURES = ("validation", "overloaded", "template", "incomplete", "generation", "dropped", "timeout")  # the last is ours


def format_number(value: float) -> str:
    """`value` as Rust's `Display` prints it: no exponent, no `.0`."""
    if value != value or value in (float("inf"), float("-inf")):
        return {float("inf"): "+Inf", float("-inf"): "-Inf"}.get(value, "NaN")
    if value == int(value):
        return str(int(value))
    text = repr(value)
    if "e" not in text:
        return text
    mantissa, _, exponent = text.partition("e")  # only small magnitudes get here: integral ones are gone
    digits = mantissa.replace(".", "").lstrip("-")
    return ("-" if value < 0 else "") + "0." + "0" * (-int(exponent) - 1) + digits


def even_buckets(maximum: int) -> tuple[float, ...]:
    """TGI's 100 buckets of equal width up to `maximum`."""
    width = maximum / 100
    return tuple(width * (k + 1) for k in range(100))


class Metric(Protocol):
    name: str
    help: str | None
    kind: str

    def samples(self) -> Iterable[str]:
        """Sample lines without line ends."""


class _Labelled:
    """Name, help and the one label a metric may have."""

    def __init__(self, name: str, help: str | None, label: str | None = None, values: Sequence[str] = ("",)) -> None:
        self.name = name
        self.help = help
        self._label = label
        self._values = tuple(values)

    def _braces(self, value: str, extra: str = "") -> str:
        own = f'{self._label}="{value}"' if self._label else ""
        inner = ",".join(part for part in (own, extra) if part)
        return "{" + inner + "}" if inner else ""


class Counter(_Labelled):
    """Only grows."""

    kind = "counter"

    def __init__(self, name: str, help: str | None, label: str | None = None, values: Sequence[str] = ("",)) -> None:
        super().__init__(name, help, label, values)
        self._counts = dict.fromkeys(self._values, 0.0)

    def inc(self, value: str = "", amount: float = 1.0) -> None:
        """Adds `amount` to the series whose label has `value` ("" when the metric has no label)."""
        self._counts[value] += amount

    def get(self, value: str = "") -> float:
        return self._counts[value]

    def samples(self) -> Iterable[str]:
        for value, count in self._counts.items():
            yield f"{self.name}{self._braces(value)} {format_number(count)}"


class Gauge(_Labelled):
    """Goes up and down."""

    kind = "gauge"

    def __init__(self, name: str, help: str | None) -> None:
        super().__init__(name, help)
        self._current = 0.0

    def set(self, value: float) -> None:
        self._current = value

    def get(self) -> float:
        return self._current

    def samples(self) -> Iterable[str]:
        yield f"{self.name} {format_number(self._current)}"


class Histogram(_Labelled):
    """Cumulative buckets, sum and count, per label value."""

    kind = "histogram"

    def __init__(
        self,
        name: str,
        help: str | None,
        buckets: Sequence[float],
        label: str | None = None,
        values: Sequence[str] = ("",),
    ) -> None:
        super().__init__(name, help, label, values)
        self.set_buckets(buckets)

    def set_buckets(self, buckets: Sequence[float]) -> None:
        """Replaces the bounds and forgets what was observed; before the first request only."""
        self._bounds = tuple(buckets)
        self._buckets = {value: [0] * (len(self._bounds) + 1) for value in self._values}
        self._sums = dict.fromkeys(self._values, 0.0)

    def observe(self, amount: float, value: str = "") -> None:
        self._buckets[value][bisect_left(self._bounds, amount)] += 1
        self._sums[value] += amount

    def count(self, value: str = "") -> int:
        return sum(self._buckets[value])

    def samples(self) -> Iterable[str]:
        for value in self._values:
            total = 0
            for bound, count in zip((*self._bounds, float("inf")), self._buckets[value], strict=True):
                total += count
                le = self._braces(value, f'le="{format_number(bound)}"')
                yield f"{self.name}_bucket{le} {total}"
            yield f"{self.name}_sum{self._braces(value)} {format_number(self._sums[value])}"
            yield f"{self.name}_count{self._braces(value)} {total}"


class Summary(_Labelled):
    """Quantiles over the last observations, sum and count over all."""

    kind = "summary"

    def __init__(self, name: str, help: str | None) -> None:
        super().__init__(name, help)
        self._recent: deque[float] = deque(maxlen=1024)
        self._sum = 0.0
        self._count = 0

    def observe(self, amount: float) -> None:
        self._recent.append(amount)
        self._sum += amount
        self._count += 1

    def count(self) -> int:
        return self._count

    def samples(self) -> Iterable[str]:
        ordered = sorted(self._recent)
        for quantile in QUANTILES:
            value = ordered[round(quantile * (len(ordered) - 1))] if ordered else 0.0
            yield f'{self.name}{{quantile="{format_number(quantile)}"}} {format_number(value)}'
        yield f"{self.name}_sum {format_number(self._sum)}"
        yield f"{self.name}_count {self._count}"


class Metrics:
    """One set of metrics; one per server. Who records what is in the comments."""

    def __init__(self) -> None:
        durations = DURATION_BUCKETS
        # HTTP handlers and infer.py
        self.request_count = Counter("tgi_request_count", "Total number of requests")
        self.request_success = Counter("tgi_request_success", "Number of successful requests")
        self.request_failure = Counter("tgi_request_failure", None, "err", FAILURES)
        self.request_duration = Histogram("tgi_request_duration", "Request duration", durations)
        self.request_validation_duration = Histogram(
            "tgi_request_validation_duration", "Request validation duration", durations
        )
        self.request_queue_duration = Histogram("tgi_request_queue_duration", "Request queue duration", durations)
        self.request_inference_duration = Histogram(
            "tgi_request_inference_duration", "Request inference duration", durations
        )
        self.request_mean_time_per_token_duration = Histogram(
            "tgi_request_mean_time_per_token_duration", "Mean time per token per request", durations
        )
        self.request_generated_tokens = Histogram(
            "tgi_request_generated_tokens", "Generated tokens per request", (1.0,)
        )
        self.request_input_length = Histogram("tgi_request_input_length", "Input token length per request", (1.0,))
        self.request_max_new_tokens = Histogram("tgi_request_max_new_tokens", "Maximum new tokens per request", (1.0,))
        # batcher.py; method: "prefill" when the step admitted requests, else "decode"
        self.request_skipped_tokens = Summary("tgi_request_skipped_tokens", "Speculated tokens per request")
        self.batch_next_size = Histogram("tgi_batch_next_size", "Batch size of the next batch", BATCH_SIZE_BUCKETS)
        self.batch_current_size = Gauge("tgi_batch_current_size", "Current batch size")
        self.batch_current_max_tokens = Gauge("tgi_batch_current_max_tokens", "Maximum tokens for the current batch")
        self.queue_size = Gauge("tgi_queue_size", "Current queue size")
        self.batch_inference_count = Counter(
            "tgi_batch_inference_count", "Inference calls per method (prefill or decode)", "method", METHODS
        )
        self.batch_inference_success = Counter(
            "tgi_batch_inference_success",
            "Number of successful inference calls per method (prefill or decode)",
            "method",
            METHODS,
        )
        self.batch_inference_failure = Counter("tgi_batch_inference_failure", None, "method", METHODS)
        self.batch_inference_duration = Histogram(
            "tgi_batch_inference_duration", "Batch inference duration", durations, "method", METHODS
        )
        self.batch_forward_duration = Histogram(
            "tgi_batch_forward_duration",
            "Batch forward duration per method (prefill or decode)",
            durations,
            "method",
            METHODS,
        )
        # total_ns - forward_ns of the shard's answer
        self.batch_decode_duration = Histogram(
            "tgi_batch_decode_duration",
            "Time spent decoding a batch per method (prefill or decode)",
            durations,
            "method",
            METHODS,
        )
        # applying an answer: scheduler and sinks
        self.batch_filter_duration = Histogram(
            "tgi_batch_filter_duration",
            "Time spent filtering batches and sending generated tokens per method (prefill or decode)",
            durations,
            "method",
            METHODS,
        )
        # ours: infer.py
        self.request_time_to_first_token_duration = Histogram(
            "tgi_request_time_to_first_token_duration", "Time from arrival to the first token", durations
        )
        self.request_inter_token_duration = Histogram(
            "tgi_request_inter_token_duration", "Time between two tokens of a request", durations
        )
        self.request_cancelled = Counter("tgi_request_cancelled", "Requests whose client left before the end")
        # ours: grpc_service/calls.py; what is generated counts above, too
        self.grpc_request_count = Counter(
            "tgi_grpc_request_count", "Calls of the public gRPC service", "method", GRPC_METHODS
        )
        # ours: batcher.py
        self.kv_blocks = Gauge("tgi_kv_blocks", "KV blocks of the pool")
        self.kv_blocks_used = Gauge("tgi_kv_blocks_used", "KV blocks held by running requests")
        self.kv_blocks_cached = Gauge("tgi_kv_blocks_cached", "KV blocks kept only for the prefix cache")
        self.prefix_cache_query_tokens = Counter(
            "tgi_prefix_cache_query_tokens", "Prompt tokens looked up in the prefix cache"
        )
        self.prefix_cache_hit_tokens = Counter("tgi_prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache")
        self.request_preemptions = Counter(
            "tgi_request_preemptions", "Times a running request lost its KV blocks to older ones"
        )
        self.shard_restarts = Counter("tgi_shard_restarts", "Times the router connected to the shards again")

    def set_limits(self, max_input_tokens: int, max_total_tokens: int) -> None:
        """Chooses the buckets that depend on the limits; once, before the first request."""
        self.request_input_length.set_buckets(even_buckets(max_input_tokens))
        self.request_generated_tokens.set_buckets(even_buckets(max_total_tokens))
        self.request_max_new_tokens.set_buckets(even_buckets(max_total_tokens))

    def all(self) -> list[Metric]:
        """Every metric: counters, gauges, then distributions, each in the order of declaration."""
        order = ("counter", "gauge", "histogram", "summary")
        metrics: list[Metric] = list(vars(self).values())
        return sorted(metrics, key=lambda metric: order.index(metric.kind))

    def exposition(self) -> str:
        """The body of GET /metrics."""
        lines: list[str] = []
        for metric in self.all():
            if metric.help is not None:
                lines.append(f"# HELP {metric.name} {metric.help}")
            lines.append(f"# TYPE {metric.name} {metric.kind}")
            lines.extend(metric.samples())
            lines.append("")
        return "\n".join(lines) + "\n"
