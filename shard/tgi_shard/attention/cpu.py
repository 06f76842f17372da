"""Attention on CPU over paged KV in place: no padding, and no copy that grows with a request's context.

A context is read as *pieces*: a long run of physically consecutive blocks is a strided view of the pool; short runs are
gathered together into at most GATHER_TOKENS tokens, a copy that stays in the cache. Pieces are attended one by one with
torch's flash kernel, which also returns the log-sum-exp of its scores, and merged by it.

One query token (decode): the G query heads that share a KV head become G query rows, so K and V are read once.
Several query tokens (a prompt chunk) at positions p0 .. p1-1, with window W:

    key positions   p0-W+1 ......... p1-W | p1-W+1 ......... p0-1 | p0 ... p1-1
                    `edge`: anti-causal   | `past`: seen by all   | causal, read from k and v themselves

Chunks longer than W-1 tokens are cut, so that the three never overlap. Without a window there is no edge.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .base import AttentionBatch, AttentionSpec

VIEW_TOKENS = 256  # a run this long is worth a kernel call of its own
GATHER_TOKENS = 1024  # most tokens copied at a time
WINDOW_CHUNK = 512  # most query tokens at a time under a window: the edge's mask is its square

_flash = torch._scaled_dot_product_flash_attention_for_cpu  # -> (out, log-sum-exp)


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive positions of one context: slots start .. start+length of the pool, or of the gathered blocks."""

    start: int
    length: int
    blocks: Tensor | None = None  # [n] int32, to gather; None = read the pool in place


@dataclass(frozen=True, slots=True)
class Chunk:
    """Queries of one request that are attended together: rows start .. start+length of the step's tokens."""

    start: int
    length: int
    past: list[Piece]  # seen by every query; for a single query it includes the query's own position
    # The oldest positions that any query sees, with the mask [length, piece's length] of 0 and -inf. One piece, because
    # a query that sees nothing of a piece has no log-sum-exp in torch's kernel.
    edge: tuple[Piece, Tensor] | None


class CpuAttention:
    name = "cpu"

    def objections(self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, block_size: int) -> list[str]:
        found = []
        if device.type != "cpu":
            found.append(f"it computes on the CPU, not on {device.type}")
        if spec.softcap is not None:
            found.append("torch's CPU kernel has no softcap")
        if spec.alibi_slopes is not None:
            found.append("torch's CPU kernel has no ALiBi")
        return found

    def plan(self, batch: AttentionBatch, specs: list[AttentionSpec]) -> dict[int | None, list[Chunk]]:
        """What to read, for each distinct window of the model."""
        windows = dict.fromkeys(spec.window for spec in specs)
        return {window: _plan_window(batch, window) for window in windows}

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: tuple[Tensor, Tensor],
        batch: AttentionBatch,
        plan: dict[int | None, list[Chunk]],
        spec: AttentionSpec,
    ) -> Tensor:
        num_tokens, num_kv_heads, dim = k.shape
        key_slots, value_slots = (cache.view(-1, num_kv_heads, dim) for cache in kv)  # [slots, K, D]
        key_slots.index_copy_(0, batch.slots, k)
        value_slots.index_copy_(0, batch.slots, v)
        pool = _Pool(kv, key_slots.transpose(0, 1).unsqueeze(0), value_slots.transpose(0, 1).unsqueeze(0), spec.scale)
        grouped = q.view(num_tokens, num_kv_heads, -1, dim)  # [T, K, G, D]
        outputs = []
        for chunk in plan[spec.window]:
            rows = slice(chunk.start, chunk.start + chunk.length)
            if chunk.length == 1:
                outputs.append(_merge([_attend(grouped[rows], piece, pool) for piece in chunk.past]))
            else:
                outputs.append(_attend_chunk(grouped[rows], k[rows], v[rows], chunk, pool))
        return torch.cat(outputs).view(num_tokens, -1, dim)


