"""The shard as a process: what its calls answer, how it starts, fails and ends. Through real gRPC."""

import asyncio
import os
import signal
import stat
import threading
from pathlib import Path

import driving
import grpc
import pytest
import torch
from driving import SAMPLED, Driver, ShardGroup
from tgi_proto import channel, service
from tgi_proto import generate_pb2 as pb
from tgi_shard import server

PROMPT = [5, 17, 99, 250, 31, 8, 77]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return driving.save_tiny_llama(tmp_path_factory.mktemp("llama"))


def generate(step: driving.Step) -> list[driving.Live]:
    d = Driver(step)
    lives = [d.add(PROMPT, prompt_logprobs=True, top_n=2), d.add(PROMPT[:3], **SAMPLED), d.add(PROMPT * 3, top_k=5)]
    d.step({lives[0]: 4})
    d.run(10)
    return lives


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_two_ranks_are_one(tmp_path: Path, kv_heads: int):
    """With one key/value head both ranks hold a copy of it."""
    model_dir = driving.save_tiny_llama(tmp_path / "model", num_key_value_heads=kv_heads)
    with ShardGroup(model_dir, tmp_path, world_size=2) as group:
        two = generate(group.step)
        infos = [rank.call("Info", pb.InfoRequest()) for rank in group.ranks]
    assert [info.rank for info in infos] == [0, 1]
    assert infos[0].num_blocks == infos[1].num_blocks
    one = generate(driving.make_engine(driving.load_tiny(model_dir)).step)
    for a, b in zip(one, two, strict=True):
        assert a.generated == b.generated
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert a.prompt_logprobs == pytest.approx(b.prompt_logprobs, abs=1e-4)
        assert a.top == b.top


def test_a_shard_says_its_phases_and_facts_and_leaves_nothing_behind(model_dir: Path, tmp_path: Path):
    with ShardGroup(model_dir, tmp_path) as group:
        (rank,) = group.ranks
        assert rank.phases == ["import", "load", "warmup", "ready"]
        assert rank.records[0]["rank"] == 0
        progress = [record for record in rank.records if record.get("event") == "progress"]
        assert progress[-1]["done"] == progress[-1]["total"] > 0
        path = Path(channel.socket_path(group.uds_path, 0))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        info = rank.call("Info", pb.InfoRequest())
        assert (info.model_type, info.dtype, info.device_type) == ("llama", "float32", "cpu")
        assert (info.block_size, info.num_blocks, info.vocab_size) == (4, 64, driving.VOCAB)
        assert (info.max_model_tokens, info.max_rows, info.max_step_tokens) == (256, 16, 256)
        assert list(info.eos_token_ids) == [2]
        assert info.pid == rank.process.pid
        assert info.kv_bytes == 64 * 4 * 2 * 2 * 2 * 8 * 4  # blocks, slots, layers, k and v, heads, head dim, float32
        assert info.weight_bytes > 100_000
        rank.process.send_signal(signal.SIGTERM)
        assert rank.wait() == 0
        assert not path.exists()


def test_a_stale_socket_is_replaced(model_dir: Path, tmp_path: Path):
    with ShardGroup(model_dir, tmp_path) as group:
        group.ranks[0].process.kill()
        group.ranks[0].process.communicate()
        assert Path(channel.socket_path(group.uds_path, 0)).exists()
    with ShardGroup(model_dir, tmp_path) as group:
        assert len(generate(group.step)[0].generated) == 10


def test_a_killed_shard_is_replaced_by_one_that_goes_on_token_for_token(model_dir: Path, tmp_path: Path):
    with ShardGroup(model_dir, tmp_path, faults=f"step:kill:n=6:once={tmp_path}/mark") as group:
        d = Driver(group.step)
        live = d.add(PROMPT, **SAMPLED)
        with pytest.raises(grpc.RpcError) as caught:
            d.run(11)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert group.ranks[0].wait() == -signal.SIGKILL
    with ShardGroup(model_dir, tmp_path) as group:
        again = Driver(group.step)
        resumed = again.add(PROMPT, **SAMPLED)
        resumed.generated = list(live.generated)
        again.run(11 - len(live.generated))
    whole = Driver(driving.make_engine(driving.load_tiny(model_dir)).step)
    expected = whole.add(PROMPT, **SAMPLED)
    whole.run(11)
    assert len(live.generated) == 5
    assert resumed.generated == expected.generated


def test_an_exception_in_a_step_ends_the_process_and_says_why(model_dir: Path, tmp_path: Path):
    with ShardGroup(model_dir, tmp_path, faults="step:raise:n=2") as group:
        d = Driver(group.step)
        d.add(PROMPT)
        d.step()
        with pytest.raises(grpc.RpcError) as caught:
            d.step()
        assert caught.value.code() == grpc.StatusCode.INTERNAL
        assert caught.value.details() == "InjectedFault: injected fault at step"
        (rank,) = group.ranks
        assert rank.wait() == 1
        critical = [record for record in rank.records if record["level"] == "CRITICAL"]
        assert critical[0]["message"].startswith("the engine failed: InjectedFault: injected fault at step\nTraceback")
        assert not Path(channel.socket_path(group.uds_path, 0)).exists()


