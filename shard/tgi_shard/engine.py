"""The inference step: `Engine.step` is everything that happens between a plan and its answer.

Called by server.py, in order, from one thread; knows rows, model, KV pool and sampler, and nothing of gRPC.
"""

import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tgi_proto import generate_pb2 as pb
from torch import Tensor

from .attention.base import AttentionBackend, AttentionSpec
from .errors import StepOrder
from .faults import Faults
from .kv_cache import KvCache
from .rows import Row, RowTable, StepBatch
from .sampling import logprobs
from .sampling.sampler import Sampled, Sampler
from .step import StepInput


class Model(Protocol):
    """What the engine needs of a model; models/decoder.py is the one there is."""

    backend: AttentionBackend

    @property
    def attention_specs(self) -> Sequence[AttentionSpec]:
        """One per layer."""

    @property
    def vocab_size(self) -> int:
        """V"""

    def forward(self, step: StepInput, kv: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Hidden states `[T, E]`, KV written."""

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden `[N, E]` → `[N, V]` float32, the same on every rank, free to be overwritten."""


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """One row's prompt log-probabilities from this step: of prompt tokens [start, start + len)."""

    start: int
    values: list[float]
    top: list[logprobs.TopTokens]  # of each; [] when the row wants none


class Engine:
    """Owns rows and KV of one rank. All ranks take the same steps, so every decision here is the same on every rank."""

    def __init__(self, model: Model, kv: KvCache, rows: RowTable, sampler: Sampler, faults: Faults, rank: int) -> None:
        self._model = model
        self._kv = kv
        self._rows = rows
        self._sampler = sampler
        self._faults = faults
        self._rank = rank
        self._device = kv.layers[0][0].device
        self._specs = list(dict.fromkeys(model.attention_specs))
        self._next_step = 1

    def reset(self) -> None:
        """Forgets every row; the next step is number 1."""
        self._rows.reset()
        self._next_step = 1

    @torch.inference_mode()
    def step(self, admissions: Iterable[pb.Admission], plan: pb.StepPlan) -> pb.StepResponse:
        """Executes one step. Raises StepOrder when it is not the next one; any other exception ends the process."""
        if plan.step != self._next_step:
            raise StepOrder(f"step {plan.step} came, step {self._next_step} is next")
        self._faults.hit("step")
        if self._device.type == "cuda":  # the current device belongs to the thread, and Triton launches there
            torch.cuda.set_device(self._device)
        errors = self._rows.apply(admissions, plan)
        batch = self._rows.gather()
        started = time.perf_counter_ns()
        response = pb.StepResponse(step=plan.step, errors=errors)
        if batch is not None:
            hidden = self._model.forward(self._step_input(batch), self._kv.layers)
            prompts = self._prompt_logprobs(batch, hidden)
            sampled = self._sample(batch, hidden)
            self._rows.record(batch, sampled.ids)
            self._report(response, batch, sampled, prompts)
        response.forward_ns = time.perf_counter_ns() - started
        self._next_step += 1
        return response

    def _step_input(self, batch: StepBatch) -> StepInput:
        plan = self._model.backend.plan(batch.attention, self._specs)
        return StepInput(batch.token_ids, batch.positions, batch.attention, plan)

    def _sample(self, batch: StepBatch, hidden: Tensor) -> Sampled:
        if not batch.sampling_rows:  # the same on every rank, so nobody waits in the head's collective
            return Sampled(torch.empty(0, dtype=torch.int64, device=hidden.device), hidden.new_empty(0))
        logits = self._model.logits(hidden[batch.last_tokens])
        if self._faults.armed("row.logits"):
            for i, row in enumerate(batch.sampling_rows):
                if self._faults.hit("row.logits", self._rows.prompt_tokens(row, 0, row.num_tokens).tolist()):
                    logits[i] = torch.nan
        if batch.grammars and self._rows.grammars is not None:
            places, matchings = zip(*batch.grammars, strict=True)
            self._rows.grammars.apply(logits, places, matchings)
        return self._sampler(logits, batch.sampling)

    def _prompt_logprobs(self, batch: StepBatch, hidden: Tensor) -> dict[int, PromptLogprobs]:
        """By request id. A prompt token's log-probability comes from the hidden state of the token before it."""
        parts: list[tuple[Row, int, int]] = []  # row, first prompt token, number
        sources: list[Tensor] = []
        targets: list[Tensor] = []
        wanted: list[Tensor] = []
        offset = 0
        for row, num_tokens in zip(batch.rows, batch.attention.query_lengths, strict=True):
            start = row.num_computed_tokens + 1
            count = min(start + num_tokens, row.num_prompt_tokens) - start
            if row.prompt_logprobs and count > 0:
                parts.append((row, start, count))
                sources.append(hidden[offset : offset + count])
                targets.append(self._rows.prompt_tokens(row, start, start + count))
                wanted.append(torch.full((count,), row.prompt_top_n, device=hidden.device))
            offset += num_tokens
        if not parts:
            return {}
        model = self._model
        # Only rank 0 reports.
        tops = torch.cat(wanted) if self._rank == 0 and any(row.prompt_top_n for row, _, _ in parts) else None
        found, top = logprobs.of_targets(model.logits, torch.cat(sources), torch.cat(targets), model.vocab_size, tops)
        values, result, offset = found.tolist(), {}, 0
        for row, start, count in parts:
            mine = slice(offset, offset + count)
            result[row.request_id] = PromptLogprobs(start, values[mine], top[mine] if row.prompt_top_n else [])
            offset += count
        return result

    def _report(
        self, response: pb.StepResponse, batch: StepBatch, sampled: Sampled, prompts: dict[int, PromptLogprobs]
    ) -> None:
        """Reads the results back, the one place where the device is waited for, and fills the answer."""
        # float64 holds ids and float32 log-probabilities exactly: one transfer for both.
        both = torch.stack([sampled.ids.double(), sampled.logprobs.double()]).cpu().numpy()
        ids, values = both[0].astype(np.int64), both[1]
        finite = np.isfinite(values)
        places = {row.request_id: i for i, row in enumerate(batch.sampling_rows)}
        digest = np.empty(len(ids), np.dtype([("request_id", "<u8"), ("token_id", "<u4")]))
        digest["request_id"] = list(places)
        digest["token_id"] = ids
        response.digest = zlib.crc32(digest[finite].tobytes())
        dropped = self._drop_failed(response, batch, finite, prompts)
        if self._rank != 0:
            return
        id_list, value_list = ids.tolist(), values.tolist()
        self._advance(batch, id_list, dropped)
        for row in batch.rows:
            place, prompt = places.get(row.request_id), prompts.get(row.request_id)
            if (place is None and prompt is None) or row.request_id in dropped:
                continue
            generation = response.generations.add(request_id=row.request_id)
            if place is not None:
                generation.token_ids.append(id_list[place])
                generation.logprobs.append(value_list[place])
                if place in sampled.top:
                    top = sampled.top[place]
                    generation.top_tokens.append(_top_tokens(top))
            if prompt is not None:
                generation.prompt_logprobs.extend(prompt.values)
                generation.prompt_logprobs_start = prompt.start
                generation.prompt_top_tokens.extend(map(_top_tokens, prompt.top))

    def _drop_failed(
        self,
        response: pb.StepResponse,
        batch: StepBatch,
        finite: NDArray[np.bool_],
        prompts: dict[int, PromptLogprobs],
    ) -> frozenset[int]:
        """Drops rows with a log-probability that is no number; returns their ids. finite: `[N]`, of sampling rows."""
        failed = [row.request_id for row, ok in zip(batch.sampling_rows, finite.tolist(), strict=True) if not ok]
        failed += [key for key, part in prompts.items() if not np.isfinite(part.values).all() and key not in failed]
        if not failed:
            return frozenset()
        reasons = {batch.sampling_rows[place].request_id: matching.error for place, matching in batch.grammars}
        for request_id in failed:
            message = reasons.get(request_id) or "the model's logits are not finite numbers; the request cannot go on"
            response.errors.append(self._rows.drop(request_id, message, response.step))
        return frozenset(failed)

    def _advance(self, batch: StepBatch, token_ids: list[int], dropped: frozenset[int]) -> None:
        """Sends the grammars on with their rows' new tokens: the next masks are computed while the next step runs."""
        for place, matching in batch.grammars:
            if self._rows.grammars is not None and batch.sampling_rows[place].request_id not in dropped:
                self._rows.grammars.advance(matching, token_ids[place])


def _top_tokens(top: logprobs.TopTokens) -> pb.TopTokens:
    return pb.TopTokens(ids=[token for token, _ in top], logprobs=[value for _, value in top])
