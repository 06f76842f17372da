"""Traces, as a real OTLP collector receives them: an in-process gRPC server of opentelemetry's own protocol."""

import asyncio
import contextlib
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import grpc.aio
import pytest
from api_kit import Api, serving
from grpc_kit import client, failure, free_port
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from tgi_proto import inference_pb2 as pb
from tgi_router import log_context
from tgi_router.errors import StartupError
from tgi_router.grpc_service.listening import listening
from tgi_router.tracing import Tracing

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
BODY = {"inputs": "hello", "parameters": {"max_new_tokens": 5, "do_sample": True, "seed": 7, "temperature": 0.5}}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        self.refuses = False

    async def Export(self, request: Any, context: Any) -> Any:
        if self.refuses:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no")
        for of_resource in request.resource_spans:
            self.resources.append(attributes(of_resource.resource))
            for scope in of_resource.scope_spans:
                self.spans.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, trace_id: str) -> dict[str, Span]:
        """The spans of a trace by their names."""
        return {span.name: span for span in self.spans if span.trace_id.hex() == trace_id}


def attributes(holder: Any) -> dict[str, Any]:
    """The attributes of a span or resource as plain values."""

    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        if kind == "array_value":
            return [plain(item) for item in value.array_value.values]
        return getattr(value, kind)

    return {entry.key: plain(entry.value) for entry in holder.attributes}


@contextlib.asynccontextmanager
async def collecting(**changes: Any) -> AsyncIterator[tuple[Api, Collector]]:
    """A router and its collector; `flush` before looking."""
    collector, server = Collector(), grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with serving(otlp_endpoint=f"http://127.0.0.1:{port}", otlp_service_name="tgi-test", **changes) as api:
            yield api, collector
    finally:
        await server.stop(None)


async def flush(api: Api) -> None:
    """Everything that is over has arrived at the collector afterwards; nothing more will."""
    assert api.server.tracing is not None
    await api.idle()
    await asyncio.to_thread(api.server.tracing.stop)


def assert_nested(spans: dict[str, Span], *names: str) -> None:
    """Each of `names` is the child of the one before, and lies within it."""
    for outer, inner in pairwise(names):
        parent, child = spans[outer], spans[inner]
        assert child.parent_span_id == parent.span_id, (outer, inner)
        assert parent.start_time_unix_nano <= child.start_time_unix_nano + 1_000_000, (outer, inner)
        assert child.start_time_unix_nano <= child.end_time_unix_nano <= parent.end_time_unix_nano + 1_000_000


async def test_a_request_is_one_trace_from_its_client_through_queue_prefill_and_decode_to_the_shards() -> None:
    async with collecting() as (api, collector):
        headers = {"traceparent": PARENT, "x-request-id": "mine"}
        answer = await api.post("/generate", BODY, headers=headers)
        await flush(api)
        spans = collector.of(TRACE_ID)
        assert answer.headers["traceresponse"] == f"00-{TRACE_ID}-{spans['POST /generate'].span_id.hex()}-01"
        assert spans["POST /generate"].parent_span_id.hex() == "00f067aa0ba902b7"
        for phase, call in [("prefill", "Prefill"), ("decode", "Decode")]:
            assert_nested(spans, "POST /generate", "text_completion tiny", phase, f"tgi.shard.v1.Shard/{call}")
        for phase in ("validate", "queue"):
            assert_nested(spans, "POST /generate", "text_completion tiny", phase)
        assert len(collector.spans) == len(spans) == 8
        order = ["validate", "queue", "prefill", "decode"]
        assert [spans[name].end_time_unix_nano for name in order[:-1]] == [
            spans[name].start_time_unix_nano for name in order[1:]
        ]
        assert {span.kind for name, span in spans.items() if name.startswith("POST")} == {Span.SPAN_KIND_SERVER}
        assert collector.resources[0]["service.name"] == "tgi-test"


