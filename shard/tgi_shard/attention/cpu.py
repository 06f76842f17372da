"""Attention on CPU over paged KV in place: no padding, and no copy that grows with a request's context.

A context is read as *pieces*: a long run of physically consecutive blocks is a strided view of the pool; short runs are
gathered together into at most GATHER_TOKENS tokens, a copy that stays in the cache. Pieces are attended one by one with
torch's flash kernel, which also returns the log-sum-exp of its scores, and merged by it.

One query token (decode): the G query heads that share a KV head become G query rows, so K and V are read once.
Several query tokens (a prompt chunk) at positions p0 .. p1-1, with window W:

    key positions   p0-W+1 ......... p1-W | p1-W+1 ......... p0-1 | p0 ... p1-1
                    `edge`: anti-causal   | `past`: seen by all   | causal, read from k and v themselves

Chunks longer than W-1 tokens are cut, so that the three never overlap. Without a window there is no edge.

ALiBi is a bias that depends on the head and the key's position alone: what the query's position adds is the same for
all its scores, so softmax does not see it. Torch's kernel has no soft cap; `_capped` computes such scores itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .base import AttentionBatch, AttentionSpec

VIEW_TOKENS = 256  # a run this long is worth a kernel call of its own
GATHER_TOKENS = 1024  # most tokens copied at a time
WINDOW_CHUNK = 512  # most query tokens at a time under a window: the edge's mask is its square
BIAS_CHUNK = 256  # and where a mask of that size is needed for every head, or the scores themselves are held

_flash = torch._scaled_dot_product_flash_attention_for_cpu  # -> (out, log-sum-exp)


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive positions of one context: slots start .. start+length of the pool, or of the gathered blocks."""

    start: int
    length: int
    blocks: Tensor | None = None  # [n] int32, to gather; None = read the pool in place
    bias: Tensor | None = None  # [H, length] float32, added to the scores (ALiBi)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Queries of one request that are attended together: rows start .. start+length of the step's tokens."""

    start: int
    length: int
    past: list[Piece]  # seen by every query; for a single query it includes the query's own position
    # The oldest positions that any query sees, with the mask [length, piece's length] of 0 and -inf. One piece, because
    # a query that sees nothing of a piece has no log-sum-exp in torch's kernel.
    edge: tuple[Piece, Tensor] | None
    bias: Tensor | None = None  # [H, this length] float32, of the chunk's own keys


@dataclass(frozen=True, slots=True)
class Cut:
    """What decides how a step is cut into chunks and pieces."""

    window: int | None
    longest: int | None  # queries in a chunk
    slopes: tuple[float, ...] | None

    @classmethod
    def of(cls, spec: AttentionSpec) -> "Cut":
        is_plain = spec.softcap is None and spec.alibi_slopes is None
        return cls(spec.window, None if is_plain else BIAS_CHUNK, spec.alibi_slopes)


class CpuAttention:
    name = "cpu"

    def objections(self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, block_size: int) -> list[str]:
        found = []
        if device.type != "cpu":
            found.append(f"it computes on the CPU, not on {device.type}")
        return found

    def plan(self, batch: AttentionBatch, specs: list[AttentionSpec]) -> dict[AttentionSpec, list[Chunk]]:
        """What to read; cut once for all specs that are cut alike."""
        cuts = dict.fromkeys(Cut.of(spec) for spec in specs)
        chunks = {cut: [_biased(chunk, cut) for chunk in _plan_cut(batch, cut)] for cut in cuts}
        return {spec: chunks[Cut.of(spec)] for spec in specs}

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: tuple[Tensor, Tensor],
        batch: AttentionBatch,
        plan: dict[AttentionSpec, list[Chunk]],
        spec: AttentionSpec,
    ) -> Tensor:
        num_tokens, num_kv_heads, dim = k.shape
        key_slots, value_slots = (cache.view(-1, num_kv_heads, dim) for cache in kv)  # [slots, K, D]
        key_slots.index_copy_(0, batch.slots, k)
        value_slots.index_copy_(0, batch.slots, v)
        pool = _Pool(
            blocks=kv,
            keys=key_slots.transpose(0, 1).unsqueeze(0),
            values=value_slots.transpose(0, 1).unsqueeze(0),
            scale=spec.scale,
            softcap=spec.softcap,
        )
        grouped = q.view(num_tokens, num_kv_heads, -1, dim)  # [T, K, G, D]
        outputs = []
        for chunk in plan[spec]:
            rows = slice(chunk.start, chunk.start + chunk.length)
            if chunk.length == 1:
                outputs.append(_merge([_attend_one(grouped[rows], piece, pool) for piece in chunk.past]))
            else:
                outputs.append(_attend_chunk(grouped[rows], k[rows], v[rows], chunk, pool))
        attended = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return attended.reshape(num_tokens, -1, dim)


