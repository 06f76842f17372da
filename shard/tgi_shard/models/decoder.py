"""THE decoder-only transformer: what a DecoderSpec describes, on one rank of a tensor-parallel group.

Weights are read from a Checkpoint through the layers; attention goes through one backend; a range of layers makes it
one stage of a pipeline. Built by models/__init__.py, called by the engine. No autograd: call it under inference_mode.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.base import AttentionBackend, AttentionSpec
from ..errors import Bug, StartError
from ..layers.embedding import Embedding, Head, VocabTables
from ..layers.linear import DenseMethod, LinearMethod, Matmul, MatmulMaker, RowParallel, Rows, split
from ..layers.mlp import GatedMlpLayer
from ..layers.norm import RmsNormLayer, stack_heads
from ..layers.rotary import RopeTable, RotaryEmbedding, rotate
from ..layers.weights import WeightReader
from ..parallel import Parallel
from ..step import StepInput
from .names import Concat, Names
from .spec import DecoderSpec

KvCache = tuple[Tensor, Tensor]  # one layer's key and value pool, [num_blocks, S, K, D] each


@dataclass(frozen=True, slots=True)
class Source:
    """The checkpoint, and what the decoder's parts are called in it."""

    reader: WeightReader
    names: Names

    def norm(self, module: str, eps: float) -> RmsNormLayer:
        return RmsNormLayer(self.reader.vector(f"{module}.weight"), eps)


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
        return AttentionSpec(
            num_heads=self.heads.stop - self.heads.start,
            num_kv_heads=self.kv_heads.stop - self.kv_heads.start,
            head_dim=spec.attention.head_dim,
            scale=spec.attention.scale,
            window=spec.windows[layer],
            dtype=dtype,
        )


class DecoderLayer:
    def __init__(
        self, number: int, spec: DecoderSpec, source: Source, linear: LinearMethod, parallel: Parallel
    ) -> None:
        names, attention = source.names, spec.attention
        heads = HeadSplit.of(spec, parallel)
        self.attention_spec = heads.attention_spec(spec, number, source.reader.dtype)

        def name(part: str) -> str:
            return names.in_layer(number, part)

        def concat(fused: Concat, rows: Sequence[slice], bias: bool) -> Matmul:
            return linear.column(
                [Rows(name(part), share.start, share.stop) for part, share in zip(fused.parts, rows, strict=True)], bias
            )

        head_rows = [_times(part, attention.head_dim) for part in (heads.heads, heads.kv_heads, heads.kv_heads)]
        self._attention_norm = source.norm(name(names.attention_norm), spec.norm.eps)
        self._qkv = concat(names.qkv, head_rows, attention.qkv_bias)
        self._qk_norm = self._read_qk_norm(spec, source, number) if attention.qk_norm else None
        self._out = RowParallel(
            linear, name(names.out), attention.heads * attention.head_dim, attention.out_bias, parallel
        )
        self._mlp_norm = source.norm(name(names.mlp_norm), spec.norm.eps)
        ffn = split(spec.mlp.size, parallel, "the feed-forward size")
        self._mlp = GatedMlpLayer(
            concat(names.gate_up, (ffn, ffn), spec.mlp.bias),
            RowParallel(linear, name(names.down), spec.mlp.size, spec.mlp.bias, parallel),
            spec.mlp.activation,
        )
        parts = (self._attention_norm, self._qkv, self._qk_norm, self._out, self._mlp_norm, self._mlp)
        self.num_bytes = sum(part.num_bytes for part in parts if part is not None)

    def _read_qk_norm(self, spec: DecoderSpec, source: Source, number: int) -> RmsNormLayer:
        local = self.attention_spec
        q, k = (
            source.reader.vector(source.names.in_layer(number, f"{part}.weight"))
            for part in (source.names.q_norm, source.names.k_norm)
        )
        return RmsNormLayer(stack_heads([(q, local.num_heads), (k, local.num_kv_heads)]), spec.norm.eps)

    def forward(self, x: Tensor, rope: RopeTable, backend: AttentionBackend, step: StepInput, kv: KvCache) -> Tensor:
        """`[T, E]` → `[T, E]`; x is overwritten."""
        x.add_(self._attend(self._attention_norm(x), rope, backend, step, kv))
        return x.add_(self._mlp(self._mlp_norm(x)))

    def _attend(self, x: Tensor, rope: RopeTable, backend: AttentionBackend, step: StepInput, kv: KvCache) -> Tensor:
        spec = self.attention_spec
        num_qk = spec.num_heads + spec.num_kv_heads
        heads = self._qkv(x).view(x.shape[0], -1, spec.head_dim)  # [T, H + 2K, D]: q, k, v
        qk, v = heads[:, :num_qk], heads[:, num_qk:]
        if self._qk_norm is not None:
            qk = self._qk_norm(qk)
        qk = rotate(qk, rope)
        q, k = qk[:, : spec.num_heads], qk[:, spec.num_heads :]
        attended = backend.forward(q, k, v, kv, step.attention, step.attention_plan, spec)
        return self._out(attended.flatten(1))


