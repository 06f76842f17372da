"""What the decoder's parts are called in a checkpoint, how matrices are packed there, and which tensors it holds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..checkpoint import Checkpoint
from ..errors import Bug
from ..layers.linear import Rows
from .spec import (
    BareLayerNorm,
    DecoderSpec,
    GatedMlp,
    HeadNorm,
    LayerNorm,
    Mlp,
    MoeMlp,
    Norm,
    OwnHeadNorm,
    PlainMlp,
    SandwichNorm,
    SharedNormParallel,
    WideNorm,
)


@dataclass(frozen=True, slots=True)
class Concat:
    """Matrices of the checkpoint that the decoder applies as one, stacked along their output rows in this order."""

    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Packed:
    """One matrix of the checkpoint that holds all parts, one after the other."""

    module: str


@dataclass(frozen=True, slots=True)
class Grouped:
    """One matrix that holds q, k and v by key/value head: the query heads that share it, its key, its value.

    For 4 query and 2 key/value heads its rows are  q0 q1 k0 v0 | q2 q3 k1 v1,  each D rows.
    """

    module: str


Layout = Concat | Packed | Grouped


@dataclass(frozen=True, slots=True)
class SplitExperts:
    """Every expert has matrices of its own; `{}` stands for its number."""

    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class StackedExperts:
    """One tensor for all experts: gate_up `[experts, 2 F, E]` (gate, then up), down `[experts, E, F]`."""

    gate_up: str
    down: str


@dataclass(frozen=True, slots=True)
class MoeNames:
    router: str
    experts: SplitExperts | StackedExperts
    shared_gate_up: Layout = Concat(())
    shared_down: str = ""
    shared_gate: str = ""  # the one number that scales the shared expert


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Checkpoint modules (without `.weight`, `.bias`) by the decoder's part. Parts a family lacks stay empty.

    layer: prefix of one layer with `{}` for its number, from 0. The parts of a layer are relative to it.
    qk norms: `{}` stands for the head's number where every head's norm is a module.
    ignorable: regular expressions of tensors that may be in a checkpoint and are not read.
    optional_prefix: what every name begins with, unless the checkpoint was saved without it.
    transposed: the matrices of the layers are stored `[in, out]`.
    """

    embedding: str
    head: str = "lm_head"
    layer: str
    qkv: Layout
    out: str
    gate_up: Layout  # a plain MLP's `up` alone
    down: str
    attention_norm: str = ""  # before attention; after it, for OutputNorm and PostNorm
    attention_out_norm: str = ""  # the second norm of a sandwich
    mlp_norm: str = ""
    mlp_out_norm: str = ""
    final_norm: str = ""
    q_norm: str = ""
    k_norm: str = ""
    moe: MoeNames | None = None
    positions: str = ""
    embedding_norm: str = ""
    project_in: str = ""
    project_out: str = ""
    ignorable: tuple[str, ...] = ()
    optional_prefix: str = ""
    transposed: bool = False

    def in_layer(self, number: int, part: str) -> str:
        return self.layer.format(number) + part