@dataclass(slots=True)  # not frozen: one is made per layer and step, and freezing would double its cost
class _Pool:
    """One layer's KV, as blocks and as `[1, K, slots, D]`."""

    blocks: tuple[Tensor, Tensor]
    keys: Tensor
    values: Tensor
    scale: float
    softcap: float | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> "_Partial":
        """q `[B, H, n, D]`, k and v `[B, H, m, D]`; mask: added to the scores."""
        if self.softcap is not None:
            return _capped(q, k, v, mask, self.scale, self.softcap)
        partial: _Partial = _flash(q, k, v, attn_mask=mask, scale=self.scale)
        return partial

    def attend_causally(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> "_Partial":
        """As many queries as keys; bias: added to the scores, `[B, H, 1, n]`."""
        if self.softcap is None and bias is None:
            partial: _Partial = _flash(q, k, v, is_causal=True, scale=self.scale)
            return partial
        mask = torch.full((q.shape[-2],) * 2, float("-inf")).triu_(1)
        return self.attend(q, k, v, mask if bias is None else mask + bias)

    def read(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """Keys and values of a piece, each `[1, K, length, D]`."""
        if piece.blocks is None:
            return self.keys.narrow(2, piece.start, piece.length), self.values.narrow(2, piece.start, piece.length)
        gathered = (cache.index_select(0, piece.blocks).flatten(0, 1) for cache in self.blocks)
        keys, values = (part.transpose(0, 1).unsqueeze(0).narrow(2, piece.start, piece.length) for part in gathered)
        return keys, values


# out [..., rows, D] and log-sum-exp of the scores [..., rows], fp32
_Partial = tuple[Tensor, Tensor]


def _attend_one(rows: Tensor, piece: Piece, pool: _Pool) -> _Partial:
    """One query's heads `[1, K, G, D]` attend to all of a piece."""
    keys, values = pool.read(piece)
    bias = None if piece.bias is None else piece.bias.view(*rows.shape[:3], piece.length)
    return pool.attend(rows, keys, values, bias)


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> _Partial:
    """What the kernel computes, with scores softcap * tanh(scores / softcap), in float32."""
    scores = (q.float() @ k.float().transpose(-1, -2)).mul_(scale / softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores += mask
    lse = scores.logsumexp(-1)
    return ((scores - lse.unsqueeze(-1)).exp_() @ v.float()).to(q.dtype), lse


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

    def biased(bias: Tensor | None) -> Tensor | None:  # [H, m] -> [K, G, 1, m]
        return None if bias is None else bias.view(num_kv_heads, group, 1, -1)

    own_k, own_v = shared(k.transpose(0, 1)), shared(v.transpose(0, 1))
    partials = [pool.attend_causally(heads_first, own_k, own_v, biased(chunk.bias))]
    if chunk.past:
        rows = heads_first.reshape(1, num_kv_heads, group * length, dim)
    for piece in chunk.past:
        keys, values = pool.read(piece)
        if piece.bias is not None:
            partials.append(pool.attend(heads_first, shared(keys[0]), shared(values[0]), biased(piece.bias)))
            continue
        out, lse = pool.attend(rows, keys, values)
        partials.append((out.view(heads_first.shape), lse.view(heads_first.shape[:-1])))
    if chunk.edge is not None:
        piece, mask = chunk.edge
        keys, values = pool.read(piece)
        bias = biased(piece.bias)
        mask = mask if bias is None else mask + bias
        partials.append(pool.attend(heads_first, shared(keys[0]), shared(values[0]), mask))
    return _merge(partials).permute(2, 0, 1, 3)


def _biased(chunk: Chunk, cut: Cut) -> Chunk:
    """The chunk with the ALiBi of its keys: `slope * (position - the chunk's first position)`, over [H, keys]."""
    if cut.slopes is None:
        return chunk
    slopes = torch.tensor(cut.slopes)[:, None]

    def bias(first: int, length: int) -> Tensor:
        return slopes * torch.arange(first, first + length, dtype=torch.float32)

    # What is before the chunk ends where it begins; a single query's own key is part of its past.
    first = (1 if chunk.length == 1 else 0) - sum(piece.length for piece in chunk.past)
    edge, past = chunk.edge, []
    if edge is not None:
        edge = (replace(edge[0], bias=bias(first - edge[0].length, edge[0].length)), edge[1])
    for piece in chunk.past:
        past.append(replace(piece, bias=bias(first, piece.length)))
        first += piece.length
    return replace(chunk, past=past, edge=edge, bias=bias(0, chunk.length))


def _plan_cut(batch: AttentionBatch, cut: Cut) -> list[Chunk]:
    chunks, row, window = [], 0, cut.window
    for request, (num_queries, context) in enumerate(zip(batch.query_lengths, batch.context_lengths, strict=True)):
        past = context - num_queries
        longest = num_queries if cut.longest is None else min(num_queries, cut.longest)
        if window is not None and context > window:
            longest = max(1, min(longest, WINDOW_CHUNK, window - 1))
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
