"""Masks on the logits: exactly the allowed tokens stay possible, in exactly the rows that have a grammar."""

from typing import Any

import numpy as np
import pytest
import torch
from tgi_shard.grammar.masks import GrammarMasks
from tgi_shard.grammar.matching import Matching
from tgi_shard.parallel import Parallel


def no_vocabulary() -> Any:
    raise AssertionError("nothing is compiled here")


def matching(allowed: np.ndarray[Any, np.dtype[np.bool_]], num_words: int) -> Matching:
    """One whose mask is there; num_words: as many as its tokenizer has, which may be more than the model's head."""
    bits = np.zeros(num_words * 32, np.bool_)
    bits[: len(allowed)] = allowed
    found = Matching()
    found.words = np.packbits(bits, bitorder="little").view(np.int32)
    return found


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 1000])
@pytest.mark.parametrize("places", [[0, 1, 2, 3], [2], [3, 0]])
def test_only_what_is_allowed_stays_possible(device: torch.device, vocab_size: int, places: list[int]) -> None:
    chance = np.random.default_rng(vocab_size)
    logits = torch.from_numpy(chance.normal(size=(4, vocab_size)).astype(np.float32)).to(device)
    allowed = chance.random((len(places), vocab_size)) < 0.3
    matchings = [matching(row, -(-vocab_size // 32) + extra) for row, extra in zip(allowed, range(4), strict=False)]
    expected = logits.clone()
    for place, row in zip(places, allowed, strict=True):
        expected[place, torch.from_numpy(~row).to(device)] = -torch.inf

    GrammarMasks(no_vocabulary, vocab_size, Parallel.single()).apply(logits, places, matchings)

    assert torch.equal(logits, expected)


def test_a_row_that_cannot_go_on_has_no_token_left(device: torch.device) -> None:
    failed = matching(np.ones(40, np.bool_), 2)
    failed.error = "it cannot go on"
    logits = torch.zeros(2, 40, device=device)

    GrammarMasks(no_vocabulary, 40, Parallel.single()).apply(logits, [1], [failed])

    assert (logits[0] == 0).all()
    assert (logits[1] == -torch.inf).all()
