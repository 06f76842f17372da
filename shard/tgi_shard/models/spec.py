"""What a decoder-only transformer is, as data. A family is a function from its config.json to a DecoderSpec.

Alternatives are types, not flags: a second kind of norm, position, MLP or residual becomes a second class here and one
more case in decoder.py and layers/. A field exists when two families differ in it; what only one family has is a
subclass in that family's file. Whole-model numbers: the split over ranks is decoder.py's.
"""

import math
from dataclasses import dataclass

from ..layers.mlp import Activation
from ..layers.rotary import Rope


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """x / rms(x) * weight."""

    eps: float


@dataclass(frozen=True, slots=True)
class Attention:
    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool
    out_bias: bool
    qk_norm: bool  # the model's norm on every query and key head, before rope

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.head_dim)


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """down(activation(gate(x)) * up(x))."""

    size: int
    activation: Activation
    bias: bool


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """Pre-norm decoder with sequential residuals."""

    model_type: str
    hidden: int
    vocab: int
    max_positions: int
    norm: RmsNorm
    attention: Attention
    windows: tuple[int | None, ...]  # one per layer: how far back it sees, itself included; None = everything
    position: Rope
    mlp: GatedMlp
    tied_head: bool  # the output head is the embedding table

    @property
    def layers(self) -> int:
        return len(self.windows)
