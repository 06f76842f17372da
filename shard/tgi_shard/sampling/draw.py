"""The draw itself: one token per row from a softmax, by Gumbel maxima (Maddison et al. 2014), in two levels.

The vocabulary is cut into blocks of 256 ids. A block is chosen by the maximum of log(its mass) plus noise of the block,
then a token inside it by the maximum of its logit plus noise of the token. That has exactly the softmax' distribution,
needs noise for V/256 + 256 numbers instead of V, and, unlike inversion of the cumulative distribution, changes its
mind about a slightly different logit only where two candidates are all but equal.

Both functions choose the same token from the same distribution, whichever form it comes in.
"""

import torch
from torch import Tensor

from .noise import gumbel

BLOCK = 256
# Blocks draw noise from indices that no token has.
_BLOCK_INDEX = 1 << 40


def padded_width(vocab_size: int) -> int:
    """V rounded up to whole blocks."""
    return -(-vocab_size // BLOCK) * BLOCK


def from_vocabulary(z: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """z `[N, V]` float32, V whole blocks, -inf = impossible → ids `[N]`, normalisers (logsumexp) `[N]`."""
    n = z.shape[0]
    top = z.amax(-1, keepdim=True)
    masses = (z - top).exp_().view(n, -1, BLOCK).sum(-1)
    block = _choose_block(masses, keys)
    inside = z.view(n, -1, BLOCK).gather(1, block.view(n, 1, 1).expand(n, 1, BLOCK)).squeeze(1)
    tokens = block.unsqueeze(1) * BLOCK + torch.arange(BLOCK, device=z.device)
    ids = block * BLOCK + (inside.double() + gumbel(keys, tokens)).argmax(-1)
    return ids, top.squeeze(1) + masses.sum(-1).log()


def from_candidates(values: Tensor, ids: Tensor, vocab_size: int, keys: Tensor) -> tuple[Tensor, Tensor]:
    """values, ids `[N, M]`: all possible tokens of each row, -inf = not one → ids `[N]`, normalisers `[N]`."""
    top = values.amax(-1, keepdim=True)
    weights = (values - top).exp_()
    blocks = ids // BLOCK
    masses = weights.new_zeros(values.shape[0], padded_width(vocab_size) // BLOCK).scatter_add_(1, blocks, weights)
    block = _choose_block(masses, keys)
    noisy = torch.where(blocks == block.unsqueeze(1), values.double() + gumbel(keys, ids), -torch.inf)
    chosen = ids.gather(1, noisy.argmax(-1, keepdim=True)).squeeze(1)
    return chosen, top.squeeze(1) + weights.sum(-1).log()


def _choose_block(masses: Tensor, keys: Tensor) -> Tensor:
    """masses `[N, B]` → block `[N]`."""
    indices = torch.arange(_BLOCK_INDEX, _BLOCK_INDEX + masses.shape[1], device=masses.device)
    return (masses.double().log() + gumbel(keys, indices)).argmax(-1)
