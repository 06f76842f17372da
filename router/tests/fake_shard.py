"""A torch-free shard group that speaks the real gRPC contract and checks every word of it.

Instead of a model: the "KV" of a token is (position, hash of all tokens up to it), written to its slot. The next token
is a function of that hash as *read from the slots*, the seed and the position. So a wrong block table, a stale prefix
hit, a block given to two requests or a chunk out of order is either reported as a violation or changes the tokens.

In process: `FakeGroup`. By hand, for benchmarks and black-box tests:
    python router/tests/fake_shard.py --uds-path /tmp/fake --world-size 2 --step-ms 5
"""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import grpc.aio
from tgi_proto import generate_pb2 as pb
from tgi_proto.channel import SERVER_OPTIONS, address, socket_path
from tgi_proto.service import handlers

MASK = (1 << 61) - 1
ROOT = 1469598103934665603


def chain(previous: int, token: int) -> int:
    """Hash of a sequence from the hash of all but its last token."""
    return ((previous ^ (token + 1)) * 1099511628211) & MASK


def sample(hashed: int, position: int, sampling: pb.SamplingParameters, vocab_size: int) -> int:
    """The token at `position` after a history with hash `hashed`; depends on the seed only when sampling."""
    noise = sampling.seed * 7919 + position if sampling.do_sample else 0
    return ((hashed ^ noise) * 6364136223846793005 >> 20) % vocab_size


def logprob(token: int) -> float:
    """Log-probability of `token`: exact in float32."""
    return -(1 + token % 64) / 16


def top_tokens(token: int, count: int, vocab_size: int) -> list[int]:
    """What is reported as the most likely tokens where `token` stands."""
    return [(token + i) % vocab_size for i in range(count)]


def generate(prompt: list[int], count: int, sampling: pb.SamplingParameters, vocab_size: int) -> list[int]:
    """What an undisturbed model generates: the expectation of every test."""
    hashed = ROOT
    tokens: list[int] = []
    for token in prompt:
        hashed = chain(hashed, token)
    for _ in range(count):
        tokens.append(sample(hashed, len(prompt) + len(tokens), sampling, vocab_size))
        hashed = chain(hashed, tokens[-1])
    return tokens


@dataclass(frozen=True, slots=True)
class FakeConfig:
    """Facts of the group, and what goes wrong with it and when."""

    vocab: int = 128
    block_size: int = 4
    num_blocks: int = 64
    max_model_tokens: int = 4096
    max_rows: int = 16
    max_step_tokens: int = 64
    max_steps_in_flight: int = 2
    eos: int = 2  # eos_token_ids of Info; the fake draws it like any other token
    step_ms: float = 0.0  # duration of a step
    delay: float = 0.0  # seconds before the socket opens
    check: bool = True  # verify the KV of the whole context at every step (slow for long contexts)
    die_at_step: int = 0  # 0 = never
    hang_at_step: int = 0
    poison_token: int = -1  # the shard dies when it computes a row that contains this token
    error_token: int = -1  # the row fails alone when this token is computed
    disagree_at_step: int = 0  # digests of the ranks differ from here on
    script: str = ""  # ids of the tokens every request gets, separated by spaces, then `eos`; "" = hashes decide


class Violation(Exception):
    """The router broke the contract."""


class Died(Exception):
    """A scripted death."""


@dataclass(slots=True)
class Row:
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int
    blocks: list[int]
    admission: pb.Admission
    hashes: list[int] = field(default_factory=list)  # [i] = of token_ids[:i + 1], as it ought to be


