"""The group of shards as one: found, asked together, checked for agreement, and noticed when it is gone."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest
from fake_shard import FakeConfig, FakeGroup
from shard_processes import ShardProcess, until
from tgi_proto import generate_pb2 as pb
from tgi_proto.channel import socket_path
from tgi_router import shard_client
from tgi_router.shard_client import ShardedClient, ShardsLost


class Client(ShardedClient):
    """Counts how often it told of a loss."""

    def __init__(self, uds_path: str, deadline_s: float = 30.0) -> None:
        self.losses = 0
        super().__init__(socket_path(uds_path, 0), deadline_s, self.note)

    def note(self) -> None:
        self.losses += 1

    async def found(self) -> list[pb.InfoResponse]:
        return await asyncio.wait_for(self.connect(), 60)


@pytest.fixture
async def group(tmp_path: Path) -> AsyncIterator[FakeGroup]:
    """Two ranks in this process."""
    group = FakeGroup(f"{tmp_path}/s", FakeConfig(error_token=127), world_size=2)
    await group.start()
    yield group
    await group.stop()


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    client = Client(f"{tmp_path}/s")
    yield client
    await client.close()


def hung_ranks(caplog: pytest.LogCaptureFixture) -> list[int]:
    """Ranks that were reported to the launcher."""
    return [record.__dict__["rank"] for record in caplog.records if record.__dict__.get("event") == "shard_hung"]


UNKNOWN_ROW = pb.DecodeRequest(
    plan=pb.StepPlan(step=1, scheduled=[pb.Scheduled(request_id=9, num_tokens=1)])
).SerializeToString()


def prefill(step: int, tokens: list[int], request_id: int = 1) -> bytes:
    """A step that admits one request and computes all its tokens."""
    admission = pb.Admission(
        request_id=request_id, token_ids=tokens, num_prompt_tokens=len(tokens), blocks=[request_id]
    )
    scheduled = pb.Scheduled(request_id=request_id, num_tokens=len(tokens))
    return pb.PrefillRequest(
        admissions=[admission], plan=pb.StepPlan(step=step, scheduled=[scheduled])
    ).SerializeToString()


async def test_every_rank_is_found_from_rank_0s_socket(group: FakeGroup, client: Client) -> None:
    infos = await client.found()
    assert [(info.rank, info.pid, info.world_size) for info in infos] == [(0, 1000, 2), (1, 1001, 2)]


async def test_it_waits_for_shards_that_are_still_loading(client: Client, tmp_path: Path) -> None:
    connecting = asyncio.create_task(client.connect())
    group = FakeGroup(f"{tmp_path}/s", world_size=2)
    await asyncio.sleep(0)
    assert not connecting.done()
    await group.start()
    assert len(await asyncio.wait_for(connecting, 60)) == 2
    await group.stop()


async def test_a_step_is_answered_by_rank_0_with_the_row_errors_of_all(group: FakeGroup, client: Client) -> None:
    await client.found()
    answer = await client.send("Prefill", prefill(1, [5, 6, 7]), 1)
    assert len(answer.generations) == 1
    assert group.servers[1].engine.num_computed_tokens == 3, "rank 1 has computed it as well"
    answer = await client.send("Prefill", prefill(2, [5, 127], request_id=2), 2)
    assert [error.request_id for error in answer.errors] == [2], "once, although both ranks say it"
    assert group.violations == []


async def test_ranks_that_disagree_are_lost_and_reported(
    group: FakeGroup, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await group.restart(disagree_at_step=1)
    await client.found()
    with pytest.raises(ShardsLost, match="ranks 0 and 1 disagree about the tokens of step 1"):
        await client.send("Prefill", prefill(1, [5, 6, 7]), 1)
    assert hung_ranks(caplog) == [0, 1], "all are alive, so the launcher has to be told"
    assert client.losses == 1


async def test_an_error_of_a_shard_loses_the_group_without_calling_it_hung(
    group: FakeGroup, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await client.found()
    with pytest.raises(ShardsLost, match=r"rank [01]"):
        await client.send("Decode", UNKNOWN_ROW, 1)
    assert hung_ranks(caplog) == [], "it ends by itself and says why in its log"
    assert len(group.violations) == 2


async def test_a_killed_shard_is_noticed_while_nothing_runs(client: Client, tmp_path: Path) -> None:
    shard = await ShardProcess(f"{tmp_path}/s").start()
    await client.found()
    await shard.end(signal.SIGKILL)
    assert await until(lambda: client.lost) < 5.0
    assert client.lost is not None
    assert client.lost.hung_ranks == ()


async def test_a_stopped_shard_is_noticed_while_nothing_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    shards = [await ShardProcess(f"{tmp_path}/s", rank=rank, world_size=2).start() for rank in range(2)]
    client = Client(f"{tmp_path}/s", deadline_s=4.0)  # so that a busy machine does not silence rank 0 as well
    await client.found()
    shards[1].send(signal.SIGSTOP)
    await until(lambda: client.lost)
    assert client.lost is not None
    assert client.lost.hung_ranks == (1,)
    assert hung_ranks(caplog) == [1]
    await client.close()
    for shard in shards:
        await shard.end(signal.SIGKILL)


async def test_an_overdue_step_loses_the_group_and_names_the_rank_that_is_silent(
    group: FakeGroup, tmp_path: Path
) -> None:
    client = Client(f"{tmp_path}/s", deadline_s=2.0)
    await client.found()
    for server in group.servers:
        server.may_answer = asyncio.Event()  # as if rank 0 waited for rank 1 in a collective
    group.servers[1].hung.set()
    step = client.send("Prefill", prefill(1, [5, 6, 7]), 1)
    await until(lambda: client.lost)
    assert client.lost is not None
    assert client.lost.hung_ranks == (1,)
    step.cancel()
    await client.close()


async def test_a_shard_whose_engine_hangs_is_reported_although_it_answers_pings(
    group: FakeGroup, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    client = Client(f"{tmp_path}/s", deadline_s=0.5)
    await client.found()
    for server in group.servers:
        server.may_answer = asyncio.Event()
    step = client.send("Prefill", prefill(1, [5, 6, 7]), 1)
    await until(lambda: client.lost)
    assert hung_ranks(caplog) == [0, 1]
    step.cancel()
    await client.close()


async def test_after_a_loss_only_new_processes_count(
    group: FakeGroup, client: Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(shard_client, "SURVIVOR_S", 0.2)
    await client.found()
    with pytest.raises(ShardsLost):
        await client.send("Decode", UNKNOWN_ROW, 1)
    connecting = asyncio.create_task(client.connect())
    await until(lambda: hung_ranks(caplog))
    assert not connecting.done(), "the old ones still answer, and have been reported"
    await group.restart()
    infos = await asyncio.wait_for(connecting, 60)
    assert [info.pid for info in infos] == [2000, 2001]
    assert client.lost is None


async def test_a_late_error_of_the_lost_group_is_not_taken_for_the_next_ones(group: FakeGroup, client: Client) -> None:
    await client.found()
    late: asyncio.Future[pb.StepResponse] = asyncio.get_running_loop().create_future()
    client._shards[1].steps["Decode"] = lambda message: late  # type: ignore[assignment]
    step = client.send("Decode", UNKNOWN_ROW, 1)
    with pytest.raises(ShardsLost):
        await step
    connecting = asyncio.create_task(client.connect())
    await until(lambda: client.lost is None)
    late.set_exception(grpc.aio.AioRpcError(grpc.StatusCode.UNKNOWN, grpc.aio.Metadata(), grpc.aio.Metadata()))
    await group.restart()
    infos = await asyncio.wait_for(connecting, 60)
    assert [info.pid for info in infos] == [2000, 2001], "the pids to wait out have not been forgotten"
    assert client.lost is None
    assert client.losses == 1


async def test_a_shard_that_listens_and_is_silent_from_the_start_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = await asyncio.start_unix_server(lambda reader, writer: None, socket_path(f"{tmp_path}/s", 0))
    client = Client(f"{tmp_path}/s", deadline_s=0.3)
    connecting = asyncio.create_task(client.connect())
    await until(lambda: hung_ranks(caplog) == [0])
    connecting.cancel()
    await asyncio.gather(connecting, return_exceptions=True)
    await client.close()
    server.close()


async def test_a_socket_file_that_nobody_serves_is_only_waited_for(
    client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    shard = await ShardProcess(f"{tmp_path}/s").start()
    await shard.end(signal.SIGKILL)  # leaves its socket file behind
    connecting = asyncio.create_task(client.connect())
    shard = await ShardProcess(f"{tmp_path}/s").start()
    assert len(await asyncio.wait_for(connecting, 60)) == 1
    assert hung_ranks(caplog) == []
    await client.close()
    assert await shard.end() == 0
