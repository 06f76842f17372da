"""The loop, over real gRPC: tokens reach their sinks whatever happens to shards, sinks and clients."""

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from fake_shard import FakeConfig, FakeGroup, logprob
from shard_processes import ShardProcess, until
from simulation import Collector, expected_ids, make_valid
from tgi_router import batcher as batcher_module
from tgi_router.batcher import Batcher, State
from tgi_router.config import RouterConfig
from tgi_router.errors import (
    Bug,
    GenerationError,
    IncompleteGeneration,
    InternalError,
    ShuttingDown,
    StartupError,
    ValidationError,
)
from tgi_router.metrics import Metrics
from tgi_router.request import FinishReason, Request, Token, Top, ValidRequest

VOCAB = 120
POISON, BROKEN = 127, 126


class Sink(Collector):
    """A collector one can wait for, and that can be told to misbehave."""

    def __init__(self, max_new_tokens: int, on_token: Callable[[Token], None] | None = None) -> None:
        super().__init__(max_new_tokens)
        self.done = asyncio.Event()
        self.on_token = on_token

    def token(self, token: Token) -> FinishReason | None:
        if self.on_token is not None:
            self.on_token(token)
        reason = super().token(token)
        if reason is not None:
            self.done.set()
        return reason

    def failed(self, error: Exception) -> None:
        super().failed(error)
        self.done.set()


def make_batcher(uds_path: str, **config: Any) -> Batcher:
    return Batcher(RouterConfig(model_dir="", model_id="", master_shard_uds_path=f"{uds_path}-0", **config), Metrics())


def submit(batcher: Batcher, valid: ValidRequest) -> tuple[Request, Sink]:
    sink = Sink(valid.max_new_tokens)
    return batcher.submit(valid, sink), sink


async def finished(sink: Sink) -> Sink:
    await asyncio.wait_for(sink.done.wait(), 30)
    return sink


@pytest.fixture
async def group(tmp_path: Path) -> AsyncIterator[FakeGroup]:
    """Two ranks in this process; the contract was kept when the test ends."""
    config = FakeConfig(vocab=VOCAB, error_token=BROKEN, poison_token=POISON)
    group = FakeGroup(f"{tmp_path}/s", config, world_size=2)
    await group.start()
    yield group
    await group.stop()
    assert group.violations == []


@pytest.fixture
async def batcher(group: FakeGroup) -> AsyncIterator[Batcher]:
    batcher = make_batcher(group.uds_path)
    await batcher.start()
    yield batcher
    await batcher.stop()


# ---- serving


async def test_a_crowd_gets_what_each_would_get_alone(batcher: Batcher, group: FakeGroup) -> None:
    valids = [make_valid([i % 5] * (1 + i % 13), 1 + i % 7, seed=i if i % 2 else None) for i in range(40)]
    sinks = [submit(batcher, valid)[1] for valid in valids]
    for valid, sink in zip(valids, sinks, strict=True):
        await finished(sink)
        assert sink.error is None
        assert sink.ids == expected_ids(valid, VOCAB)
        assert [token.logprob for token in sink.tokens] == [logprob(token) for token in sink.ids]
    await until(lambda: not group.servers[1].engine.rows)


async def test_top_tokens_and_prompt_logprobs_are_delivered(batcher: Batcher) -> None:
    _, sink = submit(batcher, make_valid([7, 8, 9], 2, top_n_tokens=2, prompt_logprobs=True, prompt_top_n_tokens=2))
    await finished(sink)
    assert sink.logprobs == [logprob(8), logprob(9)]
    assert sink.prompt_top == [((8, logprob(8)), (9, logprob(9))), ((9, logprob(9)), (10, logprob(10)))]
    for token in sink.tokens:
        second = (token.id + 1) % VOCAB
        assert token.top == ((token.id, logprob(token.id)), (second, logprob(second)))


async def test_the_times_of_a_request_are_in_order_and_complete(batcher: Batcher) -> None:
    request, sink = submit(batcher, make_valid(6, 3))
    await finished(sink)
    times = [request.arrived_s, request.admitted_s, request.first_token_s, request.finished_s]
    assert None not in times
    assert times == sorted(times, key=lambda time: time or 0)
    assert request.finish_reason is FinishReason.LENGTH


async def test_two_steps_are_in_flight(batcher: Batcher, group: FakeGroup) -> None:
    brakes = [asyncio.Event() for _ in group.servers]
    for server, brake in zip(group.servers, brakes, strict=True):
        server.may_answer = brake
    _, sink = submit(batcher, make_valid(6, 5))
    await until(lambda: all(server.num_arrived == 2 for server in group.servers))
    for brake in brakes:
        brake.set()
    await finished(sink)


