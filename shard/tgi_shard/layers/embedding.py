"""The embedding table and the output head, split over the ranks by vocabulary.

The vocabulary is padded so that every rank has equally many rows. On CUDA tied tables share storage. On CPU the
embedding reads rows of the mapped file, in the checkpoint's dtype, and so takes no memory beside the packed head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parallel import Parallel
from .linear import Matmul, MatmulMaker
from .weights import WeightReader

PAD_ROWS = 64  # rows per rank are a multiple, for the sake of matrix kernels


class VocabRange:
    """This rank's rows of a `[vocab, hidden]` table: start .. stop, then padding up to `rows`."""

    def __init__(self, vocab: int, parallel: Parallel) -> None:
        unit = PAD_ROWS * parallel.world_size
        self.rows = -(-vocab // unit) * PAD_ROWS
        self.start = min(parallel.rank * self.rows, vocab)
        self.stop = min(self.start + self.rows, vocab)

    def padded(self, table: Tensor, reader: WeightReader) -> Tensor:
        """A copy of these rows of the whole table `[vocab, ...]`, padded with zeros: `[rows, ...]`."""
        share, count = reader.empty(self.rows, *table.shape[1:]), self.stop - self.start
        share[:count].copy_(table[self.start : self.stop])
        share[count:].zero_()
        return share


class Embedding:
    def __init__(self, rows: Tensor, share: VocabRange, dtype: torch.dtype, parallel: Parallel, num_bytes: int) -> None:
        """rows: `[>= stop - start, hidden]`, of any floating dtype; num_bytes: what they add to this rank's memory."""
        self._rows, self._share, self._dtype, self._parallel = rows, share, dtype, parallel
        self.num_bytes = num_bytes

    def __call__(self, token_ids: Tensor) -> Tensor:
        """`[T]` → `[T, hidden]`."""
        if self._parallel.world_size == 1:
            return F.embedding(token_ids, self._rows).to(self._dtype)
        local = token_ids - self._share.start
        elsewhere = (local < 0) | (local >= self._share.stop - self._share.start)
        hidden = F.embedding(local.masked_fill(elsewhere, 0), self._rows).to(self._dtype)
        return self._parallel.all_reduce(hidden.masked_fill_(elsewhere[:, None], 0))


class Head:
    """Hidden states to logits of the whole vocabulary, on every rank."""

    def __init__(self, matmul: Matmul, vocab: int, parallel: Parallel) -> None:
        self._matmul, self._vocab, self._parallel = matmul, vocab, parallel
        self.num_bytes = matmul.num_bytes

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[N, hidden]` → `[N, vocab]` float32."""
        return self._parallel.all_gather(self._matmul(hidden))[:, : self._vocab].float()


class VocabTables:
    """Reads the embedding table and the head of one checkpoint."""

    def __init__(self, reader: WeightReader, matmuls: MatmulMaker, vocab: int, parallel: Parallel) -> None:
        self._reader, self._matmuls, self._vocab, self._parallel = reader, matmuls, vocab, parallel
        self._share = VocabRange(vocab, parallel)

    def embedding(self, module: str) -> Embedding:
        return self._embedding(self._reader.view(f"{module}.weight"))

    def head(self, module: str, bias: str | None = None) -> Head:
        """bias: the name of the whole tensor."""
        return self._head(self._padded(f"{module}.weight"), bias)

    def tied(self, module: str, bias: str | None = None) -> tuple[Embedding, Head]:
        """Both from one table; the bias is the head's."""
        if self._reader.device.type == "cpu":
            return self.embedding(module), self.head(module, bias)
        weight = self._padded(f"{module}.weight")
        return Embedding(weight, self._share, self._reader.dtype, self._parallel, 0), self._head(weight, bias)

    def _padded(self, name: str) -> Tensor:
        return self._share.padded(self._reader.view(name), self._reader)

    def _embedding(self, table: Tensor) -> Embedding:
        rows = table[self._share.start : self._share.stop]
        if self._reader.device.type == "cpu" and rows.shape[0]:
            return Embedding(rows, self._share, self._reader.dtype, self._parallel, 0)
        rows = self._share.padded(table, self._reader)
        return Embedding(rows, self._share, self._reader.dtype, self._parallel, rows.nbytes)

    def _head(self, weight: Tensor, bias: str | None) -> Head:
        matmul = self._matmuls.make(weight, None if bias is None else self._padded(bias))
        return Head(matmul, self._vocab, self._parallel)
