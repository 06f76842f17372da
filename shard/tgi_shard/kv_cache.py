"""The KV pool: the bytes of every layer's keys and values, in blocks. It knows sizes, not who uses which block.

Owned by the engine; which request has which blocks is decided in the router's block manager.
"""

import mmap
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """What a block is made of. Head counts are this rank's."""

    num_layers: int
    num_kv_heads: int  # K
    head_dim: int  # D
    block_size: int  # S
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Keys and values of one block in all layers."""
        return 2 * self.num_layers * self.block_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class KvCache:
    """`layers[i]` is (keys, values) of layer i, each `[num_blocks, S, K, D]`."""

    def __init__(self, geometry: KvGeometry, num_blocks: int, device: torch.device) -> None:
        self.geometry = geometry
        self.num_blocks = num_blocks
        shape = (2 * geometry.num_layers, num_blocks, geometry.block_size, geometry.num_kv_heads, geometry.head_dim)
        pool = _allocate(num_blocks * geometry.block_bytes, device).view(geometry.dtype).view(shape)
        self.layers: list[tuple[Tensor, Tensor]] = [(pool[2 * i], pool[2 * i + 1]) for i in range(geometry.num_layers)]

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.geometry.block_bytes


def _allocate(num_bytes: int, device: torch.device) -> Tensor:
    """Zeros, `[num_bytes]` uint8. On CPU the system gives a page only when it is first written: start costs nothing."""
    if device.type == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        return torch.frombuffer(mmap.mmap(-1, num_bytes, flags), dtype=torch.uint8)
    return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
