"""The row table: one row per live request, with its tokens, sampling parameters and block table. Owned by the engine.

A step is applied to the table (`apply`), read out of it as index vectors (`gather`), and its sampled tokens are written
into it (`record`). Counts live on the host and are exact without asking the device, because a step always samples one
token for a row whose last known token it computes; token ids live on the device and are never read back here.

Everything the router claims is checked. What is wrong with one row is a RowError for that row; what contradicts the
table itself is a Bug, which ends the process.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tgi_proto import generate_pb2 as pb
from torch import Tensor

from .attention.base import AttentionBatch
from .errors import Bug, RowProblem
from .faults import Faults
from .grammar.masks import GrammarMasks
from .grammar.matching import Matching
from .sampling.bias import BiasTable
from .sampling.parameters import RECORD, SamplingParameters
from .sampling.sampler import SamplingBatch
from .upload import upload

logger = logging.getLogger(__name__)

Ints = NDArray[np.int64]

# Steps for which a failed row's id is remembered: more than the router ever has under way.
_REMEMBERED_STEPS = 64


@dataclass(frozen=True, slots=True)
class RowLimits:
    """What the table must hold. `max_tokens`: longest history of a row."""

    max_rows: int
    max_tokens: int
    max_step_tokens: int
    num_blocks: int
    block_size: int
    vocab_size: int


@dataclass(slots=True, eq=False)
class Row:
    """Host side of one row."""

    request_id: int
    index: int  # place in the tables
    num_prompt_tokens: int
    num_tokens: int  # known: given by the router, plus sampled
    num_computed_tokens: int  # of them, with KV in the pool
    blocks: list[int]
    prompt_logprobs: bool
    prompt_top_n: int  # most likely alternatives reported with each
    matching: Matching | None = None  # what its grammar allows


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step read out of the table: R requests, T tokens, N of the requests sample."""

    rows: list[Row]  # [R] in the plan's order
    query_lengths: Ints  # [R]
    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    attention: AttentionBatch
    sampling_rows: list[Row]  # [N]
    grammars: list[tuple[int, Matching]]  # of the sampling rows that have one: place among them
    last_tokens: Tensor  # [N] int64, index of each sampling row's last token in the step
    sampling: SamplingBatch


