"""gRPC calls that are cancelled, time out or are not read; shards that die, servers that drain; health that follows."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from api_kit import Api
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_kit import address, client, failure, serving
from tgi_proto import inference_pb2 as pb
from tgi_proto import inference_pb2_grpc
from tgi_router import stream
from tgi_router.grpc_service import calls

Status = health_pb2.HealthCheckResponse
SERVICE = "tgi.inference.v1.Inference"
LONG = pb.GenerateRequest(inputs="hello", parameters=pb.GenerateParameters(max_new_tokens=200))
CHAT = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="hello")], max_tokens=150, temperature=0)


def generate(count: int, inputs: str = "hello", **parameters: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(inputs=inputs, parameters=pb.GenerateParameters(max_new_tokens=count, **parameters))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  nothing announces it
            await asyncio.sleep(0.002)


async def running(api: Api) -> None:
    """Waits until a request has produced a token."""
    await until(lambda: any(request.first_token_s for request in api.server.batcher._core.running))


def stop_the_shards(api: Api) -> asyncio.Event:
    """From now on no step is answered, until the event is set."""
    brake = api.group.servers[0].may_answer = asyncio.Event()
    return brake


METHODS: dict[str, Callable[[Any], Any]] = {
    "Generate": lambda stub: stub.Generate(LONG),
    "GenerateStream": lambda stub: stub.GenerateStream(LONG),
    "Chat": lambda stub: stub.Chat(CHAT),
    "ChatStream": lambda stub: stub.ChatStream(CHAT),
}


async def consume(call: Any) -> None:
    with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call


@pytest.mark.parametrize("method", METHODS)
async def test_a_cancelled_call_ends_its_generation_though_the_shards_are_silent(method: str) -> None:
    async with serving() as api, client(api) as stub:
        brake = stop_the_shards(api)
        call = METHODS[method](stub)
        reading = asyncio.create_task(consume(call))
        await until(lambda: api.server.infer.num_running == 1)
        call.cancel()
        await until(lambda: api.server.infer.num_running == 0)
        await reading
        metrics = api.server.metrics
        assert (metrics.request_cancelled.get(), metrics.request_failure.get("dropped")) == (1, 1)
        brake.set()
        await stub.Generate(generate(1))
        await api.idle()
        assert api.server.batcher._core.blocks.num_used == 0


async def test_a_deadline_ends_the_generation_and_frees_its_blocks() -> None:
    requests = {"Generate": LONG, "GenerateStream": LONG, "Chat": CHAT, "ChatStream": CHAT}
    async with serving() as api, client(api) as stub:
        brake = stop_the_shards(api)
        tasks = [
            asyncio.create_task(failure(getattr(stub, method)(request, timeout=3)))
            for method, request in requests.items()
        ]
        for error, _ in [await task for task in tasks]:
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: api.server.infer.num_running == 0)
        metrics = api.server.metrics
        assert metrics.request_failure.get("timeout") + metrics.request_failure.get("dropped") == len(requests)
        assert metrics.request_success.get() == 0
        brake.set()
        await stub.Generate(generate(1))
        await api.idle()
        assert api.server.batcher._core.blocks.num_used == 0
        assert api.group.servers[0].engine.num_computed_tokens < 150


async def test_a_client_whose_connection_breaks_ends_its_generation() -> None:
    async with serving() as api:
        stop_the_shards(api)
        channel = grpc.aio.insecure_channel(address(api))
        reading = asyncio.create_task(consume(inference_pb2_grpc.InferenceStub(channel).GenerateStream(LONG)))
        await until(lambda: api.server.infer.num_running == 1)
        await channel.close()
        await until(lambda: api.server.infer.num_running == 0)
        await reading


@pytest.mark.parametrize("how", ["too many tokens wait", "nothing was read for long"])
async def test_a_client_that_does_not_read_is_cut_before_it_costs_memory(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "too many tokens wait":
        monkeypatch.setattr(stream, "MAX_UNREAD_TOKENS", 50)
    else:
        monkeypatch.setattr(calls, "PATIENCE_S", 3.0)
    count = 7900 if how == "too many tokens wait" else 3000  # of which fewer than MAX_UNREAD_TOKENS can wait
    async with serving(max_model_tokens=8000, num_blocks=4000, max_step_tokens=4096, check=False) as api:
        options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1)]
        async with grpc.aio.insecure_channel(address(api), options=options) as channel:
            call = inference_pb2_grpc.InferenceStub(channel).GenerateStream(generate(count, top_n_tokens=5))
            messages = aiter(call)
            assert (await anext(messages)).index == 1
            await until(lambda: api.server.infer.num_running == 0)
            assert api.server.metrics.request_success.get() == 0
            assert api.server.metrics.request_cancelled.get() == 1
            error, trailing = await failure(messages)
            assert (error.code(), trailing["error_type"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded")
            assert "was not read" in error.details()
        assert api.group.servers[0].engine.num_computed_tokens < 7000


async def test_a_slow_client_gets_every_token() -> None:
    async with serving() as api, client(api) as stub:
        call = aiter(stub.GenerateStream(generate(40)))
        messages = [await anext(call)]
        await until(lambda: api.server.batcher._core.is_idle)
        messages += [message async for message in call]
        assert messages[-1].generated_text == api.expected_text("hello", 40)
        assert [message.index for message in messages] == list(range(1, 41))


# Shards that die ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 4])
async def test_a_stream_survives_the_death_of_the_shards(seed: int | None) -> None:
    sampling = {} if seed is None else {"do_sample": True, "seed": seed}
    async with serving(die_at_step=12) as api, client(api) as stub:
        api.group.supervise(die_at_step=0)
        messages = [message async for message in stub.GenerateStream(generate(30, **sampling))]
        assert messages[-1].generated_text == api.expected_text("hello", 30, seed)
        assert [message.index for message in messages] == list(range(1, 31))
        await api.idle()


async def test_calls_that_arrive_while_the_shards_are_away_are_answered_later() -> None:
    async with serving() as api, client(api) as stub, health(api) as well:
        await api.group.kill()
        await until(lambda: not api.server.batcher.healthy)
        assert (await well.Check(health_pb2.HealthCheckRequest())).status == Status.NOT_SERVING
        call = asyncio.create_task(consumed(stub.Generate(generate(3))))
        await until(lambda: api.server.infer.num_running == 1)
        await api.group.start()
        assert (await call).generated_text == api.expected_text("hello", 3)
        assert (await well.Check(health_pb2.HealthCheckRequest())).status == Status.SERVING


async def consumed(call: Awaitable[Any]) -> Any:
    return await call


# Health ---------------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def health(api: Api) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(address(api)) as channel:
        yield health_pb2_grpc.HealthStub(channel)


async def test_health_can_be_asked_for_the_server_and_for_its_services() -> None:
    async with serving() as api, health(api) as well:
        for name in ("", SERVICE, "grpc.health.v1.Health"):
            assert (await well.Check(health_pb2.HealthCheckRequest(service=name))).status == Status.SERVING
        error, _ = await failure(well.Check(health_pb2.HealthCheckRequest(service="other")))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        unknown = well.Watch(health_pb2.HealthCheckRequest(service="other"))
        assert (await unknown.read()).status == Status.SERVICE_UNKNOWN
        unknown.cancel()


async def test_a_watcher_sees_the_shards_go_and_come_back() -> None:
    async with serving() as api, health(api) as well:
        watch = well.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == Status.SERVING
        await api.group.kill()
        assert (await watch.read()).status == Status.NOT_SERVING
        assert (await api.get("/health")).status == 503
        await api.group.start()
        assert (await watch.read()).status == Status.SERVING
        assert (await api.get("/health")).status == 200
        watch.cancel()


async def test_a_watch_ends_with_the_server() -> None:
    async with serving() as api:
        channel = grpc.aio.insecure_channel(address(api))
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == Status.SERVING
    assert await asyncio.wait_for(watch.read(), 60) == grpc.aio.EOF
    await channel.close()


# Draining -------------------------------------------------------------------------------------------------------------


async def test_draining_answers_what_was_accepted_and_refuses_what_is_new() -> None:
    async with serving() as api, client(api) as stub, health(api) as well:
        watch = well.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == Status.SERVING
        brake = stop_the_shards(api)
        whole = asyncio.create_task(consumed(stub.Generate(generate(20))))
        open_stream = stub.GenerateStream(generate(20))
        core = api.server.batcher._core
        await until(lambda: len(core.running) + len(core.waiting) == 2)
        api.server.draining = True
        drained = asyncio.create_task(api.server.batcher.drain())
        assert (await watch.read()).status == Status.NOT_SERVING
        error, trailing = await failure(stub.Generate(generate(1)))
        assert (error.code(), trailing["error_type"]) == (grpc.StatusCode.UNAVAILABLE, "overloaded")
        assert int(trailing["retry-after"]) > 0
        assert (await stub.Info(pb.InfoRequest())).model_id == "tiny"
        brake.set()
        await asyncio.wait_for(drained, 60)
        messages = [message async for message in open_stream]
        assert messages[-1].generated_text == (await whole).generated_text == api.expected_text("hello", 20)
        watch.cancel()


async def test_what_does_not_end_in_time_is_unavailable_so_that_clients_try_another_server() -> None:
    async with serving() as api, client(api) as stub:
        stop_the_shards(api)
        tasks = [asyncio.create_task(failure(METHODS[method](stub))) for method in METHODS]
        core = api.server.batcher._core
        await until(lambda: len(core.running) + len(core.waiting) == 4)
        await api.server.batcher.stop()
        for error, trailing in [await task for task in tasks]:
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert trailing["error_type"].startswith("incomplete_generation")


# Crowds ---------------------------------------------------------------------------------------------------------------


async def test_64_streams_at_once_each_get_their_own_text() -> None:
    async with serving(max_rows=32, num_blocks=1024) as api, client(api) as stub:

        async def one(number: int) -> None:
            prompt = f"number {number} é"
            seed = number if number % 3 == 0 else None
            sampling = {} if seed is None else {"do_sample": True, "seed": seed}
            count = 5 + number % 7
            messages = [m async for m in stub.GenerateStream(generate(count, prompt, **sampling))]
            assert messages[-1].generated_text == api.expected_text(prompt, count, seed)
            assert [message.index for message in messages] == list(range(1, count + 1))

        await asyncio.gather(*(one(number) for number in range(64)))
        await api.idle()


async def test_the_synchronous_client_works_too() -> None:
    async with serving() as api:

        def talk() -> tuple[str, list[str], str]:
            with grpc.insecure_channel(address(api)) as channel:
                stub = inference_pb2_grpc.InferenceStub(channel)
                whole = stub.Generate(generate(5)).generated_text
                pieces = [message.token.text for message in stub.GenerateStream(generate(5))]
                cancelled = stub.GenerateStream(LONG)
                next(cancelled)
                cancelled.cancel()
                return whole, pieces, threading.current_thread().name

        whole, pieces, thread = await asyncio.to_thread(talk)
        assert whole == api.expected_text("hello", 5)
        assert len(pieces) == 5
        assert thread != threading.main_thread().name
        await api.idle()
