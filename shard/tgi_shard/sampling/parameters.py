"""How each row chooses its tokens, as one numpy record per row: a batch's parameters are one fancy index away.

Filled by rows.py when a request is admitted, read by the sampler. Ranges are checked in `record`.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import RowProblem

MAX_BIASES = 1024  # entries of `logit_bias`; the router refuses more

# One row's parameters. The last five are derived: they say which parts of the sampler the row needs at all.
RECORD = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int64),  # 0 = off
        ("top_p", np.float32),
        ("typical_p", np.float32),
        ("repetition_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("log_min_p", np.float32),  # -inf = off
        ("min_new_tokens", np.int64),
        ("seed", np.int64),  # the bits of the unsigned seed
        ("top_n", np.int64),
        ("watermark", np.bool_),
        ("samples", np.bool_),  # draws; otherwise the most likely token is taken
        ("truncates", np.bool_),  # top-k, top-p, min-p or typical-p
        ("penalises", np.bool_),
        ("biased", np.bool_),  # has a logit bias
    ]
)


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """The fields of the wire's SamplingParameters, whose comments define them, and `top_n_tokens`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    do_sample: bool = False
    seed: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_new_tokens: int = 0
    end_token_ids: tuple[int, ...] = ()
    watermark: bool = False
    top_n: int = 0

    def record(self) -> NDArray[np.void]:
        """A RECORD scalar array. Raises RowProblem when a value is out of range."""
        self._check()
        truncates = self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0 or self.typical_p < 1.0
        record = np.zeros((), RECORD)
        record["temperature"] = self.temperature
        record["top_k"] = self.top_k
        record["top_p"] = self.top_p
        record["typical_p"] = self.typical_p
        record["repetition_penalty"] = self.repetition_penalty
        record["frequency_penalty"] = self.frequency_penalty
        record["presence_penalty"] = self.presence_penalty
        record["log_min_p"] = math.log(self.min_p) if self.min_p > 0.0 else -math.inf
        record["min_new_tokens"] = self.min_new_tokens
        record["seed"] = np.uint64(self.seed).astype(np.int64)
        record["top_n"] = self.top_n
        record["watermark"] = self.watermark
        record["samples"] = self.do_sample or truncates or self.temperature != 1.0
        record["truncates"] = truncates
        additive = self.frequency_penalty != 0.0 or self.presence_penalty != 0.0
        record["penalises"] = self.repetition_penalty != 1.0 or additive
        record["biased"] = bool(self.logit_bias)
        return record

    def _check(self) -> None:
        positive = {"temperature": self.temperature, "repetition_penalty": self.repetition_penalty}
        for name, value in positive.items():
            if not (value > 0.0 and math.isfinite(value)):
                raise RowProblem(f"`{name}` must be a finite number > 0, given: {value}")
        for name, value in {"top_p": self.top_p, "typical_p": self.typical_p}.items():
            if not 0.0 < value <= 1.0:
                raise RowProblem(f"`{name}` must be > 0 and <= 1, given: {value}")
        for name, value in {"frequency": self.frequency_penalty, "presence": self.presence_penalty}.items():
            if not -2.0 <= value <= 2.0:
                raise RowProblem(f"`{name}_penalty` must be >= -2 and <= 2, given: {value}")
        if not 0.0 <= self.min_p <= 1.0:
            raise RowProblem(f"`min_p` must be >= 0 and <= 1, given: {self.min_p}")
        if len(self.logit_bias) > MAX_BIASES:
            raise RowProblem(f"`logit_bias` must have at most {MAX_BIASES} entries, given: {len(self.logit_bias)}")
        for token_id, bias in self.logit_bias:
            if not math.isfinite(bias):
                raise RowProblem(f"`logit_bias` must be finite numbers, given: {bias} for token {token_id}")
