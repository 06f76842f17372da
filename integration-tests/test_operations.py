"""What operators need, on a whole server: traces at a collector, metrics on their own port, ids in the log, limits."""

import re
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from harness import Server, free_port, wait_until
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

Launch = Callable[..., Server]
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
KEY = {"authorization": "Bearer sesame"}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that keeps what it is sent."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    def Export(self, request: Any, context: Any) -> Any:
        with self._lock:
            for of_resource in request.resource_spans:
                for scope in of_resource.scope_spans:
                    self._spans.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace(self, trace_id: str) -> dict[str, Span]:
        """The spans of a trace by name."""
        with self._lock:
            return {span.name: span for span in self._spans if span.trace_id.hex() == trace_id}


@pytest.fixture
def collector() -> Iterator[tuple[Collector, int]]:
    """A running collector and its port."""
    server, found = grpc.server(ThreadPoolExecutor(2)), Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(found, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield found, port
    server.stop(None)


def number(span: Span, name: str) -> int:
    (value,) = [entry.value.int_value for entry in span.attributes if entry.key == name]
    return value


def test_a_request_can_be_followed_from_its_client_through_a_crash_to_the_collector(
    launch: Launch, collector: tuple[Collector, int]
) -> None:
    found, port = collector
    metrics_port = free_port()
    server = launch(
        *("--api-key", "sesame", "--open-path", "/metrics", "--prometheus-port", str(metrics_port)),
        *("--otlp-endpoint", f"http://127.0.0.1:{port}", "--otlp-service-name", "mine"),
    )
    body = {"inputs": "def f(", "parameters": {"max_new_tokens": 1200}, "stream": True}
    headers = {**KEY, "traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01", "x-request-id": "night-shift-1"}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.request, "POST", "/", body, headers)
        wait_until(lambda: server.metric("tgi_request_time_to_first_token_duration_count"), within_s=60, what="a token")
        server.shards()[0].signal(9)
        response = answer.result(120)
    assert response.text.count("data: ") == 1200
    assert response.headers["x-request-id"] == "night-shift-1"
    assert re.fullmatch(rf"00-{TRACE_ID}-[0-9a-f]{{16}}-01", response.headers["traceresponse"])
    assert server.metric("tgi_shard_restarts") == 1

    names = {"POST /", "text_completion tgi-demo", "validate", "queue", "prefill", "decode"}
    names |= {"tgi.shard.v1.Shard/Prefill", "tgi.shard.v1.Shard/Decode"}
    wait_until(lambda: found.trace(TRACE_ID).keys() >= names, within_s=60, what="the trace arrives")
    spans = found.trace(TRACE_ID)
    assert spans["POST /"].parent_span_id.hex() == "00f067aa0ba902b7"
    assert (number(spans["decode"], "tgi.crashes_survived"), number(spans["decode"], "tgi.generated_tokens")) == (
        1,
        1200,
    )
    assert server.log().count("night-shift-1") == 1  # one line, with everything

    assert server.request("GET", "/info").status == 401
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics") as alone:
        assert b"tgi_shard_restarts 1" in alone.read()
    late = server.request("POST", "/generate", {"inputs": "a"}, {**KEY, "x-request-timeout": "0.001"})
    assert (late.status, late.json["error_type"]) == (504, "timeout")
    server.stop()
