"""Traces over OTLP: one HTTP request becomes a server span, and its generations spans of queue, prefill and decode.

Every span below the request's is made when the request is over, from times that were taken anyway: tracing costs the
hot path nothing, and at most one span per choice and phase. The shards' spans are made here too, from the times in
their answers: a step serves many requests at once, so a shard by itself could not say whose time it was.
The only importer of opentelemetry; imported by cli.py when `--otlp-endpoint` is given. An endpoint that is down costs
the spans, and one warning; never a request. Attributes: TGI's, HTTP's and GenAI's semantic conventions, and `tgi.*`.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.propagators.textmap import Getter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from .errors import ApiError, StartupError
from .infer import Call, Timings, log_fields
from .request import FinishReason, Request, ShardWork
from .stream import Choice, Stream
from .validation import Prompt

logger = logging.getLogger(__name__)

EXPORT_TIMEOUT_S = 5.0
STOP_S = 3.0  # for what is left at the end
_MAX_TEXT = 4096  # characters of an attribute
_SHARD_SERVICE = "tgi.shard.v1.Shard"
_SERVER_CODES = (2, 4, 12, 13, 14, 15)  # of gRPC: those that the semantic conventions call the server's errors
_TGI_FIELDS = ("total_time", "validation_time", "queue_time", "inference_time", "time_per_token", "seed")

Attributes = dict[str, Any]


class Tracing:
    """One per server."""

    def __init__(self, endpoint: str, service_name: str, version: str, model_id: str) -> None:
        """Raises StartupError when `endpoint` is not an address. Connects in the background."""
        parts = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
        if parts.scheme not in ("http", "https", "grpc") or not parts.hostname:
            raise StartupError(f"`--otlp-endpoint` is '{endpoint}': give it as http://host:4317")
        # Its own lines would repeat at every attempt; _Exporter says it once.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._exporter = OTLPSpanExporter(
            endpoint=f"{'https' if parts.scheme == 'https' else 'http'}://{parts.netloc}",
            insecure=parts.scheme != "https",
            timeout=EXPORT_TIMEOUT_S,
        )
        resource = Resource.create({"service.name": service_name, "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_Exporter(self._exporter, endpoint)))
        self._tracer = self._provider.get_tracer("tgi_router", version)
        self._propagator = TraceContextTextMapPropagator()
        self._model_id = model_id

    def begin(self, name: str, headers: Mapping[str, str], attributes: Attributes) -> "Trace":
        """The trace of a request that has just come: the client's, when it sent `traceparent`, or a new one."""
        parent = self._propagator.extract(headers, getter=_HEADERS)
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes)
        return Trace(self, span)

    def start(self, name: str, parent: Context, kind: SpanKind, start_ns: int, attributes: Attributes) -> Span:
        return self._tracer.start_span(name, parent, kind, attributes, start_time=start_ns)

    @property
    def model_id(self) -> str:
        return self._model_id

    def stop(self) -> None:
        """Sends what is left; blocks for a few seconds at most."""
        patience = threading.Timer(STOP_S, self._exporter.shutdown)  # ends attempts under way
        patience.daemon = True
        patience.start()
        self._provider.shutdown()
        patience.cancel()


