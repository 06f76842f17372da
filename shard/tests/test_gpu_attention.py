"""The attention backends for GPUs compute what the definition says.

The Triton kernels run in Triton's interpreter on CPU, and for real with a GPU. flash-attn is replaced by fakes with its
signatures that compute what its documentation promises.
"""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tgi_shard.attention import triton as triton_attention
from tgi_shard.attention.base import AttentionBatch, AttentionSpec
from tgi_shard.attention.flash_attn import FlashAttention, Version, layer_objections
from tgi_shard.attention.triton import TritonAttention, _long_batch, compile_kernels
from torch import Tensor

pytest.importorskip("triton", reason="triton comes with torch for CUDA, or: pip install triton")

BLOCK_SIZE = 16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

# (tokens in the step, tokens of context after it) of each request
MIXED = [(1, 1), (1, 77), (13, 13), (40, 90), (1, 150)]
DECODE = [(1, 1), (1, 16), (1, 17), (1, 200), (1, 64)]
PREFILL = [(1, 1), (16, 16), (33, 33), (100, 100)]
CHUNKS = [(7, 60), (64, 128), (1, 129), (5, 5)]
VERIFY = [(4, 60), (4, 4), (4, 33)]  # speculation: a few tokens each


@dataclass(frozen=True)
class Case:
    """One step with its pool: every number that attention reads."""

    batch: AttentionBatch
    q: Tensor
    k: Tensor
    v: Tensor
    kv: tuple[Tensor, Tensor]


def make_spec(heads: int = 4, kv_heads: int = 2, head_dim: int = 32, **rest: object) -> AttentionSpec:
    return AttentionSpec(heads, kv_heads, head_dim, scale=head_dim**-0.5, **rest)  # type: ignore[arg-type]


