"""Reads this rank's parts of one model from a checkpoint: norms, projections, feed-forward layers.

What a DecoderSpec says becomes layers here; block.py and ends.py put them together. Knows the split over ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.base import AttentionSpec
from ..errors import StartError
from ..layers.linear import DenseMethod, Matmul, MatmulMaker, RowParallel, Rows, split
from ..layers.mlp import GatedMlpLayer, PlainMlpLayer
from ..layers.moe import GroupedExperts, MoeLayer, SharedExpertLayer, VisitedExperts
from ..layers.norm import Float32RmsNormLayer, LayerNormLayer, NormLayer, RmsNormLayer, WideRmsNormLayer
from ..layers.weights import WeightReader
from ..parallel import Parallel
from .names import Layout, Names, SplitExperts, StackedExperts, layer_rows, moe_names
from .spec import (
    Alibi,
    BareLayerNorm,
    DecoderSpec,
    GatedMlp,
    HeadNorm,
    LayerNorm,
    MoeMlp,
    Norm,
    OffsetRmsNorm,
    PlainMlp,
    QkNorm,
    RmsNorm,
    SharedNormParallel,
    TwoNormParallel,
    WideNorm,
)

MlpLayer = GatedMlpLayer | PlainMlpLayer | MoeLayer
GROUPED_ALIGNMENT = 16  # bytes: torch's grouped product wants the rows of its matrices to begin at multiples


@dataclass(frozen=True, slots=True)
class Source:
    """The checkpoint, and what the decoder's parts are called in it."""

    reader: WeightReader
    names: Names


@dataclass(frozen=True, slots=True)
class HeadSplit:
    """Which heads of the model this rank computes. Ranks share a KV head when there are fewer KV heads than ranks."""

    heads: slice
    kv_heads: slice

    @classmethod
    def of(cls, spec: DecoderSpec, parallel: Parallel) -> "HeadSplit":
        heads = split(spec.attention.heads, parallel, "the number of attention heads")
        total, world = spec.attention.kv_heads, parallel.world_size
        if spec.attention.heads % total:
            raise StartError(
                f"config.json: `num_key_value_heads` {total} does not divide "
                f"`num_attention_heads` {spec.attention.heads}."
            )
        if total >= world:
            return cls(heads, split(total, parallel, "the number of key/value heads"))
        if world % total:
            raise StartError(f"`--num-shard` {world} is not a multiple of the number of key/value heads ({total}).")
        first = parallel.rank * total // world
        return cls(heads, slice(first, first + 1))

    def attention_spec(self, spec: DecoderSpec, layer: int, dtype: torch.dtype) -> AttentionSpec:
        position = spec.layers[layer].position
        return AttentionSpec(
            num_heads=self.heads.stop - self.heads.start,
            num_kv_heads=self.kv_heads.stop - self.kv_heads.start,
            head_dim=spec.attention.head_dim,
            scale=spec.attention.scale,
            window=spec.layers[layer].window,
            softcap=spec.attention.softcap,
            alibi_slopes=position.slopes[self.heads] if isinstance(position, Alibi) else None,
            dtype=dtype,
        )