class Trace:
    """The spans of one request."""

    def __init__(self, tracing: Tracing, span: Span) -> None:
        self._tracing = tracing
        self._span = span
        self._epoch_ns = time.time_ns() - time.monotonic_ns()  # of the monotonic clock

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        return f"{self._span.get_span_context().trace_id:032x}"

    @property
    def response_header(self) -> str:
        """`traceresponse` of W3C Trace Context, level 2: so that a client without a tracer can look its trace up."""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def end(self, status: int | None) -> None:
        """The response is complete; status: None when the client has left before."""
        if status is not None:
            self._span.set_attribute("http.response.status_code", status)
        if status is None or status >= 500:
            self._span.set_status(Status(StatusCode.ERROR, "the client has left" if status is None else None))
        self._span.end()

    def end_rpc(self, code: int | None) -> None:
        """The same for a gRPC call. code: its status; None when the client has left before."""
        if code is not None:
            self._span.set_attribute("rpc.grpc.status_code", code)
        if code is None or code in _SERVER_CODES:
            self._span.set_status(Status(StatusCode.ERROR, "the client has left" if code is None else None))
        self._span.end()

    def generation(
        self,
        call: Call,
        prompts: Sequence[Prompt],
        stream: Stream,
        error: BaseException | None,
        copies: int,
    ) -> None:
        """The spans of what ran between Infer.open's beginning and end. error: what it ended with."""
        if not self._span.is_recording():  # the client asked not to
            return
        try:
            self._generation(call, prompts, stream, error, copies)
        except Exception:
            logger.exception("a trace was lost")  # the request was served

    def _generation(
        self, call: Call, prompts: Sequence[Prompt], stream: Stream, error: BaseException | None, copies: int
    ) -> None:
        choices = stream.choices
        now_ns = self._ns(time.monotonic())
        operation = "chat" if callable(prompts[0].text) else "text_completion"
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "tgi",
            "gen_ai.request.model": self._tracing.model_id,
            "gen_ai.response.model": self._tracing.model_id,
            "gen_ai.request.stream": stream.streaming,
            **_asked(prompts[0], copies),
            **_given(choices, call),
            "tgi.request_id": call.request_id,
        }
        parent, started_ns = set_span_in_context(self._span), self._ns(call.started_s)
        name = f"{operation} {self._tracing.model_id}"
        span = self._tracing.start(name, parent, SpanKind.INTERNAL, started_ns, attributes)
        if error is not None:
            _fail(span, error)
        inside = set_span_in_context(span)
        arrived = [choice.request.arrived_s for choice in choices if choice.request is not None]
        self._phase("validate", inside, call.started_s, arrived[0] if arrived else None, now_ns, {})
        for choice in choices:
            if choice.request is not None:
                self._choice(choice.request, choice.index, inside, now_ns)
        span.end(now_ns)

    def _choice(self, request: Request, index: int, parent: Context, now_ns: int) -> None:
        """queue → prefill → decode, as far as it came."""
        which: Attributes = {"tgi.choice": index}
        self._phase("queue", parent, request.arrived_s, request.admitted_s, now_ns, which)
        if request.admitted_s is None:
            return
        prefill = {
            **which,
            "tgi.prompt_tokens": request.num_prompt_tokens,
            "tgi.cached_tokens": request.num_cached_tokens,
        }
        span = self._phase("prefill", parent, request.admitted_s, request.first_token_s, now_ns, prefill)
        self._shard("Prefill", span, request.admitted_s, request.first_token_s, request.work[:2])
        if request.first_token_s is None:
            return
        decode = {
            **which,
            "tgi.generated_tokens": request.num_generated_tokens,
            "tgi.preemptions": request.num_preemptions,
            "tgi.crashes_survived": request.num_crashes,
        }
        span = self._phase("decode", parent, request.first_token_s, request.finished_s, now_ns, decode)
        self._shard("Decode", span, request.first_token_s, request.finished_s, request.work[1:])

    def _phase(
        self, name: str, parent: Context, start_s: float, end_s: float | None, now_ns: int, attributes: Attributes
    ) -> Span:
        """end_s: None when the request ended within the phase."""
        span = self._tracing.start(name, parent, SpanKind.INTERNAL, self._ns(start_s), attributes)
        span.end(now_ns if end_s is None else self._ns(end_s))
        return span

    def _shard(self, method: str, phase: Span, start_s: float, end_s: float | None, work: Sequence[ShardWork]) -> None:
        """The shards' part of a phase that is complete: a span with the attributes that TGI's shards gave theirs."""
        if end_s is None or len(work) < 2:
            return
        attributes = {
            "rpc.system": "grpc",
            "rpc.service": _SHARD_SERVICE,
            "rpc.method": method,
            "rpc.grpc.status_code": 0,
            "network.transport": "unix",
            "tgi.shard.steps": work[1].num_steps - work[0].num_steps,
            "tgi.shard.forward_time_s": (work[1].forward_ns - work[0].forward_ns) / 1e9,
        }
        parent = set_span_in_context(phase)
        span = self._tracing.start(f"{_SHARD_SERVICE}/{method}", parent, SpanKind.CLIENT, self._ns(start_s), attributes)
        span.end(self._ns(end_s))

    def _ns(self, monotonic_s: float) -> int:
        return self._epoch_ns + int(monotonic_s * 1e9)


