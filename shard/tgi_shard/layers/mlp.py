"""The feed-forward part of a layer. With experts: moe.py."""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from .linear import Matmul, RowParallel

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class GatedMlpLayer:
    """down(activation(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, gate_up: Matmul, down: RowParallel, activation: Activation) -> None:
        """gate_up: this rank's rows of gate, then as many of up."""
        self._gate_up, self._down, self._activation = gate_up, down, ACTIVATIONS[activation]
        self.num_bytes = gate_up.num_bytes + down.num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self._gate_up(x).chunk(2, -1)
        return self._down(self._activation(gate).mul_(up))


class PlainMlpLayer:
    """down(activation(up(x)))."""

    def __init__(self, up: Matmul, down: RowParallel, activation: Activation) -> None:
        self._up, self._down, self._activation = up, down, ACTIVATIONS[activation]
        self.num_bytes = up.num_bytes + down.num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._activation(self._up(x)))
