"""Matrix products with loaded weights: THE seam for native kernels and quantization.

A `LinearMethod` knows how to read one matrix of the checkpoint, split for tensor parallelism, and returns a `Matmul`
that applies it. Quantization formats are other LinearMethods; faster kernels for plain weights other Matmuls, chosen
in `make_matmul`. The split is made per part and before parts are stacked; each bias is read, and added, once.
"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import Checkpoint
from ..errors import StartError
from ..parallel import Parallel


class Matmul(Protocol):
    num_bytes: int  # of the weights held, bias included

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, in]` → `[T, out]`, bias included."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Output rows start .. stop of a checkpoint matrix: this rank's share of one part."""

    module: str  # name in the checkpoint without `.weight` and `.bias`
    start: int
    stop: int


class LinearMethod(Protocol):
    """How the matrices of one checkpoint format are read."""

    def column(self, parts: Sequence[Rows], bias: bool) -> Matmul:
        """The parts stacked along their output rows."""

    def row(self, module: str, columns: slice, bias: bool) -> Matmul:
        """Input columns of one matrix; its results are to be summed over the ranks, so only one rank passes `bias`."""


class DenseMethod:
    """Plain `.weight` and `.bias` tensors, converted to `dtype` on `device`."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self._checkpoint, self._device, self._dtype = checkpoint, device, dtype

    def column(self, parts: Sequence[Rows], bias: bool) -> Matmul:
        return make_matmul(self._stack(parts, "weight"), self._stack(parts, "bias") if bias else None)

    def row(self, module: str, columns: slice, bias: bool) -> Matmul:
        weight = self._checkpoint.read(f"{module}.weight")[:, columns]
        bias_vector = self._checkpoint.read(f"{module}.bias") if bias else None
        return make_matmul(
            own(weight, self._device, self._dtype),
            own(bias_vector, self._device, self._dtype) if bias_vector is not None else None,
        )

    def _stack(self, parts: Sequence[Rows], suffix: str) -> Tensor:
        """One copy: each part goes from the mapped file to its place in the result."""
        sources = [self._checkpoint.read(f"{part.module}.{suffix}")[part.start : part.stop] for part in parts]
        stacked = torch.empty(
            (sum(source.shape[0] for source in sources), *sources[0].shape[1:]), dtype=self._dtype, device=self._device
        )
        row = 0
        for source in sources:
            stacked[row : row + source.shape[0]].copy_(source)
            row += source.shape[0]
        return stacked


def own(source: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A contiguous copy of a view of the checkpoint."""
    return torch.empty(source.shape, dtype=dtype, device=device).copy_(source)


def make_matmul(weight: Tensor, bias: Tensor | None) -> Matmul:
    """The fastest Matmul for a weight `[out, in]` on its device; takes the weight over."""
    return PackedMatmul(weight, bias) if can_pack(weight) else PlainMatmul(weight, bias)


class PlainMatmul:
    """torch's own product, on any device."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.num_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has a fast kernel over a layout of its own here. Measured on x86 only, so chosen there only."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class PackedMatmul:
    """oneDNN's product over a weight it has reordered once: 1.3 to 2.6 times as fast as F.linear (docs/journal.md).

    A row's result does not depend on how many other rows there are, to the bit, so that a request computes the same
    numbers alone and in a crowd. The exception is a single row against a long `in`, where oneDNN splits the sum; where
    the weight shows that, a single row is computed as two.
    """

    # Rows the layout is chosen for; a layout chosen for a single row is slower for every number of rows.
    TYPICAL_ROWS = 64

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.bias = bias
        self.num_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, self.TYPICAL_ROWS)
        probe = torch.arange(2 * weight.shape[1]).sin().view(2, -1).to(weight.dtype)
        self._double_single_rows = not torch.equal(self._product(probe[:1]), self._product(probe)[:1])

    def __call__(self, x: Tensor) -> Tensor:
        if self._double_single_rows and x.shape[0] == 1:
            return self._product(x.expand(2, -1).contiguous())[:1]
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y


class RowParallel:
    """A matrix whose input columns are split over the ranks: the ranks' results are summed."""

    def __init__(self, method: LinearMethod, module: str, inputs: int, bias: bool, parallel: Parallel) -> None:
        """inputs: columns of the whole matrix."""
        share = split(inputs, parallel, f"the input of `{module}`")
        self._matmul = method.row(module, share, bias and parallel.rank == 0)
        self._parallel = parallel
        self.num_bytes = self._matmul.num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        return self._parallel.all_reduce(self._matmul(x))


def split(size: int, parallel: Parallel, what: str) -> slice:
    """This rank's share of `size` equal things. Raises StartError when they cannot be shared equally."""
    if size % parallel.world_size:
        raise StartError(f"`--num-shard` {parallel.world_size} does not divide {what} ({size}).")
    share = size // parallel.world_size
    return slice(parallel.rank * share, (parallel.rank + 1) * share)
