"""One row's place in its grammar: a matcher, and the mask of the tokens that may come next.

Its methods run on a worker thread, one at a time; the engine reads the results when they are done. Called by masks.py.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tgi_proto.grammar import first_line, make_matcher

from .workers import Piece

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)


class Matching:
    """What is wrong is kept in `error`, in words for the client; nothing is raised."""

    def __init__(self) -> None:
        self.error: str | None = None
        self.words: NDArray[np.int32] | None = None  # bit i of word w: token 32 w + i may come next
        self.work: Piece | None = None  # the latest; None on ranks that have no matchers
        self._matcher: LLMatcher | None = None

    def open(self, vocabulary: Callable[[], "LLTokenizer"], grammar: str, generated: Sequence[int]) -> None:
        """Compiles the grammar, follows what the row has generated before, and computes the mask."""
        try:
            tokenizer = vocabulary()
            self._matcher = make_matcher(tokenizer, grammar)
            self.words = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
            if not self._matcher.is_error() and generated:
                self._matcher.consume_tokens(list(generated))
            self._compute()
        except Exception as error:
            self._fail(error)

    def advance(self, token_id: int) -> None:
        """Follows one more token and computes the next mask."""
        try:
            if self._matcher is not None:
                self._matcher.consume_token(token_id)
                self._compute()
        except Exception as error:
            self._fail(error)

    def _compute(self) -> None:
        """Once the grammar is complete, and for ever after, the mask allows what ends a text and nothing else."""
        matcher, words = self._matcher, self.words
        if matcher is None or words is None:
            return
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if matcher.is_error():
            self.error = f"the grammar cannot be followed further: {first_line(matcher.get_error())}"

    def _fail(self, error: Exception) -> None:
        logger.error("a grammar failed", exc_info=error)
        self.error = f"the grammar cannot be followed: {first_line(str(error))}"
