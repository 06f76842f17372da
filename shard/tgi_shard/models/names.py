"""What the decoder's parts are called in a checkpoint, and which tensors a checkpoint must therefore hold."""

from dataclasses import dataclass

from .spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class Concat:
    """Matrices of the checkpoint that the decoder applies as one, stacked along their output rows in this order."""

    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Names:
    """Checkpoint modules (without `.weight`, `.bias`) by the decoder's part. Parts a family lacks are not looked up.

    layer: prefix of one layer with `{}` for its number, from 0. The parts of a layer are relative to it.
    ignorable: regular expressions of tensors that may be in a checkpoint and are not read.
    """

    embedding: str
    final_norm: str
    head: str
    layer: str
    attention_norm: str
    qkv: Concat
    q_norm: str
    k_norm: str
    out: str
    mlp_norm: str
    gate_up: Concat
    down: str
    ignorable: tuple[str, ...]

    def in_layer(self, number: int, part: str) -> str:
        return self.layer.format(number) + part


def expected_tensors(spec: DecoderSpec, names: Names, layers: range) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every tensor that a decoder of these layers reads. The first layer brings the embedding,
    the last the final norm and the head."""
    tensors: dict[str, tuple[int, ...]] = {}
    if layers.start == 0 or (spec.tied_head and layers.stop == spec.layers):
        tensors[f"{names.embedding}.weight"] = (spec.vocab, spec.hidden)
    for number in layers:
        tensors.update(_layer_tensors(spec, names, number))
    if layers.stop == spec.layers:
        tensors[f"{names.final_norm}.weight"] = (spec.hidden,)
        if not spec.tied_head:
            tensors[f"{names.head}.weight"] = (spec.vocab, spec.hidden)
    return tensors


def _layer_tensors(spec: DecoderSpec, names: Names, number: int) -> dict[str, tuple[int, ...]]:
    attention, mlp, hidden = spec.attention, spec.mlp, spec.hidden
    q_rows, kv_rows = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    matrices = [  # (module, output rows, input columns, has a bias)
        *zip(names.qkv.parts, (q_rows, kv_rows, kv_rows), (hidden,) * 3, (attention.qkv_bias,) * 3, strict=True),
        (names.out, hidden, q_rows, attention.out_bias),
        *((part, mlp.size, hidden, mlp.bias) for part in names.gate_up.parts),
        (names.down, hidden, mlp.size, mlp.bias),
    ]
    vectors = [(names.attention_norm, hidden), (names.mlp_norm, hidden)]
    if attention.qk_norm:
        vectors += [(names.q_norm, attention.head_dim), (names.k_norm, attention.head_dim)]
    tensors: dict[str, tuple[int, ...]] = {}
    for module, rows, columns, bias in matrices:
        tensors[names.in_layer(number, f"{module}.weight")] = (rows, columns)
        if bias:
            tensors[names.in_layer(number, f"{module}.bias")] = (rows,)
    for module, size in vectors:
        tensors[names.in_layer(number, f"{module}.weight")] = (size,)
    return tensors
