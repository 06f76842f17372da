"""What a decoder-only transformer is, as data. A family is a function from its config.json to a DecoderSpec.

Alternatives are types, not flags: a further kind of norm, position, MLP or residual becomes a class here and one more
case in parts.py, block.py or layers/. A field exists when two families differ in it. Whole-model numbers: the split
over ranks is parts.py's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..layers.mlp import Activation
from ..layers.moe import Router
from ..layers.rotary import Rope, RopeScaling


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """x / rms(x) * weight."""

    eps: float


@dataclass(frozen=True, slots=True)
class OffsetRmsNorm:
    """x / rms(x) * (1 + weight), in float32."""

    eps: float


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """(x - mean) / deviation * weight + bias."""

    eps: float
    bias: bool = True


@dataclass(frozen=True, slots=True)
class BareLayerNorm:
    """(x - mean) / deviation: nothing is learned."""

    eps: float


Norm = RmsNorm | OffsetRmsNorm | LayerNorm | BareLayerNorm


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """Every query head normed with one weight `[D]`, every key head with another."""

    norm: RmsNorm | OffsetRmsNorm | LayerNorm


@dataclass(frozen=True, slots=True)
class OwnHeadNorm:
    """Every query and key head normed with a weight of its own, `[heads, D]` in all."""

    norm: RmsNorm | LayerNorm


@dataclass(frozen=True, slots=True)
class WideNorm:
    """A token's query heads normed together, its key heads together, with weights `[heads * D]`."""

    norm: RmsNorm


QkNorm = HeadNorm | OwnHeadNorm | WideNorm


@dataclass(frozen=True, slots=True)
class Attention:
    heads: int
    kv_heads: int
    head_dim: int
    scale: float  # of the products of queries and keys
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QkNorm | None = None  # before rope
    softcap: float | None = None  # scores = softcap * tanh(scores / softcap)
    qkv_clip: float | None = None  # queries, keys and values are kept within ± this


def inverse_root(head_dim: int) -> float:
    """The usual scale of attention."""
    return 1.0 / math.sqrt(head_dim)


@dataclass(frozen=True, slots=True)
class Alibi:
    """Scores fall linearly with the distance."""

    slopes: tuple[float, ...]  # [H] of the whole model, positive


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """down(activation(gate(x)) * up(x))."""

    size: int
    activation: Activation
    bias: bool = False


@dataclass(frozen=True, slots=True)
class PlainMlp:
    """down(activation(up(x)))."""

    size: int
    activation: Activation
    bias: bool = True


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """A gated MLP that every token goes through; its result is multiplied by sigmoid(gate(x)), one number."""

    size: int


@dataclass(frozen=True, slots=True)
class MoeMlp:
    """The weighted sum of `active` gated MLPs out of `experts`, chosen for each token."""

    experts: int
    active: int
    size: int  # of each expert
    activation: Activation
    router: Router
    shared: SharedExpert | None = None


Mlp = GatedMlp | PlainMlp | MoeMlp


@dataclass(frozen=True, slots=True)
class PreNorm:
    """x += m attention(norm(x)); x += m mlp(norm'(x)), with multiplier m."""

    multiplier: float = 1.0


@dataclass(frozen=True, slots=True)
class OutputNorm:
    """x += norm(attention(x)); x += norm'(mlp(x))."""


@dataclass(frozen=True, slots=True)
class SandwichNorm:
    """x += norm'(attention(norm(x))); x += norm'''(mlp(norm''(x)))."""


@dataclass(frozen=True, slots=True)
class PostNorm:
    """x = norm(x + attention(x)); x = norm'(x + mlp(x))."""


@dataclass(frozen=True, slots=True)
class TwoNormParallel:
    """x += attention(norm(x)) + mlp(norm'(x))."""


@dataclass(frozen=True, slots=True)
class SharedNormParallel:
    """x += attention(norm(x)) + mlp(norm(x)), with one norm."""


Residual = PreNorm | OutputNorm | SandwichNorm | PostNorm | TwoNormParallel | SharedNormParallel


@dataclass(frozen=True, slots=True)
class LearnedPositions:
    """A vector for each position is added to the embedding; position 0 is row `offset` of the table."""

    offset: int = 0


@dataclass(frozen=True, slots=True)
class Input:
    """From token ids to hidden states: scale * table[id], then what is not None, in this order."""

    scale: float = 1.0
    width: int | None = None  # of the table, where it is not the hidden size: a matrix brings it there and, out, back
    positions: LearnedPositions | None = None
    norm: Norm | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """From hidden states to logits: the final norm, the head, scale * logits, softcap * tanh(logits / softcap)."""

    tied: bool  # the head is the embedding table
    norm: Norm | None
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """In what the layers of one model may differ."""

    mlp: Mlp
    position: Rope | Alibi | None = None  # None: the layer does not see positions
    window: int | None = None  # how far back it sees, itself included; None = everything


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    model_type: str
    hidden: int
    vocab: int
    max_positions: int
    attention: Attention
    norm: Norm  # of the layers
    layers: tuple[Layer, ...]
    output: Output
    input: Input = Input()
    residual: Residual = PreNorm()

    @property
    def num_layers(self) -> int:
        return len(self.layers)


def with_windows(spec: DecoderSpec, windows: Sequence[int | None]) -> DecoderSpec:
    """The model with these windows, one per layer."""
    layers = (replace(layer, window=window) for layer, window in zip(spec.layers, windows, strict=True))
    return replace(spec, layers=tuple(layers))


def with_scaling(spec: DecoderSpec, scaling: RopeScaling, max_positions: int) -> DecoderSpec:
    """The model with the scaling of its ropes replaced."""
    layers = (
        replace(layer, position=replace(layer.position, scaling=scaling)) if isinstance(layer.position, Rope) else layer
        for layer in spec.layers
    )
    return replace(spec, layers=tuple(layers), max_positions=max_positions)
