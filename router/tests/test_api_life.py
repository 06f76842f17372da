"""Requests whose client leaves or does not read, shards that die, servers that drain: nothing leaks, nobody is left."""

import asyncio
import socket
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from api_kit import Answer, Api, serving
from tgi_router import stream
from tgi_router.infer import format_duration

LONG: dict[str, Any] = {"inputs": "hello", "parameters": {"max_new_tokens": 200}}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 200, "temperature": 0}
ROUTES = [
    ("/generate", LONG),
    ("/generate_stream", LONG),
    ("/", {**LONG, "stream": True}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "stream": True, "n": 2}),
    ("/v1/completions", {"prompt": ["hello", "world"], "max_tokens": 200}),
    ("/v1/completions", {"prompt": ["hello", "world"], "max_tokens": 200, "stream": True}),
]


async def running(api: Api) -> None:
    """Waits until a request has produced a token."""
    async with asyncio.timeout(60):
        while not any(request.first_token_s for request in api.server.batcher._core.running):  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(("path", "body"), ROUTES, ids=[f"{path} {sorted(body)}" for path, body in ROUTES])
async def test_a_client_that_leaves_ends_its_request_within_a_step(path: str, body: dict[str, Any]) -> None:
    async with serving(step_ms=5.0) as api:
        task = asyncio.create_task(api.post(path, body))
        await running(api)
        task.cancel()
        await api.idle()
        engine = api.group.servers[0].engine
        assert engine.num_computed_tokens < 100
        assert api.server.metrics.request_cancelled.get() == 1
        assert api.server.metrics.request_failure.get("dropped") == 1
        assert api.server.metrics.request_success.get() == 0
        assert (await api.post("/generate", {"inputs": "h", "parameters": {"max_new_tokens": 1}})).status == 200
        assert len(engine.rows) <= 1  # the last one's: it is forgotten with the next step


async def test_a_client_that_leaves_the_queue_is_never_computed() -> None:
    async with serving(max_rows=1) as api:
        brake = api.group.servers[0].may_answer = asyncio.Event()
        first = asyncio.create_task(api.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 30}}))
        while api.server.infer.num_running < 1:  # noqa: ASYNC110  nothing announces it
            await asyncio.sleep(0.001)
        second = asyncio.create_task(api.post("/generate", LONG))
        while api.server.infer.num_running < 2:  # noqa: ASYNC110  nothing announces it
            await asyncio.sleep(0.001)
        second.cancel()
        while api.server.infer.num_running > 1:  # noqa: ASYNC110  nothing announces it
            await asyncio.sleep(0.001)
        brake.set()
        assert (await first).status == 200
        await api.idle()
        assert api.group.servers[0].engine.num_computed_tokens < 40


async def test_a_client_that_does_not_read_is_cut_before_it_costs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_UNREAD_TOKENS", 50)
    async with serving(max_model_tokens=4000, num_blocks=2000, check=False) as api:
        api.send_buffer(8192)
        loop = asyncio.get_running_loop()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await loop.sock_connect(client, (urlsplit(api.url).hostname, urlsplit(api.url).port))
            body = b'{"inputs":"hello","parameters":{"max_new_tokens":3900,"top_n_tokens":5}}'
            head = f"host: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
            await loop.sock_sendall(client, f"POST /generate_stream HTTP/1.1\r\n{head}\r\n\r\n".encode() + body)
            await running(api)
            async with asyncio.timeout(60):
                while api.server.infer.num_running:  # noqa: ASYNC110  only the router knows that it has cut it
                    await asyncio.sleep(0.01)
        assert api.group.servers[0].engine.num_computed_tokens < 2000
        assert api.server.metrics.request_cancelled.get() == 1
        assert api.server.metrics.request_success.get() == 0


async def test_a_quiet_stream_is_kept_alive_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "KEEP_ALIVE_S", 0.05)
    async with serving() as api:
        brake = api.group.servers[0].may_answer = asyncio.Event()
        request = api.http.post(f"{api.url}/generate_stream", json={"inputs": "h", "parameters": {"max_new_tokens": 2}})
        async with request as response:
            assert response.status == 200  # before there is any token
            assert await response.content.readexactly(6) == b":\n\n:\n\n"
            brake.set()
            rest = await response.read()
        events = rest.decode().replace(":\n\n", "") if rest.startswith(b":") else rest.decode()
        assert events.count("data: ") == 2
        await api.idle()


@pytest.mark.parametrize("sampled", [False, True])
async def test_a_stream_survives_the_death_of_the_shards(sampled: bool) -> None:
    async with serving(die_at_step=12) as api:
        api.group.supervise(die_at_step=0)
        parameters = {"max_new_tokens": 30, **({"do_sample": True, "seed": 4} if sampled else {})}
        answer = await api.post("/generate_stream", {"inputs": "hello", "parameters": parameters})
        text = api.expected_text("hello", 30, 4 if sampled else None)
        assert answer.events[-1]["generated_text"] == text
        assert [event["index"] for event in answer.events] == list(range(1, 31))
        await api.idle()