def _asked(prompt: Prompt, copies: int) -> Attributes:
    """What the request asked for; no text of it but its stop strings."""
    parameters = prompt.parameters
    asked = {
        "parameters": str(parameters)[:_MAX_TEXT],
        "gen_ai.request.max_tokens": parameters.max_new_tokens,
        "gen_ai.request.temperature": parameters.temperature,
        "gen_ai.request.top_p": parameters.top_p,
        "gen_ai.request.top_k": parameters.top_k,
        "gen_ai.request.frequency_penalty": parameters.frequency_penalty,
        "gen_ai.request.seed": parameters.seed,
        "gen_ai.request.stop_sequences": parameters.stop or None,
        "gen_ai.request.choice.count": copies if copies > 1 else None,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _given(choices: Sequence[Choice], call: Call) -> Attributes:
    """What came of it so far."""
    requests = [choice.request for choice in choices if choice.request is not None]
    if not requests:
        return {}
    given: Attributes = {
        "gen_ai.usage.input_tokens": sum(request.num_prompt_tokens for request in requests),
        "gen_ai.usage.output_tokens": sum(choice.num_tokens for choice in choices),
        "gen_ai.usage.cache_read.input_tokens": sum(request.num_cached_tokens for request in requests),
    }
    firsts = [request.first_token_s for request in requests if request.first_token_s is not None]
    if firsts:
        given["gen_ai.response.time_to_first_chunk"] = min(firsts) - call.started_s
    reasons = [choice.finish_reason for choice in choices]
    if None not in reasons:
        given["gen_ai.response.finish_reasons"] = [
            "length" if reason is FinishReason.LENGTH else "stop" for reason in reasons
        ]
        times = log_fields(choices[0], Timings.of(choices[0], call))
        given |= {name: times[name] for name in _TGI_FIELDS}
    return given


def _fail(span: Span, error: BaseException) -> None:
    if isinstance(error, ApiError):
        span.set_attribute("error.type", error.error_type)
        span.set_status(Status(StatusCode.ERROR, error.message[:_MAX_TEXT]))
    elif isinstance(error, Exception) and not isinstance(error, ConnectionError):
        span.set_attribute("error.type", "internal")
        span.set_status(Status(StatusCode.ERROR))
    else:
        span.set_attribute("error.type", "cancelled")
        span.set_status(Status(StatusCode.ERROR, "the client has left"))


class _Headers(Getter[Mapping[str, str]]):
    """Reads aiohttp's headers."""

    def get(self, carrier: Mapping[str, str], key: str) -> list[str] | None:
        return [carrier[key]] if key in carrier else None

    def keys(self, carrier: Mapping[str, str]) -> list[str]:
        return list(carrier)


_HEADERS = _Headers()


class _Exporter(SpanExporter):
    """Says once that the collector is not there, and once that it is back. Called from the SDK's thread."""

    def __init__(self, inner: SpanExporter, endpoint: str) -> None:
        self._inner = inner
        self._endpoint = endpoint
        self._failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._inner.export(spans)
        failing = result is not SpanExportResult.SUCCESS
        if failing and not self._failing:
            logger.warning(
                "Traces are lost: the collector at %s (`--otlp-endpoint`) does not take them. Requests are served as "
                "usual; this line is not repeated",
                self._endpoint,
            )
        elif self._failing and not failing:
            logger.info("The collector at %s takes traces again", self._endpoint)
        self._failing = failing
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._inner.force_flush(timeout_millis)
