"""What is added to single tokens' logits: a client's `logit_bias`, and end-of-sequence held off by `min_new_tokens`.

One line per row, on the device, as wide as the longest list there has been (0 until the first): a batch's biases are
one gather and one scatter. Filled by rows.py at admission, applied by the sampler before anything else.
"""

import torch
from torch import Tensor

from .parameters import SamplingParameters

# Finite, so that a row of which nothing else is left (a grammar may allow only the end) still has a distribution.
HELD_OFF = -1e9
_ALWAYS = 2**31 - 1


class BiasTable:
    """Lines 0 .. max_rows-1. Entries beyond a row's own are (token 0, bias 0)."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._ids = torch.zeros(max_rows, 0, dtype=torch.int64, device=device)
        self._values = torch.zeros(max_rows, 0, dtype=torch.float32, device=device)
        self._until = torch.zeros(max_rows, 0, dtype=torch.int32, device=device)  # applied to so many generated tokens

    def set(self, row: int, parameters: SamplingParameters) -> None:
        """Replaces the row's line."""
        held_off = parameters.end_token_ids if parameters.min_new_tokens else ()
        ids = [token_id for token_id, _ in parameters.logit_bias] + list(held_off)
        values = [bias for _, bias in parameters.logit_bias] + [HELD_OFF] * len(held_off)
        until = [_ALWAYS] * len(parameters.logit_bias) + [parameters.min_new_tokens] * len(held_off)
        self._widen(len(ids))
        for table, line in ((self._ids, ids), (self._values, values), (self._until, until)):
            table[row] = 0
            table[row, : len(line)] = torch.tensor(line, dtype=table.dtype)

    def _widen(self, width: int) -> None:
        missing = width - self._ids.shape[1]
        if missing > 0:
            self._ids, self._values, self._until = (
                torch.nn.functional.pad(table, (0, missing)) for table in (self._ids, self._values, self._until)
            )

    def apply(self, logits: Tensor, where: Tensor, rows: Tensor, num_generated: Tensor) -> None:
        """Adds the biases of `rows` to `logits[where]`, in place.

        logits `[N, V]` float32; where, rows, num_generated (tokens so far) `[P]` int64.
        """
        ids = self._ids[rows]
        active = num_generated.unsqueeze(1) < self._until[rows]
        index = (where.unsqueeze(1).expand_as(ids), ids)
        logits.index_put_(index, self._values[rows] * active, accumulate=True)