async def test_a_request_that_comes_while_a_step_runs_does_not_wait_for_its_end(
    batcher: Batcher, group: FakeGroup
) -> None:
    brakes = [asyncio.Event() for _ in group.servers]
    for server, brake in zip(group.servers, brakes, strict=True):
        server.may_answer = brake
    _, first = submit(batcher, make_valid(6, 1))
    await until(lambda: group.servers[0].num_arrived == 1)
    _, second = submit(batcher, make_valid([9] * 6, 1))
    await until(lambda: group.servers[0].num_arrived == 2)
    for brake in brakes:
        brake.set()
    await finished(first)
    await finished(second)


async def test_nothing_follows_a_large_message(
    batcher: Batcher, group: FakeGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher_module, "LARGE_BYTES", 40)
    brakes = [asyncio.Event() for _ in group.servers]
    for server, brake in zip(group.servers, brakes, strict=True):
        server.may_answer = brake
    valid = make_valid(60, 3)
    _, sink = submit(batcher, valid)
    await until(lambda: group.servers[0].num_arrived == 1)
    submit(batcher, make_valid([9], 1))
    await asyncio.sleep(0.05)  # time in which a second step would arrive
    assert group.servers[0].num_arrived == 1
    for brake in brakes:
        brake.set()
    assert (await finished(sink)).ids == expected_ids(valid, VOCAB)


async def test_a_cancelled_request_is_gone_from_the_shards_and_its_sink_hears_nothing(
    batcher: Batcher, group: FakeGroup
) -> None:
    request, sink = submit(batcher, make_valid(6, 200))
    await until(lambda: sink.tokens)
    batcher.cancel(request)
    heard = len(sink.tokens)
    await until(lambda: not group.servers[0].engine.rows)
    assert (len(sink.tokens), sink.error) == (heard, None)
    batcher.cancel(request)


async def test_a_storm_of_clients_that_leave_leaves_nothing_behind(batcher: Batcher, group: FakeGroup) -> None:
    chance = random.Random(3)
    stays_valid = make_valid([99] * 5, 100, seed=1)
    _, stays = submit(batcher, stays_valid)
    alive: list[Request] = []
    for i in range(200):
        alive.append(submit(batcher, make_valid([chance.randrange(3)] * chance.randrange(1, 40), 50, seed=i))[0])
        if chance.random() < 0.7:
            await asyncio.sleep(0)
        if len(alive) > 8:
            batcher.cancel(alive.pop(chance.randrange(len(alive))))
    for request in alive:
        batcher.cancel(request)
    assert (await finished(stays)).ids == expected_ids(stays_valid, VOCAB)
    await until(lambda: not group.servers[0].engine.rows)
    batcher._core.check_integrity()
    assert batcher._core.blocks.num_used == 0


async def test_a_request_that_can_never_fit_is_refused(batcher: Batcher) -> None:
    assert batcher.max_total_tokens == 256
    with pytest.raises(ValidationError, match="`max_new_tokens`"):
        submit(batcher, make_valid(200, 100))


async def test_limits_come_from_shards_and_configuration(group: FakeGroup) -> None:
    batcher = make_batcher(group.uds_path, max_batch_total_tokens=50, max_batch_size=3, max_batch_prefill_tokens=7)
    await batcher.start()
    assert batcher.max_total_tokens == 48
    assert batcher.info.vocab_size == VOCAB
    limits = batcher._core.limits
    assert (limits.num_blocks, limits.max_running, limits.max_step_tokens) == (12, 3, 7)
    await batcher.stop()


async def test_a_pool_without_a_block_is_a_startup_error_that_names_the_flag(group: FakeGroup) -> None:
    batcher = make_batcher(group.uds_path, max_batch_total_tokens=3)
    with pytest.raises(StartupError, match="`--max-batch-total-tokens`"):
        await batcher.start()
    await batcher.stop()


def test_asking_before_the_start_is_a_bug() -> None:
    async def ask() -> None:
        batcher = make_batcher("/nowhere")
        assert (batcher.healthy, batcher.state) == (False, State.STARTING)
        for question in (lambda: batcher.info, lambda: batcher.max_total_tokens, lambda: submit(batcher, make_valid())):
            with pytest.raises(Bug):
                question()
        await batcher.stop()

    asyncio.run(ask())


