"""Writes a step's new keys and values into the paged pool, in one launch. Called by `attention/triton.py`."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _store_kernel(
    keys, values, key_pool, value_pool, slots,
    stride_key_token, stride_key_head, stride_value_token, stride_value_head,
    K: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program per token: its K * D numbers of keys and as many of values."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    element = tl.arange(0, WIDTH)
    inside = element < K * D
    head = element // D
    dim = element % D
    key = tl.load(keys + token * stride_key_token + head * stride_key_head + dim, mask=inside)
    value = tl.load(values + token * stride_value_token + head * stride_value_head + dim, mask=inside)
    tl.store(key_pool + slot * (K * D) + element, key, mask=inside)
    tl.store(value_pool + slot * (K * D) + element, value, mask=inside)


def store_kv(keys: Tensor, values: Tensor, kv: tuple[Tensor, Tensor], slots: Tensor) -> None:
    """keys, values `[T, K, D]` (any stride between tokens and heads) → kv `[num_blocks, S, K, D]` at slots `[T]`.

    A slot of -1 is not written: padding, once steps are replayed as CUDA graphs.
    """
    num_tokens, num_heads, head_dim = keys.shape
    width = triton.next_power_of_2(num_heads * head_dim)
    key_pool, value_pool = (
        pool.view(-1) for pool in kv
    )  # raises when the pool is not contiguous, as the kernel assumes
    _store_kernel[(num_tokens,)](
        keys, values, key_pool, value_pool, slots,
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        K=num_heads, D=head_dim, WIDTH=width,
        num_warps=4 if width <= 4096 else 8,
    )  # fmt: skip


def store_kv_torch(keys: Tensor, values: Tensor, kv: tuple[Tensor, Tensor], slots: Tensor) -> None:
    """The same in torch operators, for slots that are all real: the kernel's specification."""
    for pool, new in zip(kv, (keys, values), strict=True):
        pool.view(-1, *new.shape[1:]).index_copy_(0, slots, new)
