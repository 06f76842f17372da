"""The grammars of all rows of a rank: their masks are computed while the model runs, and applied to the logits.

Rank 0 alone has matchers; its masks are broadcast, so every rank chooses among the same tokens. A mask is computed on a
thread from the moment the row's last token is known, which is while the next step's forward pass runs; `apply` waits
for what is not ready. A row that cannot go on gets an empty mask: then its log-probability is not finite on any rank,
which is how the engine finds rows that failed.

Called by rows.py (begin) and engine.py (apply, advance); a step without grammars never comes here.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..parallel import Parallel
from ..upload import upload
from .matching import Matching
from .workers import Workers

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# A mask takes 20 µs to 20 ms, and the router has tried the grammar; this is for what got past it.
DEADLINE_S = 30.0
_NUM_THREADS = 4


class GrammarMasks:
    """One per engine. Not thread-safe: the engine thread's."""

    def __init__(
        self,
        load: Callable[[], "LLTokenizer"],
        vocab_size: int,
        parallel: Parallel,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        """load: the vocabulary; called once, when the first grammar comes. deadline_s: for all masks of one step."""
        self._load = load
        self._vocab_size = vocab_size
        self._parallel = parallel
        self._deadline_s = deadline_s
        self._workers = Workers(_NUM_THREADS)
        self._tokenizer: LLTokenizer | None = None
        self._loading = threading.Lock()

    def begin(self, grammar: str, generated: Sequence[int]) -> Matching:
        """A row's grammar, after the tokens it has generated before it was preempted or its shard died."""
        matching = Matching()
        if self._parallel.rank == 0:
            matching.work = self._workers.submit(lambda: matching.open(self._vocabulary, grammar, generated))
        return matching

    def advance(self, matching: Matching, token_id: int) -> None:
        """The row has one more token."""
        if self._parallel.rank == 0 and matching.error is None:
            matching.work = self._workers.submit(lambda: matching.advance(token_id))

    def apply(self, logits: Tensor, places: Sequence[int], matchings: Sequence[Matching]) -> None:
        """Makes impossible, in rows `places` of logits `[N, V]`, what their grammars do not allow now."""
        words = np.zeros((len(places), -(-self._vocab_size // 32)), np.int32)
        if self._parallel.rank == 0:
            self._wait(matchings)
            for row, matching in zip(words, matchings, strict=True):
                if matching.error is None and matching.words is not None:
                    row[:] = matching.words[: len(row)]
        where, bits = upload([np.array(places, np.int64), words], logits.device)
        refused = _zeros(self._parallel.broadcast(bits))[:, : self._vocab_size]
        if logits.device.type == "cpu":  # no copy of the rows, which are the largest thing here
            for place, row in zip(places, refused, strict=True):
                logits[place].masked_fill_(row, -torch.inf)
        else:
            logits[where] = logits[where].masked_fill_(refused, -torch.inf)

    def _wait(self, matchings: Sequence[Matching]) -> None:
        """Until every mask is there. A row whose mask does not come fails; its thread is left to itself."""
        end = time.monotonic() + self._deadline_s
        for matching in matchings:
            if matching.work is None or matching.work.wait(max(0.0, end - time.monotonic())):
                continue
            if matching.work.give_up():
                self._workers.replace_one()
            matching.error = f"the grammar took more than {self._deadline_s:g} s for one token"

    def _vocabulary(self) -> "LLTokenizer":
        with self._loading:
            if self._tokenizer is None:
                self._tokenizer = self._load()
            return self._tokenizer


def _zeros(bits: Tensor) -> Tensor:
    """bits `[G, W]` int32 → `[G, 32 W]` bool: true where a bit is not set."""
    if bits.device.type == "cpu":  # ten times as fast as shifting
        return torch.from_numpy(np.unpackbits(bits.numpy().view(np.uint8), axis=1, bitorder="little")) == 0
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    return ((bits.unsqueeze(-1) >> shifts) & 1).flatten(1) == 0