def make_batch(lengths: list[tuple[int, int]], block_size: int, device: torch.device) -> tuple[AttentionBatch, int]:
    """A step over requests of these lengths whose blocks lie scattered in the pool; and the pool's size in blocks."""
    query, context = [q for q, _ in lengths], [c for _, c in lengths]
    counts = [-(-c // block_size) for c in context]
    pool = sum(counts) + 3
    free = torch.randperm(pool).tolist()
    tables = [[free.pop() for _ in range(count)] for count in counts]
    padded = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = torch.tensor(table, dtype=torch.int32)
    slots = [
        table[p // block_size] * block_size + p % block_size
        for table, q, c in zip(tables, query, context, strict=True)
        for p in range(c - q, c)
    ]
    cu_query = torch.tensor([0, *query]).cumsum(0).to(torch.int32)
    batch = AttentionBatch(
        query_lengths=query,
        context_lengths=context,
        block_tables=tables,
        cu_query=cu_query.to(device),
        context=torch.tensor(context, dtype=torch.int32, device=device),
        block_table=padded.to(device),
        slots=torch.tensor(slots, device=device),
        block_size=block_size,
    )
    return batch, pool


def make_case(
    spec: AttentionSpec, lengths: list[tuple[int, int]], device: torch.device, block_size: int = BLOCK_SIZE
) -> Case:
    """q, k and v are views of one fused projection, as in the decoder; slots nobody wrote hold NaN."""
    torch.manual_seed(0)
    batch, num_blocks = make_batch(lengths, block_size, device)
    heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    fused = torch.randn(sum(batch.query_lengths), (heads + 2 * kv_heads) * dim).to(device, spec.dtype)
    q, k, v = fused.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
    pools = []
    for _ in range(2):
        pool = torch.full((num_blocks, block_size, kv_heads, dim), float("nan"))
        for table, length in zip(batch.block_tables, batch.context_lengths, strict=True):
            for position in range(length):
                pool[table[position // block_size], position % block_size] = torch.randn(kv_heads, dim)
        pools.append(pool.to(device, spec.dtype))
    return Case(
        batch,
        q.unflatten(1, (heads, dim)),
        k.unflatten(1, (kv_heads, dim)),
        v.unflatten(1, (kv_heads, dim)),
        (pools[0], pools[1]),
    )


def dense(case: Case, spec: AttentionSpec) -> Tensor:
    """The definition, request by request in float64 on CPU, from q, k, v and what was in the pool before."""
    batch, size = case.batch, case.batch.block_size
    results, first = [], 0
    for table, queries, context in zip(batch.block_tables, batch.query_lengths, batch.context_lengths, strict=True):
        rows = slice(first, first + queries)
        first += queries
        slots = torch.tensor([table[p // size] * size + p % size for p in range(context)])
        keys, values = (pool.cpu().double().flatten(0, 1)[slots] for pool in case.kv)
        keys[context - queries :], values[context - queries :] = (
            case.k[rows].cpu().double(),
            case.v[rows].cpu().double(),
        )
        keys, values = (t.repeat_interleave(spec.num_heads // spec.num_kv_heads, 1) for t in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", case.q[rows].cpu().double(), keys) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        distance = torch.arange(context - queries, context)[:, None] - torch.arange(context)[None, :]
        if spec.alibi_slopes is not None:
            scores = scores - torch.tensor(spec.alibi_slopes).double()[:, None, None] * distance
        hidden = distance < 0
        if spec.window is not None:
            hidden |= distance >= spec.window
        results.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(results)


def attend(case: Case, spec: AttentionSpec) -> Tensor:
    backend = TritonAttention(compile_early=False)
    if case.q.device.type == "cuda":  # on CPU the interpreter stands in, which nobody is served by
        assert backend.objections(spec, case.q.device, spec.dtype, case.batch.block_size) == []
    plan = backend.plan(case.batch, [spec])
    return backend.forward(case.q, case.k, case.v, case.kv, case.batch, plan, spec)


def check(
    spec: AttentionSpec, lengths: list[tuple[int, int]], device: torch.device, block_size: int = BLOCK_SIZE
) -> None:
    case = make_case(spec, lengths, device, block_size)
    expected = dense(case, spec)
    found = attend(case, spec).cpu().double()
    assert torch.isfinite(found).all()
    error = (found - expected).norm() / expected.norm()
    assert error < TOLERANCE[spec.dtype], f"relative error {error:.1e}"


@pytest.mark.parametrize(
    "lengths", [MIXED, DECODE, PREFILL, CHUNKS, VERIFY], ids=["mixed", "decode", "prefill", "chunks", "verify"]
)
def test_every_kind_of_step(lengths: list[tuple[int, int]], device: torch.device) -> None:
    check(make_spec(), lengths, device)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 2), (7, 1), (20, 1), (71, 1)])
def test_every_ratio_of_query_heads_to_kv_heads(heads: int, kv_heads: int, device: torch.device) -> None:
    check(make_spec(heads, kv_heads), [(1, 40), (9, 30)], device)


@pytest.mark.parametrize("head_dim", [16, 20, 64, 80, 96, 128, 192, 256])
def test_head_sizes_that_are_no_power_of_two_too(head_dim: int, device: torch.device) -> None:
    check(make_spec(2, 1, head_dim), [(1, 40), (9, 30)], device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_half_precision(dtype: torch.dtype, head_dim: int, device: torch.device) -> None:
    check(make_spec(4, 2, head_dim, dtype=dtype), MIXED, device)


@pytest.mark.parametrize("window", [1, 5, 16, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_hides_older_positions(window: int, dtype: torch.dtype, device: torch.device) -> None:
    check(make_spec(window=window, dtype=dtype), MIXED, device)


def test_a_window_reads_nothing_of_older_blocks(device: torch.device) -> None:
    """Their memory may hold anything, NaN included."""
    spec = make_spec(window=20)
    case = make_case(spec, [(1, 200), (30, 150)], device)
    expected = dense(case, spec)
    for table, context, queries in zip(
        case.batch.block_tables, case.batch.context_lengths, case.batch.query_lengths, strict=True
    ):
        for block in table[: (context - queries - 20 + 1) // BLOCK_SIZE]:
            case.kv[0][block] = case.kv[1][block] = float("nan")
    assert torch.allclose(attend(case, spec).cpu().double(), expected, atol=1e-4)


def test_softcap(device: torch.device) -> None:
    check(make_spec(softcap=2.0), MIXED, device)


@pytest.mark.parametrize("window", [None, 24])
def test_alibi(window: int | None, device: torch.device) -> None:
    check(make_spec(4, 4, alibi_slopes=(0.5, 0.25, 0.125, 0.0625), window=window), MIXED, device)


@pytest.mark.parametrize("block_size", [16, 32, 48, 256])
def test_block_sizes(block_size: int, device: torch.device) -> None:
    check(make_spec(), MIXED, device, block_size)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("lengths", [[(1, 700)], [(3, 500), (1, 40)], [(10, 700)]], ids=["one", "few", "chunk"])
def test_long_contexts_are_split_and_put_together_again(
    lengths: list[tuple[int, int]], window: int | None, device: torch.device
) -> None:
    spec = make_spec(2, 1, window=window)
    case = make_case(spec, lengths, device)
    launches = TritonAttention(compile_early=False).plan(case.batch, [spec]).layers[spec].launches
    assert window is not None or any(len(launch.groups) for launch in launches)
    check(spec, lengths, device)


def test_the_warm_up_runs_every_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sizes of tile, each with split contexts, so that both kernels are compiled for both."""
    monkeypatch.setattr(triton_attention, "INTERPRETED", ((9, 0), 132))
    monkeypatch.setattr(triton_attention, "LONG_CONTEXT", 512)
    spec = make_spec(2, 1, dtype=torch.bfloat16)
    launches = TritonAttention(compile_early=False).plan(_long_batch(spec, device, 16), [spec]).layers[spec].launches
    assert len({launch.tile.rows for launch in launches}) == 2
    assert all(len(launch.groups) for launch in launches)
    compile_kernels(spec, device, 16)


def test_layers_with_different_specs_share_one_plan(device: torch.device) -> None:
    """As in models that alternate sliding and full attention."""
    specs = [make_spec(), make_spec(window=9), make_spec(4, 2, alibi_slopes=(0.5, 0.25, 0.125, 0.0625))]
    case = make_case(specs[0], MIXED, device)
    backend = TritonAttention(compile_early=False)
    plan = backend.plan(case.batch, specs)
    for spec in specs:
        expected = dense(case, spec)
        found = backend.forward(case.q, case.k, case.v, case.kv, case.batch, plan, spec).cpu().double()
        assert torch.allclose(found, expected, atol=1e-4)


def test_new_keys_and_values_are_written_where_the_slots_say(device: torch.device) -> None:
    from tgi_shard.kernels.kv_store import store_kv, store_kv_torch

    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(make_spec(3, 3, 20, dtype=dtype), CHUNKS, device)
        kernel, twin = ([pool.nan_to_num(7.0) for pool in case.kv] for _ in range(2))
        store_kv(case.k, case.v, (kernel[0], kernel[1]), case.batch.slots)
        store_kv_torch(case.k, case.v, (twin[0], twin[1]), case.batch.slots)
        assert torch.equal(kernel[0], twin[0])
        assert torch.equal(kernel[1], twin[1])


def test_a_token_with_slot_minus_one_is_not_written(device: torch.device) -> None:
    from tgi_shard.kernels.kv_store import store_kv

    case = make_case(make_spec(), [(3, 3)], device)
    before = case.kv[0].nan_to_num(7.0), case.kv[1].nan_to_num(7.0)
    after = before[0].clone(), before[1].clone()
    store_kv(case.k, case.v, after, torch.full_like(case.batch.slots, -1))
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


def test_padding_items_do_nothing(device: torch.device) -> None:
    """A captured graph launches as many programs as its largest step; the rest carry request -1."""
    from tgi_shard.kernels.paged_attention import paged_attention

    spec = make_spec(2, 1)
    case = make_case(spec, [(1, 700), (1, 40)], device)
    expected = attend(case, spec)
    plan = TritonAttention(compile_early=False).plan(case.batch, [spec])
    layer = plan.layers[spec]
    padding = torch.full((3, 5), -1, dtype=torch.int32, device=device)
    padded = [
        replace(x, items=torch.cat([x.items, padding]), groups=torch.cat([x.groups, padding[:, :4]]))
        for x in layer.launches
    ]
    found = paged_attention(case.q, case.kv, plan.requests, layer.scores, padded, plan.interpreted)
    assert torch.equal(found, expected)


# As documented: query i of a sequence sits at key position i + len_k - len_q; a window (left, right) shows it the keys
# from `left` before to `right` after that position.
FAKE = """
import torch

def attend(q, k_cache, v_cache, cu_q, context, table, scale, causal, window, softcap, slopes):
    results = []
    for r in range(len(context)):
        rows = q[cu_q[r]:cu_q[r + 1]].double()
        keys, values = (c[table[r].long()].flatten(0, 1)[:context[r]].double() for c in (k_cache, v_cache))
        group = q.shape[1] // keys.shape[1]
        keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", rows, keys) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        offset = torch.arange(len(keys))[None, :] - (torch.arange(len(rows)) + len(keys) - len(rows))[:, None]
        if slopes is not None:
            scores = scores - slopes.double()[:, None, None] * offset.abs()
        left, right = window
        hidden = offset > 0 if causal else torch.zeros_like(offset, dtype=torch.bool)
        hidden |= (left >= 0) & (offset < -left)
        hidden |= (right >= 0) & (offset > right)
        results.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(results).to(q.dtype)
"""
FAKE_2 = """
def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                           deterministic=False, return_attn_probs=False, block_table=None):
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k.diff(), block_table, softmax_scale, causal, window_size, softcap,
                  alibi_slopes)
"""
FAKE_3 = """
def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
                            cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None,
                            cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None,
                            q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False,
                            window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
                            scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
                            return_softmax_lse=False):
    assert max_seqlen_q == cu_seqlens_q.diff().max()
    return attend(q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, page_table, softmax_scale, causal, window_size,
                  softcap, None)
"""


@pytest.fixture
def flash_attn_fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "flash_attn.py").write_text(FAKE + FAKE_2)
    (tmp_path / "flash_attn_interface.py").write_text(FAKE + FAKE_3)
    monkeypatch.syspath_prepend(tmp_path)
    saved = {name: sys.modules.pop(name, None) for name in ("flash_attn", "flash_attn_interface")}
    yield
    for name, module in saved.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


SPECS = {
    "plain": make_spec(),
    "window": make_spec(window=9),
    "softcap": make_spec(softcap=2.0),
    "alibi": make_spec(alibi_slopes=(0.5, 0.25, 0.125, 0.0625)),
}


@pytest.mark.usefixtures("flash_attn_fakes")
@pytest.mark.parametrize("lengths", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize(
    ("version", "name"), [(2, name) for name in SPECS] + [(3, name) for name in SPECS if name != "alibi"]
)
def test_flash_attn_is_asked_for_the_same(version: Version, name: str, lengths: list[tuple[int, int]]) -> None:
    spec = SPECS[name]
    case = make_case(spec, lengths, torch.device("cpu"))
    for pool in case.kv:
        pool.nan_to_num_(7.0)
    expected = dense(case, spec)
    backend = FlashAttention(version)
    plan = backend.plan(case.batch, [spec])
    found = backend.forward(case.q, case.k, case.v, case.kv, case.batch, plan, spec)
    assert torch.allclose(found.double(), expected, atol=1e-4)


def test_flash_attn_says_what_it_cannot_do() -> None:
    fine = make_spec(head_dim=128)
    assert layer_objections(2, fine, torch.bfloat16, 256) == []
    assert layer_objections(3, fine, torch.float16, 16) == []
    assert "multiple of 256" in layer_objections(2, fine, torch.bfloat16, 16)[0]
    assert "float32" in layer_objections(2, fine, torch.float32, 256)[0]
    assert "this model's is 20" in layer_objections(3, make_spec(head_dim=20), torch.bfloat16, 16)[0]
    assert "ALiBi" in layer_objections(3, SPECS["alibi"], torch.bfloat16, 16)[0]


def test_flash_attn_is_not_used_where_it_is_not_installed_or_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    backend = FlashAttention()
    assert backend.version is None
    assert backend.objections(make_spec(), torch.device("cuda"), torch.bfloat16, 16) == [
        "the package flash-attn is not installed"
    ]
    assert "not on cpu" in backend.objections(make_spec(), torch.device("cpu"), torch.bfloat16, 16)[0]


class FakeGpu:
    """A machine whose parts can be missing, as `attention/triton.py` asks about them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capability, self.compilers, self.header = (9, 0), {"gcc"}, Path(__file__)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: self.capability)
        monkeypatch.setattr(triton_attention.shutil, "which", lambda name: name if name in self.compilers else None)
        monkeypatch.setattr(triton_attention, "_python_header", lambda: self.header)

    def objections(self, spec: AttentionSpec, dtype: torch.dtype = torch.bfloat16) -> list[str]:
        return TritonAttention().objections(spec, torch.device("cuda"), dtype, BLOCK_SIZE)


def test_triton_says_what_it_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    assert gpu.objections(make_spec()) == []
    assert "up to 256" in gpu.objections(make_spec(head_dim=288))[0]
    assert "float64" in gpu.objections(make_spec(), torch.float64)[0]
    gpu.compilers = set()
    assert "C compiler" in gpu.objections(make_spec())[0]
    gpu.compilers, gpu.header = {"clang"}, Path("/nowhere/Python.h")
    assert "Python.h is missing" in gpu.objections(make_spec())[0]
    gpu.header, gpu.capability = Path(__file__), (7, 5)
    assert "this GPU has 7.5" in gpu.objections(make_spec())[0]


def test_triton_is_not_for_cpu() -> None:
    assert "not on cpu" in TritonAttention().objections(make_spec(), torch.device("cpu"), torch.float32, 16)[0]
