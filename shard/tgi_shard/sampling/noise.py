"""Randomness of sampling: Gumbel noise as a pure function of (seed, position, index). There is no generator state.

So a request draws the same tokens in any batch, on every rank, on CPU and CUDA, and after a preemption or a crash.
Integers are mixed with splitmix64's finaliser (Steele, Lea, Flood 2014), in wrapping 64-bit arithmetic, which torch
does identically on every device; the two logarithms are taken in float64, where devices differ by at most an ulp.
"""

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_Integers = TypeVar("_Integers", Tensor, NDArray[np.int64])

# splitmix64's constants as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLY_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLY_2 = 0x94D049BB133111EB - 2**64


def _shift_right(x: _Integers, bits: int) -> _Integers:
    """Logical shift of int64; `>>` keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: _Integers) -> _Integers:
    """splitmix64's finaliser: int64 in, int64 out, a bijection; every input bit moves half of the output bits."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MULTIPLY_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLY_2
    return x ^ _shift_right(x, 31)


def keys(seeds: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """One key per row, on the host: seeds, positions `[N]` → `[N]`."""
    return mix(mix(seeds) ^ positions)


def gumbel(keys: Tensor, indices: Tensor) -> Tensor:
    """Standard Gumbel noise. keys `[N]`, indices `[N, M]` or `[M]`, int64 → `[N, M]` float64."""
    bits = mix(keys.unsqueeze(-1) + indices)
    uniform = (_shift_right(bits, 12).double() + 0.5) * 2.0**-52  # in (0, 1), never 0 or 1
    return -torch.log(-torch.log(uniform))
