"""Rotary position embedding: frequencies as transformers computes them, and their application to heads.

Follows transformers' modeling_rope_utils.py, with one deviation: under dynamic scaling the base for a position depends
on that position alone (as if its token were the last of its request), where transformers uses the length of whatever
is computed at once. Else a token's key would depend on how a prompt was cut into steps. The two agree for every token
that is decoded, and for prompts within the original positions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class DynamicScaling:
    """The base grows with the length, beyond `original_positions` (NTK-aware)."""

    factor: float
    original_positions: int


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Long wavelengths divided by `factor`, short ones kept, smooth in between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Interpolated by dimension between extrapolation and division by `factor` (arXiv 2309.00071)."""

    factor: float
    original_positions: int
    attention_factor: float  # cos and sin are multiplied by it
    beta_fast: float
    beta_slow: float
    truncate: bool  # round the bounds of the ramp to whole dimensions


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions over the first `dim` of each head; the two halves of `dim` are the two coordinates."""

    theta: float
    dim: int
    scaling: RopeScaling | None


RopeTable = tuple[Tensor, Tensor]  # cos and sin of the step's tokens, each [T, 1, dim]; sin negated in its first half


class RotaryEmbedding:
    def __init__(self, rope: Rope, device: torch.device, dtype: torch.dtype) -> None:
        self._rope, self._dtype = rope, dtype
        self._inverse = inverse_frequencies(rope).to(device)  # [dim / 2] fp32
        self._exponents = _exponents(rope.dim).to(device)
        self._factor = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0

    def table(self, positions: Tensor) -> RopeTable:
        """Once per step, for positions `[T]`."""
        angles = positions[:, None].float() * self._frequencies(positions)  # [T, dim / 2]
        cos, sin = angles.cos() * self._factor, angles.sin() * self._factor
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return cos.to(self._dtype).unsqueeze(1), sin.to(self._dtype).unsqueeze(1)

    def _frequencies(self, positions: Tensor) -> Tensor:
        """`[dim / 2]`, or `[T, dim / 2]` when they depend on the position."""
        scaling = self._rope.scaling
        if not isinstance(scaling, DynamicScaling):
            return self._inverse
        dim, original = self._rope.dim, scaling.original_positions
        length = (positions + 1).clamp(min=original).float()
        growth = (scaling.factor * length / original) - (scaling.factor - 1)
        base = self._rope.theta * growth ** (dim / (dim - 2))  # [T]
        return 1.0 / base[:, None] ** self._exponents


def rotate(heads: Tensor, table: RopeTable) -> Tensor:
    """`[T, heads, D]` rotated; a rope narrower than D leaves the rest of each head as it is."""
    cos, sin = table
    dim = cos.shape[-1]
    if dim < heads.shape[-1]:
        return torch.cat((rotate(heads[..., :dim], table), heads[..., dim:]), -1)
    # Half a turn of the last dimension swaps the two halves; the sign of the first half is in sin.
    return torch.addcmul(heads * cos, heads.roll(dim // 2, -1), sin)


def inverse_frequencies(rope: Rope) -> Tensor:
    """`[dim / 2]` fp32 on the CPU. For dynamic scaling: those within the original positions."""
    plain = 1.0 / (rope.theta ** _exponents(rope.dim))
    match rope.scaling:
        case LinearScaling(factor=factor):
            return plain / factor
        case Llama3Scaling() as scaling:
            return _llama3(plain, scaling)
        case YarnScaling() as scaling:
            return _yarn(rope, scaling)
        case _:
            return plain


def _exponents(dim: int) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.int64).float() / dim


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    wavelength = 2 * math.pi / plain
    original, low, high = scaling.original_positions, scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * plain / scaling.factor + smooth * plain
    scaled = torch.where(wavelength > original / low, plain / scaling.factor, plain)
    is_between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(is_between, between, scaled)


def _yarn(rope: Rope, scaling: YarnScaling) -> Tensor:
    def dimension(rotations: float) -> float:
        """The dimension that makes so many rotations over the original positions."""
        return rope.dim * math.log(scaling.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    powers = rope.theta ** _exponents(rope.dim)
    return ramp / (scaling.factor * powers) + (1 - ramp) / powers
