"""The part of `gpu_step` that measures attention alone: ceilings of the device, kernels by shape, other tiles.

Owns `Bench`, the clock and the ceilings that everything is compared with. Called by gpu_step.py.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from tgi_shard.attention import AttentionBackend, AttentionBatch, AttentionSpec
from tgi_shard.kernels import tiles
from tgi_shard.models import llama
from tgi_shard.models.decoder import HeadSplit
from tgi_shard.parallel import Parallel

from benchmarks.apis import Json

BLOCK_SIZE = 16
# Shapes of tiles.Tile: rows, keys, warps, stages.
SMALL_SWEEP = [
    (16, 64, 4, 2),
    (16, 64, 4, 3),
    (16, 64, 4, 5),
    (16, 32, 4, 3),
    (16, 32, 4, 5),
    (16, 128, 4, 3),
    (16, 128, 8, 5),
]
LARGE_SWEEP = [(128, 64, 8, 3), (128, 64, 8, 5), (128, 64, 8, 7), (128, 128, 8, 3), (64, 64, 4, 3), (64, 64, 4, 5)]


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured, where, and against which ceilings."""

    device: torch.device
    dtype: torch.dtype
    config: dict[str, object]
    repeats: int
    copy_bytes_per_s: float
    flops_per_s: float

    @property
    def spec(self) -> AttentionSpec:
        return HeadSplit.of(llama.spec(self.config), Parallel.single()).attention_spec(
            llama.spec(self.config), 0, self.dtype
        )

    def milliseconds(self, run: Callable[[], object], graph: bool) -> float:
        """Median time of `run`, which has been run before."""
        if self.device.type == "cpu":
            return statistics.median(wall_ms(run) for _ in range(self.repeats))
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                run()
            run = captured.replay
        run()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.repeats + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def wall_ms(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def measure_ceilings(device: torch.device, dtype: torch.dtype, tiny: bool) -> tuple[float, float]:
    """(bytes/s that a copy reads and writes, operations/s of a large matrix product on random numbers)."""
    bench = Bench(device, dtype, {}, 10, 0.0, 0.0)
    source = torch.empty((1 << 20) if tiny else (2 << 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = bench.milliseconds(lambda: target.copy_(source), graph=False)
    size = 256 if tiny else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    matmul_ms = bench.milliseconds(lambda: a @ b, graph=False)
    return 2e3 * source.nbytes / copy_ms, 2e3 * size**3 / matmul_ms


def make_batch(lengths: list[tuple[int, int]], device: torch.device) -> tuple[AttentionBatch, int]:
    """(tokens in the step, context) of each request, on scattered blocks; and how many blocks that takes."""
    counts = [-(-context // BLOCK_SIZE) for _, context in lengths]
    blocks = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).split(counts)
    padded = torch.nn.utils.rnn.pad_sequence(list(blocks), batch_first=True)
    slots = torch.cat(
        [
            row[torch.arange(context - query, context) // BLOCK_SIZE] * BLOCK_SIZE
            + torch.arange(context - query, context) % BLOCK_SIZE
            for row, (query, context) in zip(padded, lengths, strict=True)
        ]
    )
    query = [q for q, _ in lengths]
    batch = AttentionBatch(
        query_lengths=query,
        context_lengths=[context for _, context in lengths],
        block_tables=[part.tolist() for part in blocks],
        cu_query=torch.tensor([0, *query]).cumsum(0).int().to(device),
        context=torch.tensor([context for _, context in lengths], dtype=torch.int32, device=device),
        block_table=padded.int().to(device),
        slots=slots.to(device),
        block_size=BLOCK_SIZE,
    )
    return batch, sum(counts)


def attention_ms(bench: Bench, backend: AttentionBackend, lengths: list[tuple[int, int]]) -> float:
    """One layer's attention, KV write included. Layers take turns, so that their KV comes from memory, not from L2."""
    spec = bench.spec
    batch, num_blocks = make_batch(lengths, bench.device)
    layer_bytes = 2 * num_blocks * BLOCK_SIZE * spec.num_kv_heads * spec.head_dim * bench.dtype.itemsize
    num_layers = 1 if bench.device.type == "cpu" else max(1, min(64, (1 << 29) // layer_bytes))
    shape = (num_blocks, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim)
    kv = [tuple(torch.randn(shape, device=bench.device).to(bench.dtype) for _ in range(2)) for _ in range(num_layers)]
    heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    fused = torch.randn(sum(batch.query_lengths), sum(heads), spec.head_dim, device=bench.device).to(bench.dtype)
    q, k, v = fused.split(heads, 1)
    plan = backend.plan(batch, [spec])

    def run() -> None:
        for pools in kv:
            backend.forward(q, k, v, pools, batch, plan, spec)

    run()
    return bench.milliseconds(run, graph=True) / num_layers


def sdpa_ms(bench: Bench, tokens: int) -> float:
    """torch's own dense attention over one prompt, as a yardstick."""
    spec = bench.spec
    q, k, v = (
        torch.randn(1, heads, tokens, spec.head_dim, device=bench.device).to(bench.dtype)
        for heads in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    )

    def run() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    run()
    return bench.milliseconds(run, graph=True)


def attention_flops(spec: AttentionSpec, lengths: list[tuple[int, int]]) -> float:
    seen = sum(query * context - query * (query - 1) / 2 for query, context in lengths)
    return 4.0 * spec.num_heads * spec.head_dim * seen


def measure_attention(bench: Bench, backend: AttentionBackend, tiny: bool) -> list[Json]:
    spec, results = bench.spec, []
    unit = 64 if tiny else 1024
    for context in (unit, 8 * unit):
        for streams in (1, 4) if tiny else (1, 8, 32, 64, 256):
            lengths = [(1, context)] * streams
            ms = attention_ms(bench, backend, lengths)
            read = 2 * streams * context * spec.num_kv_heads * spec.head_dim * bench.dtype.itemsize
            share = read / ms * 1e3 / bench.copy_bytes_per_s
            results.append({"step": f"decode {streams} x {context}", "ms": ms, "share_of_copy_bandwidth": share})
    prompts = {"4 units": [(4 * unit, 4 * unit)], "units": [(unit, unit)] * 4, "chunk": [(unit // 2, 8 * unit)]}
    for lengths in prompts.values():
        ms = attention_ms(bench, backend, lengths)
        rate = attention_flops(spec, lengths) / ms * 1e3
        name = " + ".join(f"{query} of {context}" for query, context in dict.fromkeys(lengths))
        results.append(
            {
                "step": f"prefill {len(lengths)} x {name}",
                "ms": ms,
                "tflops": rate / 1e12,
                "share_of_matmul": rate / bench.flops_per_s,
            }
        )
    ms = sdpa_ms(bench, 4 * unit)
    rate = attention_flops(spec, [(4 * unit, 4 * unit)]) / ms * 1e3
    results.append(
        {
            "step": f"torch SDPA 1 x {4 * unit}",
            "ms": ms,
            "tflops": rate / 1e12,
            "share_of_matmul": rate / bench.flops_per_s,
        }
    )
    return results


def sweep_tiles(bench: Bench, backend: AttentionBackend) -> list[Json]:
    """The same steps with other tiles than `kernels/tiles.py` chooses."""
    results = []
    chosen = tiles.small_tile, tiles.large_tile
    try:
        for candidates, kind, steps in (
            (SMALL_SWEEP, "small", {"decode 8 x 8192": [(1, 8192)] * 8, "decode 64 x 1024": [(1, 1024)] * 64}),
            (LARGE_SWEEP, "large", {"prefill 4096": [(4096, 4096)]}),
        ):
            for shape in candidates:
                for per_processor in (2, 3, 4) if kind == "small" else (1,):
                    tile = tiles.Tile(*shape, per_processor)
                    tiles.small_tile = tiles.large_tile = lambda *arguments, tile=tile: tile
                    times = {name: attention_ms(bench, backend, lengths) for name, lengths in steps.items()}
                    results.append({"kind": kind, "tile": asdict(tile), "ms": times})
    finally:
        tiles.small_tile, tiles.large_tile = chosen
    return results