@dataclass(frozen=True, slots=True)
class _Pool:
    """One layer's KV, as blocks and as `[1, K, slots, D]`."""

    blocks: tuple[Tensor, Tensor]
    keys: Tensor
    values: Tensor
    scale: float

    def read(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """Keys and values of a piece, each `[1, K, length, D]`."""
        if piece.blocks is None:
            return self.keys.narrow(2, piece.start, piece.length), self.values.narrow(2, piece.start, piece.length)
        gathered = (cache.index_select(0, piece.blocks).flatten(0, 1) for cache in self.blocks)
        keys, values = (part.transpose(0, 1).unsqueeze(0).narrow(2, piece.start, piece.length) for part in gathered)
        return keys, values


# out [..., rows, D] and log-sum-exp of the scores [..., rows], fp32
_Partial = tuple[Tensor, Tensor]


def _attend(rows: Tensor, piece: Piece, pool: _Pool) -> _Partial:
    """Rows `[1, K, n, D]` attend to all of a piece."""
    keys, values = pool.read(piece)
    partial: _Partial = _flash(rows, keys, values, scale=pool.scale)
    return partial


def _merge(partials: Sequence[_Partial]) -> Tensor:
    """Attention over the union of the keys each partial has seen."""
    if len(partials) == 1:
        return partials[0][0]
    outputs = torch.stack([out.float() for out, _ in partials])
    weights = torch.softmax(torch.stack([lse for _, lse in partials]), dim=0)
    return (outputs * weights.unsqueeze(-1)).sum(0).to(partials[0][0].dtype)


def _attend_chunk(q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, pool: _Pool) -> Tensor:
    """Queries `[n, K, G, D]` of one chunk and their own k, v `[n, K, D]` → `[n, K, G, D]`."""
    length, num_kv_heads, group, dim = q.shape
    heads_first = q.permute(1, 2, 0, 3)  # [K, G, n, D]; below K is the kernel's batch, and G heads share one K and V

    def shared(x: Tensor) -> Tensor:  # [K, m, D] -> [K, G, m, D], no copy
        return x.unsqueeze(1).expand(num_kv_heads, group, x.shape[1], dim)

    own_k, own_v = shared(k.transpose(0, 1)), shared(v.transpose(0, 1))
    partials: list[_Partial] = [_flash(heads_first, own_k, own_v, is_causal=True, scale=pool.scale)]
    if chunk.past:
        rows = heads_first.reshape(1, num_kv_heads, group * length, dim)
        for piece in chunk.past:
            out, lse = _attend(rows, piece, pool)
            partials.append((out.view(heads_first.shape), lse.view(heads_first.shape[:-1])))
    if chunk.edge is not None:
        piece, mask = chunk.edge
        keys, values = pool.read(piece)
        partials.append(_flash(heads_first, shared(keys[0]), shared(values[0]), attn_mask=mask, scale=pool.scale))
    return _merge(partials).permute(2, 0, 1, 3)


def _plan_window(batch: AttentionBatch, window: int | None) -> list[Chunk]:
    chunks, row = [], 0
    for request, (num_queries, context) in enumerate(zip(batch.query_lengths, batch.context_lengths, strict=True)):
        past = context - num_queries
        longest = num_queries if window is None or context <= window else max(1, min(WINDOW_CHUNK, window - 1))
        for first in range(0, num_queries, longest):
            length = min(longest, num_queries - first)
            chunks.append(_plan_chunk(batch, request, row + first, past + first, length, window))
        row += num_queries
    return chunks


def _plan_chunk(batch: AttentionBatch, request: int, row: int, position: int, length: int, window: int | None) -> Chunk:
    """row: of the first query in the step; position: of the first query in its context."""
    end = position + length
    visible_to_all = 0 if window is None else max(0, end - window)
    if length == 1:
        return Chunk(row, 1, _pieces(batch, request, visible_to_all, end), None)
    if visible_to_all == 0 or window is None:
        return Chunk(row, length, _pieces(batch, request, 0, position), None)
    # The edge takes one position that all queries see, so that each sees some of it.
    oldest = position - window + 1
    first = max(0, oldest)
    hidden = torch.ones(length, length, dtype=torch.bool).tril_(-1)[
        :, first - oldest :
    ]  # query i sees keys oldest+i ...
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
    edge = _gathered(batch, request, first, visible_to_all + 1)
    return Chunk(row, length, _pieces(batch, request, visible_to_all + 1, position), (edge, mask))


def _gathered(batch: AttentionBatch, request: int, begin: int, end: int) -> Piece:
    """Positions begin .. end-1, not empty, as one piece."""
    size = batch.block_size
    blocks = batch.block_table[request, begin // size : -(-end // size)]
    return Piece(begin % size, end - begin, blocks)


def _pieces(batch: AttentionBatch, request: int, begin: int, end: int) -> list[Piece]:
    """Positions begin .. end-1 of a request's context, in order."""
    if begin >= end:
        return []
    size, table = batch.block_size, batch.block_tables[request]
    last = -(-end // size)
    pieces: list[Piece] = []
    pending = begin // size  # the first block not yet in a piece

    def gather(stop: int) -> None:
        nonlocal pending
        while pending < stop:
            block_end = min(stop, pending + max(1, GATHER_TOKENS // size))
            pieces.append(_gathered(batch, request, max(begin, pending * size), min(end, block_end * size)))
            pending = block_end

    for run, run_end in _runs(table, pending, last):
        low, high = max(begin, run * size), min(end, run_end * size)
        if high - low >= VIEW_TOKENS or (low == begin and high == end):
            gather(run)
            pieces.append(Piece(table[run] * size + low - run * size, high - low))
            pending = run_end
    gather(last)
    return pieces


def _runs(table: list[int], first: int, last: int) -> Iterator[tuple[int, int]]:
    """The longest ranges, in order, of entries first .. last-1 of a block table that name consecutive blocks."""
    breaks = np.flatnonzero(np.diff(np.array(table[first:last])) != 1) + first + 1
    return pairwise([first, *breaks.tolist(), last])