def layer_rows(
    layout: Layout, sizes: Sequence[int], shares: Sequence[slice], prefix: str = "", head_dim: int = 1
) -> list[Rows]:
    """Where the given rows of each part lie in the checkpoint, part after part. sizes: rows of each whole part."""
    match layout:
        case Concat(parts):
            return [Rows(prefix + part, share.start, share.stop) for part, share in zip(parts, shares, strict=True)]
        case Packed(module):
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            pairs = zip(starts, shares, strict=True)
            return [Rows(prefix + module, start + share.start, start + share.stop) for start, share in pairs]
        case Grouped(module):
            group = sizes[0] // sizes[1]
            starts = [
                ((head // group * (group + 2) + head % group) if part == 0 else head * (group + 2) + group + part - 1)
                * head_dim
                for part, share in enumerate(shares)
                for head in range(share.start // head_dim, share.stop // head_dim)
            ]
            return [Rows(prefix + module, start, start + head_dim) for start in starts]


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def resolve(spec: DecoderSpec, names: Names, checkpoint: Checkpoint) -> Names:
    """The names in this checkpoint's spelling: without the optional prefix; a tied table under the head's name."""
    if names.optional_prefix and f"{names.embedding}.weight" not in checkpoint:
        cut = {
            field: getattr(names, field).removeprefix(names.optional_prefix)
            for field in (
                "embedding",
                "layer",
                "final_norm",
                "positions",
                "embedding_norm",
                "project_in",
                "project_out",
            )
        }
        if f"{cut['embedding']}.weight" in checkpoint:
            names = replace(names, **cut)
    if spec.output.tied and f"{names.embedding}.weight" not in checkpoint and f"{names.head}.weight" in checkpoint:
        names = replace(names, embedding=names.head)
    return names


def expected_tensors(spec: DecoderSpec, names: Names, layers: range) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every tensor that a decoder of these layers reads. The first layer brings the embedding,
    the last the final norm and the head."""
    tensors: dict[str, tuple[int, ...]] = {}
    is_first, is_last = layers.start == 0, layers.stop == spec.num_layers
    width = spec.input.width or spec.hidden
    if is_first or (spec.output.tied and is_last):
        tensors[f"{names.embedding}.weight"] = (spec.vocab, width)
    if is_first:
        tensors.update(_input_tensors(spec, names))
    for number in layers:
        for name, shape in _layer_tensors(spec, names, spec.layers[number].mlp):
            tensors[names.in_layer(number, name)] = shape
    if is_last:
        tensors.update(_norm(names.final_norm, spec.output.norm, spec.hidden))
        if spec.input.width is not None:
            tensors[f"{names.project_out}.weight"] = (width, spec.hidden)
        if not spec.output.tied:
            tensors[f"{names.head}.weight"] = (spec.vocab, width)
        if spec.output.bias:
            tensors[f"{names.head}.bias"] = (spec.vocab,)
    return tensors


def _input_tensors(spec: DecoderSpec, names: Names) -> Shapes:
    if spec.input.positions is not None:
        yield f"{names.positions}.weight", (spec.max_positions + spec.input.positions.offset, spec.hidden)
    yield from _norm(names.embedding_norm, spec.input.norm, spec.hidden)
    if spec.input.width is not None:
        yield f"{names.project_in}.weight", (spec.hidden, spec.input.width)


def _layer_tensors(spec: DecoderSpec, names: Names, mlp: Mlp) -> Shapes:
    attention, hidden = spec.attention, spec.hidden
    q_rows, kv_rows = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    yield from _norm(names.attention_norm, spec.norm, hidden)
    if not isinstance(spec.residual, SharedNormParallel):
        yield from _norm(names.mlp_norm, spec.norm, hidden)
    if isinstance(spec.residual, SandwichNorm):
        yield from _norm(names.attention_out_norm, spec.norm, hidden)
        yield from _norm(names.mlp_out_norm, spec.norm, hidden)
    yield from _stacked(names, names.qkv, (q_rows, kv_rows, kv_rows), hidden, attention.qkv_bias)
    yield from _qk_norms(spec, names)
    yield from _matrix(names, names.out, hidden, q_rows, attention.out_bias)
    match mlp:
        case GatedMlp(size=size, bias=bias):
            yield from _stacked(names, names.gate_up, (size, size), hidden, bias)
            yield from _matrix(names, names.down, hidden, size, bias)
        case PlainMlp(size=size, bias=bias):
            yield from _stacked(names, names.gate_up, (size,), hidden, bias)
            yield from _matrix(names, names.down, hidden, size, bias)
        case MoeMlp():
            yield from _moe(names, mlp, hidden)


def _moe(names: Names, mlp: MoeMlp, hidden: int) -> Shapes:
    moe = moe_names(names)
    yield f"{moe.router}.weight", (mlp.experts, hidden)
    match moe.experts:
        case SplitExperts(gate, up, down):
            for expert in range(mlp.experts):
                yield f"{gate.format(expert)}.weight", (mlp.size, hidden)
                yield f"{up.format(expert)}.weight", (mlp.size, hidden)
                yield f"{down.format(expert)}.weight", (hidden, mlp.size)
        case StackedExperts(gate_up, down):
            yield f"{gate_up}.weight", (mlp.experts, 2 * mlp.size, hidden)
            yield f"{down}.weight", (mlp.experts, hidden, mlp.size)
    if mlp.shared is not None:
        yield from _stacked(names, moe.shared_gate_up, (mlp.shared.size, mlp.shared.size), hidden, False)
        yield from _matrix(names, moe.shared_down, hidden, mlp.shared.size, False)
        yield f"{moe.shared_gate}.weight", (1, hidden)


def moe_names(names: Names) -> MoeNames:
    if names.moe is None:
        raise Bug("A family describes experts, but not their names. This is a bug.")
    return names.moe


def _qk_norms(spec: DecoderSpec, names: Names) -> Shapes:
    attention = spec.attention
    for module, heads in ((names.q_norm, attention.heads), (names.k_norm, attention.kv_heads)):
        match attention.qk_norm:
            case HeadNorm(norm):
                yield from _norm(module, norm, attention.head_dim)
            case WideNorm(norm):
                yield from _norm(module, norm, heads * attention.head_dim)
            case OwnHeadNorm(norm) if "{}" in module:
                for head in range(heads):
                    yield from _norm(module.format(head), norm, attention.head_dim)
            case OwnHeadNorm(norm):
                yield from _norm(module, norm, heads, attention.head_dim)
            case None:
                return


def _norm(module: str, norm: Norm | None, *shape: int) -> Shapes:
    if norm is None or isinstance(norm, BareLayerNorm):
        return
    yield f"{module}.weight", shape
    if isinstance(norm, LayerNorm) and norm.bias:
        yield f"{module}.bias", shape


def _stacked(names: Names, layout: Layout, rows: tuple[int, ...], columns: int, bias: bool) -> Shapes:
    match layout:
        case Concat(parts):
            for part, count in zip(parts, rows, strict=True):
                yield from _matrix(names, part, count, columns, bias)
        case Packed(module) | Grouped(module):
            yield from _matrix(names, module, sum(rows), columns, bias)


def _matrix(names: Names, module: str, rows: int, columns: int, bias: bool) -> Shapes:
    yield f"{module}.weight", (columns, rows) if names.transposed else (rows, columns)
    if bias:
        yield f"{module}.bias", (rows,)
