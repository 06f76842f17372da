"""Watermark of Kirchenbauer et al. 2023 ("A Watermark for Large Language Models", algorithm 2), with TGI's constants.

The previous token seeds a permutation of the vocabulary; its first `gamma` share is the green list, whose logits get
`delta`. The permutation is torch's CPU `randperm`, on CUDA too, so that a public detector agrees with both.
"""

from collections import OrderedDict

import torch
from torch import Tensor

HASH_KEY = 15485863
_CACHED_LISTS = 256  # green lists kept; V bytes each


class Watermark:
    """Green lists by previous token, least recently used dropped first."""

    def __init__(self, vocab_size: int, gamma: float, delta: float) -> None:
        self._vocab_size = vocab_size
        self._gamma = gamma
        self._delta = delta
        self._lists: OrderedDict[int, Tensor] = OrderedDict()

    def green_list(self, previous_token: int) -> Tensor:
        """`[V]` bool, on the CPU."""
        mask = self._lists.pop(previous_token, None)
        if mask is None:
            generator = torch.Generator().manual_seed(HASH_KEY * previous_token)
            green = torch.randperm(self._vocab_size, generator=generator)[: int(self._vocab_size * self._gamma)]
            mask = torch.zeros(self._vocab_size, dtype=torch.bool)
            mask[green] = True
        self._lists[previous_token] = mask
        if len(self._lists) > _CACHED_LISTS:
            self._lists.popitem(last=False)
        return mask

    def apply(self, logits: Tensor, rows: list[int], previous_tokens: list[int]) -> None:
        """Adds delta to the green list of each of `rows`, in place. logits `[N, V]`."""
        for row, previous_token in zip(rows, previous_tokens, strict=True):
            logits[row] += self.green_list(previous_token).to(logits.device, non_blocking=True) * self._delta
