"""One layer of the decoder: attention, feed-forward, and how the two and their norms are joined.

Each way of joining is a class with a `forward` of its own, chosen once when the model is built. Called by decoder.py.
"""

from collections.abc import Sequence

from torch import Tensor

from ..attention.base import AttentionBackend
from ..layers.rotary import Rope, RopeTable, rotate
from ..step import StepInput
from .parts import Parts
from .spec import OutputNorm, PostNorm, PreNorm, SandwichNorm, SharedNormParallel, TwoNormParallel

KvCache = tuple[Tensor, Tensor]  # one layer's key and value pool, [num_blocks, S, K, D] each


class AttentionLayer:
    def __init__(self, number: int, parts: Parts, ropes: Sequence[Rope]) -> None:
        """ropes: those of the model, in the order of the tables that the step brings."""
        spec = parts.spec
        self.spec = parts.attention_spec(number)
        self._num_qk = self.spec.num_heads + self.spec.num_kv_heads
        position = spec.layers[number].position
        self._rope = ropes.index(position) if isinstance(position, Rope) else None
        self._clip = spec.attention.qkv_clip
        self._qkv, self._qk_norm, self._out = parts.qkv(number), parts.qk_norm(number), parts.out(number)
        norm_bytes = 0 if self._qk_norm is None else self._qk_norm.num_bytes
        self.num_bytes = self._qkv.num_bytes + norm_bytes + self._out.num_bytes

    def __call__(
        self, x: Tensor, ropes: Sequence[RopeTable], backend: AttentionBackend, step: StepInput, kv: KvCache
    ) -> Tensor:
        """`[T, E]` → `[T, E]`; this step's keys and values are written into kv."""
        spec = self.spec
        projected = self._qkv(x)
        if self._clip is not None:
            projected.clamp_(-self._clip, self._clip)
        heads = projected.view(x.shape[0], -1, spec.head_dim)  # [T, H + 2K, D]: q, k, v
        qk, v = heads[:, : self._num_qk], heads[:, self._num_qk :]
        if self._qk_norm is not None:
            qk = self._qk_norm(qk)
        if self._rope is not None:
            qk = rotate(qk, ropes[self._rope])
        q, k = qk[:, : spec.num_heads], qk[:, spec.num_heads :]
        attended = backend.forward(q, k, v, kv, step.attention, step.attention_plan, spec)
        return self._out(attended.flatten(1))


class DecoderLayer:
    """Before-norms and sequential residuals; the other ways of joining override `forward`."""

    def __init__(self, number: int, parts: Parts, ropes: Sequence[Rope]) -> None:
        spec, names = parts.spec, parts.names
        self._parallel = parts.parallel
        self.attention, self.mlp = AttentionLayer(number, parts, ropes), parts.mlp(number)
        self._attention_norm = parts.norm(names.in_layer(number, names.attention_norm), spec.norm)
        self._mlp_norm = self._attention_norm
        norms = [self._attention_norm]
        if not isinstance(spec.residual, SharedNormParallel):
            self._mlp_norm = parts.norm(names.in_layer(number, names.mlp_norm), spec.norm)
            norms.append(self._mlp_norm)
        self._multiplier = spec.residual.multiplier if isinstance(spec.residual, PreNorm) else 1.0
        self.num_bytes = sum(part.num_bytes for part in (self.attention, self.mlp, *norms))

    def forward(
        self, x: Tensor, ropes: Sequence[RopeTable], backend: AttentionBackend, step: StepInput, kv: KvCache
    ) -> Tensor:
        """`[T, E]` → `[T, E]`; x may be overwritten."""
        x.add_(self.attention(self._attention_norm(x), ropes, backend, step, kv), alpha=self._multiplier)
        return x.add_(self.mlp(self._mlp_norm(x)), alpha=self._multiplier)


class OutputNormLayer(DecoderLayer):
    def forward(
        self, x: Tensor, ropes: Sequence[RopeTable], backend: AttentionBackend, step: StepInput, kv: KvCache
    ) -> Tensor:
        x.add_(self._attention_norm(self.attention(x, ropes, backend, step, kv)))
        return x.add_(self._mlp_norm(self.mlp(x)))


class SandwichNormLayer(DecoderLayer):
    def __init__(self, number: int, parts: Parts, ropes: Sequence[Rope]) -> None:
        super().__init__(number, parts, ropes)
        names, norm = parts.names, parts.spec.norm
        self._attention_out_norm = parts.norm(names.in_layer(number, names.attention_out_norm), norm)
        self._mlp_out_norm = parts.norm(names.in_layer(number, names.mlp_out_norm), norm)
        self.num_bytes += self._attention_out_norm.num_bytes + self._mlp_out_norm.num_bytes

    def forward(
        self, x: Tensor, ropes: Sequence[RopeTable], backend: AttentionBackend, step: StepInput, kv: KvCache
    ) -> Tensor:
        x.add_(self._attention_out_norm(self.attention(self._attention_norm(x), ropes, backend, step, kv)))
        return x.add_(self._mlp_out_norm(self.mlp(self._mlp_norm(x))))


class PostNormLayer(DecoderLayer):
    def forward(
        self, x: Tensor, ropes: Sequence[RopeTable], backend: AttentionBackend, step: StepInput, kv: KvCache
    ) -> Tensor:
        x = self._attention_norm(x.add_(self.attention(x, ropes, backend, step, kv)))
        return self._mlp_norm(x.add_(self.mlp(x)))


class TwoNormParallelLayer(DecoderLayer):
    """Attention and MLP are added on each rank, then over the ranks: one collective instead of two."""

    def forward(
        self, x: Tensor, ropes: Sequence[RopeTable], backend: AttentionBackend, step: StepInput, kv: KvCache
    ) -> Tensor:
        attended = self.attention(self._attention_norm(x), ropes, backend, step, kv)
        return x.add_(self._parallel.all_reduce(attended.add_(self.mlp(self._mlp_norm(x)))))


class SharedNormParallelLayer(DecoderLayer):
    def forward(
        self, x: Tensor, ropes: Sequence[RopeTable], backend: AttentionBackend, step: StepInput, kv: KvCache
    ) -> Tensor:
        normed = self._attention_norm(x)
        attended = self.attention(normed, ropes, backend, step, kv)
        return x.add_(self._parallel.all_reduce(attended.add_(self.mlp(normed))))


def make_layer(number: int, parts: Parts, ropes: Sequence[Rope]) -> DecoderLayer:
    match parts.spec.residual:
        case PreNorm():
            return DecoderLayer(number, parts, ropes)
        case OutputNorm():
            return OutputNormLayer(number, parts, ropes)
        case SandwichNorm():
            return SandwichNormLayer(number, parts, ropes)
        case PostNorm():
            return PostNormLayer(number, parts, ropes)
        case TwoNormParallel():
            return TwoNormParallelLayer(number, parts, ropes)
        case SharedNormParallel():
            return SharedNormParallelLayer(number, parts, ropes)
