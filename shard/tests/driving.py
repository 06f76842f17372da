"""For the shard's tests: tiny random models, engines on them, shard processes, and a driver that plays the router."""

import dataclasses
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from tgi_proto import channel, logs, service
from tgi_proto import generate_pb2 as pb
from tgi_proto.argv import to_argv
from tgi_shard import warmup
from tgi_shard.config import ShardConfig
from tgi_shard.engine import Engine
from tgi_shard.faults import Faults
from tgi_shard.kv_cache import KvGeometry
from tgi_shard.models import load_model
from tgi_shard.models.decoder import Decoder
from tgi_shard.parallel import Parallel
from transformers import AutoModelForCausalLM, LlamaConfig

BLOCK_SIZE = 4
NUM_BLOCKS = 64
VOCAB = 301
CPU = torch.device("cpu")

Step = Callable[[list[pb.Admission], pb.StepPlan], pb.StepResponse]


def save_tiny_llama(directory: Path, **overrides: object) -> Path:
    """A random llama of two layers with grouped heads, in fp32; the same weights for the same arguments."""
    values: dict[str, object] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        # The default 0.02 makes all tokens about equally likely, so that greedy choices hang on rounding.
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**(values | overrides)))
    model.save_pretrained(directory)
    return directory


def load_tiny(directory: Path, device: torch.device = CPU) -> Decoder:
    config = ShardConfig(model_dir=str(directory), model_id="tiny", block_size=BLOCK_SIZE)
    return load_model(config, Parallel.single(), device, torch.float32, lambda done, total: None)


def make_engine(model: Decoder, faults: str | None = None, num_blocks: int = NUM_BLOCKS, **shape: int) -> Engine:
    return warmup.build_engine(model, make_shape(model, **shape), num_blocks, Faults(faults), rank=0)


def make_shape(model: Decoder, max_rows: int = 16, max_step_tokens: int = 256) -> warmup.Shape:
    return warmup.Shape(
        geometry=KvGeometry(model.num_layers, model.num_kv_heads, model.head_dim, BLOCK_SIZE, model.dtype),
        max_rows=max_rows,
        max_step_tokens=max_step_tokens,
        max_total_tokens=model.max_positions,
        vocab_size=model.vocab_size,
        hidden_size=model.spec.hidden,
        device=model.device,
        watermark_gamma=0.5,
        watermark_delta=2.0,
    )


def sampling(**fields: object) -> pb.SamplingParameters:
    """Greedy unless said otherwise."""
    off = {"temperature": 1.0, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0}
    return pb.SamplingParameters(**(off | fields))


SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 7}


@dataclasses.dataclass(eq=False)
class Live:
    """A request as the driver knows it."""

    id: int
    prompt: list[int]
    sampling: pb.SamplingParameters
    top_n: int = 0
    prompt_logprobs_wanted: bool = False
    prompt_top_n: int = 0
    grammar: str = ""
    generated: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top: list[list[int]] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)
    prompt_top: list[list[int]] = dataclasses.field(default_factory=list)
    blocks: list[int] = dataclasses.field(default_factory=list)
    cached: int = 0
    computed: int = 0
    pending: int = 0  # sampled in steps whose answer was not read yet
    admitted: bool = False
    error: str | None = None

    @property
    def known(self) -> int:
        return len(self.prompt) + len(self.generated) + self.pending


