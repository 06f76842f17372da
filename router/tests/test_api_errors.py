"""What holds on every route: bodies that are wrong, paths and methods that are not there, keys, CORS, overload."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from api_kit import Answer, Api, serving

JSON = {"content-type": "application/json"}
POSTS = ["/generate", "/generate_stream", "/", "/tokenize", "/v1/chat/completions", "/v1/completions"]


def message(answer: Answer, path: str) -> str:
    """The sentence, from either API's shape of an error."""
    error = answer.json["error"]
    assert answer.headers["content-type"] == "application/json"
    if not path.startswith("/v1/"):
        assert list(answer.json) == ["error", "error_type"]
        return str(error)
    assert list(error) == ["message", "type", "param", "code", "http_status_code"]
    assert error["http_status_code"] == answer.status
    return str(error["message"])


async def test_a_body_is_checked_for_its_type_then_its_size_then_its_syntax_then_its_shape() -> None:
    async with serving(payload_limit=1000) as api:
        for path in POSTS:
            large = b'{"inputs": "' + b"x" * 1000
            answer = await api.request("POST", path, data=large, headers={"content-type": "text/plain"})
            assert answer.status == 415
            assert message(answer, path) == "Expected request with `Content-Type: application/json`"
            answer = await api.request("POST", path, data=large, headers=JSON)
            assert answer.status == 413
            assert message(answer, path).startswith("Failed to buffer the request body: length limit exceeded")
            assert "--payload-limit" in message(answer, path)
            for wrong in (b"", b"{", b'{"inputs": NaN}', b"\xff"):
                answer = await api.request("POST", path, data=wrong, headers=JSON)
                assert (answer.status, message(answer, path)[:40]) == (400, "Failed to parse the request body as JSON")
            for wrong in (b"[]", b"{}", b"null", b'"x"'):
                answer = await api.request("POST", path, data=wrong, headers=JSON)
                assert answer.status == 422
                assert message(answer, path).startswith("Failed to deserialize the JSON body into the target type: ")


async def test_a_body_without_a_length_is_limited_too() -> None:
    async with serving(payload_limit=1000) as api:

        async def chunks() -> Any:
            for _ in range(50):
                yield b"x" * 100

        answer = await api.request("POST", "/generate", data=chunks(), headers=JSON)
        assert answer.status == 413
        exact = json.dumps({"inputs": "h", "parameters": {"max_new_tokens": 1}}).encode().ljust(1000)
        assert (await api.request("POST", "/generate", data=exact, headers=JSON)).status == 200


async def test_content_types_ending_in_json_are_json() -> None:
    async with serving() as api:
        data = b'{"inputs": "h", "parameters": {"max_new_tokens": 1}}'
        for content_type, status in [
            ("application/json; charset=utf-8", 200),
            ("application/vnd.x+json", 200),
            ("application/jsonx", 415),
            ("text/json", 415),
        ]:
            answer = await api.request("POST", "/generate", data=data, headers={"content-type": content_type})
            assert answer.status == status


@pytest.mark.parametrize(
    ("parameters", "where"),
    [
        ({"max_new_tokens": -1}, "parameters.max_new_tokens: "),
        ({"max_new_tokens": 1.5}, "parameters.max_new_tokens: "),
        ({"max_new_tokens": "20"}, "parameters.max_new_tokens: "),
        ({"max_new_tokens": 2**32}, "parameters.max_new_tokens: "),
        ({"temperature": "hot"}, "parameters.temperature: "),
        ({"stop": "x"}, "parameters.stop: "),
        ({"stop": ["a", 1]}, "parameters.stop[1]: "),
        ({"do_sample": 1}, "parameters.do_sample: "),
        ({"seed": -1}, "parameters.seed: "),
    ],
    ids=str,
)
async def test_a_wrong_type_is_told_with_its_place(parameters: dict[str, Any], where: str) -> None:
    async with serving() as api:
        answer = await api.post("/generate", {"inputs": "x", "parameters": parameters})
        assert answer.status == 422
        assert message(answer, "/generate").startswith(
            f"Failed to deserialize the JSON body into the target type: {where}"
        )