class RowTable:
    """Rows 0 .. max_rows-1. Not thread-safe: the engine thread's."""

    def __init__(
        self, limits: RowLimits, device: torch.device, faults: Faults, grammars: GrammarMasks | None = None
    ) -> None:
        """grammars: None = a row that has one fails."""
        self._limits = limits
        self.grammars = grammars
        self._num_matchings = 0
        self._device = device
        self._faults = faults
        # Untouched pages of an uninitialised tensor cost no memory on the CPU.
        self._tokens = torch.empty(limits.max_rows, limits.max_tokens, dtype=torch.int32, device=device)
        max_blocks = -(-limits.max_tokens // limits.block_size)
        self._blocks = np.zeros((limits.max_rows, max_blocks), np.int32)
        self._sampling = np.zeros(limits.max_rows, RECORD)
        self._bias = BiasTable(limits.max_rows, device)
        self._rows: dict[int, Row] = {}
        self._free = list(range(limits.max_rows))[::-1]
        self._dropped: dict[int, int] = {}  # request id → step in which its row failed
        self._scheduled: list[tuple[Row, int]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def reset(self) -> None:
        """Forgets every row."""
        for request_id in list(self._rows):
            self._forget(request_id)
        self._dropped.clear()
        self._scheduled.clear()

    def apply(self, admissions: Iterable[pb.Admission], plan: pb.StepPlan) -> list[pb.RowError]:
        """Forgets, admits and extends rows as the plan says; returns the rows that failed. They are gone."""
        errors: list[pb.RowError] = []
        if self._dropped:
            oldest = plan.step - _REMEMBERED_STEPS
            self._dropped = {request_id: step for request_id, step in self._dropped.items() if step > oldest}
        for request_id in plan.forget:
            self._forget(request_id)
        for admission in admissions:
            try:
                self._admit(admission)
            except Bug:
                raise
            except Exception as error:
                errors.append(self._failed(admission.request_id, error, plan.step))
        self._scheduled = []
        seen: set[int] = set()
        num_tokens = 0
        for scheduled in plan.scheduled:
            request_id = scheduled.request_id
            row = self._rows.get(request_id)
            if request_id in seen or (row is None and request_id not in self._dropped):
                raise Bug(f"step {plan.step} schedules request {request_id} twice or without a row. This is a bug.")
            seen.add(request_id)
            if row is None:  # failed in this step or in one whose answer the router has not seen yet
                continue
            try:
                self._extend(row, scheduled)
            except Exception as error:
                errors.append(self._failed(request_id, error, plan.step))
                continue
            num_tokens += scheduled.num_tokens
            self._scheduled.append((row, scheduled.num_tokens))
        if num_tokens > self._limits.max_step_tokens:
            limit = self._limits.max_step_tokens
            raise Bug(f"step {plan.step} has {num_tokens} tokens, more than --max-step-tokens {limit}. This is a bug.")
        return errors

    def gather(self) -> StepBatch | None:
        """The applied step as index vectors and device tensors; None when nothing is to be computed."""
        if not self._scheduled:
            return None
        rows = [row for row, _ in self._scheduled]
        index = np.array([row.index for row in rows], np.int64)
        query = np.array([num_tokens for _, num_tokens in self._scheduled], np.int64)
        computed = np.array([row.num_computed_tokens for row in rows], np.int64)
        context = computed + query
        cu_query = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(query, out=cu_query[1:])
        positions = np.arange(cu_query[-1]) + np.repeat(computed - cu_query[:-1], query)
        token_rows = np.repeat(index, query)
        size = self._limits.block_size
        slots = self._blocks[token_rows, positions // size].astype(np.int64) * size + positions % size
        num_blocks = -(-context // size)
        block_table = self._blocks[index, : num_blocks.max()]
        sampling = np.flatnonzero(context == np.array([row.num_tokens for row in rows]))
        arrays: list[NDArray[np.generic]] = [token_rows, positions, slots, cu_query[1:][sampling] - 1]
        arrays += [cu_query.astype(np.int32), context.astype(np.int32), block_table]
        tensors = upload(arrays, self._device)
        attention = AttentionBatch(
            query_lengths=query.tolist(),
            context_lengths=context.tolist(),
            block_tables=[row.blocks[:n] for row, n in zip(rows, num_blocks.tolist(), strict=True)],
            cu_query=tensors[4],
            context=tensors[5],
            block_table=tensors[6],
            slots=tensors[2],
            block_size=size,
        )
        sampling_rows = [rows[i] for i in sampling]
        return StepBatch(
            rows=rows,
            query_lengths=query,
            token_ids=self._tokens[tensors[0], tensors[1]].long(),
            positions=tensors[1],
            attention=attention,
            sampling_rows=sampling_rows,
            grammars=self._matchings(sampling_rows),
            last_tokens=tensors[3],
            sampling=SamplingBatch(
                params=self._sampling[index[sampling]],
                rows=index[sampling],
                num_tokens=context[sampling],
                num_prompt_tokens=np.array([row.num_prompt_tokens for row in sampling_rows], np.int64),
                tokens=self._tokens,
                bias=self._bias,
            ),
        )

    def record(self, batch: StepBatch, sampled_ids: Tensor) -> None:
        """The step is done: its tokens have KV, and each sampling row has one more token, `sampled_ids` `[N]`."""
        for row, num_tokens in zip(batch.rows, batch.query_lengths.tolist(), strict=True):
            row.num_computed_tokens += num_tokens
        sampling = batch.sampling
        # A row that is full keeps its tokens: its request ends with this one.
        fits = sampling.num_tokens < self._limits.max_tokens
        if not fits.all():
            sampled_ids = sampled_ids[torch.from_numpy(fits).to(self._device)]
        rows, places = upload([sampling.rows[fits], sampling.num_tokens[fits]], self._device)
        self._tokens[rows, places] = sampled_ids.int()
        for row in batch.sampling_rows:
            row.num_tokens += 1

    def prompt_tokens(self, row: Row, start: int, end: int) -> Tensor:
        """Token ids [start, end) of a row, `[end - start]` int64 on the device."""
        return self._tokens[row.index, start:end].long()

    def drop(self, request_id: int, message: str, step: int) -> pb.RowError:
        """Removes a row that failed. Steps that are already under way may still name it; they skip it."""
        self._forget(request_id)
        self._dropped[request_id] = step
        return pb.RowError(request_id=request_id, message=message)

    def _failed(self, request_id: int, error: Exception, step: int) -> pb.RowError:
        """What goes wrong while one row is handled is that row's end only; what nobody foresaw is logged in full."""
        if isinstance(error, RowProblem):
            return self.drop(request_id, str(error), step)
        logger.error("request %d failed in step %d", request_id, step, exc_info=error)
        return self.drop(request_id, f"the shard could not handle the request: {type(error).__name__}: {error}", step)

    def _forget(self, request_id: int) -> None:
        self._dropped.pop(request_id, None)
        row = self._rows.pop(request_id, None)
        if row is not None:  # a row that failed is gone already
            self._free.append(row.index)
            self._num_matchings -= row.matching is not None

    def _admit(self, admission: pb.Admission) -> None:
        request_id = admission.request_id
        if request_id in self._rows or not self._free:
            raise Bug(
                f"request {request_id} is admitted twice, or beyond --max-rows {self._limits.max_rows}. This is a bug."
            )
        self._dropped.pop(request_id, None)
        tokens = np.array(admission.token_ids, np.int64)
        self._check_admission(admission, tokens)
        self._faults.hit("row.apply", tokens=admission.token_ids)
        parameters = sampling_parameters(admission)
        params = parameters.record()
        row = Row(
            request_id=request_id,
            index=self._free[-1],
            num_prompt_tokens=admission.num_prompt_tokens,
            num_tokens=len(tokens),
            num_computed_tokens=admission.num_cached_tokens,
            blocks=[],
            prompt_logprobs=admission.prompt_logprobs,
            prompt_top_n=admission.prompt_top_n_tokens,
        )
        self._append_blocks(row, admission.blocks)
        self._sampling[row.index] = params
        if parameters.logit_bias or parameters.min_new_tokens:
            self._bias.set(row.index, parameters)
        (device_tokens,) = upload([tokens], self._device)
        self._tokens[row.index, : len(tokens)] = device_tokens
        if admission.grammar:
            row.matching = self._begin_grammar(admission)
            self._num_matchings += 1
        self._free.pop()
        self._rows[request_id] = row

    def _begin_grammar(self, admission: pb.Admission) -> Matching:
        if self.grammars is None:
            raise RowProblem("this shard follows no grammars")
        return self.grammars.begin(admission.grammar, admission.token_ids[admission.num_prompt_tokens :])

    def _matchings(self, rows: list[Row]) -> list[tuple[int, Matching]]:
        if not self._num_matchings:  # most steps: then the rows are not even looked at
            return []
        return [(i, row.matching) for i, row in enumerate(rows) if row.matching is not None]

    def _check_admission(self, admission: pb.Admission, tokens: Ints) -> None:
        limits, count = self._limits, len(tokens)
        if not 1 <= admission.num_prompt_tokens <= count <= limits.max_tokens:
            raise RowProblem(
                f"{count} tokens, of them {admission.num_prompt_tokens} prompt tokens; a row holds 1 to"
                f" {limits.max_tokens} (`--max-total-tokens`)"
            )
        if tokens.max() >= limits.vocab_size:
            raise RowProblem(f"token id {tokens.max()} is not in the model's vocabulary of {limits.vocab_size} tokens")
        adjusted = [*admission.sampling.logit_bias, *admission.sampling.end_token_ids]
        if adjusted and max(adjusted) >= limits.vocab_size:
            raise RowProblem(f"token id {max(adjusted)} of `logit_bias` or `end_token_ids` is not in the vocabulary")
        if admission.num_cached_tokens >= count:
            raise RowProblem(
                f"{admission.num_cached_tokens} of {count} tokens are said to be cached; one must be computed"
            )
        if admission.prompt_logprobs and admission.num_cached_tokens:
            raise RowProblem("log-probabilities of prompt tokens need the whole prompt computed, but a part is cached")

    def _append_blocks(self, row: Row, blocks: Iterable[int]) -> None:
        added = list(blocks)
        if not added:
            return
        start, end = len(row.blocks), len(row.blocks) + len(added)
        if max(added) >= self._limits.num_blocks or end > self._blocks.shape[1]:
            raise RowProblem(
                f"block {max(added)} as number {end} of its table; the pool has blocks 0 to"
                f" {self._limits.num_blocks - 1} and a table holds {self._blocks.shape[1]}"
            )
        row.blocks += added
        self._blocks[row.index, start:end] = added

    def _extend(self, row: Row, scheduled: pb.Scheduled) -> None:
        """Checks one row's part of the step and appends its new blocks."""
        if scheduled.new_blocks:
            self._append_blocks(row, scheduled.new_blocks)
        computed, num_tokens = row.num_computed_tokens, scheduled.num_tokens
        end = computed + num_tokens
        if scheduled.num_computed_tokens != computed:
            raise RowProblem(f"{scheduled.num_computed_tokens} tokens are said to be computed, here {computed} are")
        if num_tokens < 1 or end > row.num_tokens or end > self._limits.max_tokens:
            raise RowProblem(f"tokens {computed} to {end} are to be computed; {row.num_tokens} are known")
        if end > len(row.blocks) * self._limits.block_size:
            raise RowProblem(f"{len(row.blocks)} blocks of {self._limits.block_size} slots do not hold {end} tokens")


def sampling_parameters(admission: pb.Admission) -> SamplingParameters:
    """The wire's message as our own type."""
    wire = admission.sampling
    return SamplingParameters(
        temperature=wire.temperature,
        top_k=wire.top_k,
        top_p=wire.top_p,
        typical_p=wire.typical_p,
        do_sample=wire.do_sample,
        seed=wire.seed,
        repetition_penalty=wire.repetition_penalty,
        frequency_penalty=wire.frequency_penalty,
        presence_penalty=wire.presence_penalty,
        min_p=wire.min_p,
        logit_bias=tuple(sorted(wire.logit_bias.items())),
        min_new_tokens=wire.min_new_tokens,
        end_token_ids=tuple(wire.end_token_ids),
        watermark=wire.watermark,
        top_n=admission.top_n_tokens,
    )