async def test_the_numbers_move(batcher: Batcher) -> None:
    metrics = batcher._metrics
    for _ in range(2):
        await finished(submit(batcher, make_valid(20, 3))[1])
    assert metrics.batch_inference_count.get("prefill") == 2
    assert metrics.batch_inference_success.get("decode") >= 4
    assert metrics.batch_inference_duration.count("prefill") == 2
    assert metrics.batch_next_size.count() == 2
    assert metrics.kv_blocks.get() == 64
    assert (metrics.prefix_cache_query_tokens.get(), metrics.prefix_cache_hit_tokens.get()) == (40, 16)
    await until(lambda: metrics.batch_current_size.get() == metrics.queue_size.get() == 0)
    assert metrics.kv_blocks_used.get() == 0
    assert metrics.kv_blocks_cached.get() > 0


async def test_the_books_are_checked_in_an_idle_moment(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher_module, "IDLE_CHECK_S", 0.01)
    await finished(submit(batcher, make_valid(6, 3))[1])
    checked = asyncio.Event()
    monkeypatch.setattr(batcher._core, "check_integrity", checked.set)
    await asyncio.wait_for(checked.wait(), 10)
    await finished(submit(batcher, make_valid(6, 3))[1])


# ---- what goes wrong with one request


async def test_an_exception_in_a_sink_fails_its_request_alone(batcher: Batcher) -> None:
    def explode(token: Token) -> None:
        raise RuntimeError("no more paper")

    bad = Sink(5, on_token=explode)
    batcher.submit(make_valid([3] * 4, 5), bad)
    valid = make_valid(6, 5)
    _, good = submit(batcher, valid)
    await finished(bad)
    assert isinstance(bad.error, InternalError)
    assert (await finished(good)).ids == expected_ids(valid, VOCAB)


async def test_a_sink_that_cannot_even_fail_hurts_nobody(batcher: Batcher) -> None:
    class Hopeless:
        def prompt_logprobs(self, start: int, logprobs: list[float], top: list[Top]) -> None: ...

        def token(self, token: Token) -> FinishReason | None:
            raise RuntimeError("first")

        def failed(self, error: Exception) -> None:
            raise RuntimeError("second")

    batcher.submit(make_valid([3] * 4, 5), Hopeless())
    valid = make_valid(6, 5)
    _, good = submit(batcher, valid)
    assert (await finished(good)).ids == expected_ids(valid, VOCAB)


async def test_a_sink_that_never_ends_is_ended(batcher: Batcher) -> None:
    sink = Sink(max_new_tokens=99)
    batcher.submit(make_valid(6, 3), sink)
    await finished(sink)
    assert isinstance(sink.error, InternalError)
    assert len(sink.tokens) == 3


async def test_a_sink_may_cancel_another_request(batcher: Batcher) -> None:
    victim: list[Request] = []
    first = Sink(5, on_token=lambda token: batcher.cancel(victim[0]))
    batcher.submit(make_valid(6, 5), first)
    request, sink = submit(batcher, make_valid([9] * 6, 5))
    victim.append(request)
    await finished(first)
    assert sink.tokens == []


async def test_a_row_error_reaches_its_sink_alone(batcher: Batcher) -> None:
    _, bad = submit(batcher, make_valid([1, BROKEN], 5))
    valid = make_valid(6, 5)
    _, good = submit(batcher, valid)
    await finished(bad)
    assert isinstance(bad.error, GenerationError)
    assert "cannot compute token 126" in str(bad.error)
    assert (await finished(good)).ids == expected_ids(valid, VOCAB)


# ---- what goes wrong with the shards


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_streams_pause_when_the_shard_is_gone_and_go_on_with_the_same_tokens(
    tmp_path: Path, number: signal.Signals
) -> None:
    options = ["--vocab", str(VOCAB), "--step-ms", "5"]
    shard = await ShardProcess(f"{tmp_path}/s", *options).start()
    batcher = make_batcher(f"{tmp_path}/s", step_deadline_s=1.0)
    await batcher.start()
    valids = [make_valid([i] * 5, 60, seed=i if i % 2 else None) for i in range(4)]
    sinks = [submit(batcher, valid)[1] for valid in valids]
    await until(lambda: all(len(sink.tokens) > 3 for sink in sinks))
    shard.send(number)
    assert await until(lambda: not batcher.healthy) < (1.0 if number is signal.SIGKILL else 4.0)
    assert batcher.state is State.RECOVERING
    assert "restarted" in batcher.reason
    assert (batcher._metrics.batch_current_size.get(), batcher._metrics.queue_size.get()) == (0, 4)
    late_valid = make_valid([50] * 5, 5)
    _, late = submit(batcher, late_valid)
    gone, gone_sink = submit(batcher, make_valid([51] * 5, 5))
    batcher.cancel(gone)
    await shard.end(signal.SIGKILL)
    shard = await ShardProcess(f"{tmp_path}/s", *options).start()
    await until(lambda: batcher.healthy)
    for valid, sink in zip([*valids, late_valid], [*sinks, late], strict=True):
        await finished(sink)
        assert sink.error is None
        assert sink.ids == expected_ids(valid, VOCAB)
    assert gone_sink.tokens == []
    assert batcher._metrics.shard_restarts.get() == 1
    await batcher.stop()
    assert await shard.end() == 0, "the contract was kept"


