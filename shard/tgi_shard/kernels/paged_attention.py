"""Attention over the paged KV pool: prefill, chunked prefill, decode and speculative verification in one kernel.

Owns the device side and its launch; which programs there are is decided on the host (`work_list.py`), their shapes in
`tiles.py`. Called by `attention/triton.py`. What it computes is what `attention/reference.py` computes.

A program's tile holds `ROWS` rows of one request that read the same KV head. With G query heads per KV head, row m of a
request is query position m // G and head m % G, so one read of the keys serves all of them (shown: G = 2, ROWS = 4):

    row          0    1    2    3  |  4    5    6    7
    position     0    0    1    1  |  2    2    3    3
    head         h   h+1   h   h+1 |  h   h+1   h   h+1
                 program 0         |  program 1

and its keys are walked in tiles of `KEYS` positions, of which only those at the edges need a mask:

    first key it may see (window)                                its last query
         |  masked  |     every row sees every key      |  masked  |
         begin      inner_begin                inner_end          high

Scores are kept in powers of two: exp2 is what the hardware has.

Numbers are upcast right after loading when UPCAST is set: Triton's interpreter computes wrongly in bfloat16.
"""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .tiles import Tile, padded_head_dim

LOG2_E = tl.constexpr(1.4426950408889634)
# How float32 is multiplied: on the tensor cores in three TF32 parts, accurate but for the last bits.
PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _load(pointers, row_mask, column_mask, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr, UPCAST: tl.constexpr):
    """Loads a tile, zero where masked; an unmasked load is a vector load."""
    if MASK_ROWS and MASK_COLUMNS:
        tile = tl.load(pointers, mask=row_mask & column_mask, other=0.0)
    elif MASK_ROWS:
        tile = tl.load(pointers, mask=row_mask, other=0.0)
    elif MASK_COLUMNS:
        tile = tl.load(pointers, mask=column_mask, other=0.0)
    else:
        tile = tl.load(pointers)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _walk(
    total, peak, weighted, query, position, slope,
    keys, values, table, stride_block, stride_slot,
    begin, end, low, high, scale, softcap, window,
    D: tl.constexpr, DP: tl.constexpr, S: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Goes over keys begin..end and returns the new running (sum of weights, highest score, weighted values)."""
    dim = tl.arange(0, DP)
    for start in range(begin, end, KEYS):
        key_position = start + tl.arange(0, KEYS)
        if MASKED:
            readable = (key_position >= low) & (key_position < high)
            block = tl.load(table + key_position // S, mask=readable, other=0)
        else:
            readable = key_position >= 0
            block = tl.load(table + key_position // S)
        offset = block.to(tl.int64) * stride_block + (key_position % S) * stride_slot
        key = _load(
            keys + offset[None, :] + dim[:, None], readable[None, :], (dim < D)[:, None], MASKED, D != DP, UPCAST
        )
        score = tl.dot(query, key, input_precision=PRECISION) * scale
        if SOFTCAP:  # tanh(x) = 1 - 2 / (exp(2x) + 1); `scale` and `softcap` come with their factors
            score = softcap - 2.0 * softcap / (tl.exp2(score) + 1.0)
        if ALIBI:
            score += slope[:, None] * (key_position[None, :] - position[:, None]).to(tl.float32)
        if MASKED:
            visible = (key_position[None, :] <= position[:, None]) & readable[None, :]
            if WINDOW:
                visible = visible & (position[:, None] - key_position[None, :] < window)
            score = tl.where(visible, score, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))
        base = new_peak
        if MASKED:  # a row may have seen nothing yet, and -inf - -inf is not a number
            base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weight = tl.exp2(score - base[:, None])
        decay = tl.exp2(peak - base)
        value = _load(
            values + offset[:, None] + dim[None, :], readable[:, None], (dim < D)[None, :], MASKED, D != DP, UPCAST
        )
        total = total * decay + tl.sum(weight, 1)
        weighted = tl.dot(weight.to(value.dtype), value, weighted * decay[:, None], input_precision=PRECISION)
        peak = new_peak
    return total, peak, weighted


@triton.jit(
    do_not_specialize=["stride_table", "window"],
    do_not_specialize_on_alignment=["table", "items", "cu_query", "context", "slopes"],
)
def _attention_kernel(
    out, part_out, part_scale, queries, key_pool, value_pool,
    table, items, cu_query, context, slopes,
    stride_query_token, stride_query_head, stride_block, stride_slot, stride_kv_head, stride_table,
    scale, softcap, window,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, S: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: items x K. Writes out `[T, H, D]`, or a split item's part: normalised values and log2 of their weight."""
    kv_head = tl.program_id(0) % K
    item = items + tl.program_id(0) // K * 5
    request = tl.load(item)
    if request < 0:  # padding
        return
    block, split, num_splits, first_part = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)
    first_token = tl.load(cu_query + request)
    query_length = tl.load(cu_query + request + 1) - first_token
    before = tl.load(context + request) - query_length  # position of the request's first query

    row = block * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DP)
    used = row < query_length * G
    head = kv_head * G + row % G
    token = (first_token + row // G).to(tl.int64)
    position = before + row // G
    stored = used[:, None] & (dim < D)[None, :]
    query = tl.load(
        queries + token[:, None] * stride_query_token + head[:, None] * stride_query_head + dim[None, :],
        mask=stored, other=0.0,
    )  # fmt: skip
    if UPCAST:
        query = query.to(tl.float32)
    slope = tl.zeros([ROWS], tl.float32)
    if ALIBI:
        slope = tl.load(slopes + head, mask=used, other=0.0) * LOG2_E

    first_query = before + block * ROWS // G
    last_query = before + tl.minimum(((block + 1) * ROWS - 1) // G, query_length - 1)
    low = 0
    if WINDOW:
        low = tl.maximum(first_query - window + 1, 0)
    high = last_query + 1
    begin = low // KEYS * KEYS
    share = tl.cdiv(tl.cdiv(high - begin, KEYS), num_splits) * KEYS
    begin += split * share
    end = tl.minimum(begin + share, high)
    inner_begin = begin
    if WINDOW:
        inner_begin = tl.minimum(tl.maximum(tl.cdiv(last_query - window + 1, KEYS) * KEYS, begin), end)
    inner_end = tl.maximum(tl.minimum((first_query + 1) // KEYS * KEYS, end), inner_begin)

    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    weighted = tl.zeros([ROWS, DP], tl.float32)
    keys = key_pool + kv_head * stride_kv_head
    values = value_pool + kv_head * stride_kv_head
    blocks = table + request * stride_table
    if WINDOW:
        total, peak, weighted = _walk(
            total, peak, weighted, query, position, slope, keys, values, blocks, stride_block, stride_slot,
            begin, inner_begin, low, high, scale, softcap, window,
            D, DP, S, KEYS, True, WINDOW, SOFTCAP, ALIBI, UPCAST,
        )  # fmt: skip
    total, peak, weighted = _walk(
        total, peak, weighted, query, position, slope, keys, values, blocks, stride_block, stride_slot,
        inner_begin, inner_end, low, high, scale, softcap, window,
        D, DP, S, KEYS, False, WINDOW, SOFTCAP, ALIBI, UPCAST,
    )  # fmt: skip
    total, peak, weighted = _walk(
        total, peak, weighted, query, position, slope, keys, values, blocks, stride_block, stride_slot,
        inner_end, end, low, high, scale, softcap, window,
        D, DP, S, KEYS, True, WINDOW, SOFTCAP, ALIBI, UPCAST,
    )  # fmt: skip

    seen = tl.where(total > 0.0, total, 1.0)  # a row of a split may see none of its keys
    weighted = weighted / seen[:, None]
    if num_splits == 1:
        place = (token * (K * G) + head)[:, None] * D + dim[None, :]
        tl.store(out + place, weighted.to(out.dtype.element_ty), mask=stored)
    else:
        part_row = ((first_part + split).to(tl.int64) * K + kv_head) * ROWS + tl.arange(0, ROWS)
        tl.store(part_out + part_row[:, None] * D + dim[None, :], weighted, mask=stored)
        tl.store(part_scale + part_row, tl.where(total > 0.0, peak + tl.log2(seen), -float("inf")), mask=used)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["groups", "cu_query"])
def _combine_kernel(
    out, part_out, part_scale, groups, cu_query, rows,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Grid: groups x K x rows. Adds up the parts of one row, PARTS at a time, each by its weight."""
    tile_row = tl.program_id(0) % rows
    kv_head = tl.program_id(0) // rows % K
    entry = groups + tl.program_id(0) // rows // K * 4
    request = tl.load(entry)
    if request < 0:  # padding
        return
    row = tl.load(entry + 1) * ROWS + tile_row
    first_part, num_splits = tl.load(entry + 2), tl.load(entry + 3)
    first_token = tl.load(cu_query + request)
    if row >= (tl.load(cu_query + request + 1) - first_token) * G:
        return
    dim = tl.arange(0, DP)
    total = 0.0
    peak = -float("inf")
    weighted = tl.zeros([DP], tl.float32)
    for start in range(0, num_splits, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = part < num_splits
        part_row = ((first_part + part).to(tl.int64) * K + kv_head) * ROWS + tile_row
        scale = tl.load(part_scale + part_row, mask=inside, other=-float("inf"))
        values = tl.load(
            part_out + part_row[:, None] * D + dim[None, :], mask=inside[:, None] & (dim < D)[None, :], other=0.0
        )
        new_peak = tl.maximum(peak, tl.max(scale, 0))
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weight = tl.exp2(scale - base)
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weight, 0)
        weighted = weighted * decay + tl.sum(values * weight[:, None], 0)
        peak = new_peak
    place = ((first_token + row // G).to(tl.int64) * (K * G) + kv_head * G + row % G) * D + dim
    tl.store(out + place, (weighted / total).to(out.dtype.element_ty), mask=dim < D)


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of the kernel: a `WorkList` on the device, with room for its parts."""

    tile: Tile
    items: Tensor  # [n, 5] int32
    groups: Tensor  # [g, 4] int32
    rows: int  # most rows in use of any tile
    part_out: Tensor  # [parts, K, tile.rows, D] float32
    part_scale: Tensor  # [parts, K, tile.rows] float32


@dataclass(frozen=True, slots=True)
class Scores:
    """How scores are made from products; `AttentionSpec` in the kernel's terms."""

    scale: float
    window: int | None
    softcap: float | None
    slopes: Tensor | None  # [H] float32, device


@dataclass(frozen=True, slots=True)
class Requests:
    """Where each request's queries and keys lie; the device side of `AttentionBatch`."""

    cu_query: Tensor  # [R+1] int32
    context: Tensor  # [R] int32
    block_table: Tensor  # [R, max blocks] int32


def paged_attention(
    queries: Tensor, kv: tuple[Tensor, Tensor], requests: Requests, scores: Scores, launches: list[Launch], upcast: bool
) -> Tensor:
    """queries `[T, H, D]` over kv `[num_blocks, S, K, D]` → `[T, H, D]`. `upcast`: the interpreter is running this."""
    num_tokens, num_heads, head_dim = queries.shape
    num_kv_heads = kv[0].shape[2]
    out = queries.new_empty(num_tokens, num_heads, head_dim)
    shape: dict[str, Any] = {
        "K": num_kv_heads,
        "G": num_heads // num_kv_heads,
        "D": head_dim,
        "DP": padded_head_dim(head_dim),
    }
    scale, softcap = scores.scale * LOG2_E.value, 0.0
    if scores.softcap is not None:
        scale, softcap = scale * 2.0 / scores.softcap, scores.softcap * LOG2_E.value
    for launch in launches:
        tile = launch.tile
        _attention_kernel[(len(launch.items) * num_kv_heads,)](
            out, launch.part_out, launch.part_scale, queries, kv[0], kv[1],
            requests.block_table, launch.items, requests.cu_query, requests.context,
            launch.part_scale if scores.slopes is None else scores.slopes,
            queries.stride(0), queries.stride(1), kv[0].stride(0), kv[0].stride(1), kv[0].stride(2),
            requests.block_table.stride(0), scale, softcap, scores.window or 0,
            **shape, S=kv[0].shape[1], ROWS=tile.rows, KEYS=tile.keys,
            WINDOW=scores.window is not None, SOFTCAP=scores.softcap is not None, ALIBI=scores.slopes is not None,
            UPCAST=upcast, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if len(launch.groups):
            _combine_kernel[(len(launch.groups) * num_kv_heads * launch.rows,)](
                out, launch.part_out, launch.part_scale, launch.groups, requests.cu_query, launch.rows,
                **shape, ROWS=tile.rows, PARTS=16, num_warps=4,
            )  # fmt: skip
    return out
