"""Normalization of hidden states and of heads."""

import torch
import torch.nn.functional as F
from torch import Tensor


class RmsNormLayer:
    """RMS norm over the last dimension, accumulated in fp32 as transformers' LlamaRMSNorm does.

    weight: `[..., n]`, broadcast against x; more than one dimension when heads have weights of their own.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self._eps = weight, eps
        self._size = weight.shape[-1:]
        self.num_bytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 1:
            return F.rms_norm(x, self._size, self.weight, self._eps)
        return F.rms_norm(x, self._size, None, self._eps) * self.weight


def stack_heads(norm_weights: list[tuple[Tensor, int]]) -> Tensor:
    """One row of weights per head, from (weight `[D]`, number of heads) pairs → `[heads, D]`."""
    return torch.cat([weight.expand(heads, -1) for weight, heads in norm_weights])
