"""Top-k, top-p, min-p and typical-p, in this order, without sorting the vocabulary.

Min-p keeps the tokens at least so likely as a share of the most likely one: in logits, a distance from the largest.
The others are one question: what is the largest threshold t such that the tokens at or above it weigh at least so much?

    filter       value of a token                weight         target
    top-k        its logit                       1              k
    top-p        its logit                       probability    p      (probabilities after top-k)
    typical-p    -|information - entropy|        probability    p      (probabilities after top-k, top-p and min-p)

Tokens that tie with the last one kept are kept too: so the result depends on no sort order, neither between devices nor
between batches. (transformers' top-k does the same; its top-p keeps some of the ties, whichever the sort left there.)

Two implementations with equal results. `in_window` looks at the best few hundred tokens of each row and says for which
rows that was enough. `over_vocabulary` works for every distribution: it finds the thresholds by bisection over the
float32 numbers, without a sort and without waiting for the device (on CPU, where waiting is free, it first tries the
best few thousand tokens).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Tokens that `over_vocabulary` looks at on CPU before it bisects.
_FIRST_TRIED = 4096


@dataclass(frozen=True, slots=True)
class Limits:
    """Parameters of N rows. A filter that is off: top_k 0, top_p 1, log_min_p -inf, typical_p 1."""

    top_k: Tensor  # [N] int64
    top_p: Tensor  # [N] float32
    log_min_p: Tensor  # [N] float32, logarithm of min-p
    typical_p: Tensor  # [N] float32

    def select(self, rows: Tensor) -> "Limits":
        return Limits(self.top_k[rows], self.top_p[rows], self.log_min_p[rows], self.typical_p[rows])


def in_window(z: Tensor, limits: Limits, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """z `[N, V]` → values `[N, size]` (falling; removed ones are -inf), ids `[N, size]`, fits `[N]` bool.

    Where `fits` is false, tokens outside the window survive too, and the row's values mean nothing.
    """
    values, ids = z.topk(size, dim=-1)
    weights = (values - values[:, :1]).exp()
    by_k = ((limits.top_k > 0) & (limits.top_k <= size)).unsqueeze(1)
    kth = values.gather(1, (limits.top_k.clamp(1, size) - 1).unsqueeze(1))
    threshold = torch.where(by_k, kth, -torch.inf)  # [N, 1]
    by_p = (limits.top_p < 1).unsqueeze(1)
    total = (weights * (values >= threshold)).sum(-1, keepdim=True)
    if bool((by_p & ~by_k).any()):  # only the host path comes here, where looking at a value costs nothing
        total = torch.where(by_k, total, (z - values[:, :1]).exp_().sum(-1, keepdim=True))
    mass_above = weights.cumsum(-1) - weights
    kept = (mass_above < limits.top_p.unsqueeze(1) * total).sum(-1, keepdim=True).clamp(min=1)
    threshold = torch.where(by_p, threshold.maximum(values.gather(1, kept - 1)), threshold)
    threshold = threshold.maximum(values[:, :1] + limits.log_min_p.unsqueeze(1))
    fits = (values[:, -1] < threshold.squeeze(1)) & (limits.top_k <= size)
    survivors = torch.where(values < threshold, -torch.inf, values)  # keeps NaN: see _keep

    by_typical = limits.typical_p < 1
    if bool(by_typical.any()):
        atypicality, probability = _atypicality(survivors)
        ordered, order = atypicality.sort(-1)
        before = (probability.gather(1, order).cumsum(-1) < limits.typical_p.unsqueeze(1)).sum(-1, keepdim=True)
        last = ordered.gather(1, before.clamp(max=size - 1))
        removed = (atypicality > last) & by_typical.unsqueeze(1)
        survivors = survivors.masked_fill(removed, -torch.inf)
    return survivors, ids, fits


def over_vocabulary(z: Tensor, limits: Limits, *, top_k: bool, top_p: bool, min_p: bool, typical_p: bool) -> Tensor:
    """z `[N, V]` with removed tokens at -inf. The flags say which filters any row uses: the host knows."""
    if top_k:
        off = limits.top_k == 0
        target = torch.where(off, 1, limits.top_k).float()
        z = _keep(z, z, _threshold(z, None, target), off)
    if top_p:
        z = _keep(z, z, _threshold(z, z.softmax(-1), limits.top_p), limits.top_p >= 1)
    if min_p:
        z = _keep(z, z, z.amax(-1) + limits.log_min_p, limits.log_min_p == -torch.inf)
    if typical_p:
        atypicality, probability = _atypicality(z)
        typicality = atypicality.neg_()
        threshold = _threshold(typicality, probability, limits.typical_p)
        z = _keep(z, typicality, threshold, limits.typical_p >= 1)
    return z


def _keep(z: Tensor, values: Tensor, threshold: Tensor, off: Tensor) -> Tensor:
    # Written so that NaN is kept: it must reach the log-probability, where it is noticed.
    return torch.where((values < threshold.unsqueeze(1)) & ~off.unsqueeze(1), -torch.inf, z)


def _atypicality(z: Tensor) -> tuple[Tensor, Tensor]:
    """(|information - entropy|, probability) of tokens, `[N, V]`; Meister et al. 2022. Impossible ones: inf, 0."""
    logprob = z.log_softmax(-1)
    probability = logprob.exp()
    entropy = -(probability * logprob).nansum(-1, keepdim=True)  # 0 * -inf counts as 0
    return (-logprob - entropy).abs_(), probability


def _threshold(values: Tensor, weights: Tensor | None, target: Tensor) -> Tensor:
    """The largest float32 t `[N]` whose tokens (values >= t) weigh at least `target` `[N]`; weights None = 1 each.

    When all finite values together weigh less than the target (by rounding), t is below them all.
    """
    if values.device.type == "cpu" and values.shape[1] > _FIRST_TRIED:
        best, where = values.topk(_FIRST_TRIED, dim=-1)
        weight = torch.arange(1.0, _FIRST_TRIED + 1) if weights is None else weights.gather(1, where).cumsum(-1)
        before = (weight < target.unsqueeze(1)).sum(-1, keepdim=True)
        found = best.gather(1, before.clamp(max=_FIRST_TRIED - 1)).squeeze(1)
        missing = (before.squeeze(1) == _FIRST_TRIED).nonzero().squeeze(1)
        if len(missing):
            found[missing] = _bisect(values[missing], None if weights is None else weights[missing], target[missing])
        return found
    return _bisect(values, weights, target)


def _bisect(values: Tensor, weights: Tensor | None, target: Tensor) -> Tensor:
    """`_threshold` by bisection over the ordered integers that the floats' bits are: 32 passes find it exactly."""
    low = torch.full(target.shape, _LOWEST, dtype=torch.int64, device=values.device)
    high = _order(values.amax(-1)) + 1
    for _ in range(32):
        middle = low + ((high - low) >> 1)
        above = values >= _float(middle).unsqueeze(1)
        weight = above.sum(-1).float() if weights is None else (weights * above).sum(-1)
        enough = weight >= target
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return _float(low)


def _order(x: Tensor) -> Tensor:
    """float32 → int64 with the same order: negative floats' bits count the wrong way round."""
    bits = x.contiguous().view(torch.int32).long()
    return torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


def _float(order: Tensor) -> Tensor:
    """Inverse of `_order`."""
    bits = torch.where(order >= 0, order, -order | 0x80000000 - (1 << 32))
    return bits.int().view(torch.float32)


_LOWEST = -0x7F7FFFFF  # _order of the lowest finite float32
