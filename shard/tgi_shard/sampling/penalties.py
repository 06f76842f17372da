"""Repetition and frequency penalty, in place on the logits of the tokens concerned; nothing of size V is made.

Repetition (Keskar et al. 2019, as in transformers): over prompt and generated tokens, a positive logit is divided by
the penalty, a negative one multiplied. Frequency (OpenAI's definition): over generated tokens, penalty times count
is subtracted.
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


def penalise(logits: Tensor, rows: Tensor, history: History, repetition: Tensor, frequency: Tensor) -> None:
    """Changes `logits[rows]`, logits `[N, V]` float32. rows `[P]` int64; repetition, frequency `[P]` float32."""
    columns = torch.arange(history.token_ids.shape[1], device=logits.device)
    known = columns < history.lengths.unsqueeze(1)  # [P, M]
    ids = torch.where(known, history.token_ids, history.token_ids[:, :1])
    where = (rows.unsqueeze(1).expand_as(ids), ids)
    # An id that occurs twice is written twice, with the same value.
    values, penalty = logits[where], repetition.unsqueeze(1)
    logits[where] = torch.where(values < 0, values * penalty, values / penalty)
    generated = known & (columns >= history.num_prompt_tokens.unsqueeze(1))
    logits.index_put_(where, -frequency.unsqueeze(1) * generated, accumulate=True)