class Driver:
    """Plays the router for one shard: hands out blocks, makes plans, reads answers."""

    def __init__(self, step: Step, num_blocks: int = NUM_BLOCKS) -> None:
        self._step = step
        self._free = list(range(num_blocks))[::-1]
        self._live: dict[int, Live] = {}
        self._forget: list[int] = []
        self._next_id = 1
        self.steps = 0
        self.digests: list[int] = []

    def add(self, prompt: list[int], top_n: int = 0, prompt_logprobs: bool = False, **fields: object) -> Live:
        """A new request, admitted with the next plan."""
        live = Live(self._next_id, list(prompt), sampling(**fields), top_n, prompt_logprobs)
        self._next_id += 1
        self._live[live.id] = live
        return live

    def add_with_prefix_of(self, other: Live, num_blocks: int, prompt: list[int], **fields: object) -> Live:
        """A new request that shares the first blocks of another one."""
        live = self.add(prompt, **fields)
        live.blocks = other.blocks[:num_blocks]
        live.cached = live.computed = num_blocks * BLOCK_SIZE
        return live

    def preempt(self, live: Live) -> None:
        """Takes its blocks away; it is admitted again, with the tokens it has, by the next plan that schedules it."""
        self._forget.append(live.id)
        self._free += live.blocks
        live.blocks, live.computed, live.cached, live.admitted = [], 0, 0, False

    def finish(self, live: Live) -> None:
        self._forget.append(live.id)
        del self._live[live.id]

    def plan(self, chunks: dict[Live, int] | None = None) -> tuple[list[pb.Admission], pb.StepPlan]:
        """A step of `chunks` (request → tokens), or of everything that every live request has left."""
        if chunks is None:
            chunks = {live: live.known - live.computed for live in self._live.values() if live.error is None}
        self.steps += 1
        plan = pb.StepPlan(step=self.steps, forget=self._forget)
        self._forget = []
        admissions = []
        for live, num_tokens in chunks.items():
            needed = -(-(live.computed + num_tokens) // BLOCK_SIZE) - len(live.blocks)
            new = [self._free.pop() for _ in range(max(needed, 0))]
            if not live.admitted:
                admissions.append(self._admission(live))
                live.admitted = True
            live.blocks += new
            plan.scheduled.add(
                request_id=live.id, num_tokens=num_tokens, num_computed_tokens=live.computed, new_blocks=new
            )
            live.computed += num_tokens
            live.pending += live.computed == live.known
        return admissions, plan

    def read(self, response: pb.StepResponse) -> None:
        self.digests.append(response.digest)
        for generation in response.generations:
            live = self._live[generation.request_id]
            live.generated += generation.token_ids
            live.logprobs += generation.logprobs
            live.top += [list(top.ids) for top in generation.top_tokens]
            live.pending -= len(generation.token_ids)
            if generation.prompt_logprobs:
                assert generation.prompt_logprobs_start == len(live.prompt_logprobs) + 1
                live.prompt_logprobs += generation.prompt_logprobs
                live.prompt_top += [list(top.ids) for top in generation.prompt_top_tokens]
        for error in response.errors:
            self._live[error.request_id].error = error.message

    def step(self, chunks: dict[Live, int] | None = None) -> pb.StepResponse:
        response = self._step(*self.plan(chunks))
        self.read(response)
        return response

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step()

    def _admission(self, live: Live) -> pb.Admission:
        return pb.Admission(
            request_id=live.id,
            token_ids=live.prompt + live.generated,
            num_prompt_tokens=len(live.prompt),
            num_cached_tokens=live.cached,
            blocks=live.blocks,
            sampling=live.sampling,
            top_n_tokens=live.top_n,
            prompt_logprobs=live.prompt_logprobs_wanted,
            prompt_top_n_tokens=live.prompt_top_n,
            grammar=live.grammar,
        )


class ShardGroup:
    """Real shard processes on a model directory, started as the launcher does and spoken to over gRPC."""

    def __init__(self, model_dir: Path, socket_dir: Path, world_size: int = 1, **fields: object) -> None:
        self.uds_path = str(socket_dir / "shard")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        values = {"max_step_tokens": 256, "max_rows": 16, "block_size": BLOCK_SIZE, "num_threads": 1}
        values |= {"master_port": port, "master_addr": "127.0.0.1", "max_kv_tokens": NUM_BLOCKS * BLOCK_SIZE} | fields
        self.ranks = []
        for rank in range(world_size):
            config = ShardConfig(
                model_dir=str(model_dir),
                model_id="tiny",
                uds_path=self.uds_path,
                rank=rank,
                world_size=world_size,
                **values,
            )
            self.ranks.append(ShardProcess(["serve", *to_argv(config)], channel.address(self.uds_path, rank)))

    def __enter__(self) -> "ShardGroup":
        for rank in self.ranks:
            rank.wait_ready()
        return self

    def __exit__(self, *exception: object) -> None:
        for rank in self.ranks:
            rank.close()

    def step(self, admissions: list[pb.Admission], plan: pb.StepPlan) -> pb.StepResponse:
        """Sends the step to every rank; all have to agree. Returns rank 0's answer."""
        method = "Prefill" if admissions else "Decode"
        request = pb.PrefillRequest(admissions=admissions, plan=plan) if admissions else pb.DecodeRequest(plan=plan)
        calls = [rank.start(method, request) for rank in self.ranks]
        responses = [call.result() for call in calls]
        assert len({response.digest for response in responses}) == 1
        assert all(not response.generations for response in responses[1:])
        failed = [[error.request_id for error in response.errors] for response in responses]
        assert failed == failed[:1] * len(failed)
        return responses[0]


class ShardProcess:
    """One `text-generation-server`, its log records and its channel."""

    def __init__(self, argv: list[str], address: str) -> None:
        command = [sys.executable, "-c", "from tgi_shard.cli import main; main()", *argv]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.records: list[dict[str, Any]] = []
        self._channel = grpc.insecure_channel(address, options=channel.CHANNEL_OPTIONS)

    def wait_ready(self) -> None:
        """Reads its log up to the `ready` event."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._record(line)
            if self.records[-1].get("phase") == "ready":
                return
        pytest.fail(f"the shard ended at start:\n{self.log}")

    def _record(self, line: str) -> None:
        record = logs.parse(line)
        assert record is not None, f"not a log record: {line}"
        self.records.append(record)

    @property
    def log(self) -> str:
        return "\n".join(record["message"] for record in self.records)

    @property
    def phases(self) -> list[str]:
        return [record["phase"] for record in self.records if record.get("event") == "phase"]

    def start(self, method: str, request: Any) -> Any:
        """Begins a call; `.result()` waits for its answer."""
        response_type = service.METHODS[method][1]
        path = f"/{service.SERVICE}/{method}"
        call = self._channel.unary_unary(path, type(request).SerializeToString, response_type.FromString)
        return call.future(request, timeout=200, wait_for_ready=True)

    def call(self, method: str, request: Any) -> Any:
        return self.start(method, request).result()

    def wait(self) -> int:
        """Its exit status, with the rest of its log read."""
        stdout, _ = self.process.communicate(timeout=200)
        for line in stdout.splitlines():
            self._record(line)
        return self.process.returncode

    def close(self) -> None:
        self._channel.close()
        if self.process.poll() is None:
            self.process.terminate()
            self.wait()
