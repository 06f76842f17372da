"""Matrix products with loaded weights: THE seam for native kernels and quantization.

A `LinearMethod` knows how to read one matrix of the checkpoint, split for tensor parallelism, and returns a `Matmul`
that applies it. Quantization formats are other LinearMethods; faster kernels for plain weights other Matmuls, chosen
by `MatmulMaker`. The split is made per part and before parts are stacked; each bias is read, and added, once.
"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import StartError
from ..parallel import Parallel
from .weights import WeightReader


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


class MatmulMaker:
    """Chooses the fastest Matmul for each plain weight of a model. One per model: it remembers what it measured."""

    def __init__(self) -> None:
        self._splits_single_rows: dict[tuple[torch.Size, torch.dtype], bool] = {}

    def make(self, weight: Tensor, bias: Tensor | None) -> Matmul:
        """A Matmul for a weight `[out, in]` on its device; takes the weight over."""
        if not can_pack(weight):
            return PlainMatmul(weight, bias)
        kind = (weight.shape, weight.dtype)
        matmul = PackedMatmul(weight, bias)
        if kind not in self._splits_single_rows:
            self._splits_single_rows[kind] = matmul.splits_single_rows()
        matmul.double_single_rows = self._splits_single_rows[kind]
        return matmul


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
    numbers alone and in a crowd. The exception is a single row against a long `in`, for which oneDNN splits the sum in
    some shapes: then `double_single_rows` computes it as two rows.
    """

    # Rows the layout is chosen for; a layout chosen for a single row is slower for every number of rows.
    TYPICAL_ROWS = 64
    # Results compared to see whether single rows differ; in bf16 about one in ten thousand does.
    PROBED_RESULTS = 100_000

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.bias = bias
        self.num_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self.double_single_rows = False
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, self.TYPICAL_ROWS)
        self._shape, self._dtype = weight.shape, weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        if self.double_single_rows and x.shape[0] == 1:
            return self._product(x.expand(2, -1).contiguous())[:1]
        return self._product(x)

    def splits_single_rows(self) -> bool:
        """Whether a row alone differs from the same row among others. The same for all weights of a shape and type."""
        outputs, inputs = self._shape
        rows = min(256, 2 + self.PROBED_RESULTS // outputs)
        probe = torch.arange(rows * inputs).sin().view(rows, inputs).to(self._dtype)
        together = self._product(probe)
        return any(not torch.equal(self._product(probe[i : i + 1]), together[i : i + 1]) for i in range(rows))

    def _product(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y


class DenseMethod:
    """Plain `.weight` and `.bias` tensors."""

    def __init__(self, reader: WeightReader, matmuls: MatmulMaker, transposed: bool = False) -> None:
        """transposed: the checkpoint has its weights as `[in, out]`."""
        self._reader, self._matmuls, self._transposed = reader, matmuls, transposed

    def column(self, parts: Sequence[Rows], bias: bool) -> Matmul:
        return self._matmuls.make(self._stack(parts, "weight"), self._stack(parts, "bias") if bias else None)

    def row(self, module: str, columns: slice, bias: bool) -> Matmul:
        weight = self._reader.copy(self._view(module, "weight")[:, columns])
        return self._matmuls.make(weight, self._reader.vector(f"{module}.bias") if bias else None)

    def _stack(self, parts: Sequence[Rows], suffix: str) -> Tensor:
        """One copy: each part goes from the mapped file to its place in the result."""
        views = [self._view(part.module, suffix)[part.start : part.stop] for part in parts]
        stacked = self._reader.empty(sum(view.shape[0] for view in views), *views[0].shape[1:])
        row = 0
        for view in views:
            stacked[row : row + view.shape[0]].copy_(view)
            row += view.shape[0]
        return stacked

    def _view(self, module: str, suffix: str) -> Tensor:
        view = self._reader.view(f"{module}.{suffix}")
        return view.T if self._transposed and view.dim() == 2 else view


class RowParallel:
    """A matrix whose input columns are split over the ranks: the ranks' results are summed."""

    def __init__(
        self,
        method: LinearMethod,
        module: str,
        inputs: int,
        bias: bool,
        parallel: Parallel,
        summed: Parallel | None = None,
    ) -> None:
        """inputs: columns of the whole matrix. summed: over whom results are summed here; None = over `parallel`, a
        group of one = by the caller."""
        share = split(inputs, parallel, f"the input of `{module}`")
        self._matmul = method.row(module, share, bias and parallel.rank == 0)
        self._summed = parallel if summed is None else summed
        self.num_bytes = self._matmul.num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        return self._summed.all_reduce(self._matmul(x))


def split(size: int, parallel: Parallel, what: str) -> slice:
    """This rank's share of `size` equal things. Raises StartError when they cannot be shared equally."""
    if size % parallel.world_size:
        raise StartError(f"`--num-shard` {parallel.world_size} does not divide {what} ({size}).")
    share = size // parallel.world_size
    return slice(parallel.rank * share, (parallel.rank + 1) * share)
