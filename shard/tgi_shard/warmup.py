"""Warm-up: runs the engine on a throw-away pool, measures what a step needs beside weights and KV, sizes the pool.

On CUDA the largest possible step is really run and its peak memory measured, so running out of memory happens here or
never. On CPU the small steps only load code and prepack what the first request would otherwise wait for; memory for
activations is estimated, because a real 4096-token step of a large model takes longer than the whole start should.
"""

import logging
from dataclasses import dataclass

import torch
from tgi_proto import generate_pb2 as pb

from .config import ShardConfig
from .engine import Engine, Model
from .errors import Bug, StartError
from .faults import Faults
from .grammar.masks import GrammarMasks
from .host import available_memory
from .kv_cache import KvCache, KvGeometry
from .rows import RowLimits, RowTable
from .sampling.parameters import MAX_BIASES
from .sampling.sampler import Sampler
from .sampling.watermark import Watermark

logger = logging.getLogger(__name__)

# Of the free host memory, the share the KV pool may grow into. It is taken page by page as it is used.
CPU_SHARE = 0.5
# Device memory that stays free: what libraries allocate later without asking torch.
CUDA_RESERVE_BYTES = 256 << 20
# Estimated float32 buffers of E numbers that one token occupies at once (CPU), and [V] buffers of one sampled row.
_TOKEN_BUFFERS, _ROW_BUFFERS = 24, 4


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes that are fixed before the pool is."""

    geometry: KvGeometry
    max_rows: int
    max_step_tokens: int
    max_total_tokens: int
    vocab_size: int
    hidden_size: int  # E
    device: torch.device
    watermark_gamma: float
    watermark_delta: float

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.geometry.block_size)


def build_engine(
    model: Model, shape: Shape, num_blocks: int, faults: Faults, rank: int, grammars: GrammarMasks | None = None
) -> Engine:
    """An engine with a pool of `num_blocks`. grammars: None = rows that have one fail."""
    limits = RowLimits(
        max_rows=shape.max_rows,
        max_tokens=min(shape.max_total_tokens, num_blocks * shape.geometry.block_size),
        max_step_tokens=shape.max_step_tokens,
        num_blocks=num_blocks,
        block_size=shape.geometry.block_size,
        vocab_size=shape.vocab_size,
    )
    watermark = Watermark(shape.vocab_size, shape.watermark_gamma, shape.watermark_delta)
    rows = RowTable(limits, shape.device, faults, grammars)
    kv = KvCache(shape.geometry, num_blocks, shape.device)
    return Engine(model, kv, rows, Sampler(shape.vocab_size, watermark), faults, rank)


def measure(model: Model, shape: Shape, rank: int) -> int:
    """Bytes a step may need beside weights and KV: measured on CUDA, estimated on CPU. Runs two steps."""
    on_cuda = shape.device.type == "cuda"
    num_rows = min(shape.max_rows, shape.max_step_tokens, shape.max_rows if on_cuda else 2)
    most_tokens = shape.max_step_tokens if on_cuda else 8
    num_tokens = max(1, min(most_tokens, shape.max_step_tokens // num_rows, shape.max_total_tokens - 1))
    # All rows write into the same blocks: the values mean nothing here.
    engine = build_engine(model, shape, shape.blocks_for(num_tokens + 1), Faults(), rank)
    if on_cuda:
        torch.cuda.synchronize(shape.device)
        torch.cuda.reset_peak_memory_stats(shape.device)
        before = torch.cuda.memory_allocated(shape.device)
    for step in (1, 2):
        admissions = [_admission(i, num_tokens, shape) for i in range(num_rows)] if step == 1 else []
        response = engine.step(admissions, _plan(step, num_rows, num_tokens if step == 1 else 1, num_tokens))
        if response.errors and "finite" not in response.errors[0].message:
            raise Bug(f"a warm-up request failed: {response.errors[0].message}. This is a bug.")
    if on_cuda:
        peak = torch.cuda.max_memory_allocated(shape.device) - before
        del engine
        torch.cuda.empty_cache()
        # And the real engine's table of token ids (int32), of which this one had as little as it had blocks.
        return peak + 4 * shape.max_rows * shape.max_total_tokens
    return _estimate(shape)


def _estimate(shape: Shape) -> int:
    token_bytes = 4 * shape.hidden_size * _TOKEN_BUFFERS
    return shape.max_step_tokens * token_bytes + 4 * shape.max_rows * shape.vocab_size * _ROW_BUFFERS


def _admission(i: int, num_tokens: int, shape: Shape) -> pb.Admission:
    """Every row asks for everything, which takes the most memory; but the first is greedy and wants its prompt's."""
    greedy = pb.SamplingParameters(temperature=1.0, top_p=1.0, typical_p=1.0, repetition_penalty=1.0)
    everything = pb.SamplingParameters(
        temperature=0.7,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        typical_p=0.9,
        repetition_penalty=1.1,
        frequency_penalty=0.1,
        presence_penalty=0.1,
        logit_bias=dict.fromkeys(range(min(MAX_BIASES, shape.vocab_size)), 1.0) if i == 1 else {},
        seed=i,
    )
    return pb.Admission(
        request_id=i + 1,
        token_ids=[(i + k) % shape.vocab_size for k in range(num_tokens)],
        num_prompt_tokens=num_tokens,
        blocks=range(shape.blocks_for(num_tokens + 1)),
        sampling=everything if i else greedy,
        top_n_tokens=5 if i else 0,
        prompt_logprobs=i == 0,
        prompt_top_n_tokens=5 if i == 0 else 0,
    )