class Parts:
    """The parts of one model, by name, each as this rank's share."""

    def __init__(self, spec: DecoderSpec, source: Source, parallel: Parallel) -> None:
        self.spec, self.names, self.reader, self.parallel = spec, source.names, source.reader, parallel
        self.matmuls = MatmulMaker()
        self.heads = HeadSplit.of(spec, parallel)
        # Where attention and MLP are added up anyway, the layer sums the two over the ranks at once.
        is_joined = isinstance(spec.residual, TwoNormParallel | SharedNormParallel)
        self._summed = Parallel.single() if is_joined else parallel
        self._attention_specs: dict[AttentionSpec, AttentionSpec] = {}
        self._linear = DenseMethod(source.reader, self.matmuls, source.names.transposed)

    def attention_spec(self, number: int) -> AttentionSpec:
        """Layers alike share one object: backends look their plans up by it, which is fastest by identity."""
        spec = self.heads.attention_spec(self.spec, number, self.reader.dtype)
        return self._attention_specs.setdefault(spec, spec)

    def norm(self, module: str, norm: Norm) -> NormLayer:
        """Of hidden states."""
        if isinstance(norm, BareLayerNorm):
            return LayerNormLayer(self.spec.hidden, None, None, norm.eps)
        return _norm_layer(norm, *self._norm_weights(module, norm))

    def _norm_weights(self, module: str, norm: Norm) -> tuple[Tensor, Tensor | None]:
        if isinstance(norm, OffsetRmsNorm):
            return self.reader.view(f"{module}.weight").to(self.reader.device, torch.float32) + 1, None
        has_bias = isinstance(norm, LayerNorm) and norm.bias
        return self.reader.vector(f"{module}.weight"), self.reader.vector(f"{module}.bias") if has_bias else None

    def whole(self, module: str, outputs: int) -> Matmul:
        """A matrix without bias that every rank has as a whole."""
        return self._linear.column([Rows(module, 0, outputs)], False)

    def qkv(self, number: int) -> Matmul:
        """`[T, E]` → `[T, (H + 2 K) D]`: this rank's q, k and v heads."""
        attention, dim = self.spec.attention, self.spec.attention.head_dim
        sizes = [heads * dim for heads in (attention.heads, attention.kv_heads, attention.kv_heads)]
        shares = [_times(share, dim) for share in (self.heads.heads, self.heads.kv_heads, self.heads.kv_heads)]
        rows = layer_rows(self.names.qkv, sizes, shares, self.names.in_layer(number, ""), dim)
        return self._linear.column(rows, attention.qkv_bias)

    def out(self, number: int) -> RowParallel:
        attention = self.spec.attention
        return self._row(number, self.names.out, attention.heads * attention.head_dim, attention.out_bias)

    def qk_norm(self, number: int) -> NormLayer | None:
        """Of this rank's query and key heads together, `[T, H + K, D]`."""
        kind = self.spec.attention.qk_norm
        if kind is None:
            return None
        heads, kv_heads = self.heads.heads, self.heads.kv_heads
        q, q_bias = self._head_weights(self.names.in_layer(number, self.names.q_norm), kind, heads)
        k, k_bias = self._head_weights(self.names.in_layer(number, self.names.k_norm), kind, kv_heads)
        if isinstance(kind, WideNorm):
            return WideRmsNormLayer(q, k, kind.norm.eps, self.parallel)
        bias = torch.cat((q_bias, k_bias)) if q_bias is not None and k_bias is not None else None
        return _norm_layer(kind.norm, torch.cat((q, k)), bias)

    def _head_weights(self, module: str, kind: QkNorm, share: slice) -> tuple[Tensor, Tensor | None]:
        """Weights and biases of these heads, `[heads, D]` each."""
        if isinstance(kind, HeadNorm):
            parts = [self._norm_weights(module, kind.norm)] * (share.stop - share.start)
        elif "{}" in module:
            parts = [self._norm_weights(module.format(head), kind.norm) for head in range(share.start, share.stop)]
        else:
            dim = self.spec.attention.head_dim
            weight, bias = self._norm_weights(module, kind.norm)
            return weight.view(-1, dim)[share], None if bias is None else bias.view(-1, dim)[share]
        biases = [bias for _, bias in parts if bias is not None]
        return torch.stack([weight for weight, _ in parts]), torch.stack(biases) if biases else None

    def mlp(self, number: int) -> MlpLayer:
        names, mlp = self.names, self.spec.layers[number].mlp
        match mlp:
            case GatedMlp(size=size, bias=bias):
                gate_up = self._column(number, names.gate_up, (size, size), bias)
                return GatedMlpLayer(gate_up, self._row(number, names.down, size, bias), mlp.activation)
            case PlainMlp(size=size, bias=bias):
                up = self._column(number, names.gate_up, (size,), bias)
                return PlainMlpLayer(up, self._row(number, names.down, size, bias), mlp.activation)
            case MoeMlp():
                return self._moe(number, mlp)

    def _moe(self, number: int, mlp: MoeMlp) -> MoeLayer:
        names = moe_names(self.names)
        gates = [Rows(self.names.in_layer(number, names.router), 0, mlp.experts)]
        shared = None
        if mlp.shared is not None:
            size = mlp.shared.size
            share = split(size, self.parallel, "the shared expert's size")
            down = self._linear.row(self.names.in_layer(number, names.shared_down), share, False)
            gates.append(Rows(self.names.in_layer(number, names.shared_gate), 0, 1))
            gate_up = self._column(number, names.shared_gate_up, (size, size), False)
            shared = SharedExpertLayer(gate_up, down, mlp.activation)
        gate, experts = self._linear.column(gates, False), self._experts(number, mlp)
        return MoeLayer(gate, mlp.router, mlp.active, experts, shared, self._summed)

    def _experts(self, number: int, mlp: MoeMlp) -> VisitedExperts | GroupedExperts:
        share = split(mlp.size, self.parallel, "the experts' size")
        size, reader = share.stop - share.start, self.reader
        if reader.device.type == "cpu":
            gate_up, down = [], []
            for expert in range(mlp.experts):
                views = self._expert(number, expert, mlp.size, share)
                gate_up.append(self.matmuls.make(torch.cat([reader.copy(view) for view in views[:2]]), None))
                down.append(self.matmuls.make(reader.copy(views[2]), None))
            return VisitedExperts(gate_up, down, mlp.activation)
        for what, columns in (("the experts' size on each rank", size), ("the hidden size", self.spec.hidden)):
            if columns * reader.dtype.itemsize % GROUPED_ALIGNMENT:
                raise StartError(
                    f"config.json: on {reader.device.type} {what} has to be a multiple of "
                    f"{GROUPED_ALIGNMENT // reader.dtype.itemsize}; it is {columns}."
                )
        stacked_up = reader.empty(mlp.experts, 2 * size, self.spec.hidden)
        stacked_down = reader.empty(mlp.experts, self.spec.hidden, size)
        for expert in range(mlp.experts):
            gate, up, down_view = self._expert(number, expert, mlp.size, share)
            stacked_up[expert, :size].copy_(gate)
            stacked_up[expert, size:].copy_(up)
            stacked_down[expert].copy_(down_view)
        return GroupedExperts(stacked_up, stacked_down, mlp.activation)

    def _expert(self, number: int, expert: int, size: int, share: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Views of this rank's rows of gate and up, and columns of down."""

        def view(module: str) -> Tensor:
            return self.reader.view(f"{self.names.in_layer(number, module)}.weight")

        match moe_names(self.names).experts:
            case SplitExperts(gate, up, down):
                parts = (view(part.format(expert)) for part in (gate, up, down))
                gate_rows, up_rows, down_columns = parts
                return gate_rows[share], up_rows[share], down_columns[:, share]
            case StackedExperts(gate_up, down):
                both = view(gate_up)[expert]
                return both[:size][share], both[size:][share], view(down)[expert][:, share]

    def _column(self, number: int, layout: Layout, sizes: Sequence[int], bias: bool) -> Matmul:
        shares = [split(size, self.parallel, "the feed-forward size") for size in sizes]
        return self._linear.column(layer_rows(layout, sizes, shares, self.names.in_layer(number, "")), bias)

    def _row(self, number: int, module: str, inputs: int, bias: bool) -> RowParallel:
        return RowParallel(self._linear, self.names.in_layer(number, module), inputs, bias, self.parallel, self._summed)


def _norm_layer(norm: Norm, weight: Tensor, bias: Tensor | None) -> NormLayer:
    match norm:
        case RmsNorm(eps):
            return RmsNormLayer(weight, eps)
        case OffsetRmsNorm(eps):
            return Float32RmsNormLayer(weight, eps)
        case LayerNorm(eps) | BareLayerNorm(eps):
            return LayerNormLayer(weight.shape[-1], weight, bias, eps)


def _times(share: slice, factor: int) -> slice:
    return slice(share.start * factor, share.stop * factor)
