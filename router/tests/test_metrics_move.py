"""Every declared metric, with every value of its label, is moved by something: what nothing moves is not a metric.

The scenarios run on the fake shard; after and during each the exposition is read, and a series that was ever not zero
has moved. Of a histogram or summary its count has to.
"""

import asyncio
from typing import Any

import grpc_kit
from api_kit import Answer, Api, serving
from tgi_proto import inference_pb2 as pb
from tgi_router.metrics import Metrics

# Label values that TGI's exporter knows and its own chunked prefill does not use either.
NEVER = {'tgi_batch_concat{reason="backpressure"}', 'tgi_batch_concat{reason="wait_exceeded"}'}
LONG = "hello world, this is a test of a tokenizer. " * 3


def series(text: str) -> dict[str, float]:
    """What has to move, by name and label."""
    found = {}
    kinds: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            kinds[name] = kind
        elif line and not line.startswith("#"):
            key, _, value = line.rpartition(" ")
            name = key.partition("{")[0]
            if name in kinds or (name.endswith("_count") and name.removesuffix("_count") in kinds):
                found[key] = float(value)
    return {key: value for key, value in found.items() if "quantile=" not in key}


class Moved:
    """The series that were seen to be not zero."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    async def look(self, api: Api) -> None:
        text = (await api.get("/metrics")).body.decode()
        self.names |= {name for name, value in series(text).items() if value}


async def until(api: Api, num_running: int) -> None:
    """Waits until so many permits are taken."""
    async with asyncio.timeout(60):
        while api.server.infer.num_running != num_running:  # noqa: ASYNC110  nothing announces it
            await asyncio.sleep(0.001)


async def until_submitted(api: Api, count: int) -> None:
    """Waits until the batcher has so many requests."""
    core = api.server.batcher._core
    async with asyncio.timeout(60):
        while len(core.running) + len(core.waiting) != count:  # noqa: ASYNC110  nothing announces it
            await asyncio.sleep(0.001)


def generate(api: Api, tokens: int = 4, prompt: str = LONG, **options: Any) -> "asyncio.Task[Answer]":
    body = {"inputs": prompt, "parameters": {"max_new_tokens": tokens}}
    return asyncio.create_task(api.post("/generate", body, **options))


async def requests_that_queue_run_together_and_share_a_prefix(moved: Moved) -> None:
    async with serving(max_rows=2) as api:
        assert (await generate(api)).status == 200
        brake = api.group.servers[0].may_answer = asyncio.Event()
        tasks = [generate(api, tokens=20)]
        await until_submitted(api, 1)
        tasks += [generate(api) for _ in range(2)]
        await until_submitted(api, 3)
        await moved.look(api)
        brake.set()
        assert [(await task).status for task in tasks] == [200, 200, 200]
        await moved.look(api)


async def requests_that_are_refused(moved: Moved) -> None:
    async with serving(max_concurrent_requests=1, model={"chat_template": None}) as api:
        assert (await api.post("/generate", {"inputs": "h", "parameters": {"temperature": 0}})).status == 422
        chat = {"messages": [{"role": "user", "content": "h"}]}
        assert (await api.post("/v1/chat/completions", chat)).json["error_type"] == "template_error"
        brake = api.group.servers[0].may_answer = asyncio.Event()
        task = generate(api)
        await until(api, 1)
        assert (await generate(api)).status == 429
        brake.set()
        await task
        await moved.look(api)


async def requests_that_fail(moved: Moved) -> None:
    async with serving() as api:
        bad = api.encode("Z", special=False)[0]
    async with serving(error_token=bad) as api:
        assert (await generate(api, prompt="Z")).status == 424
        api.group.servers[0].may_answer = asyncio.Event()
        assert (await generate(api, headers={"x-request-timeout": "0.05"})).status == 504
        leaves = generate(api)
        await until(api, 1)
        leaves.cancel()
        await until(api, 0)
        cut = generate(api)
        await until_submitted(api, 1)
        await api.server.batcher.stop()
        assert (await cut).status == 500
        await moved.look(api)


async def shards_that_die(moved: Moved) -> None:
    for step in (1, 6):  # the first admits, the sixth only decodes
        async with serving(die_at_step=step) as api:
            api.group.supervise(die_at_step=0)
            assert (await generate(api, tokens=20, prompt="h")).status == 200
            await moved.look(api)


async def a_pool_that_is_too_small(moved: Moved) -> None:
    async with serving(num_blocks=16, max_model_tokens=60) as api:
        brake = api.group.servers[0].may_answer = asyncio.Event()
        answers = [generate(api, tokens=40, prompt=f"{number} hello") for number in range(3)]
        await until_submitted(api, 3)
        brake.set()
        assert [(await answer).status for answer in answers] == [200, 200, 200]
        await moved.look(api)


async def calls_of_the_grpc_service(moved: Moved) -> None:
    async with grpc_kit.serving() as api, grpc_kit.client(api) as stub:
        prompt = pb.GenerateRequest(inputs="h", parameters=pb.GenerateParameters(max_new_tokens=2))
        chat = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="h")], max_tokens=2)
        for method, request in [
            ("Generate", prompt),
            ("Chat", chat),
            ("Tokenize", pb.TokenizeRequest(inputs="h")),
            ("Info", pb.InfoRequest()),
        ]:
            await getattr(stub, method)(request)
        for method, request in [("GenerateStream", prompt), ("ChatStream", chat)]:
            async for _ in getattr(stub, method)(request):
                pass
        await moved.look(api)


async def test_every_declared_metric_is_moved_by_a_scenario() -> None:
    declared = set(series(Metrics().exposition()))
    moved = Moved()
    for scenario in (
        requests_that_queue_run_together_and_share_a_prefix,
        requests_that_are_refused,
        requests_that_fail,
        shards_that_die,
        a_pool_that_is_too_small,
        calls_of_the_grpc_service,
    ):
        async with asyncio.timeout(120):
            await scenario(moved)
    assert declared - moved.names == NEVER
    assert len(declared) > 50