async def test_spans_say_what_tgi_said_and_what_the_genai_conventions_ask_for() -> None:
    async with collecting() as (api, collector):
        await api.post("/generate", BODY, headers={"traceparent": PARENT, "x-request-id": "mine"})
        await flush(api)
        spans = collector.of(TRACE_ID)
        http = attributes(spans["POST /generate"])
        assert http == {
            "http.request.method": "POST",
            "url.path": "/generate",
            "http.route": "/generate",
            "http.response.status_code": 200,
        }
        found = attributes(spans["text_completion tiny"])
        expected = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": "tiny",
            "gen_ai.response.model": "tiny",
            "gen_ai.request.max_tokens": 5,
            "gen_ai.request.temperature": 0.5,
            "gen_ai.request.seed": 7,
            "gen_ai.request.stream": False,
            "gen_ai.usage.input_tokens": len(api.encode("hello")),
            "gen_ai.usage.output_tokens": 5,
            "gen_ai.usage.cache_read.input_tokens": 0,
            "gen_ai.response.finish_reasons": ["length"],
            "seed": "Some(7)",
            "tgi.request_id": "mine",
        }
        assert {name: found[name] for name in expected} == expected
        for name in ("total_time", "validation_time", "queue_time", "inference_time", "time_per_token"):
            assert found[name].endswith("s"), name  # as Rust prints durations
        assert "max_new_tokens=5" in found["parameters"]
        assert "hello" not in str(found)
        decode = attributes(spans["decode"])
        assert (decode["tgi.generated_tokens"], decode["tgi.preemptions"]) == (5, 0)
        assert attributes(spans["prefill"])["tgi.prompt_tokens"] == len(api.encode("hello"))
        shard = attributes(spans["tgi.shard.v1.Shard/Decode"])
        assert (shard["rpc.system"], shard["rpc.method"], shard["rpc.service"]) == (
            "grpc",
            "Decode",
            "tgi.shard.v1.Shard",
        )
        assert shard["tgi.shard.steps"] == 4
        assert shard["tgi.shard.forward_time_s"] == pytest.approx(4 * 1e-6)  # the fake shard says 1 µs a step


async def test_a_chat_of_several_choices_has_the_phases_of_each() -> None:
    async with collecting() as (api, collector):
        body = {"messages": [{"role": "user", "content": "h"}], "n": 2, "max_tokens": 3, "stream": True}
        answer = await api.post("/v1/chat/completions", body)
        await flush(api)
        trace_id = answer.headers["traceresponse"].split("-")[1]
        spans = collector.of(trace_id)
        chat = attributes(spans["chat tiny"])
        assert (chat["gen_ai.operation.name"], chat["gen_ai.request.choice.count"]) == ("chat", 2)
        assert chat["gen_ai.usage.output_tokens"] == 6
        assert chat["gen_ai.request.stream"] is True
        decodes = [attributes(span)["tgi.choice"] for span in collector.spans if span.name == "decode"]
        assert sorted(decodes) == [0, 1]


async def test_what_goes_wrong_is_on_the_span() -> None:
    async with collecting(step_ms=20.0) as (api, collector):
        refused = await api.post("/generate", {"inputs": "h", "parameters": {"temperature": 0}})
        late = await api.post(
            "/generate", {"inputs": "h", "parameters": {"max_new_tokens": 200}}, headers={"x-request-timeout": "0.5"}
        )
        await flush(api)
        spans = collector.of(refused.headers["traceresponse"].split("-")[1])
        generation = spans["text_completion tiny"]
        assert attributes(generation)["error.type"] == "validation"
        assert generation.status.code == Status.STATUS_CODE_ERROR
        assert "`temperature` must be strictly positive" in generation.status.message
        assert spans["POST /generate"].status.code == Status.STATUS_CODE_UNSET  # the client's mistake, not the server's
        spans = collector.of(late.headers["traceresponse"].split("-")[1])
        assert attributes(spans["text_completion tiny"])["error.type"] == "timeout"
        assert spans["POST /generate"].status.code == Status.STATUS_CODE_ERROR
        assert "queue" in spans


async def test_a_client_that_asks_not_to_be_traced_is_not_and_probes_never_are() -> None:
    async with collecting() as (api, collector):
        await api.post("/generate", BODY, headers={"traceparent": PARENT[:-1] + "0"})
        await api.get("/health")
        await api.get("/metrics")
        await flush(api)
        assert collector.spans == []


