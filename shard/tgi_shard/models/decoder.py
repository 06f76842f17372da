"""THE decoder-only transformer: what a DecoderSpec describes, on one rank of a tensor-parallel group.

Its layers are block.py's, its two ends ends.py's; attention goes through one backend; a range of layers makes it one
stage of a pipeline. Built by models/__init__.py, called by the engine. No autograd: call it under inference_mode.
"""

from collections.abc import Sequence

from torch import Tensor

from ..attention.base import AttentionBackend, AttentionSpec
from ..errors import Bug
from ..layers.embedding import Embedding, Head, VocabTables
from ..layers.rotary import Rope, RotaryEmbedding
from ..parallel import Parallel
from ..step import StepInput
from .block import KvCache, make_layer
from .ends import InputLayer, OutputLayer
from .parts import HeadSplit, Parts, Source
from .spec import DecoderSpec

__all__ = ["Decoder", "HeadSplit", "KvCache", "Source"]


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
        layers = range(spec.num_layers) if layers is None else layers
        reader = source.reader
        self.spec, self.backend, self.dtype, self.device = spec, backend, reader.dtype, reader.device
        parts = Parts(spec, source, parallel)
        # Distinct ropes of this stage's layers; their tables are made once per step.
        positions = (spec.layers[number].position for number in layers)
        ropes = list(dict.fromkeys(position for position in positions if isinstance(position, Rope)))
        self._ropes = [RotaryEmbedding(rope, reader.device, reader.dtype) for rope in ropes]
        is_first, is_last = layers.start == 0, layers.stop == spec.num_layers
        embedding, head = _tables(parts, is_first, is_last)
        self._input = None if embedding is None else InputLayer(parts, embedding)
        self._layers = [make_layer(number, parts, ropes) for number in layers]
        self._output = None if head is None else OutputLayer(parts, head)
        held = (self._input, *self._layers, self._output)
        self.num_bytes = sum(part.num_bytes for part in held if part is not None)

    @property
    def attention_specs(self) -> list[AttentionSpec]:
        return [layer.attention.spec for layer in self._layers]

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def num_kv_heads(self) -> int:
        return self._layers[0].attention.spec.num_kv_heads

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
        x = hidden if self._input is None else self._input(step.token_ids, step.positions)
        if x is None:
            raise Bug("A later stage of the pipeline got no hidden states. This is a bug.")
        ropes = [rope.table(step.positions) for rope in self._ropes]
        for layer, cache in zip(self._layers, kv, strict=True):
            x = layer.forward(x, ropes, self.backend, step, cache)
        return x if self._output is None else self._output.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows `[N, E]` of what the last stage's `forward` returned → `[N, V]` float32, the same on every rank."""
        if self._output is None:
            raise Bug("Only the last stage of the pipeline has an output head. This is a bug.")
        return self._output.logits(hidden)


def _tables(parts: Parts, is_first: bool, is_last: bool) -> tuple[Embedding | None, Head | None]:
    """The embedding table for the first stage, the head for the last."""
    spec, names = parts.spec, parts.names
    tables = VocabTables(parts.reader, parts.matmuls, spec.vocab, parts.parallel)
    tied = spec.output.tied
    bias = f"{names.head}.bias" if spec.output.bias else None
    if is_first and is_last and tied:
        return tables.tied(names.embedding, bias)
    embedding = tables.embedding(names.embedding) if is_first else None
    head = tables.head(names.embedding if tied else names.head, bias) if is_last else None
    return embedding, head