async def test_a_poisonous_request_fails_and_everybody_else_goes_on(batcher: Batcher, group: FakeGroup) -> None:
    group.supervise()
    valids = [make_valid([i] * 5, 20, seed=i) for i in range(3)]
    sinks = [submit(batcher, valid)[1] for valid in valids]
    _, poisonous = submit(batcher, make_valid([1, POISON], 5))
    await finished(poisonous)
    assert isinstance(poisonous.error, GenerationError)
    for valid, sink in zip(valids, sinks, strict=True):
        await finished(sink)
        assert sink.ids == expected_ids(valid, VOCAB)
    assert group.incarnation == 3
    assert batcher._metrics.batch_inference_failure.get("prefill") >= 2


async def test_a_bug_of_ours_fails_the_requests_of_the_moment_and_serving_goes_on(
    batcher: Batcher, group: FakeGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher_module, "GIVE_UP_S", 0.01)
    for server in group.servers:
        server.may_answer = asyncio.Event()
    sinks = [submit(batcher, make_valid([i] * 5, 20))[1] for i in range(3)]
    await until(lambda: group.servers[0].num_arrived)

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(batcher._core, "apply", broken)
    for server in group.servers:
        assert server.may_answer is not None
        server.may_answer.set()
    for sink in sinks:
        assert isinstance((await finished(sink)).error, InternalError)
    valid = make_valid(6, 5)
    _, good = submit(batcher, valid)
    assert (await finished(good)).ids == expected_ids(valid, VOCAB)
    assert batcher.healthy


# ---- the end


async def test_draining_finishes_what_runs_and_refuses_what_comes(batcher: Batcher) -> None:
    valid = make_valid(6, 30)
    sinks = [submit(batcher, valid)[1] for _ in range(20)]  # more than there are rows: some wait
    draining = asyncio.create_task(batcher.drain())
    await asyncio.sleep(0)
    assert (batcher.state, batcher.healthy) == (State.DRAINING, False)
    with pytest.raises(ShuttingDown):
        submit(batcher, valid)
    await asyncio.wait_for(draining, 30)
    assert all(sink.ids == expected_ids(valid, VOCAB) for sink in sinks)


async def test_draining_survives_a_crash(batcher: Batcher, group: FakeGroup) -> None:
    for server in group.servers:
        server.may_answer = asyncio.Event()
    valid = make_valid(6, 30)
    _, sink = submit(batcher, valid)
    await until(lambda: group.servers[0].num_arrived == 2)
    draining = asyncio.create_task(batcher.drain())
    await group.restart()
    await asyncio.wait_for(draining, 30)
    assert sink.ids == expected_ids(valid, VOCAB)
    assert batcher.state is State.DRAINING


async def test_draining_does_not_wait_for_lost_shards_when_nothing_is_left(batcher: Batcher, group: FakeGroup) -> None:
    request, _ = submit(batcher, make_valid(6, 200))
    await group.kill()
    await until(lambda: batcher.state is State.RECOVERING)
    draining = asyncio.create_task(batcher.drain())
    batcher.cancel(request)
    await asyncio.wait_for(draining, 5)


async def test_stopping_tells_those_who_are_left(batcher: Batcher, group: FakeGroup) -> None:
    for server in group.servers:
        server.may_answer = asyncio.Event()
    sinks = [submit(batcher, make_valid([i] * 5, 5))[1] for i in range(20)]
    await until(lambda: group.servers[0].num_arrived)
    await batcher.stop()
    assert all(isinstance(sink.error, IncompleteGeneration) for sink in sinks)
    assert batcher.state is State.STOPPED
    with pytest.raises(ShuttingDown):
        submit(batcher, make_valid())
