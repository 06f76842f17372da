"""Every metric of the router, declared here and nowhere else; docs/reference/metrics.md is generated from it.

Names, types, labels, buckets and help texts are TGI's; what stands under "ours" is new. Everything exists at zero from
the start. A test moves each of them, so that none is declared and forgotten. How they are written: metric_types.py.

TGI's list is complete but for `tgi_batch_total_tokens`, which TGI described and never had.
"""

from itertools import accumulate
from operator import mul

from .metric_types import Counter, Gauge, Histogram, Metric, Summary

CONTENT_TYPE = "text/plain; charset=utf-8"  # TGI's: without a version

# 0.0001 * 1.5^k seconds, k = 1..35, by repeated multiplication as in TGI, so that the last digits agree.
DURATION_BUCKETS = tuple(accumulate([1.5] * 35, mul, initial=0.0001))[1:]
BATCH_SIZE_BUCKETS = tuple(float(size) for size in range(1, 1025))
METHODS = ("prefill", "decode")
FAILURES = ("validation", "overloaded", "template", "incomplete", "generation", "dropped", "timeout")  # the last: ours
GRPC_METHODS = ("Generate", "GenerateStream", "Chat", "ChatStream", "Tokenize", "Info")
CONCAT_REASONS = ("backpressure", "wait_exceeded", "chunking")


def even_buckets(maximum: int) -> tuple[float, ...]:
    """TGI's 100 buckets of equal width up to `maximum`."""
    width = maximum / 100
    return tuple(width * (k + 1) for k in range(100))