async def test_log_lines_of_a_traced_request_carry_its_trace(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with collecting() as (api, _):
        caplog.handler.addFilter(log_context.ContextFilter())
        await api.post("/generate", BODY, headers={"traceparent": PARENT})
    record = next(vars(record) for record in caplog.records if record.message == "Success")
    assert record["trace_id"] == TRACE_ID


async def test_a_collector_that_is_not_there_costs_one_warning_and_no_request(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tgi_router.tracing.EXPORT_TIMEOUT_S", 0.2)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    caplog.set_level(logging.DEBUG)
    async with serving(otlp_endpoint="http://127.0.0.1:1") as api:
        for _ in range(3):
            assert (await api.post("/generate", BODY)).status == 200
            async with asyncio.timeout(60):
                while "Traces are lost" not in caplog.text:  # noqa: ASYNC110  the SDK's thread announces nothing
                    await asyncio.sleep(0.01)
        await flush(api)
    loud = [record for record in caplog.records if record.levelno >= logging.WARNING and record.name != "asyncio"]
    assert [record.name for record in loud] == ["tgi_router.tracing"]
    assert "127.0.0.1:1" in loud[0].message


async def test_a_collector_that_comes_back_is_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    caplog.set_level(logging.INFO)
    async with collecting() as (api, collector):
        collector.refuses = True
        await api.post("/generate", BODY)
        async with asyncio.timeout(60):
            while "Traces are lost" not in caplog.text:  # noqa: ASYNC110  the SDK's thread announces nothing
                await asyncio.sleep(0.01)
        collector.refuses = False
        answer = await api.post("/generate", BODY)
        await flush(api)
        assert len(collector.of(answer.headers["traceresponse"].split("-")[1])) == 8
    assert caplog.text.count("Traces are lost") == caplog.text.count("takes traces again") == 1


async def test_a_collector_that_never_answers_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgi_router.tracing.EXPORT_TIMEOUT_S", 600.0)
    monkeypatch.setattr("tgi_router.tracing.STOP_S", 0.1)
    silent = await asyncio.start_server(lambda reader, writer: reader.read(), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    async with serving(otlp_endpoint=f"http://127.0.0.1:{port}") as api:
        assert (await api.post("/generate", BODY)).status == 200
        async with asyncio.timeout(60):
            await flush(api)
    silent.close()


@pytest.mark.parametrize("endpoint", ["", "http://", "ftp://c:4317"])
def test_an_endpoint_that_is_no_address_is_refused_at_start(endpoint: str) -> None:
    with pytest.raises(StartupError, match="`--otlp-endpoint` is "):
        Tracing(endpoint, "name", "1", "tiny")


def test_nothing_of_opentelemetry_is_imported_without_the_flag() -> None:
    code = "import sys, tgi_router.cli; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_a_grpc_call_is_one_trace_from_its_client_to_the_shards() -> None:
    async with collecting(grpc_port=free_port()) as (api, collector):
        async with listening(api.server, "127.0.0.1"), client(api) as stub:
            request = pb.GenerateRequest(inputs="hello", parameters=pb.GenerateParameters(max_new_tokens=5))
            caller = (("traceparent", PARENT), ("x-request-id", "mine"))
            assert len([message async for message in stub.GenerateStream(request, metadata=caller)]) == 5
            other = PARENT.replace(TRACE_ID, TRACE_ID[::-1])
            await failure(stub.Generate(pb.GenerateRequest(inputs=""), metadata=(("traceparent", other),)))
            await flush(api)
        spans = collector.of(TRACE_ID)
        assert_nested(spans, "tgi.inference.v1.Inference/GenerateStream", "text_completion tiny", "decode")
        assert_nested(spans, "decode", "tgi.shard.v1.Shard/Decode")
        span = spans["tgi.inference.v1.Inference/GenerateStream"]
        assert span.parent_span_id.hex() == PARENT.split("-")[2]
        assert attributes(span) == {
            "rpc.system": "grpc",
            "rpc.service": "tgi.inference.v1.Inference",
            "rpc.method": "GenerateStream",
            "rpc.grpc.status_code": 0,
        }
        assert attributes(spans["text_completion tiny"])["tgi.request_id"] == "mine"
        refused = collector.of(TRACE_ID[::-1])["tgi.inference.v1.Inference/Generate"]
        assert attributes(refused)["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert refused.status.code != Status.STATUS_CODE_ERROR