def _plan(step: int, num_rows: int, num_tokens: int, num_prompt_tokens: int) -> pb.StepPlan:
    plan = pb.StepPlan(step=step)
    for i in range(num_rows):
        computed = 0 if step == 1 else num_prompt_tokens
        plan.scheduled.add(request_id=i + 1, num_tokens=num_tokens, num_computed_tokens=computed)
    return plan


def pool_blocks(config: ShardConfig, shape: Shape, free_bytes: int, step_bytes: int) -> int:
    """Blocks this rank can have. Raises StartError when one longest request would not fit.

    free_bytes: memory free now on this rank's device (on CPU: its share of the host's).
    """
    budget = max(int(free_bytes * config.memory_fraction) - step_bytes, 0)
    possible = budget // shape.geometry.block_bytes
    usable = shape.max_rows * shape.blocks_for(shape.max_total_tokens)
    if config.max_kv_tokens is not None:
        usable = min(usable, config.max_kv_tokens // shape.geometry.block_size)
    blocks = min(possible, usable)
    needed = shape.blocks_for(config.max_total_tokens if config.max_total_tokens is not None else 1)
    if blocks < needed:
        raise StartError(_too_small(config, shape, free_bytes, step_bytes, blocks, needed))
    return blocks


def _too_small(config: ShardConfig, shape: Shape, free_bytes: int, step_bytes: int, blocks: int, needed: int) -> str:
    size = shape.geometry.block_size
    total = "unset" if config.max_total_tokens is None else config.max_total_tokens
    pool = "unset" if config.max_kv_tokens is None else config.max_kv_tokens
    return (
        f"the KV pool would hold {blocks * size} tokens, one request may need {needed * size}: {_mib(free_bytes)} MiB"
        f" are free, {_mib(step_bytes)} MiB of them are needed to compute a step of {shape.max_step_tokens} tokens"
        f" (`--max-batch-prefill-tokens`), and {size} tokens take {shape.geometry.block_bytes / 2**20:.2f} MiB; lower"
        f" `--max-total-tokens` ({total}) or `--max-batch-prefill-tokens`, raise"
        f" `--max-batch-total-tokens` ({pool}) or `--cuda-memory-fraction` ({config.memory_fraction}),"
        f" or use more shards (`--num-shard`)"
    )


def _mib(num_bytes: int) -> int:
    return num_bytes >> 20


def free_memory(device: torch.device, world_size: int) -> int:
    """Bytes free for this rank. Ranks on CPU share the host's memory, of which only a part is ours to fill."""
    if device.type == "cuda":
        return max(torch.cuda.mem_get_info(device)[0] - CUDA_RESERVE_BYTES, 0)
    return int(available_memory() * CPU_SHARE) // world_size
