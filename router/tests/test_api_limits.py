"""Clients that are slow, too many, too large or out of time: each is refused or cut, and nobody else notices."""

import asyncio
import gzip
import json
import logging
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from api_kit import Answer, Api, serving
from tgi_router import bodies, log_context, stream
from tgi_router.connections import Patience
from tgi_router.errors import Overloaded

HASTE = Patience(head_s=0.2, write_s=0.3, linger_s=0.1)
LONG: dict[str, Any] = {"inputs": "hello", "parameters": {"max_new_tokens": 200}}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 200}
ROUTES = [
    ("/generate", LONG),
    ("/generate_stream", LONG),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "stream": True}),
    ("/v1/completions", {"prompt": ["hello", "world"], "max_tokens": 200}),
    ("/v1/completions", {"prompt": "hello", "max_tokens": 200, "stream": True}),
]


async def connect(api: Api) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = urlsplit(api.url)
    return await asyncio.open_connection(address.hostname, address.port)


def whole_request(path: str, body: Any, **headers: str) -> bytes:
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(data)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    """What still comes until the server closes the connection, in whatever way."""
    async with asyncio.timeout(60):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


class TestSlowClients:
    @pytest.mark.parametrize("begun", [b"", b"P", b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-"])
    async def test_a_head_that_does_not_arrive_whole_ends_the_connection(self, begun: bytes) -> None:
        async with serving(patience=HASTE) as api:
            reader, writer = await connect(api)
            writer.write(begun)
            assert await until_closed(reader) == b""
            writer.close()

    async def test_bytes_that_trickle_do_not_move_the_deadline(self) -> None:
        async with serving(patience=HASTE) as api:
            reader, writer = await connect(api)
            closed = asyncio.create_task(until_closed(reader))
            writer.write(b"GET / HTTP/1.1\r\nx-name: ")
            sent = 0
            while not closed.done():
                writer.write(b"x")
                sent += 1
                await asyncio.wait((closed,), timeout=0.02)
            assert sent > 3
            writer.close()

    async def test_the_next_head_on_a_connection_has_a_deadline_too_and_an_idle_connection_stays(self) -> None:
        async with serving(patience=HASTE) as api:
            reader, writer = await connect(api)
            once = whole_request("/generate", {"inputs": "h", "parameters": {"max_new_tokens": 1}})
            for _ in range(2):
                writer.write(once)
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
                await reader.readuntil(b"}")
                await asyncio.sleep(HASTE.head_s * 1.5)  # idle for longer than a head may take
            writer.write(once[:20])
            assert await until_closed(reader) == b""
            writer.close()

    async def test_a_request_that_runs_for_long_is_not_cut_by_the_deadline_of_its_head(self) -> None:
        async with serving(patience=HASTE, step_ms=20.0) as api:
            answer = await api.post("/generate", {"inputs": "h", "parameters": {"max_new_tokens": 20}})
            assert answer.status == 200

    async def test_a_body_that_does_not_arrive_is_a_408_and_ends_the_connection(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bodies, "READ_DEADLINE_S", 0.1)
        async with serving(patience=HASTE) as api:
            for path in ("/generate", "/v1/completions"):
                reader, writer = await connect(api)
                writer.write(whole_request(path, LONG)[:-10])
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
                assert head.startswith(b"HTTP/1.1 408")
                assert b"The body did not arrive within" in await until_closed(reader)
                writer.close()
            assert api.server.infer.num_running == 0

    async def test_a_request_that_is_refused_before_its_body_came_ends_the_connection(self) -> None:
        async with serving(patience=HASTE) as api:
            for path, content_type, status in [("/generate", "text/plain", 415), ("/nope", "application/json", 404)]:
                reader, writer = await connect(api)
                head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {content_type}\r\ncontent-length: 9\r\n\r\n"
                writer.write(head.encode())
                answer = (await until_closed(reader)).lower()
                assert answer.startswith(b"http/1.1 %d" % status)
                assert b"\r\nconnection: close\r\n" in answer
                writer.close()

    @pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
    async def test_a_client_that_reads_nothing_is_cut_whatever_is_left_to_generate(
        self, path: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        async with serving(
            patience=HASTE, max_model_tokens=4000, num_blocks=4000, check=False, max_top_n_tokens=100
        ) as api:
            api.send_buffer(8192)
            loop = asyncio.get_running_loop()
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.setblocking(False)
                await loop.sock_connect(client, (urlsplit(api.url).hostname, urlsplit(api.url).port))
                parameters = {"max_new_tokens": 200, "top_n_tokens": 100, "details": True}
                await loop.sock_sendall(client, whole_request(path, {"inputs": "hello", "parameters": parameters}))
                async with asyncio.timeout(60):
                    while "its client did not read a full buffer" not in caplog.text:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                await api.idle()
                other = await api.post("/generate", {"inputs": "h", "parameters": {"max_new_tokens": 1}})
                assert other.status == 200

    async def test_what_one_stream_may_hold_is_bounded_and_others_go_on(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        monkeypatch.setattr(stream, "MAX_UNREAD_TOKENS", 300)
        async with serving(max_model_tokens=4000, num_blocks=4000, check=False) as api:
            api.send_buffer(8192)
            loop = asyncio.get_running_loop()
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.setblocking(False)
                await loop.sock_connect(client, (urlsplit(api.url).hostname, urlsplit(api.url).port))
                body = {"inputs": "hello", "parameters": {"max_new_tokens": 3900, "top_n_tokens": 5}}
                await loop.sock_sendall(client, whole_request("/generate_stream", body, x_request_id="lazy"))
                async with asyncio.timeout(60):
                    while not api.server.batcher._core.running:  # noqa: ASYNC110  nothing announces it
                        await asyncio.sleep(0.001)
                greedy = api.server.batcher._core.running[0].sink._stream  # type: ignore[attr-defined]
                most = 0
                while api.server.infer.num_running:
                    most = max(most, len(greedy._unread))
                    answer = await api.post("/generate", {"inputs": "h", "parameters": {"max_new_tokens": 3}})
                    assert answer.json == {"generated_text": api.expected_text("h", 3)}
                assert 0 < most <= 301
            assert api.server.metrics.request_cancelled.get() == 1
            told = next(record for record in caplog.records if "301 tokens wait for a client" in record.message)
            assert vars(told)["request_id"] == "lazy"


COUNTS = {"max_best_of": 3, "max_stop_sequences": 1, "max_top_n_tokens": 2, "max_client_batch_size": 3}
SHORT = {"messages": [{"role": "user", "content": "h"}], "max_tokens": 1, "logprobs": True}
# path, body with "?" for what is counted, its limit
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("/generate", {"inputs": "h", "parameters": {"best_of": "?", "do_sample": True, "max_new_tokens": 1}}, 3),
    ("/generate", {"inputs": "h", "parameters": {"stop": ["?"], "max_new_tokens": 1}}, 1),
    ("/generate", {"inputs": "h", "parameters": {"top_n_tokens": "?", "max_new_tokens": 1}}, 2),
    ("/v1/chat/completions", {**SHORT, "stop": ["?"]}, 1),
    ("/v1/chat/completions", {**SHORT, "top_logprobs": "?"}, 2),
    ("/v1/completions", {"prompt": "h", "max_tokens": 1, "stop": ["?"]}, 1),
    ("/v1/completions", {"prompt": "h", "max_tokens": 1, "logprobs": "?"}, 2),
    ("/v1/completions", {"prompt": ["?"], "max_tokens": 1}, 3),
]


def filled(body: Any, count: int) -> Any:
    """`body` with so many of what is counted."""
    if isinstance(body, dict):
        return {name: filled(value, count) for name, value in body.items()}
    if body == ["?"]:
        return [f"text {number}" for number in range(count)]
    return count if body == "?" else body


@pytest.mark.parametrize(("path", "body", "limit"), CASES, ids=[f"{path} {body}" for path, body, _ in CASES])
async def test_as_many_as_the_flag_says_pass_and_one_more_is_told_the_limit(path: str, body: Any, limit: int) -> None:
    async with serving(**COUNTS) as api:
        assert (await api.post(path, filled(body, limit))).status == 200
        answer = await api.post(path, filled(body, limit + 1))
        assert answer.status in (400, 422)
        assert answer.json["error_type"] in ("validation", "batch size exceeded")
        assert str(limit) in str(answer.json["error"])


class TestBytes:
    async def test_a_body_that_grows_when_it_is_unpacked_is_limited_by_what_it_becomes(self) -> None:
        async with serving(payload_limit=10_000) as api:
            headers = {"content-type": "application/json", "content-encoding": "gzip"}
            bomb = gzip.compress(b'{"inputs": "' + b"x" * 5_000_000)
            answer = await api.request("POST", "/generate", data=bomb, headers=headers)
            assert answer.status == 413
            small = gzip.compress(json.dumps({"inputs": "h", "parameters": {"max_new_tokens": 1}}).encode())
            assert (await api.request("POST", "/generate", data=small, headers=headers)).status == 200

    async def test_a_body_that_is_not_compressed_as_its_header_says_is_the_clients_mistake(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with serving() as api:
            headers = {"content-type": "application/json", "content-encoding": "gzip"}
            for path in ("/generate", "/v1/completions"):
                answer = await api.request("POST", path, data=b'{"inputs": "h", "prompt": "h"}', headers=headers)
                assert answer.status == 400
                assert "content-encoding: gzip" in str(answer.json["error"])
            assert (await api.post("/generate", {"inputs": "h", "parameters": {"max_new_tokens": 1}})).status == 200
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    async def test_an_unknown_expectation_is_refused(self) -> None:
        async with serving() as api:
            reader, writer = await connect(api)
            writer.write(b"POST /generate HTTP/1.1\r\nhost: x\r\nexpect: more\r\nconnection: close\r\n\r\n")
            assert (await until_closed(reader)).startswith(b"HTTP/1.1 417 ")
            writer.close()

    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
    @pytest.mark.parametrize(("name", "number"), [("top_k", 2**31), ("min_tokens", -1), ("min_tokens", 2**32)])
    async def test_a_number_that_the_wire_does_not_hold_is_refused_by_its_name(
        self, path: str, name: str, number: int
    ) -> None:
        async with serving() as api:
            what = {"prompt": "h", "messages": [{"role": "user", "content": "h"}], name: number}
            answer = await api.post(path, what)
            assert answer.status == 422
            assert name in str(answer.json["error"])

    @pytest.mark.parametrize("count", [3, 1000, 2**63, 10**400], ids=["3", "1000", "2^63", "10^400"])
    async def test_a_best_of_that_is_never_allowed_is_not_told_to_come_again(self, count: int) -> None:
        async with serving(max_best_of=2, max_concurrent_requests=2) as api:
            answer = await api.post("/generate", {"inputs": "h", "parameters": {"best_of": count, "do_sample": True}})
            assert answer.status == 422
            assert "`best_of` must be > 0 and <= 2" in str(answer.json["error"])

    async def test_bytes_that_are_no_request_get_an_error_in_json_and_one_line(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        async with serving() as api:
            for number, garbage in enumerate(
                (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET / HTTP/9\r\n\r\n"), start=1
            ):
                reader, writer = await connect(api)
                writer.write(garbage)
                answer = await until_closed(reader)
                assert answer.startswith(b"HTTP/1.")
                assert b" 400 " in answer.split(b"\r\n")[0]
                error = json.loads(answer.split(b"\r\n\r\n", 1)[1])
                assert (list(error), error["error_type"]) == (["error", "error_type"], "validation")
                assert caplog.text.count("Refused bytes that are no HTTP request") == number
                writer.close()
            loud = [record for record in caplog.records if record.levelno > logging.INFO]
            assert not [record for record in loud if record.name.startswith(("aiohttp", "tgi_router"))]


class TestDeadlines:
    @pytest.mark.parametrize(("path", "body"), ROUTES, ids=[f"{path} {sorted(body)}" for path, body in ROUTES])
    async def test_a_request_is_answered_when_its_time_is_over_and_its_generation_ends(
        self, path: str, body: dict[str, Any]
    ) -> None:
        async with serving(step_ms=20.0) as api:  # 4 s for 200 tokens
            answer = await api.post(path, body, headers={"x-request-timeout": "0.3"})
            await api.idle()
            streamed = answer.headers["content-type"] == "text/event-stream"
            if streamed:
                assert answer.status == 200
                error = next(event for event in answer.events if "error" in event)
                assert answer.events[-1] == ("[DONE]" if path.startswith("/v1") else error)
            else:
                assert answer.status == 504
                assert answer.headers["x-should-retry"] == "false"
                error = answer.json
            assert error["error_type"] == "timeout"
            assert "within 0.3 seconds, its `x-request-timeout`" in str(error)
            assert api.group.servers[0].engine.num_computed_tokens < 300
            metrics = api.server.metrics
            assert (metrics.request_failure.get("timeout"), metrics.request_success.get()) == (1, 0)

    async def test_it_counts_while_a_request_waits_and_while_its_body_is_on_its_way(self) -> None:
        async with serving(max_rows=1) as api:
            brake = api.group.servers[0].may_answer = asyncio.Event()
            first = asyncio.create_task(api.post("/generate", {"inputs": "h", "parameters": {"max_new_tokens": 2}}))
            late = await api.post("/generate", LONG, headers={"x-request-timeout": "0.1"})
            assert late.status == 504
            brake.set()
            assert (await first).status == 200
            reader, writer = await connect(api)
            writer.write(whole_request("/generate", LONG, x_request_timeout="0.1")[:-5])
            assert (await asyncio.wait_for(reader.readuntil(b"\r\n"), 60)).startswith(b"HTTP/1.1 504")
            writer.close()

    async def test_a_time_that_is_over_at_once_is_a_timeout_like_any_other(self) -> None:
        async with serving() as api:
            for given in ("0.001", "0.0001", "1e-9"):
                answer = await api.post("/generate", LONG, headers={"x-request-timeout": given})
                assert (answer.status, answer.json["error_type"]) == (504, "timeout"), given

    async def test_one_that_is_done_in_time_has_its_whole_answer(self) -> None:
        async with serving() as api:
            for path in ("/generate", "/generate_stream"):
                body = {"inputs": "hello", "parameters": {"max_new_tokens": 5}}
                answer = await api.post(path, body, headers={"x-request-timeout": "60"})
                last = answer.json if path == "/generate" else answer.events[-1]
                assert last["generated_text"] == api.expected_text("hello", 5)

    @pytest.mark.parametrize("given", ["soon", "0", "-1", "nan", "inf", ""])
    async def test_a_time_that_is_none_is_refused_by_name(self, given: str) -> None:
        async with serving() as api:
            answer = await api.post("/generate", LONG, headers={"x-request-timeout": given})
            assert (answer.status, answer.json["error_type"]) == (422, "validation")
            assert "`x-request-timeout` must be a number of seconds > 0" in answer.json["error"]


class TestRetryAfter:
    async def test_a_refused_client_is_told_when_a_permit_is_likely_to_be_back(self) -> None:
        async with serving(max_concurrent_requests=1) as api:
            api.server.infer._retry_after.returned(held_s=7.5)  # what the last request took
            brake = api.group.servers[0].may_answer = asyncio.Event()
            task = asyncio.create_task(api.post("/generate", {"inputs": "h", "parameters": {"max_new_tokens": 2}}))
            while not api.server.infer.num_running:  # noqa: ASYNC110  nothing announces it
                await asyncio.sleep(0.001)
            told = [(await api.post("/generate", LONG)).headers["retry-after"] for _ in range(2)]
            assert told == ["8", "15"]  # the second stands behind the first
            api.server.draining = True
            refused = await api.post("/generate", LONG)
            assert (refused.status, refused.headers["retry-after"]) == (503, "8")
            brake.set()
            assert (await task).status == 200

    def test_nothing_measured_is_a_second(self) -> None:
        assert Overloaded().retry_after_s == 1


class TestIds:
    async def test_every_line_about_a_request_carries_its_id(
        self, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        (tmp_path / "key").write_text("k")
        caplog.set_level(logging.INFO)
        caplog.handler.addFilter(log_context.ContextFilter())
        async with serving() as api:
            bad = api.encode("Z", special=False)[0]
        async with serving(error_token=bad, api_key_file=str(tmp_path / "key"), payload_limit=1000) as api:
            api.http.headers["authorization"] = "Bearer k"
            ids: list[str] = []

            async def ask(body: Any, **options: Any) -> Answer:
                ids.append(f"id-{len(ids)}")
                headers = {"x-request-id": ids[-1], **options.pop("headers", {})}
                answer = await api.request("POST", "/generate", headers=headers, json=body, **options)
                assert answer.headers["x-request-id"] == ids[-1]
                return answer

            statuses = [
                (await ask({"inputs": "h", "parameters": {"max_new_tokens": 1}})).status,
                (await ask({"inputs": "Z"})).status,
                (await ask({"inputs": ""})).status,
                (await ask({})).status,
                (await ask({"inputs": "h" * 2000})).status,
                (await ask({}, headers={"authorization": "Bearer guessed"})).status,
            ]
            assert statuses == [200, 424, 422, 422, 413, 401]
            await api.idle()
        lines = [vars(record) for record in caplog.records if "request_id" in vars(record)]
        assert [line["request_id"] for line in lines] == ids  # one line each
        assert [line["levelname"] for line in lines] == ["INFO", "ERROR", "INFO", "INFO", "INFO", "INFO"]
        assert lines[-1]["path"] == "/generate"
        assert "guessed" not in caplog.text

    async def test_a_mistake_of_ours_is_logged_with_the_id_that_its_client_was_given(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        caplog.handler.addFilter(log_context.ContextFilter())
        async with serving() as api:

            def broken(*args: object, **options: object) -> None:
                raise RuntimeError("secret")

            monkeypatch.setattr(api.server.tokenizer, "encode", broken)
            answer = await api.post("/generate", LONG)
            record = next(record for record in caplog.records if record.exc_info)
            assert vars(record)["request_id"] == answer.headers["x-request-id"]
            assert api.server.metrics.request_failure.get("generation") == 1


class TestOrigins:
    async def test_a_preflight_allows_the_headers_a_page_asks_for(self) -> None:
        async with serving(cors_allow_origin=("https://a.example",)) as api:
            asked = {
                "origin": "https://a.example",
                "access-control-request-method": "POST",
                "access-control-request-headers": "Authorization, content-type,x-stainless-os",
            }
            answer = await api.request("OPTIONS", "/v1/chat/completions", headers=asked)
            assert answer.status == 200
            assert answer.headers["access-control-allow-origin"] == "https://a.example"
            assert answer.headers["access-control-allow-methods"] == "GET,POST"
            assert answer.headers["access-control-allow-headers"] == "authorization, content-type,x-stainless-os"
            assert answer.headers["access-control-max-age"] == "600"
            assert answer.headers["vary"] == "origin, access-control-request-method, access-control-request-headers"
            other = await api.request(
                "OPTIONS", "/v1/chat/completions", headers={**asked, "origin": "https://b.example"}
            )
            assert "access-control-allow-origin" not in other.headers

    async def test_what_is_no_list_of_names_is_not_repeated(self) -> None:
        async with serving() as api:
            headers = {"access-control-request-headers": "x y<script>"}
            answer = await api.request("OPTIONS", "/generate", headers=headers)
            assert answer.headers["access-control-allow-headers"] == "content-type,authorization"

    async def test_a_page_may_read_our_headers_and_those_of_errors(self) -> None:
        async with serving() as api:
            for body, status in [({"inputs": "h", "parameters": {"max_new_tokens": 1}}, 200), ({"inputs": ""}, 422)]:
                answer = await api.post("/generate", body, headers={"origin": "https://a.example"})
                assert answer.status == status
                assert answer.headers["access-control-allow-origin"] == "*"
                assert answer.headers["access-control-expose-headers"] == "*"


async def test_paths_that_were_opened_need_no_key_to_be_read(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k")
    config: dict[str, Any] = {"api_key_file": str(tmp_path / "key"), "open_path": ("/metrics", "/tokenize")}
    async with serving(**config, aip_health_route="/alive") as api:
        assert (await api.get("/metrics")).status == 200
        assert (await api.get("/info")).status == 401
        assert (await api.post("/tokenize", {"inputs": "h"})).status == 401  # only reading is opened
        assert (await api.get("/alive")).status != 401
        assert (await api.get("/metrics/")).status == 401
