"""For the shard's tests: tiny random models on disk, engines on them, and a driver that plays the router."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from tgi_proto import generate_pb2 as pb
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


def load_tiny(directory: Path) -> Decoder:
    config = ShardConfig(model_dir=str(directory), model_id="tiny", block_size=BLOCK_SIZE)
    return load_model(config, Parallel.single(), torch.device("cpu"), torch.float32, lambda done, total: None)


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
        device=torch.device("cpu"),
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
    generated: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top: list[list[int]] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)
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
        )