async def test_unknown_fields_and_null_parameters_pass() -> None:
    async with serving() as api:
        body = {
            "inputs": "h",
            "what": 1,
            "parameters": {"max_new_tokens": 1, "also": [], "stop": None, "do_sample": None},
        }
        assert (await api.post("/generate", body)).status == 200


async def test_unknown_paths_and_methods_have_empty_answers() -> None:
    async with serving() as api:
        answer = await api.get("/nope")
        assert (answer.status, answer.body) == (404, b"")
        answer = await api.get("/generate")
        assert (answer.status, answer.body, answer.headers["allow"]) == (405, b"", "POST")
        answer = await api.request("DELETE", "/info")
        assert (answer.status, sorted(answer.headers["allow"].split(","))) == (405, ["GET", "HEAD"])
        for path in ("/", "/health", "/info", "/metrics", "/v1/models"):
            answer = await api.request("HEAD", path)
            assert (answer.status, answer.body) == (200, b"")


async def test_the_key_covers_every_route_but_the_health_checks(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("Secret-Key\n")
    async with serving(api_key_file=str(tmp_path / "key")) as api:
        for path in ("/", "/health", "/ping"):
            assert (await api.get(path)).status == 200
        for path in POSTS:
            answer = await api.post(path, {})
            assert answer.status == 401
            assert "API key" in message(answer, path)
        for path in ("/info", "/metrics", "/v1/models", "/nope"):
            assert (await api.get(path)).status == 401
        for value, status in [
            ("Bearer Secret-Key", 200),
            ("bearer Secret-Key", 200),
            ("Bearer secret-key", 401),
            ("Secret-Key", 401),
            ("Basic Secret-Key", 401),
            ("Bearer", 401),
            ("Bearer Secret-Key2", 401),
            ("Bearer Secret-Key\u00e9", 401),
        ]:
            assert (await api.get("/info", headers={"authorization": value})).status == status
        assert (await api.request("OPTIONS", "/generate")).status == 200


async def test_cors_answers_anyone_unless_origins_are_named() -> None:
    async with serving() as api:
        answer = await api.get("/health", headers={"origin": "https://a.example"})
        assert answer.headers["access-control-allow-origin"] == "*"
        assert answer.headers["vary"] == "origin, access-control-request-method, access-control-request-headers"
        preflight = await api.request("OPTIONS", "/anything")
        assert (preflight.status, preflight.headers["access-control-allow-methods"]) == (200, "GET,POST")
        assert preflight.headers["access-control-allow-headers"] == "content-type,authorization"
        stream = await api.post("/generate_stream", {"inputs": "h", "parameters": {"max_new_tokens": 1}})
        assert stream.headers["access-control-allow-origin"] == "*"
    async with serving(cors_allow_origin=("https://a.example", "https://b.example")) as api:
        for origin, allowed in [("https://b.example", "https://b.example"), ("https://c.example", None), ("", None)]:
            answer = await api.get("/health", headers={"origin": origin} if origin else {})
            assert answer.headers.get("access-control-allow-origin") == allowed
    async with serving(cors_allow_origin=("*",)) as api:
        assert (await api.get("/health")).headers["access-control-allow-origin"] == "*"


async def test_every_answer_carries_an_id_and_nothing_about_the_software() -> None:
    async with serving() as api:
        first, second = await api.get("/health"), await api.get("/nope")
        assert first.headers["x-request-id"] != second.headers["x-request-id"]
        assert (await api.get("/health", headers={"x-request-id": "abc-1"})).headers["x-request-id"] == "abc-1"
        assert (await api.get("/health", headers={"x-request-id": "a b" * 99})).headers["x-request-id"] != "a b" * 99
        assert "server" not in first.headers


async def fill(api: Api, count: int) -> list["asyncio.Task[Answer]"]:
    """Requests that stay until the shard's brake is released."""
    api.group.servers[0].may_answer = asyncio.Event()
    tasks = [
        asyncio.create_task(api.post("/generate", {"inputs": "h", "parameters": {"max_new_tokens": 2}}))
        for _ in range(count)
    ]
    while api.server.infer.num_running < count:  # noqa: ASYNC110  nothing announces it
        await asyncio.sleep(0.001)
    return tasks


async def test_beyond_the_limit_requests_get_429_before_they_are_validated() -> None:
    async with serving(max_concurrent_requests=2) as api:
        tasks = await fill(api, 2)
        for path, body in [
            ("/generate", {"inputs": "h", "parameters": {"temperature": 0}}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "h"}], "stream": True}),
            ("/v1/completions", {"prompt": "h", "stream": True}),
        ]:
            answer = await api.post(path, body)
            assert (answer.status, answer.headers["retry-after"]) == (429, "1")
            assert message(answer, path) == "Model is overloaded"
            assert answer.json["error_type"] == "overloaded"
        answer = await api.post("/generate_stream", {"inputs": "h"})
        assert answer.body == b'data: {"error":"Model is overloaded","error_type":"overloaded"}\n\n'
        assert (await api.post("/tokenize", {"inputs": "h"})).status == 200  # takes no permit
        assert api.server.metrics.request_failure.get("overloaded") == 4
        brake = api.group.servers[0].may_answer
        assert brake is not None
        brake.set()
        assert [(await task).status for task in tasks] == [200, 200]
        await api.idle()


