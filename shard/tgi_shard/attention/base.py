"""The seam between the decoder and attention: what a backend is told per step and per layer, and what it must do.

KV layout, the same for every backend: per layer two tensors `[num_blocks, S, K, D]` (key, value); token slot
`block * S + offset`. Letters: docs/notation.md.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One layer's attention, constant for the life of the model. Head counts are this rank's."""

    num_heads: int  # H
    num_kv_heads: int  # K; H is a multiple
    head_dim: int  # D
    scale: float
    window: int | None = None  # each query sees its last `window` positions, itself included; None = all
    softcap: float | None = None  # scores = softcap * tanh(scores / softcap)
    alibi_slopes: tuple[float, ...] | None = None  # [H]
    dtype: torch.dtype = torch.float32  # of q, k, v and the pool; kernels size their tiles by it


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The step as attention sees it; built once per step on the host and shared by all layers.

    R requests, T tokens; request r's queries are rows cu_query[r]:cu_query[r+1] of q, the *last* tokens of its context.
    Host lists and device tensors hold the same numbers, so that no backend has to synchronise.
    """

    query_lengths: list[int]  # [R] tokens of each request in this step, >= 1
    context_lengths: list[int]  # [R] tokens of each request after this step's are written, >= query length
    block_tables: list[list[int]]  # [R][ceil(context / S)] physical block ids
    cu_query: Tensor  # [R+1] int32, device
    context: Tensor  # [R] int32, device
    block_table: Tensor  # [R, max blocks] int32, device; unused entries are 0
    slots: Tensor  # [T] int64, device: where each new token's KV is written
    block_size: int  # S

    @property
    def max_query(self) -> int:
        return max(self.query_lengths)

    @property
    def max_context(self) -> int:
        return max(self.context_lengths)


class AttentionBackend(Protocol):
    """Stateless apart from compiled kernels; one instance serves every layer of the model."""

    name: str

    def objections(self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, block_size: int) -> list[str]:
        """Why this backend cannot serve such a layer, one sentence each; empty = it can. Imports nothing heavy."""

    def plan(self, batch: AttentionBatch, specs: list[AttentionSpec]) -> Any:
        """Work shared by all layers of a step (index tensors, tile lists). `specs`: the distinct specs of the model."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: tuple[Tensor, Tensor],
        batch: AttentionBatch,
        plan: Any,
        spec: AttentionSpec,
    ) -> Tensor:
        """Writes k, v `[T, K, D]` (rope applied) into kv at batch.slots, then attends.

        q, k and v may be strided views; only their last dimension is contiguous.
        q `[T, H, D]` → `[T, H, D]`. Causal: query i of request r sees context positions
        <= context_lengths[r] - query_lengths[r] + i.
        """
