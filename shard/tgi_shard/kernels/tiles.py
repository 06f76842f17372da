"""Tile shapes of the attention kernel for each GPU generation, head size and data type.

A table, not an auto-tuner: the same choice on every run, nothing to measure at start. `test_triton_compile.py` checks
that every entry compiles without spilling registers and fits the shared memory. Called by `attention/triton.py`.
"""

from dataclasses import dataclass

# Shared memory one program may have, bytes, by compute capability; the last is what every GPU since 8.0 grants.
SHARED_BYTES = {(8, 0): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}
LEAST_SHARED_BYTES = 99 << 10


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program holds: `rows` query rows (positions times the heads that share a KV head), `keys` keys."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int  # of Triton's pipeline; the block table's look-up takes one, so 5 keep two tiles of keys in flight
    per_processor: int  # programs that run at once on one multiprocessor: how many splits are worth making


def padded_head_dim(head_dim: int) -> int:
    """Tiles have power-of-two sides of at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def small_tile(capability: tuple[int, int], head_dim: int, num_bytes: int, group: int) -> Tile:
    """For requests with few rows, which are bound by reading keys: many programs of one position's `group` heads."""
    dim = padded_head_dim(head_dim)
    if num_bytes == 4:
        return _float32_tile(dim)
    rows = min(max(16, 1 << (group - 1).bit_length()), 64)
    if dim > 128:
        return Tile(rows, 32, 4 if rows == 16 else 8, 3, 2)
    return Tile(rows, 64, 4 if rows == 16 else 8, 3, 3)


def large_tile(capability: tuple[int, int], head_dim: int, num_bytes: int) -> Tile:
    """For requests with many rows, which are bound by the tensor cores."""
    dim = padded_head_dim(head_dim)
    if num_bytes == 4:
        return _float32_tile(dim)
    hopper = SHARED_BYTES.get(capability, LEAST_SHARED_BYTES) == SHARED_BYTES[9, 0]
    if dim > 128:
        return Tile(128, 32, 8, 2, 1) if hopper else Tile(64, 32, 8, 2, 1)
    return Tile(128, 64, 8, 5, 1) if hopper else Tile(128, 32, 8, 3, 1)


def _float32_tile(dim: int) -> Tile:
    """Three TF32 products for each one need many registers; float32 is for checking, so one shape serves."""
    return Tile(16, 32, 4, 2, 2) if dim <= 128 else Tile(16, 16, 8, 2, 2)