async def test_requests_that_arrive_while_the_shards_are_away_are_served_later() -> None:
    async with serving() as api:
        await api.group.kill()
        while api.server.batcher.healthy:
            await api.get("/health")
        task = asyncio.create_task(api.post("/generate", {"inputs": "hello", "parameters": {"max_new_tokens": 3}}))
        while not api.server.infer.num_running:  # noqa: ASYNC110  nothing announces it
            await asyncio.sleep(0.001)
        await api.group.start()
        assert (await task).json == {"generated_text": api.expected_text("hello", 3)}


async def test_draining_answers_what_was_accepted_and_refuses_what_is_new() -> None:
    async with serving(max_rows=1) as api:
        brake = api.group.servers[0].may_answer = asyncio.Event()
        tasks = [asyncio.create_task(api.post(path, {**LONG, "parameters": {"max_new_tokens": 20}})) for path in
                 ("/generate_stream", "/generate")]  # fmt: skip
        core = api.server.batcher._core
        while len(core.running) + len(core.waiting) < 2:  # noqa: ASYNC110  nothing announces it
            await asyncio.sleep(0.001)
        api.server.draining = True
        drained = asyncio.create_task(api.server.batcher.drain())
        assert (await api.get("/health")).status == 503
        answer = await api.post("/generate", LONG)
        assert (answer.status, answer.headers["retry-after"], answer.headers["connection"]) == (503, "1", "close")
        assert (await api.get("/metrics")).status == 200
        brake.set()
        await asyncio.wait_for(drained, 60)
        stream_answer, whole = [await task for task in tasks]
        assert len(stream_answer.events) == 20
        assert whole.json == {"generated_text": api.expected_text("hello", 20)}


async def test_streams_that_are_stopped_hard_end_with_an_error_event() -> None:
    async with serving(step_ms=50.0) as api:  # 10 s for 200 tokens: nothing ends by itself meanwhile
        tasks = [asyncio.create_task(api.post(path, body)) for path, body in ROUTES[:2] + ROUTES[4:5]]
        await running(api)
        while api.server.infer.num_running < 4:  # noqa: ASYNC110  nothing announces it
            await asyncio.sleep(0.001)
        await api.server.batcher.stop()
        whole, tgi, chat = [await task for task in tasks]
        assert (whole.status, whole.json["error_type"]) == (500, "incomplete_generation")
        assert tgi.events[-1] == {"error": "Incomplete generation stream", "error_type": "incomplete_generation_stream"}
        assert chat.events[-2]["error"]["message"] == "Incomplete generation stream"
        assert chat.events[-1] == "[DONE]"


async def test_many_clients_at_once_each_get_their_own_text() -> None:
    async with serving(max_rows=8) as api:

        async def one(number: int) -> tuple[Answer, str]:
            prompt = f"number {number} é"
            path = "/generate_stream" if number % 2 else "/generate"
            parameters = {"max_new_tokens": 5 + number % 7, "seed": number, "do_sample": number % 3 == 0}
            answer = await api.post(path, {"inputs": prompt, "parameters": parameters})
            seed = number if number % 3 == 0 else None
            return answer, api.expected_text(prompt, 5 + number % 7, seed)

        for answer, expected in await asyncio.gather(*(one(number) for number in range(60))):
            found = answer.events[-1] if answer.headers["content-type"] == "text/event-stream" else answer.json
            assert found["generated_text"] == expected
        await api.idle()


async def test_connections_are_kept_for_the_next_request() -> None:
    async with serving() as api, aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as http:
        for path in ("/generate", "/generate_stream", "/health") * 3:
            method = "GET" if path == "/health" else "POST"
            json = None if method == "GET" else {"inputs": "h", "parameters": {"max_new_tokens": 2}}
            async with http.request(method, api.url + path, json=json) as response:
                assert response.status == 200
                await response.read()


async def test_every_finished_request_has_one_line_in_the_log_without_its_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    async with serving() as api:
        body = {"inputs": "a secret", "parameters": {"max_new_tokens": 3, "do_sample": True, "seed": 5}}
        await api.post("/generate", body, headers={"x-request-id": "mine"})
        await api.post("/generate", {"inputs": "", "parameters": {}}, headers={"x-request-id": "wrong"})
        record = next(vars(record) for record in caplog.records if record.message == "Success")
        assert record["request_id"] == "mine"
        assert (record["seed"], record["generated_tokens"], record["finish_reason"]) == ("Some(5)", 3, "length")
        for name in ("total_time", "validation_time", "queue_time", "inference_time", "time_per_token"):
            assert record[name].endswith("s")
        refused = next(vars(record) for record in caplog.records if "cannot be empty" in record.message)
        assert (refused["request_id"], refused["levelname"]) == ("wrong", "INFO")
        assert refused["total_time"].endswith("s")
        assert "secret" not in caplog.text


def test_durations_are_written_as_rust_writes_them() -> None:
    cases = {1.5: "1.5s", 2.0: "2s", 0.0015: "1.5ms", 0.000002: "2µs", 2.5e-7: "250ns", 0.0: "0ns"}
    assert {seconds: format_duration(seconds) for seconds in cases} == cases
