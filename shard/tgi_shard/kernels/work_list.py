"""Cuts one step's attention into programs: pure host arithmetic, no tensors on a device.

A program takes `tile.rows` rows of one request and one KV head, and a share of the keys. Long contexts are split along
the keys when there would otherwise be too few programs to fill the GPU (flash-decoding); a second kernel combines the
parts. Called by `attention/triton.py`; `paged_attention.py` documents what the device makes of the lists.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .tiles import Tile

Ints = npt.NDArray[np.integer[Any]]

MIN_TILES_PER_SPLIT = 2  # shorter parts cost more to combine than they save
MAX_SPLITS = 64


@dataclass(frozen=True, slots=True)
class WorkList:
    """Programs of one launch; every KV head runs each of them."""

    items: Ints  # [n, 5]: request, block of rows, split, number of splits, first part
    groups: Ints  # [g, 4]: request, block of rows, first part, number of splits; only where there are several
    num_parts: int  # partial results per KV head
    rows: int  # most rows in use of any program's tile


def work_list(
    requests: Ints,
    query_lengths: Ints,
    context_lengths: Ints,
    window: int | None,
    group: int,
    tile: Tile,
    programs: int,
) -> WorkList:
    """Work of the requests with the given indices, longest first.

    `group`: query heads per KV head; `programs`: how many items are wanted at least (if the keys suffice).
    """
    rows = query_lengths * group
    num_blocks = -(-rows // tile.rows)
    request = np.repeat(np.arange(len(requests)), num_blocks)
    block = np.arange(len(request)) - np.repeat(np.cumsum(num_blocks) - num_blocks, num_blocks)
    before = (context_lengths - query_lengths)[request]
    last = before + np.minimum((block + 1) * tile.rows - 1, rows[request] - 1) // group
    first_key = (
        np.zeros_like(last) if window is None else np.maximum(before + block * tile.rows // group - window + 1, 0)
    )
    num_tiles = last // tile.keys - first_key // tile.keys + 1

    splits = _num_splits(num_tiles, programs)
    order = np.argsort(-(num_tiles // splits), kind="stable")
    request, block, splits = request[order], block[order], splits[order]
    parts = np.where(splits > 1, splits, 0)
    first_part = np.cumsum(parts) - parts

    repeated = np.repeat(np.arange(len(splits)), splits)
    split = np.arange(len(repeated)) - np.repeat(np.cumsum(splits) - splits, splits)
    items = np.stack(
        [requests[request[repeated]], block[repeated], split, splits[repeated], first_part[repeated]], axis=1
    )
    several = splits > 1
    groups = np.stack([requests[request], block, first_part, splits], axis=1)[several]
    return WorkList(
        items.astype(np.int32), groups.astype(np.int32), int(parts.sum()), min(tile.rows, int(rows.max(initial=0)))
    )


def _num_splits(num_tiles: npt.NDArray[np.int64], programs: int) -> npt.NDArray[np.int64]:
    """Parts of about equal length, so many that there are about `programs` of them in all."""
    if len(num_tiles) >= programs:
        return np.ones_like(num_tiles)
    length = max(MIN_TILES_PER_SPLIT, -(-int(num_tiles.sum()) // programs))
    return np.minimum(-(-num_tiles // length), MAX_SPLITS)
