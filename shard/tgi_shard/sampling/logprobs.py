"""Log-probabilities beside the chosen token's: the most likely alternatives, and those of a prompt's own tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

# [n, V] float32 logits held at once for prompt log-probabilities, in elements: 64 MiB.
_MAX_ELEMENTS = 1 << 24

TopTokens = list[tuple[int, float]]


def top_tokens(logprobs: Tensor, ids: Tensor | None, wanted: Tensor) -> list[TopTokens]:
    """The `wanted[n]` most likely tokens of each row, and every tie with the last of them, best first, ties by id.

    logprobs `[N, K]` float32, -inf = impossible (never returned); ids `[N, K]`, None when column = id; wanted `[N]`
    >= 1. Waits for the device.
    """
    best = logprobs.topk(min(int(wanted.max()), logprobs.shape[1]), dim=-1).values
    last = best.gather(1, (wanted.clamp(max=best.shape[1]) - 1).unsqueeze(1))
    chosen = (logprobs >= last) & (logprobs > -torch.inf)
    rows, columns = chosen.nonzero(as_tuple=True)
    values = logprobs[rows, columns].tolist()
    tokens = (columns if ids is None else ids[rows, columns]).tolist()
    result: list[TopTokens] = [[] for _ in range(logprobs.shape[0])]
    for row, token, value in zip(rows.tolist(), tokens, values, strict=True):
        result[row].append((token, value))
    for entries in result:
        entries.sort(key=lambda entry: (-entry[1], entry[0]))
    return result


def of_targets(
    logits_of: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    vocab_size: int,
    wanted: Tensor | None = None,
) -> tuple[Tensor, list[TopTokens]]:
    """Log-probability of each target under the model's raw distribution, and the most likely tokens in its place.

    hidden `[P, E]`, targets `[P]`, wanted `[P]` top tokens (0 = none; None = nobody wants any) → `[P]` float32, P lists
    ([] when nobody wants any).
    logits_of: hidden `[n, E]` → logits `[n, V]` float32; called on parts small enough that they fit 64 MiB.
    """
    part = max(1, _MAX_ELEMENTS // vocab_size)
    result = torch.empty(targets.shape[0], dtype=torch.float32, device=hidden.device)
    top: list[TopTokens] = [] if wanted is None else [[] for _ in range(targets.shape[0])]
    for start in range(0, targets.shape[0], part):
        logits = logits_of(hidden[start : start + part])
        norm = logits.logsumexp(-1)
        chosen = logits.gather(1, targets[start : start + part].unsqueeze(1)).squeeze(1)
        result[start : start + part] = chosen - norm
        if wanted is not None:
            some = wanted[start : start + part].nonzero().squeeze(1)
            if len(some):
                found = top_tokens(logits[some] - norm[some].unsqueeze(1), None, wanted[start + some])
                for place, tokens in zip(some.tolist(), found, strict=True):
                    top[start + place] = tokens
    return result, top
