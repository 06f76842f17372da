"""Repetition, frequency and presence penalty, in place on the tokens concerned; nothing of size V is made.

Repetition (Keskar et al. 2019, as in transformers): over prompt and generated tokens, a positive logit is divided by
the penalty, a negative one multiplied. Frequency and presence (OpenAI's definition): over generated tokens, the one
times the token's count and the other once are subtracted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class History:
    """The tokens of P rows that have a penalty."""

    token_ids: Tensor  # [P, M] int64; entries from `lengths` on are any valid id
    lengths: Tensor  # [P] int64, >= 1
    num_prompt_tokens: Tensor  # [P] int64


@dataclass(frozen=True, slots=True)
class Penalties:
    """Of the same P rows, `[P]` float32. presence: None when no row has one."""

    repetition: Tensor
    frequency: Tensor
    presence: Tensor | None


def penalise(logits: Tensor, rows: Tensor, history: History, penalties: Penalties) -> None:
    """Changes `logits[rows]`, logits `[N, V]` float32. rows `[P]` int64."""
    columns = torch.arange(history.token_ids.shape[1], device=logits.device)
    known = columns < history.lengths.unsqueeze(1)  # [P, M]
    ids = torch.where(known, history.token_ids, history.token_ids[:, :1])
    line = rows.unsqueeze(1).expand_as(ids)
    # An id that occurs twice is written twice, with the same value.
    values, penalty = logits[line, ids], penalties.repetition.unsqueeze(1)
    logits[line, ids] = torch.where(values < 0, values * penalty, values / penalty)
    generated = known & (columns >= history.num_prompt_tokens.unsqueeze(1))
    logits.index_put_((line, ids), -penalties.frequency.unsqueeze(1) * generated, accumulate=True)
    if penalties.presence is not None:
        # The last known token is a generated one if there are any: it stands where there is none.
        last = history.token_ids.gather(1, history.lengths.unsqueeze(1) - 1)
        ids = torch.where(generated, history.token_ids, last)
        amount = penalties.presence * (history.lengths > history.num_prompt_tokens)
        logits[line, ids] = logits[line, ids] - amount.unsqueeze(1)
