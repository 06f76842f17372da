"""Rotary position embedding: frequencies as transformers computes them, and their application to heads.

Follows transformers' modeling_rope_utils.py, with one deviation: under dynamic and long scaling the frequencies for a
position depend on that position alone (as if its token were the last of its request), where transformers uses the
length of whatever is computed at once. Else a token's key would depend on how a prompt was cut into steps. The two
agree for every token that is decoded, and for prompts within the original positions.
"""

import math
from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True, slots=True)
class LongScaling:
    """LongRoPE: each frequency divided by a factor of its own, others beyond `original_positions` than within.

    The magnitudes multiply cos and sin, likewise within and beyond.
    """

    short_factors: tuple[float, ...]  # [dim / 2]
    long_factors: tuple[float, ...]
    original_positions: int
    short_magnitude: float
    long_magnitude: float


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongScaling

# Which two numbers of a head are the two coordinates of a rotation: i and i + dim / 2, or 2 i and 2 i + 1.
Pairing = Literal["halves", "neighbours"]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions over the first `dim` of each head."""

    theta: float
    dim: int
    scaling: RopeScaling | None
    pairing: Pairing = "halves"


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Of the step's tokens, each `[T, 1, dim]`; sin is negated where it belongs to the first coordinate."""

    cos: Tensor
    sin: Tensor
    pairing: Pairing


class RotaryEmbedding:
    def __init__(self, rope: Rope, device: torch.device, dtype: torch.dtype) -> None:
        self._rope, self._dtype = rope, dtype
        self._inverse = inverse_frequencies(rope).to(device)  # [dim / 2] fp32; [2, dim / 2] under long scaling
        self._exponents = _exponents(rope.dim).to(device)
        self._magnitude = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0
        if isinstance(rope.scaling, LongScaling):
            magnitudes = [[rope.scaling.short_magnitude], [rope.scaling.long_magnitude]]
            self._magnitudes = torch.tensor(magnitudes, device=device)  # [2, 1]

    def table(self, positions: Tensor) -> RopeTable:
        """Once per step, for positions `[T]`."""
        frequencies, magnitude = self._at(positions)
        angles = positions[:, None].float() * frequencies  # [T, dim / 2]
        cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
        if self._rope.pairing == "halves":
            cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        else:
            cos, sin = torch.stack((cos, cos), -1).flatten(-2), torch.stack((-sin, sin), -1).flatten(-2)
        return RopeTable(cos.to(self._dtype).unsqueeze(1), sin.to(self._dtype).unsqueeze(1), self._rope.pairing)

    def _at(self, positions: Tensor) -> tuple[Tensor, Tensor | float]:
        """Frequencies `[dim / 2]`, or `[T, dim / 2]` when they depend on the position; and the magnitude likewise."""
        match self._rope.scaling:
            case DynamicScaling(factor=factor, original_positions=original):
                dim = self._rope.dim
                length = (positions + 1).clamp(min=original).float()
                growth = (factor * length / original) - (factor - 1)
                base = self._rope.theta * growth ** (dim / (dim - 2))  # [T]
                return 1.0 / base[:, None] ** self._exponents, 1.0
            case LongScaling(original_positions=original):
                beyond = (positions >= original).long()
                return self._inverse[beyond], self._magnitudes[beyond]
            case _:
                return self._inverse, self._magnitude


def rotate(heads: Tensor, table: RopeTable) -> Tensor:
    """`[T, heads, D]` rotated; a rope narrower than D leaves the rest of each head as it is."""
    dim = table.cos.shape[-1]
    if dim < heads.shape[-1]:
        return torch.cat((rotate(heads[..., :dim], table), heads[..., dim:]), -1)
    # The other coordinate of each number; its sign is in sin.
    other = heads.roll(dim // 2, -1) if table.pairing == "halves" else _swap_neighbours(heads)
    return torch.addcmul(heads * table.cos, other, table.sin)


def _swap_neighbours(heads: Tensor) -> Tensor:
    return heads.view(*heads.shape[:-1], -1, 2).flip(-1).flatten(-2)


def inverse_frequencies(rope: Rope) -> Tensor:
    """`[dim / 2]` fp32 on the CPU. For dynamic scaling: those within the original positions; for long scaling
    `[2, dim / 2]`: within and beyond."""
    plain = 1.0 / (rope.theta ** _exponents(rope.dim))
    match rope.scaling:
        case LinearScaling(factor=factor):
            return plain / factor
        case Llama3Scaling() as scaling:
            return _llama3(plain, scaling)
        case YarnScaling() as scaling:
            return _yarn(rope, scaling)
        case LongScaling(short_factors=short, long_factors=long):
            return 1.0 / (torch.tensor([short, long]) * rope.theta ** _exponents(rope.dim))
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
