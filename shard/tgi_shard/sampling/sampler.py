"""Logits to tokens: the ordered list of what happens to a row's distribution, for all rows of a step at once.

    bias → watermark → repetition, frequency and presence penalty → temperature → top-k → top-p → min-p → typical-p
    → draw, or the maximum

(TGI's order; what TGI did not have stands where transformers has it.) A log-probability is that of the distribution the
token was drawn from. No generator state, no per-row Python except for rows that ask for a watermark or for top tokens;
a feature no row uses costs nothing.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..upload import upload
from . import draw, noise, truncation
from .bias import BiasTable
from .logprobs import TopTokens, top_tokens
from .penalties import History, Penalties, penalise
from .watermark import Watermark

# Tokens looked at first when a row truncates. On CPU only: whether they suffice has to be read back.
WINDOW = 256
# Tokens of history gathered at once for penalties, padding included: bounds memory when contexts are long.
_MAX_HISTORY = 1 << 21


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The N rows of a step that get a token."""

    params: NDArray[np.void]  # [N] parameters.RECORD
    rows: NDArray[np.int64]  # [N] places in `tokens`
    num_tokens: NDArray[np.int64]  # [N] known tokens = position of the token to be chosen
    num_prompt_tokens: NDArray[np.int64]  # [N]
    tokens: Tensor  # [max rows, max tokens] int32, every row's history
    bias: BiasTable  # every row's


@dataclass(frozen=True, slots=True)
class Sampled:
    """Results on the device. A row whose logits were not finite has a log-probability that is not finite."""

    ids: Tensor  # [N] int64
    logprobs: Tensor  # [N] float32
    top: dict[int, TopTokens] = field(default_factory=dict)  # for the rows of the batch that want them


@dataclass(frozen=True, slots=True)
class _Choice:
    """Chosen tokens of n rows, and the distributions they come from."""

    tokens: Tensor  # [n] int64
    z: Tensor  # [n, K] logits, -inf = impossible
    norm: Tensor  # [n] their logsumexp
    ids: Tensor | None = None  # [n, K] the token of each column; None: column = id


