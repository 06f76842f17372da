"""The reference is dense softmax, and the CPU backend is the reference, over shapes, windows and block tables."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_driver import batch_of
from tgi_shard import attention
from tgi_shard.attention import AttentionSpec, cpu
from tgi_shard.attention.cpu import CpuAttention
from tgi_shard.attention.reference import ReferenceAttention, attend
from tgi_shard.errors import StartError
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

torch.set_num_threads(1)
CPU = torch.device("cpu")

# [(tokens in this step, context after it)] by what the step looks like
STEPS = {
    "one token": [(1, 1)],
    "decode": [(1, 1), (1, 3), (1, 40), (1, 16)],
    "whole prompts": [(1, 1), (13, 13), (32, 32)],
    "chunks": [(5, 17), (16, 33), (2, 50), (9, 9)],
    "mixed": [(1, 29), (20, 20), (1, 5), (7, 47), (1, 2)],
}
TABLES = {
    "contiguous": lambda blocks: list(range(blocks)),
    "scattered": lambda blocks: random.Random(1).sample(range(blocks), blocks),
    "two runs": lambda blocks: [*range(blocks // 2, blocks), *range(blocks // 2)],
    "descending": lambda blocks: list(range(blocks))[::-1],
}
SPECS = {
    "multi-head": AttentionSpec(4, 4, 16, scale=0.25),
    "grouped": AttentionSpec(6, 2, 20, scale=0.3),
    "one kv head": AttentionSpec(5, 1, 8, scale=0.3),
}


class Case:
    """One layer's step on random numbers."""

    def __init__(
        self, step: str, table: str, spec: AttentionSpec, dtype: torch.dtype = torch.float32, size: int = 4
    ) -> None:
        torch.manual_seed(0)
        lengths = STEPS[step]
        query, context = [q for q, _ in lengths], [c for _, c in lengths]
        counts = [-(-c // size) for c in context]
        free = TABLES[table](sum(counts))
        tables = [[free.pop(0) for _ in range(count)] for count in counts]
        self.spec, self.tokens = spec, sum(query)
        self.batch = batch_of(query, context, tables, size)
        shape = (sum(counts) + 1, size, spec.num_kv_heads, spec.head_dim)
        self.kv = (torch.randn(shape).to(dtype), torch.randn(shape).to(dtype))
        # Slots after a context's end must not be read, whatever is there.
        for tensor in self.kv:
            for c, t in zip(context, tables, strict=True):
                tensor[t[-1], (c - 1) % size + 1 :] = float("nan")
        heads = torch.randn(self.tokens, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim).to(dtype)
        # Views with strides, as the decoder passes them.
        self.q, self.k, self.v = heads.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], 1)

    def run(self, backend: attention.AttentionBackend) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The result, and the pool afterwards."""
        kv = (self.kv[0].clone(), self.kv[1].clone())
        with torch.inference_mode():
            plan = backend.plan(self.batch, [self.spec])
            return backend.forward(self.q, self.k, self.v, kv, self.batch, plan, self.spec), kv


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
@pytest.mark.parametrize("step", STEPS)
def test_reference_is_dense_softmax(step: str, spec: AttentionSpec) -> None:
    case = Case(step, "scattered", spec)
    got, (keys, values) = case.run(ReferenceAttention())
    row = 0
    for query, context, table in zip(
        case.batch.query_lengths, case.batch.context_lengths, case.batch.block_tables, strict=True
    ):
        k, v = (pool[table].flatten(0, 1)[:context].transpose(0, 1) for pool in (keys, values))
        mask = torch.ones(query, context, dtype=torch.bool).tril(context - query)
        expected = scaled_dot_product_attention(
            case.q[row : row + query].transpose(0, 1)[None], k[None], v[None], mask, scale=spec.scale, enable_gqa=True
        )
        torch.testing.assert_close(got[row : row + query], expected[0].transpose(0, 1), atol=1e-5, rtol=1e-5)
        row += query


def test_reference_follows_the_definitions_of_softcap_alibi_and_window() -> None:
    """On three keys, by hand: scores 0, so that only the bias decides."""
    q, k = torch.zeros(1, 1, 2), torch.zeros(3, 1, 2)
    v = torch.eye(3)[:, None, :]
    spec = AttentionSpec(1, 1, 2, scale=1.0)
    alibi = attend(q, k, v, replace(spec, alibi_slopes=(0.5,)))
    torch.testing.assert_close(alibi[0, 0], torch.tensor([-1.0, -0.5, 0.0]).softmax(0))
    window = attend(q, k, v, replace(spec, window=2))
    torch.testing.assert_close(window[0, 0], torch.tensor([0.0, 0.5, 0.5]))
    k[0] = q[0] = torch.tensor([3.0, 0.0])
    softcap = attend(q, k, v, replace(spec, softcap=2.0))
    torch.testing.assert_close(softcap[0, 0], torch.tensor([2 * torch.tanh(torch.tensor(4.5)), 0, 0]).softmax(0))


@pytest.mark.parametrize("window", [None, 1, 2, 6, 16, 100])
@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("step", STEPS)
def test_cpu_is_reference(
    step: str, table: str, spec: AttentionSpec, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "VIEW_TOKENS", 8)  # so that short contexts have every kind of piece
    monkeypatch.setattr(cpu, "GATHER_TOKENS", 12)
    monkeypatch.setattr(cpu, "WINDOW_CHUNK", 11)
    case = Case(step, table, replace(spec, window=window))
    expected, expected_kv = case.run(ReferenceAttention())
    got, kv = case.run(CpuAttention())
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kv, expected_kv, equal_nan=True)


SCORES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": (0.5, 0.25, 0.3, 0.01, 1.0, 0.06)},
    "both": {"softcap": 2.5, "alibi_slopes": (0.5, 0.25, 0.3, 0.01, 1.0, 0.06)},
}


@pytest.mark.parametrize("window", [None, 1, 6, 16])
@pytest.mark.parametrize("scores", SCORES.values(), ids=list(SCORES))
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("table", ["scattered", "two runs"])
@pytest.mark.parametrize("step", STEPS)
def test_cpu_is_reference_with_softcap_and_alibi(
    step: str, table: str, kv_heads: int, scores: dict[str, Any], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("VIEW_TOKENS", 8), ("GATHER_TOKENS", 12), ("WINDOW_CHUNK", 11), ("BIAS_CHUNK", 5)):
        monkeypatch.setattr(cpu, name, size)
    case = Case(step, table, AttentionSpec(6, kv_heads, 20, scale=0.3, window=window, **scores))
    torch.testing.assert_close(case.run(CpuAttention())[0], case.run(ReferenceAttention())[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scores", SCORES.values(), ids=list(SCORES))
def test_cpu_is_reference_with_softcap_and_alibi_in_half_precision(scores: dict[str, Any]) -> None:
    case = Case("mixed", "two runs", AttentionSpec(6, 2, 20, scale=0.3, window=20, **scores), torch.bfloat16)
    torch.testing.assert_close(case.run(CpuAttention())[0], case.run(ReferenceAttention())[0], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", STEPS)
def test_cpu_is_reference_in_half_precision(step: str, dtype: torch.dtype) -> None:
    case = Case(step, "two runs", replace(SPECS["grouped"], window=20), dtype)
    torch.testing.assert_close(case.run(CpuAttention())[0], case.run(ReferenceAttention())[0], atol=2e-2, rtol=2e-2)


def test_long_contexts_are_read_in_place_and_short_runs_are_gathered() -> None:
    size, long, short = 16, [*range(100, 132)], [7, 5, 90]
    batch = batch_of([1], [35 * size], [[*short, *long]], size)
    (chunk,) = CpuAttention().plan(batch, [SPECS["grouped"]])[SPECS["grouped"]]
    gathered, view = chunk.past
    assert gathered.blocks is not None
    assert gathered.blocks.tolist() == short
    assert (view.blocks, view.start, view.length) == (None, 100 * size, 32 * size)


def test_blocks_outside_the_window_are_not_read() -> None:
    batch = batch_of([1, 8], [1000, 1000], [[*range(250)], [*range(250, 500)]], 4)
    spec = replace(SPECS["grouped"], window=64)
    for chunk in CpuAttention().plan(batch, [spec])[spec]:
        pieces = [*chunk.past, *([chunk.edge[0]] if chunk.edge else [])]
        assert sum(piece.length for piece in pieces) <= 64 + chunk.length


def test_the_first_backend_without_objections_is_chosen_and_the_others_reasons_are_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # in its interpreter Triton serves the CPU as well
    caplog.set_level("INFO", "tgi_shard.attention")
    assert attention.choose(None, [SPECS["grouped"]], CPU, torch.float32, 16).name == "cpu"
    assert "triton is not used: it computes on CUDA devices, not on cpu" in caplog.text
    monkeypatch.setattr(CpuAttention, "objections", lambda *_: ["it is resting"])
    assert attention.choose(None, [SPECS["grouped"]], CPU, torch.float32, 16).name == "reference"
    assert "cpu is not used: it is resting" in caplog.text
    assert attention.choose("reference", [SPECS["grouped"]], CPU, torch.float32, 16).name == "reference"


def test_a_backend_that_cannot_serve_the_model_is_refused_with_the_reason() -> None:
    spec = AttentionSpec(1, 1, 16, scale=0.25, alibi_slopes=(0.5,))
    with pytest.raises(StartError, match=r"`--attention triton` cannot serve this model: it computes on CUDA"):
        attention.choose("triton", [spec], CPU, torch.float32, 16)
    with pytest.raises(StartError, match=f"'paged'; this server has {', '.join(attention.BACKENDS)}"):
        attention.choose("paged", [spec], CPU, torch.float32, 16)