async def test_every_copy_and_every_prompt_takes_a_permit() -> None:
    async with serving(max_concurrent_requests=3, max_best_of=4) as api:
        parameters = {"best_of": 4, "do_sample": True, "max_new_tokens": 1}
        assert (await api.post("/generate", {"inputs": "h", "parameters": parameters})).status == 429
        never = await api.post("/v1/completions", {"prompt": ["a", "b"], "n": 2})
        assert never.status == 422, "OpenAI's clients repeat a 429, and this can never succeed"
        assert (await api.post("/v1/completions", {"prompt": ["a", "b", "c"], "max_tokens": 1})).status == 200
        await api.idle()


async def test_a_row_that_fails_is_a_424_and_on_openais_routes_a_500_that_is_not_repeated() -> None:
    async with serving() as api:
        bad = api.encode("Z", special=False)[0]
    async with serving(error_token=bad) as api:
        answer = await api.post("/generate", {"inputs": "Z"})
        assert (answer.status, answer.json["error_type"]) == (424, "generation")
        assert message(answer, "/generate").startswith("Request failed during generation: ")
        answer = await api.post("/v1/completions", {"prompt": "Z"})
        assert (answer.status, answer.headers["x-should-retry"]) == (500, "false")
        answer = await api.post("/generate_stream", {"inputs": "Z"})
        assert (answer.status, answer.events[0]["error_type"]) == (200, "generation")
        answer = await api.post("/v1/completions", {"prompt": "Z", "stream": True})
        assert answer.events[-1] == "[DONE]"
        assert answer.events[0]["error"]["http_status_code"] == 500
        assert api.server.metrics.request_failure.get("generation") == 4
        await api.idle()


async def test_a_mistake_of_ours_shows_the_client_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as api:

        def broken(*args: object, **options: object) -> None:
            raise RuntimeError("/secret/path")

        monkeypatch.setattr(api.server.tokenizer, "encode", broken)
        for path, body in [("/generate", {"inputs": "h"}), ("/v1/completions", {"prompt": "h"})]:
            answer = await api.post(path, body)
            assert (answer.status, answer.json["error_type"]) == (500, "internal")
            assert "secret" not in answer.body.decode()
        answer = await api.post("/generate_stream", {"inputs": "h"})
        assert answer.events[0]["error_type"] == "internal"
        await api.idle()
