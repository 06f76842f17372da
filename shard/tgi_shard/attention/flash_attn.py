"""Attention with the flash-attn package where the user installed it: version 3 on Hopper GPUs, else version 2.

Both read the paged pool as it is. Registered in `attention/__init__.py`; the packages are imported on first use.
"""

import importlib
import importlib.util
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..upload import upload
from .base import AttentionBatch, AttentionSpec

Version = Literal[2, 3]
MODULES: dict[Version, str] = {2: "flash_attn", 3: "flash_attn_interface"}
DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
BLOCK_MULTIPLE = 256  # of version 2's pages


@dataclass(frozen=True, slots=True)
class FlashPlan:
    cu_context: Tensor  # [R+1] int32
    slopes: dict[AttentionSpec, Tensor]  # [H] float32
    max_query: int
    max_context: int


class FlashAttention:
    name = "flash-attn"

    def __init__(self, version: Version | None = None) -> None:
        """`version`: which to use; None finds the best that is installed and runs on this GPU."""
        self.version = version or _find_version()

    def objections(self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, block_size: int) -> list[str]:
        if device.type != "cuda":
            return [f"it computes on CUDA devices, not on {device.type}"]
        if self.version is None:
            return ["the package flash-attn is not installed"]
        return layer_objections(self.version, spec, dtype, block_size)

    def plan(self, batch: AttentionBatch, specs: list[AttentionSpec]) -> FlashPlan:
        slopes = {spec: np.array(spec.alibi_slopes, np.float32) for spec in specs if spec.alibi_slopes is not None}
        cu_context = np.array([0, *accumulate(batch.context_lengths)], np.int32)
        first, *rest = upload([cu_context, *slopes.values()], batch.cu_query.device)
        return FlashPlan(first, dict(zip(slopes, rest, strict=True)), batch.max_query, batch.max_context)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: tuple[Tensor, Tensor],
        batch: AttentionBatch,
        plan: FlashPlan,
        spec: AttentionSpec,
    ) -> Tensor:
        for pool, new in zip(kv, (k, v), strict=True):
            pool.view(-1, *new.shape[1:]).index_copy_(0, batch.slots, new)
        arguments: dict[str, Any] = {
            "cu_seqlens_q": batch.cu_query,
            "max_seqlen_q": plan.max_query,
            "softmax_scale": spec.scale,
            "causal": True,
            # theirs counts the keys left of a query's own position
            "window_size": (-1, -1) if spec.window is None else (spec.window - 1, 0),
            "softcap": spec.softcap or 0.0,
        }
        if self.version == 3:
            attend = importlib.import_module(MODULES[3]).flash_attn_with_kvcache
            arguments |= {"cache_seqlens": batch.context, "page_table": batch.block_table}
        else:
            attend = importlib.import_module(MODULES[2]).flash_attn_varlen_func
            arguments |= {"cu_seqlens_k": plan.cu_context, "max_seqlen_k": plan.max_context}
            arguments |= {"block_table": batch.block_table, "alibi_slopes": plan.slopes.get(spec)}
        out: Tensor = attend(q, *kv, **arguments)
        return out


def layer_objections(version: Version, spec: AttentionSpec, dtype: torch.dtype, block_size: int) -> list[str]:
    """What the given version of the package cannot do."""
    reasons = []
    if dtype not in DTYPES:
        reasons.append(f"flash-attn computes in bfloat16 or float16, not in {str(dtype).removeprefix('torch.')}")
    if spec.head_dim > MAX_HEAD_DIM or spec.head_dim % 8:
        reasons.append(
            f"flash-attn takes head sizes up to {MAX_HEAD_DIM} that are multiples of 8; this model's is {spec.head_dim}"
        )
    if version == 2 and block_size % BLOCK_MULTIPLE:
        reasons.append(
            f"flash-attn 2 reads KV blocks of a multiple of {BLOCK_MULTIPLE} tokens; `--block-size` is {block_size}"
        )
    if version == 3 and spec.alibi_slopes is not None:
        reasons.append("flash-attn 3 has no ALiBi")
    return reasons


def _find_version() -> Version | None:
    """The newest version that is installed and has kernels for this GPU: 3 has them for Hopper only."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    if hopper and importlib.util.find_spec(MODULES[3]) is not None:
        return 3
    return 2 if importlib.util.find_spec(MODULES[2]) is not None else None
