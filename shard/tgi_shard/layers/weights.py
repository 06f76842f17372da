"""Tensors of a checkpoint, on the model's device and in its dtype. What the layers read their weights with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class WeightReader:
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype

    def view(self, name: str) -> Tensor:
        """The tensor in the mapped file, in the checkpoint's dtype."""
        return self.checkpoint.read(name)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def copy(self, view: Tensor) -> Tensor:
        """A contiguous copy of (a slice of) a view."""
        return self.empty(*view.shape).copy_(view)

    def vector(self, name: str) -> Tensor:
        return self.copy(self.view(name))