class Decoder:
    """One rank's decoder, or one stage of it.

    Attributes for the engine: `spec`, `backend`, `attention_specs` (one per layer of this stage, this rank's heads),
    `num_layers` (this stage's: so many KV caches), `num_kv_heads` (this rank's), `head_dim`, `dtype`, `device`,
    `vocab_size`, `max_positions`, `num_bytes` (weights in memory).
    """

    def __init__(
        self,
        spec: DecoderSpec,
        source: Source,
        parallel: Parallel,
        backend: AttentionBackend,
        layers: range | None = None,
    ) -> None:
        """layers: this stage's; None = all. Raises StartError when the ranks cannot share the model equally."""
        layers = range(spec.layers) if layers is None else layers
        reader, matmuls = source.reader, MatmulMaker()
        linear = DenseMethod(reader, matmuls)
        self.spec, self.backend, self.dtype, self.device = spec, backend, reader.dtype, reader.device
        self._rope = RotaryEmbedding(spec.position, reader.device, reader.dtype)
        self._embedding: Embedding | None = None
        self._head: Head | None = None
        self._final_norm: RmsNormLayer | None = None
        tables = VocabTables(reader, matmuls, spec.vocab, parallel)
        names = source.names
        is_first, is_last = layers.start == 0, layers.stop == spec.layers
        if is_first and is_last and spec.tied_head:
            self._embedding, self._head = tables.tied(names.embedding)
        elif is_first:
            self._embedding = tables.embedding(names.embedding)
        self._layers = [DecoderLayer(number, spec, source, linear, parallel) for number in layers]
        if is_last:
            self._final_norm = source.norm(names.final_norm, spec.norm.eps)
            self._head = self._head or tables.head(names.embedding if spec.tied_head else names.head)
        parts = (self._embedding, *self._layers, self._final_norm, self._head)
        self.num_bytes = sum(part.num_bytes for part in parts if part is not None)

    @property
    def attention_specs(self) -> list[AttentionSpec]:
        return [layer.attention_spec for layer in self._layers]

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def num_kv_heads(self) -> int:
        return self._layers[0].attention_spec.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.spec.attention.head_dim

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab

    @property
    def max_positions(self) -> int:
        return self.spec.max_positions

    def forward(self, step: StepInput, kv: Sequence[KvCache], hidden: Tensor | None = None) -> Tensor:
        """Hidden states `[T, E]` of the step's tokens: after the final norm, or after this stage's last layer when it
        is not the last stage. Writes the tokens' keys and values into `kv`, one cache per layer of this stage.

        hidden: what the stage before returned, `[T, E]`; None for the first stage. It may be overwritten.
        """
        x = self._embedding(step.token_ids) if self._embedding is not None else hidden
        if x is None:
            raise Bug("A later stage of the pipeline got no hidden states. This is a bug.")
        rope = self._rope.table(step.positions)
        for layer, cache in zip(self._layers, kv, strict=True):
            x = layer.forward(x, rope, self.backend, step, cache)
        return x if self._final_norm is None else self._final_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows `[N, E]` of what the last stage's `forward` returned → `[N, V]` float32, the same on every rank."""
        if self._head is None:
            raise Bug("Only the last stage of the pipeline has an output head. This is a bug.")
        return self._head(hidden)


def _times(share: slice, factor: int) -> slice:
    return slice(share.start * factor, share.stop * factor)