class FakeEngine:
    """One rank: rows, slots, and the contract's checks. Pure; the server below gives it steps in order."""

    def __init__(self, config: FakeConfig, rank: int = 0) -> None:
        self.config = config
        self.rank = rank
        self.slots: list[tuple[int, int] | None] = [None] * (config.num_blocks * config.block_size)
        self.num_computed_tokens = 0
        self.reset()

    def reset(self) -> None:
        self.rows: dict[int, Row] = {}
        self.dropped: list[int] = []  # rows that failed here and that the router has not forgotten yet
        self.users: Counter[int] = Counter()  # block -> live rows that hold it
        self.step_number = 0

    def require(self, condition: bool, message: str) -> None:
        if not condition:
            raise Violation(f"step {self.step_number}: {message}")

    def step(self, admissions: list[pb.Admission], plan: pb.StepPlan) -> pb.StepResponse:
        """Executes one step. Raises Violation, or Died when the script says so."""
        self.step_number += 1
        self.require(plan.step == self.step_number, f"has number {plan.step}")
        if plan.step == self.config.die_at_step:
            raise Died
        for request_id in plan.forget:
            self.forget(request_id)
        for admission in admissions:
            self.admit(admission)
        self.require(len(self.rows) <= self.config.max_rows, f"{len(self.rows)} rows, max_rows {self.config.max_rows}")
        total = sum(scheduled.num_tokens for scheduled in plan.scheduled)
        self.require(total <= self.config.max_step_tokens, f"{total} tokens scheduled")
        ids = [scheduled.request_id for scheduled in plan.scheduled]
        self.require(len(ids) == len(set(ids)), "a request is scheduled twice")
        self.require({a.request_id for a in admissions} <= set(ids), "a request is admitted and not scheduled")
        response = pb.StepResponse(step=plan.step)
        digest = self.rank if plan.step >= self.config.disagree_at_step > 0 else 0
        for scheduled in plan.scheduled:
            digest = self.compute(scheduled, response, digest)
        response.digest = digest
        if self.rank:
            del response.generations[:]
        response.forward_ns, response.total_ns = 1000, 1500
        return response

    def forget(self, request_id: int) -> None:
        if request_id in self.dropped:
            self.dropped.remove(request_id)
            return
        self.require(request_id in self.rows, f"forgets unknown row {request_id}")
        self.users.subtract(self.rows.pop(request_id).blocks)

    def admit(self, a: pb.Admission) -> None:
        self.require(a.request_id not in self.rows, f"row {a.request_id} is admitted twice")
        self.require(0 < a.num_prompt_tokens <= len(a.token_ids), "num_prompt_tokens out of range")
        self.require(a.num_cached_tokens < len(a.token_ids), "the whole row is said to be cached")
        self.require(a.num_cached_tokens % self.config.block_size == 0, "a prefix hit ends inside a block")
        self.require(not (a.prompt_logprobs and a.num_cached_tokens), "cached tokens and prompt_logprobs")
        self.require(len(set(a.blocks)) == len(a.blocks), "a block twice in a table")
        row = Row(list(a.token_ids), a.num_prompt_tokens, a.num_cached_tokens, [], a)
        hashed = ROOT
        for token in row.token_ids:
            hashed = chain(hashed, token)
            row.hashes.append(hashed)
        num_shared = a.num_cached_tokens // self.config.block_size
        row.blocks += a.blocks[:num_shared]
        self.users.update(row.blocks)
        self.rows[a.request_id] = row
        self.append_blocks(a.request_id, a.blocks[num_shared:])
        self.check_context(a.request_id, row)

    def append_blocks(self, request_id: int, blocks: list[int]) -> None:
        for block in blocks:
            self.require(0 <= block < self.config.num_blocks, f"block {block} does not exist")
            self.require(not self.users[block], f"row {request_id} is to write block {block}, which is in use")
            self.users[block] += 1
            self.rows[request_id].blocks.append(block)

    def slot(self, row: Row, position: int) -> int:
        size = self.config.block_size
        return row.blocks[position // size] * size + position % size

    def check_context(self, request_id: int, row: Row) -> None:
        if self.config.check:
            for position in range(row.num_computed_tokens):
                held, expected = self.slots[self.slot(row, position)], (position, row.hashes[position])
                self.require(held == expected, f"row {request_id} would read {held} instead of {expected}")

    def compute(self, scheduled: pb.Scheduled, response: pb.StepResponse, digest: int) -> int:
        request_id = scheduled.request_id
        if request_id in self.dropped:
            return digest  # the router did not know yet
        self.require(request_id in self.rows, f"row {request_id} does not exist")
        row = self.rows[request_id]
        start, stop = row.num_computed_tokens, row.num_computed_tokens + scheduled.num_tokens
        self.require(scheduled.num_tokens >= 1, "num_tokens is 0")
        self.require(scheduled.num_computed_tokens == start, f"row {request_id}: computed {start}")
        self.require(stop <= len(row.token_ids), f"row {request_id} has only {len(row.token_ids)} tokens")
        self.append_blocks(request_id, list(scheduled.new_blocks))
        self.require(stop <= len(row.blocks) * self.config.block_size, f"row {request_id}: too few blocks")
        self.check_context(request_id, row)
        for position in range(start, stop):
            token = row.token_ids[position]
            if token == self.config.error_token:
                response.errors.add(request_id=request_id, message=f"cannot compute token {token}")
                self.users.subtract(self.rows.pop(request_id).blocks)
                self.dropped.append(request_id)
                return digest
            if token == self.config.poison_token:
                raise Died
            previous = self.slots[self.slot(row, position - 1)] if position else (-1, ROOT)
            self.slots[self.slot(row, position)] = (position, chain(previous[1] if previous else 0, token))
        row.num_computed_tokens = stop
        self.num_computed_tokens += scheduled.num_tokens
        generation = pb.Generation(request_id=request_id)
        if row.admission.prompt_logprobs and start < row.num_prompt_tokens - 1:
            generation.prompt_logprobs_start = start + 1
            known = row.token_ids[start + 1 : min(stop + 1, row.num_prompt_tokens)]
            generation.prompt_logprobs.extend(logprob(token) for token in known)
            if row.admission.prompt_top_n_tokens:
                for token in known:
                    top = top_tokens(token, row.admission.prompt_top_n_tokens, self.config.vocab)
                    generation.prompt_top_tokens.add(ids=top, logprobs=map(logprob, top))
        if stop == len(row.token_ids):
            digest = self.sample(row, generation, digest)
        if generation.token_ids or generation.prompt_logprobs:
            response.generations.append(generation)
        return digest

    def sample(self, row: Row, generation: pb.Generation, digest: int) -> int:
        position = len(row.token_ids)
        held = self.slots[self.slot(row, position - 1)]
        token = sample(held[1] if held else 0, position, row.admission.sampling, self.config.vocab)
        if self.config.script:
            script = [*map(int, self.config.script.split()), self.config.eos]
            token = script[min(position - row.num_prompt_tokens, len(script) - 1)]
        row.token_ids.append(token)
        row.hashes.append(chain(row.hashes[-1], token))
        generation.token_ids.append(token)
        generation.logprobs.append(logprob(token))
        if row.admission.top_n_tokens:
            ids = top_tokens(token, row.admission.top_n_tokens, self.config.vocab)
            generation.top_tokens.add(ids=ids, logprobs=[logprob(i) for i in ids])
        return zlib.crc32(f"{generation.request_id}:{token}".encode(), digest)


class FakeServer:
    """One rank's gRPC server around a FakeEngine."""

    def __init__(self, config: FakeConfig, uds_path: str, rank: int, world_size: int, pid: int) -> None:
        self.engine = FakeEngine(config, rank)
        self.config, self.uds_path, self.rank, self.world_size, self.pid = config, uds_path, rank, world_size, pid
        self.violations: list[str] = []
        self.hung = asyncio.Event()  # set while hanging
        self.died = asyncio.Event()
        self.steps_sent = asyncio.Condition()  # notified whenever a step arrives or is answered
        self.num_arrived = 0
        self.num_answered = 0
        self.may_answer: asyncio.Event | None = None  # a test's brake: steps are computed only while it is set

    async def start(self) -> None:
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        methods: dict[str, Callable[[Any, Any], Awaitable[Any]]] = {
            "Info": self.info,
            "Reset": self.reset,
            "Prefill": self.prefill,
            "Decode": self.decode,
            "Health": self.health,
        }
        self.server.add_generic_rpc_handlers((handlers(methods),))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(socket_path(self.uds_path, self.rank))
        self.server.add_insecure_port(address(self.uds_path, self.rank))
        await self.server.start()

    async def stop(self) -> None:
        await self.server.stop(None)

    async def pause_if_hung(self) -> None:
        if self.hung.is_set():
            await asyncio.Event().wait()  # for ever; ends when the server is stopped

    async def info(self, request: pb.InfoRequest, context: object) -> pb.InfoResponse:
        await self.pause_if_hung()
        c = self.config
        return pb.InfoResponse(
            model_type="fake",
            dtype="float32",
            device_type="cpu",
            attention="fake",
            block_size=c.block_size,
            num_blocks=c.num_blocks,
            vocab_size=c.vocab,
            max_model_tokens=c.max_model_tokens,
            max_rows=c.max_rows,
            max_step_tokens=c.max_step_tokens,
            max_steps_in_flight=c.max_steps_in_flight,
            eos_token_ids=[c.eos],
            rank=self.rank,
            world_size=self.world_size,
            pid=self.pid,
        )

    async def reset(self, request: pb.ResetRequest, context: object) -> pb.ResetResponse:
        await self.pause_if_hung()
        self.engine.reset()
        self.num_arrived = self.num_answered = 0
        return pb.ResetResponse()

    async def health(self, request: pb.HealthRequest, context: object) -> pb.HealthResponse:
        await self.pause_if_hung()
        return pb.HealthResponse()

    async def prefill(self, request: pb.PrefillRequest, context: grpc.aio.ServicerContext) -> pb.StepResponse:
        if not request.admissions:
            self.violations.append(f"Prefill without admissions in step {request.plan.step}")
        return await self.step(list(request.admissions), request.plan, context)

    async def decode(self, request: pb.DecodeRequest, context: grpc.aio.ServicerContext) -> pb.StepResponse:
        return await self.step([], request.plan, context)

    async def step(self, admissions: list[pb.Admission], plan: pb.StepPlan, context: object) -> pb.StepResponse:
        """Steps are executed by number, whatever the order in which their streams arrive."""
        await self.pause_if_hung()
        async with self.steps_sent:
            self.num_arrived += 1
            if self.num_arrived - self.num_answered > self.config.max_steps_in_flight:
                self.violations.append(f"{self.num_arrived - self.num_answered} steps in flight at step {plan.step}")
            self.steps_sent.notify_all()
            await self.steps_sent.wait_for(lambda: self.engine.step_number >= plan.step - 1)
        if self.died.is_set():
            await asyncio.Event().wait()
        if self.may_answer is not None:
            await self.may_answer.wait()
        if plan.step == self.config.hang_at_step:
            self.hung.set()
        await self.pause_if_hung()
        if self.config.step_ms:
            await asyncio.sleep(self.config.step_ms / 1000)
        try:
            response = self.engine.step(admissions, plan)
        except Died:
            self.died.set()
            await asyncio.Event().wait()
            raise
        except Violation as violation:
            self.violations.append(str(violation))
            raise
        async with self.steps_sent:
            self.num_answered += 1
            self.steps_sent.notify_all()
        return response


class FakeGroup:
    """A shard group in this process. `await start()`, `await kill()` (all ranks vanish), `await restart(...)`."""

    def __init__(self, uds_path: str, config: FakeConfig | None = None, world_size: int = 1) -> None:
        self.uds_path = uds_path
        self.config = config or FakeConfig()
        self.world_size = world_size
        self.servers: list[FakeServer] = []
        self.incarnation = 0
        self.old_violations: list[str] = []
        self.supervisor: asyncio.Task[None] | None = None

    @property
    def master_path(self) -> str:
        return socket_path(self.uds_path, 0)

    @property
    def violations(self) -> list[str]:
        return self.old_violations + [violation for server in self.servers for violation in server.violations]

    async def start(self, **changes: Any) -> None:
        """Starts all ranks as new "processes"; `changes` replace fields of the configuration."""
        self.incarnation += 1
        self.config = replace(self.config, **changes)
        self.servers = [
            FakeServer(self.config, self.uds_path, rank, self.world_size, pid=1000 * self.incarnation + rank)
            for rank in range(self.world_size)
        ]
        for server in self.servers:
            await server.start()

    async def kill(self) -> None:
        """Ends every rank at once, as the launcher does when one has died."""
        self.old_violations = self.violations
        servers, self.servers = self.servers, []
        for server in servers:
            await server.stop()

    async def restart(self, **changes: Any) -> None:
        await self.kill()
        await self.start(**changes)

    def supervise(self, **changes: Any) -> None:
        """From now on plays the launcher: when a rank dies, the whole group is restarted with `changes`."""
        self.supervisor = asyncio.create_task(self._supervise(changes))

    async def _supervise(self, changes: dict[str, Any]) -> None:
        while True:
            deaths = [asyncio.create_task(server.died.wait()) for server in self.servers]
            await asyncio.wait(deaths, return_when=asyncio.FIRST_COMPLETED)
            for death in deaths:
                death.cancel()
            await self.restart(**changes)

    async def stop(self) -> None:
        if self.supervisor is not None:
            self.supervisor.cancel()
        await self.kill()


async def serve(config: FakeConfig, uds_path: str, ranks: list[int], world_size: int) -> int:
    """Serves `ranks` from this process until SIGTERM (0), a scripted death (SIGKILL) or a violation (70)."""
    await asyncio.sleep(config.delay)
    servers = [FakeServer(config, uds_path, rank, world_size, os.getpid()) for rank in ranks]
    for server in servers:
        await server.start()
    print(f"fake shard ready: ranks {ranks} of {world_size} on {uds_path}, pid {os.getpid()}", flush=True)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    while not stop.is_set():
        if any(server.died.is_set() for server in servers):
            os.kill(os.getpid(), signal.SIGKILL)
        violations = [violation for server in servers for violation in server.violations]
        if violations:
            print("\n".join(violations), file=sys.stderr, flush=True)
            return 70
        waits = [asyncio.create_task(server.died.wait()) for server in servers]
        waits.append(asyncio.create_task(stop.wait()))
        await asyncio.wait(waits, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
    for server in servers:
        await server.stop()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="A shard group without a model.")
    parser.add_argument("--uds-path", default="/tmp/text-generation-server", help="prefix of the sockets")
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--rank", type=int, help="serve this rank alone; default: all ranks in one process")
    for option in fields(FakeConfig):
        name = "--" + option.name.replace("_", "-")
        if option.type is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=option.default)
        else:
            parser.add_argument(name, type=option.type, default=option.default)
    options = vars(parser.parse_args())
    uds_path, world_size, rank = options.pop("uds_path"), options.pop("world_size"), options.pop("rank")
    ranks = list(range(world_size)) if rank is None else [rank]
    started = time.monotonic()
    code = asyncio.run(serve(FakeConfig(**options), uds_path, ranks, world_size))
    print(f"fake shard ends after {time.monotonic() - started:.1f} s with {code}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
