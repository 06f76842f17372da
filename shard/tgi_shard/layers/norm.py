"""Normalization of hidden states and of heads: `[..., n]` → the same shape, over the last dimension.

Weights may have more dimensions than one, `[heads, D]`, when heads have weights of their own.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parallel import Parallel


class NormLayer(Protocol):
    num_bytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """x is left as it is."""


class RmsNormLayer:
    """RMS norm, accumulated in fp32 as transformers' LlamaRMSNorm does. weight: `[..., n]`, broadcast against x."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self._eps = weight, eps
        self._size = weight.shape[-1:]
        self.num_bytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 1:
            return F.rms_norm(x, self._size, self.weight, self._eps)
        return F.rms_norm(x, self._size, None, self._eps) * self.weight


class Float32RmsNormLayer:
    """RMS norm whose weight is float32 and is applied in float32: Gemma's 1 + w would lose w in half precision."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._layer = RmsNormLayer(weight, eps)
        self.num_bytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return self._layer(x.float()).to(x.dtype)


class LayerNormLayer:
    """(x - mean) / deviation * weight + bias, with either, both or none of the two."""

    def __init__(self, size: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        self._size, self._weight, self._bias, self._eps = (size,), weight, bias, eps
        self.num_bytes = sum(part.nbytes for part in (weight, bias) if part is not None)

    def __call__(self, x: Tensor) -> Tensor:
        if self._weight is None or self._weight.dim() == 1:
            return F.layer_norm(x, self._size, self._weight, self._bias, self._eps)
        x = F.layer_norm(x, self._size, None, None, self._eps) * self._weight
        return x if self._bias is None else x.add_(self._bias)


class WideRmsNormLayer:
    """RMS norm over all query heads of a token at once, and over all its key heads: what a rank lacks is summed up.

    Takes queries and keys together, `[T, H + K, D]`.
    """

    def __init__(self, q: Tensor, k: Tensor, eps: float, parallel: Parallel) -> None:
        """This rank's weights: q `[H, D]`, k `[K, D]`."""
        self._weight, self._eps, self._parallel = torch.cat((q, k)), eps, parallel
        self._num_heads = q.shape[0]
        # How many numbers are summed over all ranks; a key head that two ranks share is summed, and counted, twice.
        totals = [parallel.world_size * part.numel() for part in (q, k)]
        self._totals = torch.tensor(totals, dtype=torch.float32, device=q.device)
        self._kinds = torch.tensor([0] * q.shape[0] + [1] * k.shape[0], device=q.device)
        self.num_bytes = self._weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        exact = x.float()
        squares = exact.square().sum(-1)  # [T, H + K]
        sums = torch.stack((squares[:, : self._num_heads].sum(-1), squares[:, self._num_heads :].sum(-1)), -1)
        scale = torch.rsqrt(self._parallel.all_reduce(sums) / self._totals + self._eps)  # [T, 2]
        return (exact * scale[:, self._kinds].unsqueeze(-1) * self._weight).to(x.dtype)
