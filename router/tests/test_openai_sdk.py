"""The `openai` package, as applications use it: completions and models, and the typed exception for each mistake."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from api_kit import Api, serving

CALL: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 6, "temperature": 0}


@contextlib.asynccontextmanager
async def client_of(api: Api, key: str = "-") -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key=key, max_retries=0) as client:
        yield client


async def in_a_thread(api: Api, work: Callable[[openai.OpenAI], Any]) -> Any:
    """What the blocking client does, beside the server's event loop."""

    def run() -> Any:
        with openai.OpenAI(base_url=f"{api.url}/v1", api_key="-", max_retries=0) as client:
            return work(client)

    return await asyncio.to_thread(run)


async def test_completions_streamed_and_not_by_both_clients() -> None:
    async with serving() as api, client_of(api) as client:
        text = api.expected_text("hello", 6)
        answer = await client.completions.create(**CALL)
        assert answer.choices[0].text == text
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 6
        chunks = [chunk async for chunk in await client.completions.create(**CALL, stream=True)]
        assert "".join(chunk.choices[0].text for chunk in chunks) == text
        answer = await in_a_thread(api, lambda blocking: blocking.completions.create(**CALL))
        assert answer.choices[0].text == text
        chunks = await in_a_thread(api, lambda blocking: list(blocking.completions.create(**CALL, stream=True)))
        assert "".join(chunk.choices[0].text for chunk in chunks) == text
        await api.idle()


async def test_every_parameter_of_the_signature_is_taken() -> None:
    async with serving() as api, client_of(api) as client:
        ids = api.encode("hello")
        answer = await client.completions.create(
            model="tiny",
            prompt=[ids, api.encode("world")],
            best_of=3,
            echo=True,
            frequency_penalty=0.5,
            logit_bias={"5": -100},
            logprobs=3,
            max_tokens=4,
            n=2,
            presence_penalty=0.5,
            seed=-7,
            stop=["never", "ever"],
            suffix=None,
            temperature=1.2,
            top_p=0.9,
            user="someone",
            extra_body={"min_p": 0.1, "top_k": -1, "min_tokens": 2, "repetition_penalty": 1.1, "ignore_eos": True},
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.system_fingerprint
        assert answer.choices[0].text.startswith("hello")
        scores = answer.choices[0].logprobs
        assert scores is not None
        assert scores.token_logprobs is not None
        assert len(scores.token_logprobs) == len(ids) + 4
        await api.idle()


async def test_usage_comes_last_in_a_stream_when_asked_for() -> None:
    async with serving() as api, client_of(api) as client:
        options: Any = {"include_usage": True}
        stream = await client.completions.create(**CALL, stream=True, stream_options=options)
        *chunks, last = [chunk async for chunk in stream]
        assert all(chunk.usage is None for chunk in chunks)
        assert last.choices == []
        assert last.usage is not None
        assert last.usage.total_tokens == last.usage.prompt_tokens + 6


async def test_models_can_be_listed_and_asked_for() -> None:
    async with serving() as api, client_of(api) as client:
        assert [model.id async for model in client.models.list()] == ["tiny"]
        model = await client.models.retrieve("tiny")
        assert (model.id, model.object, model.owned_by) == ("tiny", "model", "tiny")
        with pytest.raises(openai.NotFoundError, match="'some/other' does not exist") as caught:
            await client.models.retrieve("some/other")
        assert (caught.value.code, caught.value.param, caught.value.type) == (
            "model_not_found",
            "model",
            "invalid_request_error",
        )


async def test_a_model_with_a_slash_in_its_name_can_be_asked_for() -> None:
    async with serving(model_id="org/name") as api, client_of(api) as client:
        assert (await client.models.retrieve("org/name")).id == "org/name"
        assert (await api.get("/v1/models/org%2Fname")).json["id"] == "org/name"


async def test_a_wrong_parameter_names_itself() -> None:
    async with serving() as api, client_of(api) as client:
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"top_p": 2.0}, "top_p"),
            ({"presence_penalty": 3.0}, "presence_penalty"),
            ({"logit_bias": {"600": 1}}, "logit_bias"),
            ({"n": 500}, "n"),
            ({"best_of": 500}, "best_of"),
            ({"logprobs": 99}, "logprobs"),
            ({"suffix": "x"}, "suffix"),
            ({"stop": [""]}, "stop"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": 9999}, "max_tokens"),
            ({"extra_body": {"min_tokens": 9}}, "min_tokens"),
            ({"extra_body": {"min_p": 2}}, "min_p"),
        ]
        for values, param in wrong:
            with pytest.raises(openai.UnprocessableEntityError) as caught:
                await client.completions.create(**{**CALL, **values})
            assert (caught.value.param, caught.value.type) == (param, "invalid_request_error"), caught.value
            with pytest.raises(openai.UnprocessableEntityError):
                await client.completions.create(**{**CALL, **values}, stream=True)


