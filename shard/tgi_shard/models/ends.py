"""The two ends of the decoder: token ids to hidden states, and hidden states to logits. Called by decoder.py."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.embedding import Embedding, Head
from .parts import Parts


class InputLayer:
    def __init__(self, parts: Parts, embedding: Embedding) -> None:
        spec, names = parts.spec.input, parts.names
        self._embedding = embedding
        # Rounded to the model's type as transformers rounds Gemma's.
        self._scale = float(torch.tensor(spec.scale, dtype=parts.reader.dtype)) if spec.scale != 1.0 else None
        self._project = None if spec.width is None else parts.whole(names.project_in, parts.spec.hidden)
        self._positions: Tensor | None = None
        if spec.positions is not None:
            self._positions = parts.reader.vector(f"{names.positions}.weight")[spec.positions.offset :]
        self._norm = None if spec.norm is None else parts.norm(names.embedding_norm, spec.norm)
        parts_held = (embedding, self._project, self._norm)
        self.num_bytes = sum(part.num_bytes for part in parts_held if part is not None)
        self.num_bytes += 0 if self._positions is None else self._positions.nbytes

    def __call__(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """`[T]`, `[T]` → `[T, E]`, free to be overwritten."""
        x = self._embedding(token_ids)
        if self._scale is not None:
            x.mul_(self._scale)
        if self._project is not None:
            x = self._project(x)
        if self._positions is not None:
            x.add_(F.embedding(positions, self._positions))
        return x if self._norm is None else self._norm(x)


class OutputLayer:
    def __init__(self, parts: Parts, head: Head) -> None:
        spec, names = parts.spec.output, parts.names
        self._head, self._scale, self._softcap = head, spec.scale, spec.softcap
        self._norm = None if spec.norm is None else parts.norm(names.final_norm, spec.norm)
        width = parts.spec.input.width
        self._project = None if width is None else parts.whole(names.project_out, width)
        self.num_bytes = sum(part.num_bytes for part in (head, self._norm, self._project) if part is not None)

    def norm(self, x: Tensor) -> Tensor:
        """The final norm of `[T, E]`."""
        return x if self._norm is None else self._norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed `[N, E]` → `[N, V]` float32, the same on every rank, free to be overwritten."""
        if self._project is not None:
            hidden = self._project(hidden)
        logits = self._head(hidden)
        if self._scale != 1.0:
            logits.mul_(self._scale)
        if self._softcap is not None:
            logits.div_(self._softcap).tanh_().mul_(self._softcap)
        return logits