class Metrics:
    """One set of metrics; one per server. The third text of each says who records it, and when."""

    def __init__(self) -> None:
        self._declare_tgis_requests()
        self._declare_tgis_batches()
        self._declare_ours()

    def _declare_tgis_requests(self) -> None:
        durations, unknown = DURATION_BUCKETS, (1.0,)  # set_limits chooses the buckets of lengths
        self.request_count = Counter(
            "tgi_request_count",
            "Total number of requests",
            "At entry. As in TGI, a request to a chat or completion route counts once more for each of its prompts.",
        )
        self.request_success = Counter(
            "tgi_request_success", "Number of successful requests", "One for each prompt, with its last token."
        )
        self.request_failure = Counter(
            "tgi_request_failure",
            None,
            "By reason. `dropped`: the client left. `timeout` (ours): its `x-request-timeout` was over.",
            "err",
            FAILURES,
        )
        self.request_duration = Histogram(
            "tgi_request_duration", "Request duration", "Seconds, of successful requests.", durations
        )
        self.request_validation_duration = Histogram(
            "tgi_request_validation_duration",
            "Request validation duration",
            "Seconds from the parsed body to the queue: template, tokenizer, checks.",
            durations,
        )
        self.request_queue_duration = Histogram(
            "tgi_request_queue_duration", "Request queue duration", "Seconds from the queue to a row.", durations
        )
        self.request_inference_duration = Histogram(
            "tgi_request_inference_duration",
            "Request inference duration",
            "Seconds from the row to the last token.",
            durations,
        )
        self.request_mean_time_per_token_duration = Histogram(
            "tgi_request_mean_time_per_token_duration",
            "Mean time per token per request",
            "Seconds: inference duration divided by generated tokens.",
            durations,
        )
        self.request_generated_tokens = Histogram(
            "tgi_request_generated_tokens", "Generated tokens per request", "Of successful requests.", unknown
        )
        self.request_input_length = Histogram(
            "tgi_request_input_length", "Input token length per request", "At validation.", unknown
        )
        self.request_max_new_tokens = Histogram(
            "tgi_request_max_new_tokens", "Maximum new tokens per request", "At validation.", unknown
        )
        self.request_skipped_tokens = Summary(
            "tgi_request_skipped_tokens",
            "Speculated tokens per request",
            "Accepted tokens per step and request, minus one: 0 without speculation.",
        )

    def _declare_tgis_batches(self) -> None:
        """`method`: "prefill" when the step admitted requests, else "decode"."""
        durations = DURATION_BUCKETS
        self.batch_next_size = Histogram(
            "tgi_batch_next_size",
            "Batch size of the next batch",
            "Requests admitted by a step, when there are any.",
            BATCH_SIZE_BUCKETS,
        )
        self.batch_current_size = Gauge("tgi_batch_current_size", "Current batch size", "Requests that have a row.")
        self.batch_current_max_tokens = Gauge(
            "tgi_batch_current_max_tokens",
            "Maximum tokens for the current batch",
            "Token slots of the KV blocks that running requests hold.",
        )
        self.batch_max_total_tokens = Gauge(
            "tgi_batch_max_total_tokens", None, "Token slots of the KV pool. TGI meant to export it and did not."
        )
        self.queue_size = Gauge("tgi_queue_size", "Current queue size", "Requests that wait for a row.")
        self.batch_inference_count = Counter(
            "tgi_batch_inference_count",
            "Inference calls per method (prefill or decode)",
            "Steps sent to the shards.",
            "method",
            METHODS,
        )
        self.batch_inference_success = Counter(
            "tgi_batch_inference_success",
            "Number of successful inference calls per method (prefill or decode)",
            "Steps answered.",
            "method",
            METHODS,
        )
        self.batch_inference_failure = Counter(
            "tgi_batch_inference_failure", None, "Steps that were unanswered when the shards died.", "method", METHODS
        )
        self.batch_inference_duration = Histogram(
            "tgi_batch_inference_duration",
            "Batch inference duration",
            "Seconds from a step's sending to its answer; two steps may be on their way at once.",
            durations,
            "method",
            METHODS,
        )
        self.batch_forward_duration = Histogram(
            "tgi_batch_forward_duration",
            "Batch forward duration per method (prefill or decode)",
            "Seconds in model and sampler, as rank 0 says.",
            durations,
            "method",
            METHODS,
        )
        self.batch_decode_duration = Histogram(
            "tgi_batch_decode_duration",
            "Time spent decoding a batch per method (prefill or decode)",
            "Seconds that the shard's part of a step takes beside the forward pass.",
            durations,
            "method",
            METHODS,
        )
        self.batch_filter_duration = Histogram(
            "tgi_batch_filter_duration",
            "Time spent filtering batches and sending generated tokens per method (prefill or decode)",
            "Seconds in which the router takes in an answer: bookkeeping, detokenizing, writing to clients.",
            durations,
            "method",
            METHODS,
        )
        self.batch_concat = Counter(
            "tgi_batch_concat",
            None,
            "Steps that admitted requests while others ran: always `chunking`, as in TGI when it computes prompts in "
            "chunks.",
            "reason",
            CONCAT_REASONS,
        )
        self.batch_concat_duration = Histogram(
            "tgi_batch_concat_duration",
            None,
            "Counts with `tgi_batch_concat`; always 0 s, because nothing is moved, and `decode`, as in TGI.",
            durations,
            "method",
            ("decode",),
        )

    def _declare_ours(self) -> None:
        self.request_time_to_first_token_duration = Histogram(
            "tgi_request_time_to_first_token_duration",
            "Time from arrival to the first token",
            "Seconds, of every choice.",
            DURATION_BUCKETS,
        )
        self.request_inter_token_duration = Histogram(
            "tgi_request_inter_token_duration",
            "Time between two tokens of a request",
            "Seconds, of every token but the first.",
            DURATION_BUCKETS,
        )
        self.request_cancelled = Counter(
            "tgi_request_cancelled",
            "Requests whose client left before the end",
            "Those cut because they did not read are among them.",
        )
        self.grpc_request_count = Counter(
            "tgi_grpc_request_count",
            "Calls of the public gRPC service",
            "At entry; what they generate counts with the others, too.",
            "method",
            GRPC_METHODS,
        )
        self.kv_blocks = Gauge("tgi_kv_blocks", "KV blocks of the pool", "Set when the shards are there.")
        self.kv_blocks_used = Gauge(
            "tgi_kv_blocks_used", "KV blocks held by running requests", "Before and after every step."
        )
        self.kv_blocks_cached = Gauge(
            "tgi_kv_blocks_cached", "KV blocks kept only for the prefix cache", "Before and after every step."
        )
        self.prefix_cache_query_tokens = Counter(
            "tgi_prefix_cache_query_tokens", "Prompt tokens looked up in the prefix cache", "At admission."
        )
        self.prefix_cache_hit_tokens = Counter(
            "tgi_prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache", "At admission."
        )
        self.request_preemptions = Counter(
            "tgi_request_preemptions",
            "Times a running request lost its KV blocks to older ones",
            "It is computed again later, with the same tokens.",
        )
        self.shard_restarts = Counter(
            "tgi_shard_restarts", "Times the router connected to the shards again", "After they had died or hung."
        )

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