def test_a_hanging_step_leaves_health_answering_and_termination_working(model_dir: Path, tmp_path: Path):
    with ShardGroup(model_dir, tmp_path, faults="step:hang:n=1") as group:
        (rank,) = group.ranks
        d = Driver(group.step)
        d.add(PROMPT)
        admissions, plan = d.plan()
        hanging = rank.start("Prefill", pb.PrefillRequest(admissions=admissions, plan=plan))
        assert rank.call("Health", pb.HealthRequest()) == pb.HealthResponse()
        assert not hanging.done()
        rank.process.send_signal(signal.SIGTERM)
        assert rank.wait() == 0


def test_a_start_that_fails_ends_with_its_cause(model_dir: Path, tmp_path: Path):
    (rank,) = ShardGroup(model_dir, tmp_path, faults="load:raise").ranks
    assert rank.wait() == 1
    assert rank.phases == ["import", "load"]
    assert rank.records[-1]["level"] == "CRITICAL"
    assert rank.records[-1]["message"].startswith("InjectedFault: injected fault at load\nTraceback")


class FakeEngine:
    """An engine whose steps wait until they are told to go on."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.go_on = threading.Event()
        self.steps: list[int] = []
        self.fails = False

    def reset(self) -> None:
        self.steps.clear()

    def step(self, admissions: list[pb.Admission], plan: pb.StepPlan) -> pb.StepResponse:
        self.started.set()
        assert self.go_on.wait(120)
        if self.fails:
            raise ValueError("unlucky\nnumber")
        self.steps.append(plan.step)
        return pb.StepResponse(step=plan.step)


class Served:
    """`server.serve` on a fake engine, in this process."""

    def __init__(self, directory: Path) -> None:
        self.engine = FakeEngine()
        self._uds_path = str(directory / "fake")

    async def __aenter__(self) -> "Served":
        ready = asyncio.Event()
        serving = server.serve(self.engine, pb.InfoResponse(rank=0, max_steps_in_flight=4), self._uds_path, ready.set)
        self.task = asyncio.create_task(serving)
        await asyncio.wait_for(ready.wait(), 120)
        self._channel = grpc.aio.insecure_channel(channel.address(self._uds_path, 0))
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.engine.go_on.set()
        await self._channel.close()
        if not self.task.done():
            os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(self.task, 120)

    def call(self, method: str, request: object) -> grpc.aio.UnaryUnaryCall:
        return service.stub(self._channel, method)(request.SerializeToString(), timeout=120)

    def decode(self, step: int) -> grpc.aio.UnaryUnaryCall:
        return self.call("Decode", pb.DecodeRequest(plan=pb.StepPlan(step=step)))


async def test_steps_are_executed_in_order_while_health_answers(tmp_path: Path):
    async with Served(tmp_path) as served:
        calls = [served.decode(step) for step in (1, 2, 3)]
        await asyncio.to_thread(served.engine.started.wait, 120)
        await served.call("Health", pb.HealthRequest())
        assert served.engine.steps == []
        served.engine.go_on.set()
        responses = [await call for call in calls]
        assert served.engine.steps == [1, 2, 3]
        assert all(response.total_ns > 0 for response in responses)
        await served.call("Reset", pb.ResetRequest())
        assert served.engine.steps == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert await served.task == 0


async def test_a_step_out_of_order_fails_alone(tmp_path: Path):
    async with Served(tmp_path) as served:
        served.engine.go_on.set()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.decode(5)
        assert caught.value.code() == grpc.StatusCode.INTERNAL
        assert caught.value.details() == "step 5 came, step 1 is next"
        assert (await served.decode(1)).step == 1


async def test_a_step_that_overtakes_another_one_waits_for_it(tmp_path: Path):
    async with Served(tmp_path) as served:
        served.engine.go_on.set()
        calls = [served.decode(3), served.decode(2)]
        await served.call("Health", pb.HealthRequest())
        calls.append(served.decode(1))
        assert [(await call).step for call in calls] == [3, 2, 1]
        assert served.engine.steps == [1, 2, 3]


async def test_a_reset_lets_go_of_steps_whose_predecessor_never_came(tmp_path: Path):
    async with Served(tmp_path) as served:
        served.engine.go_on.set()
        early = served.decode(2)
        await served.call("Health", pb.HealthRequest())
        await served.call("Reset", pb.ResetRequest())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await early
        assert caught.value.details() == "StepOrder: a reset came before the steps that this one follows"
        assert (await served.decode(1)).step == 1


async def test_a_failed_engine_answers_what_waits_and_ends_the_server(tmp_path: Path):
    async with Served(tmp_path) as served:
        served.engine.fails = True
        calls = [served.decode(1)]
        await asyncio.to_thread(served.engine.started.wait, 120)
        calls.append(served.decode(2))
        await served.call("Health", pb.HealthRequest())
        served.engine.go_on.set()
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() == grpc.StatusCode.INTERNAL
            assert caught.value.details() == "ValueError: unlucky number"
        assert await served.task == 1