async def test_each_status_raises_its_own_exception(tmp_path: Path) -> None:
    async with serving() as api, client_of(api) as client:
        options: Any = {"headers": {"content-type": "application/json"}}
        with pytest.raises(openai.BadRequestError, match="Failed to parse the request body as JSON"):
            await client.post("/completions", cast_to=object, content=b'{"prompt": ', options=options)
        with pytest.raises(openai.NotFoundError, match="Unknown request URL: POST /v1/embeddings") as unknown:
            await client.embeddings.create(model="tiny", input="x")
        assert unknown.value.code == "unknown_url"
        wrong = await api.get("/v1/completions")
        assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
        assert wrong.json["error"]["message"].startswith("/v1/completions does not take GET")
        with pytest.raises(openai.UnprocessableEntityError):
            await client.completions.create(model="tiny", prompt=3)  # type: ignore[call-overload]
    (tmp_path / "key").write_text("secret")
    async with serving(api_key_file=str(tmp_path / "key")) as api:
        async with client_of(api, "wrong") as client:
            with pytest.raises(openai.AuthenticationError) as unauthorized:
                await client.completions.create(**CALL)
            assert unauthorized.value.code == "invalid_api_key"
        async with client_of(api, "secret") as client:
            assert (await client.completions.create(**CALL)).choices
    async with serving(payload_limit=300) as api, client_of(api) as client:
        with pytest.raises(openai.APIStatusError, match="--payload-limit") as caught:
            await client.completions.create(**{**CALL, "prompt": "x" * 400})
        assert caught.value.status_code == 413


async def test_what_is_no_fault_of_the_clients_raises_its_own_exception_too() -> None:
    async with serving() as api:
        bad = api.encode("Z", special=False)[0]
    async with serving(error_token=bad) as api, client_of(api) as client:
        with pytest.raises(openai.InternalServerError, match="Request failed during generation") as failed:
            await client.completions.create(**{**CALL, "prompt": "Z"})
        assert failed.value.status_code == 500
        api.server.draining = True
        with pytest.raises(openai.InternalServerError) as drained:
            await client.completions.create(**CALL)
        assert drained.value.status_code == 503
        assert int(drained.value.response.headers["retry-after"]) >= 1
        api.server.draining = False
    async with serving(max_concurrent_requests=1) as api, client_of(api) as client:
        brake = api.group.servers[0].may_answer = asyncio.Event()
        first = asyncio.create_task(client.completions.create(**CALL))
        async with asyncio.timeout(60):
            while not api.server.infer.num_running:  # noqa: ASYNC110  nothing announces a permit
                await asyncio.sleep(0.002)
        with pytest.raises(openai.RateLimitError, match="Model is overloaded") as busy:
            await client.completions.create(**CALL)
        assert (busy.value.code, busy.value.type) == ("rate_limit_exceeded", "rate_limit_error")
        brake.set()
        assert (await first).choices


async def test_a_failure_in_a_stream_is_an_exception_after_what_was_said() -> None:
    async with serving() as api:
        (*_, bad) = ids = api.expected_ids(api.encode("hello"), 3)
        assert bad not in ids[:-1]
    async with serving(error_token=bad) as api, client_of(api) as client:
        stream = await client.completions.create(**CALL, stream=True)
        assert [len((await anext(stream)).choices) for _ in range(3)] == [1, 1, 1]
        with pytest.raises(openai.APIError, match="Request failed during generation: cannot compute token") as caught:
            await anext(stream)
        assert caught.value.type == "server_error"
        answer = await api.post("/v1/completions", {**CALL, "stream": True})
        assert answer.events[-1] == "[DONE]"
        assert answer.events[-2]["error"]["http_status_code"] == 500
        await api.idle()
