"""Attention on CUDA with our own Triton kernels (`kernels/paged_attention.py`): nothing to install, any block size.

Cuts a step into programs once (`plan`) and launches them for each layer (`forward`). Triton's interpreter runs the same
code on CPU tensors, for the tests. Registered in `attention/__init__.py`; triton itself is imported on first use.
"""

import importlib.util
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..upload import upload
from .base import AttentionBatch, AttentionSpec

if TYPE_CHECKING:
    from ..kernels.paged_attention import Launch, Requests, Scores
    from ..kernels.tiles import Tile
    from ..kernels.work_list import WorkList

MAX_HEAD_DIM = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OLDEST_CAPABILITY = (8, 0)
LONG_CONTEXT, LONGEST_TILE = 2048, 128  # keys that are surely split; rows of the largest tile
INTERPRETED = (OLDEST_CAPABILITY, 2)  # the GPU that Triton's interpreter stands for: capability, multiprocessors


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What all layers of one spec share in a step."""

    scores: "Scores"
    launches: "list[Launch]"


@dataclass(frozen=True, slots=True)
class TritonPlan:
    requests: "Requests"
    layers: dict[AttentionSpec, LayerPlan]
    interpreted: bool


class TritonAttention:
    name = "triton"

    def __init__(self, compile_early: bool = True) -> None:
        """compile_early: the first plan, which belongs to the warm-up, compiles what any later step may need."""
        self._compile_early = compile_early

    def objections(self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, block_size: int) -> list[str]:
        return [*_machine_objections(device), *_layer_objections(spec, dtype, block_size)]

    def plan(self, batch: AttentionBatch, specs: list[AttentionSpec]) -> TritonPlan:
        """Host arithmetic and one upload, whatever the number of layers."""
        from ..kernels.paged_attention import Requests, Scores

        device = batch.cu_query.device
        if self._compile_early and device.type == "cuda":
            self._compile_early = False
            for spec in specs:
                compile_kernels(spec, device, batch.block_size)
        interpreted = device.type == "cpu"
        hardware = INTERPRETED if interpreted else _hardware(device)
        work = {spec: _work(batch, spec, *hardware) for spec in specs}
        slopes = {spec: np.array(spec.alibi_slopes, np.float32) for spec in specs if spec.alibi_slopes is not None}
        lists = [array for pairs in work.values() for _, listed in pairs for array in (listed.items, listed.groups)]
        uploaded = iter(upload([*lists, *slopes.values()], device))
        launches = {
            spec: [_launch(tile, listed, next(uploaded), next(uploaded), spec) for tile, listed in pairs]
            for spec, pairs in work.items()
        }
        on_device = {spec: next(uploaded) for spec in slopes}
        layers = {
            spec: LayerPlan(Scores(spec.scale, spec.window, spec.softcap, on_device.get(spec)), launches[spec])
            for spec in specs
        }
        return TritonPlan(Requests(batch.cu_query, batch.context, batch.block_table), layers, interpreted)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: tuple[Tensor, Tensor],
        batch: AttentionBatch,
        plan: TritonPlan,
        spec: AttentionSpec,
    ) -> Tensor:
        from ..kernels.kv_store import store_kv
        from ..kernels.paged_attention import paged_attention

        store_kv(k, v, kv, batch.slots)
        layer = plan.layers[spec]
        return paged_attention(q, kv, plan.requests, layer.scores, layer.launches, plan.interpreted)


def compile_kernels(spec: AttentionSpec, device: torch.device, block_size: int) -> None:
    """Runs all kernels that layers of this spec may need, on zeros: no request then waits for a compiler."""
    batch = _long_batch(spec, device, block_size)
    heads = torch.zeros(
        sum(batch.query_lengths), spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim, dtype=spec.dtype, device=device
    )
    q, kv_heads = heads[:, : spec.num_heads], heads[:, spec.num_heads :]
    k, v = kv_heads.chunk(2, 1)
    pool = heads.new_zeros(1, block_size, spec.num_kv_heads, spec.head_dim)
    backend = TritonAttention(compile_early=False)
    backend.forward(q, k, v, (pool, pool), batch, backend.plan(batch, [spec]), spec)


def _long_batch(spec: AttentionSpec, device: torch.device, block_size: int) -> AttentionBatch:
    """One request for each size of tile, their contexts long enough to be split, all in block 0 and none written."""
    query = [1, LONGEST_TILE * spec.num_kv_heads // spec.num_heads + 1]
    num_blocks = -(-LONG_CONTEXT // block_size)
    return AttentionBatch(
        query_lengths=query,
        context_lengths=[LONG_CONTEXT] * 2,
        block_tables=[[0] * num_blocks] * 2,
        cu_query=torch.tensor([0, 1, sum(query)], dtype=torch.int32, device=device),
        context=torch.full((2,), LONG_CONTEXT, dtype=torch.int32, device=device),
        block_table=torch.zeros(2, num_blocks, dtype=torch.int32, device=device),
        slots=torch.full((sum(query),), -1, dtype=torch.int64, device=device),
        block_size=block_size,
    )


def _work(
    batch: AttentionBatch, spec: AttentionSpec, capability: tuple[int, int], num_processors: int
) -> "list[tuple[Tile, WorkList]]":
    """The step in at most two launches: requests whose rows fit one small tile (decoding), and the others."""
    from ..kernels.tiles import large_tile, small_tile
    from ..kernels.work_list import work_list

    query, context = np.array(batch.query_lengths), np.array(batch.context_lengths)
    group = spec.num_heads // spec.num_kv_heads
    small = small_tile(capability, spec.head_dim, spec.dtype.itemsize, group)
    large = large_tile(capability, spec.head_dim, spec.dtype.itemsize)
    fits = query * group <= small.rows
    work = []
    for tile, chosen in ((large, ~fits), (small, fits)):
        requests = np.flatnonzero(chosen)
        if len(requests):
            programs = -(-num_processors * tile.per_processor // spec.num_kv_heads)
            lengths = (query[requests], context[requests])
            work.append((tile, work_list(requests, *lengths, spec.window, group, tile, programs)))
    return work


def _launch(tile: "Tile", work: "WorkList", items: Tensor, groups: Tensor, spec: AttentionSpec) -> "Launch":
    from ..kernels.paged_attention import Launch

    shape = (max(work.num_parts, 1), spec.num_kv_heads, tile.rows)
    part_out = torch.empty((*shape, spec.head_dim), dtype=torch.float32, device=items.device)
    part_scale = torch.empty(shape, dtype=torch.float32, device=items.device)
    return Launch(tile, items, groups, work.rows, part_out, part_scale)


def _hardware(device: torch.device) -> tuple[tuple[int, int], int]:
    """(compute capability, multiprocessors); torch keeps both, so asking costs nothing."""
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def _layer_objections(spec: AttentionSpec, dtype: torch.dtype, block_size: int) -> list[str]:
    reasons = []
    if spec.head_dim > MAX_HEAD_DIM:
        reasons.append(
            f"the Triton kernel takes heads of up to {MAX_HEAD_DIM} numbers; this model's have {spec.head_dim}"
        )
    if dtype not in DTYPES:
        reasons.append(f"the Triton kernel computes in bfloat16, float16 or float32, not in {dtype}")
    if block_size < 1:
        reasons.append(f"a KV block must hold at least one token, not {block_size}")
    return reasons


def _machine_objections(device: torch.device) -> list[str]:
    """What this machine lacks."""
    if device.type != "cuda":
        return [f"it computes on CUDA devices, not on {device.type}"]
    if importlib.util.find_spec("triton") is None:
        return ["the package triton is not installed (it comes with torch for CUDA)"]
    reasons = []
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        reasons.append(
            f"the Triton kernel needs compute capability {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} (Ampere), "
            f"this GPU has {capability[0]}.{capability[1]}"
        )
    if not _c_compiler():
        reasons.append(
            "Triton builds its launcher with a C compiler, and none was found: install gcc or clang, or set `CC`"
        )
    elif not _python_header().exists():
        reasons.append(f"Triton builds its launcher against Python's C headers, and {_python_header()} is missing")
    return reasons


def _c_compiler() -> bool:
    """Whether Triton will find a compiler: the one named by CC, else gcc or clang on the path."""
    from triton import knobs

    return bool(knobs.build.cc) or any(shutil.which(name) for name in ("gcc", "clang"))


def _python_header() -> Path:
    scheme = sysconfig.get_default_scheme()
    # Debian's posix_local holds no headers; Triton looks in posix_prefix as well.
    return Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)) / "Python.h"