class Sampler:
    """One per engine. Holds nothing between steps but the watermark's cached lists."""

    def __init__(self, vocab_size: int, watermark: Watermark, window: int = WINDOW) -> None:
        """window: 0 = always look at the whole vocabulary."""
        self._vocab_size = vocab_size
        self._watermark = watermark
        self._window = window

    def __call__(self, logits: Tensor, batch: SamplingBatch) -> Sampled:
        """logits `[N, V]` float32, which it may overwrite."""
        self._adjust(logits, batch)
        params, n = batch.params, len(batch.params)
        out = Sampled(torch.empty(n, dtype=torch.int64, device=logits.device), logits.new_empty(n))
        samples, truncates = params["samples"], params["truncates"]
        everywhere = np.arange(n)
        self._greedy(logits, everywhere[~samples], batch, out)
        self._drawn(logits, everywhere[samples & ~truncates], batch, out)
        self._truncated(logits, everywhere[truncates], batch, out)
        return out

    def _adjust(self, logits: Tensor, batch: SamplingBatch) -> None:
        """Biases, watermark and penalties, in place."""
        params = batch.params
        if params["biased"].any() or params["min_new_tokens"].any():
            self._bias(logits, batch)
        if params["watermark"].any():
            marked = np.flatnonzero(params["watermark"])
            rows, last = upload([batch.rows[marked], batch.num_tokens[marked] - 1], logits.device)
            self._watermark.apply(logits, marked.tolist(), batch.tokens[rows, last].tolist())
        if params["penalises"].any():
            index = np.flatnonzero(params["penalises"])
            part = max(1, _MAX_HISTORY // int(batch.num_tokens[index].max()))
            for start in range(0, len(index), part):
                self._penalise(logits, index[start : start + part], batch)

    def _bias(self, logits: Tensor, batch: SamplingBatch) -> None:
        generated = batch.num_tokens - batch.num_prompt_tokens
        index = np.flatnonzero(batch.params["biased"] | (generated < batch.params["min_new_tokens"]))
        if len(index):
            batch.bias.apply(logits, *upload([index, batch.rows[index], generated[index]], logits.device))

    def _penalise(self, logits: Tensor, index: NDArray[np.int64], batch: SamplingBatch) -> None:
        lengths = batch.num_tokens[index]
        arrays: list[NDArray[np.generic]] = [index, batch.rows[index], lengths, batch.num_prompt_tokens[index]]
        arrays += [batch.params[f"{name}_penalty"][index] for name in ("repetition", "frequency", "presence")]
        where, rows, known, prompts, repetition, frequency, presence = upload(arrays, logits.device)
        history = batch.tokens[:, : int(lengths.max())].index_select(0, rows).long()
        used = batch.params["presence_penalty"][index].any()
        penalties = Penalties(repetition, frequency, presence if used else None)
        penalise(logits, where, History(history, known, prompts), penalties)

    def _greedy(self, logits: Tensor, index: NDArray[np.int64], batch: SamplingBatch, out: Sampled) -> None:
        if len(index) == 0:
            return
        z = _rows_of(logits, index)
        self._put(out, index, batch, _Choice(z.argmax(-1), z.log_softmax(-1), z.new_zeros(len(index))))

    def _drawn(self, logits: Tensor, index: NDArray[np.int64], batch: SamplingBatch, out: Sampled) -> None:
        if len(index) == 0:
            return
        z = self._scaled(logits, index, batch)
        ids, norm = draw.from_vocabulary(z, self._keys(index, batch, z.device))
        self._put(out, index, batch, _Choice(ids, z, norm))

    def _truncated(self, logits: Tensor, index: NDArray[np.int64], batch: SamplingBatch, out: Sampled) -> None:
        if len(index) == 0:
            return
        z = self._scaled(logits, index, batch)
        names = ("top_k", "top_p", "log_min_p", "typical_p")
        limits = truncation.Limits(*upload([batch.params[name][index] for name in names], z.device))
        if z.device.type == "cpu" and 0 < self._window < self._vocab_size:
            z, limits, index = self._from_window(z, limits, index, batch, out)
        if len(index) == 0:
            return
        params = batch.params[index]
        uses = {"top_k": (params["top_k"] > 0).any(), "top_p": (params["top_p"] < 1).any()}
        uses |= {"min_p": (params["log_min_p"] > -np.inf).any(), "typical_p": (params["typical_p"] < 1).any()}
        z = truncation.over_vocabulary(z, limits, **{name: bool(used) for name, used in uses.items()})
        ids, norm = draw.from_vocabulary(z, self._keys(index, batch, z.device))
        self._put(out, index, batch, _Choice(ids, z, norm))

    def _from_window(
        self,
        z: Tensor,
        limits: truncation.Limits,
        index: NDArray[np.int64],
        batch: SamplingBatch,
        out: Sampled,
    ) -> tuple[Tensor, truncation.Limits, NDArray[np.int64]]:
        """Draws for the rows whose survivors are in the window; returns what is left of z, limits and index."""
        params = batch.params[index]
        tried = ((params["top_k"] > 0) & (params["top_k"] <= self._window)) | (params["top_p"] < 1)
        tried |= params["log_min_p"] > -np.inf
        if not tried.any():
            return z, limits, index
        rows = torch.from_numpy(np.flatnonzero(tried))
        every = bool(tried.all())
        values, ids, fits = truncation.in_window(z if every else z[rows], limits.select(rows), self._window)
        fitting = rows[fits].numpy()
        if len(fitting):
            if len(fitting) < len(values):
                values, ids = values[fits], ids[fits]
            done = index[fitting]
            chosen, norm = draw.from_candidates(values, ids, self._vocab_size, self._keys(done, batch, z.device))
            self._put(out, done, batch, _Choice(chosen, values, norm, ids))
        is_left = np.ones(len(index), np.bool_)
        is_left[fitting] = False
        left = np.flatnonzero(is_left)
        if len(left) == 0:
            return z, limits, index[left]
        keep = torch.from_numpy(left)
        return z[keep], limits.select(keep), index[left]

    def _scaled(self, logits: Tensor, index: NDArray[np.int64], batch: SamplingBatch) -> Tensor:
        """`[n, V rounded up to whole blocks]`: logits over temperature, -inf in the columns that are no token."""
        z = logits.new_full((len(index), draw.padded_width(self._vocab_size)), -torch.inf)
        (temperature,) = upload([batch.params["temperature"][index]], logits.device)
        torch.div(_rows_of(logits, index), temperature.unsqueeze(1), out=z[:, : self._vocab_size])
        return z

    def _keys(self, index: NDArray[np.int64], batch: SamplingBatch, device: torch.device) -> Tensor:
        return upload([noise.keys(batch.params["seed"][index], batch.num_tokens[index])], device)[0]

    def _put(self, out: Sampled, index: NDArray[np.int64], batch: SamplingBatch, choice: _Choice) -> None:
        """Stores the tokens of rows `index`, their log-probabilities, and the top tokens of those that want them."""
        chosen, ids = choice.tokens.unsqueeze(1), choice.ids
        column = chosen if ids is None else (ids == chosen).int().argmax(-1, keepdim=True)
        (where,) = upload([index], choice.z.device)
        out.ids[where] = choice.tokens
        out.logprobs[where] = choice.z.gather(1, column).squeeze(1) - choice.norm
        wanted = batch.params["top_n"][index]
        if wanted.any():
            some = np.flatnonzero(wanted)
            pick, counts = upload([some, wanted[some]], choice.z.device)
            scores = choice.z[pick] - choice.norm[pick].unsqueeze(1)
            found = top_tokens(scores, None if ids is None else ids[pick], counts)
            out.top.update(zip(index[some].tolist(), found, strict=True))


def _rows_of(logits: Tensor, index: NDArray[np.int64]) -> Tensor:
    """logits `[n, V]` of the rows in `index`; not copied when these are all of them."""
    return logits if len(index) == logits.shape[0] else logits[upload([index], logits.device)[0]]
