"""Attention written for reading: gather the context, dense scores in fp32, mask, softmax. The oracle of all backends.

Runs on any device and with every feature of AttentionSpec; its temporaries grow with query x context, so it serves
as the last resort only.
"""

import torch
from torch import Tensor

from .base import AttentionBatch, AttentionSpec


class ReferenceAttention:
    name = "reference"

    def objections(self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, block_size: int) -> list[str]:
        return []

    def plan(self, batch: AttentionBatch, specs: list[AttentionSpec]) -> list[Tensor]:
        """The slots of each request's context, in position order: R tensors `[context]` int64."""
        size = batch.block_size
        within = torch.arange(size, device=batch.slots.device)
        slots = []
        for row, length in enumerate(batch.context_lengths):
            blocks = batch.block_table[row, : -(-length // size)].to(torch.int64)
            slots.append((blocks[:, None] * size + within).flatten()[:length])
        return slots

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: tuple[Tensor, Tensor],
        batch: AttentionBatch,
        plan: list[Tensor],
        spec: AttentionSpec,
    ) -> Tensor:
        keys, values = (cache.view(-1, spec.num_kv_heads, spec.head_dim) for cache in kv)  # [slots, K, D]
        keys[batch.slots] = k
        values[batch.slots] = v
        outputs, start = [], 0
        for slots, num_queries in zip(plan, batch.query_lengths, strict=True):
            outputs.append(attend(q[start : start + num_queries], keys[slots], values[slots], spec))
            start += num_queries
        return torch.cat(outputs)


def attend(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """One request: the last queries `[T, H, D]` of its context `[N, K, D]` → `[T, H, D]`."""
    num_queries, num_keys = q.shape[0], k.shape[0]
    group = spec.num_heads // spec.num_kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)  # [N, H, D]
    scores = torch.einsum("thd,nhd->htn", q.float(), k.float()) * spec.scale  # [H, T, N]
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    key_position = torch.arange(num_keys, device=q.device)  # [N]
    query_position = key_position[-num_queries:, None]  # [T, 1]
    if spec.alibi_slopes is not None:
        slopes = torch.tensor(spec.alibi_slopes, device=q.device)[:, None, None]
        scores = scores + slopes * (key_position - query_position)
    visible = key_position <= query_position  # [T, N]
    if spec.window is not None:
        visible &= key_position > query_position - spec.window
    weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
    return torch.einsum("htn,nhd->thd", weights, v.float()).to(q.dtype)
