"""Scheduler: what is computed next. Continuous batching at every step; a step is a list of (request, number of tokens).

PURE: no I/O; the clock is an argument. Owns the waiting and running requests and their life, admission, chunking,
preemption, and what a crash means for each request. Which blocks a request gets is block_manager.py's business; sending
steps and delivering tokens is batcher.py's, its only caller. docs/architecture.md ("A step") explains the counting.

Order of a step: one token for every request that generates, then prompts with what is left of the token budget
(`share_budget`). Requests are admitted in order of arrival as soon as a row and blocks are there. When blocks run out
the newest running request gives its blocks back.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple

from tgi_proto import generate_pb2 as pb

from .block_manager import Admit, BlockManager
from .errors import Bug, GenerationError, ValidationError
from .request import FinishReason, Phase, Request, ShardWork, TokenSink, Top, ValidRequest
from .step_plan import Admission, Scheduled, StepPlan, share_budget

MAX_CRASHES = 2  # a request in flight at so many crashes is taken for their cause

_by_id = attrgetter("id")


@dataclass(frozen=True, slots=True)
class Limits:
    """What shards and configuration allow; new after every start of the shards."""

    num_blocks: int
    block_size: int  # S
    max_step_tokens: int  # >= 1
    max_running: int  # >= 1


@dataclass(slots=True)
class Counts:
    """For /metrics."""

    preemptions: int = 0
    queried_tokens: int = 0  # looked up in the prefix cache at first admissions
    hit_tokens: int = 0  # and found


class Outcome(NamedTuple):
    """What an answer means: tokens to deliver, in row order, and requests whose row failed."""

    generations: list[tuple[Request, pb.Generation]]
    failed: list[tuple[Request, GenerationError]]


class Scheduler:
    """Waiting and running requests. `plan` may be called while earlier plans are unanswered; `apply` in plan order."""

    def __init__(self, limits: Limits, ids: Iterator[int]) -> None:
        """ids: of new requests, ascending; never used before in the life of the router."""
        self.running: list[Request] = []  # by id, that is by arrival
        self.waiting: deque[Request] = deque()  # likewise
        self._counts = Counts()
        self._work = ShardWork()
        self._ids = ids
        self._in_flight: deque[StepPlan] = deque()
        self._forget: list[int] = []
        self._step = 0
        self._suspects: list[Request] = []  # in flight at a crash, nothing produced since; by id
        self._full: tuple[Request, int] | None = None  # who last did not fit, and blocks.num_releases then
        self._use(limits)

    def _use(self, limits: Limits) -> None:
        if limits.num_blocks < 1 or limits.max_running < 1 or limits.max_step_tokens < 1:
            raise Bug(f"{limits} leave no room for any request. This is a bug.")
        self.limits = limits
        self.blocks = BlockManager(limits.num_blocks, limits.block_size)
        # Each running request gets at least one token in every step.
        self._max_running = min(limits.max_running, limits.max_step_tokens)

    @property
    def is_idle(self) -> bool:
        """Nothing to do and nothing to wait for; rows may still have to be forgotten."""
        return not (self.running or self.waiting or self._in_flight)

    # ---- requests come and go

    def add(self, valid: ValidRequest, sink: TokenSink, now: float, label: str = "") -> Request:
        """Queues a new request. Raises ValidationError when the KV pool can never hold it."""
        request = Request(id=next(self._ids), valid=valid, sink=sink, arrived_s=now, label=label)
        if not self._fits(request):
            raise self._too_long(request)
        self.waiting.append(request)
        return request

    def finish(self, request: Request, now: float, reason: FinishReason | None = None) -> None:
        """Ends a request: finished (with a reason), failed or cancelled. What is in flight for it is dropped.

        Its blocks can be given out at once: a later step runs after those in flight. Ending it twice does nothing.
        """
        if request.phase is Phase.FINISHED:
            return
        self._leave(request)
        request.phase = Phase.FINISHED
        request.finish_reason = reason
        request.finished_s = now
        request.work.append(self._work)
        if request in self._suspects:
            self._suspects.remove(request)

    def _leave(self, request: Request) -> None:
        """Out of the running (blocks released, row to be forgotten) or waiting ones."""
        if request.phase is Phase.RUNNING:
            self.running.remove(request)
            self.blocks.release(request)
            if request.row:
                self._forget.append(request.id)
                request.row = False
        else:
            self.waiting.remove(request)

    def _wait(self, request: Request) -> None:
        """Into the queue, by arrival: those who come back are older than almost all who have not run yet."""
        request.phase = Phase.WAITING
        request.num_scheduled_tokens = request.num_acknowledged_tokens = 0
        place = next((i for i, other in enumerate(self.waiting) if other.id > request.id), len(self.waiting))
        self.waiting.insert(place, request)

    def _fits(self, request: Request) -> bool:
        """The pool alone could hold it. The last token is never computed, so it needs no slot."""
        return self.blocks.blocks_for(request.max_tokens - 1) <= self.limits.num_blocks

    def _too_long(self, request: Request) -> ValidationError:
        slots = self.limits.num_blocks * self.limits.block_size
        return ValidationError(
            f"`inputs` tokens + `max_new_tokens` must be <= {slots + 1}, what the KV memory holds. "
            f"Given: {request.num_prompt_tokens} `inputs` tokens and {request.valid.max_new_tokens} `max_new_tokens`. "
            "More memory, a larger `--max-batch-total-tokens` or more shards raise the limit.",
            param="max_new_tokens",
        )

    # ---- planning

    def plan(self, now: float) -> StepPlan | None:
        """The next step, to be sent after all earlier ones; None when there is nothing to send now."""
        scheduled: list[Scheduled] = []
        admissions: list[Admission] = []
        if self._suspects:
            prompts = self._next_suspect()
        else:
            prompts = self._plan_generating(scheduled)
            if self.waiting:
                prompts = sorted(prompts + self._admit(), key=_by_id)
        if prompts:
            left = self.limits.max_step_tokens - len(scheduled)
            todo = [len(r.token_ids) + r.num_pending_tokens - r.num_scheduled_tokens for r in prompts]
            for request, num_tokens in zip(prompts, share_budget(todo, left), strict=True):
                if num_tokens:
                    self._begin_row(request, admissions, now)
                    scheduled.append(self._chunk(request, num_tokens))
        if not scheduled and not self._forget:
            return None
        self._step += 1
        plan = StepPlan(self._step, self._forget, admissions, scheduled)
        self._forget = []
        self._in_flight.append(plan)
        return plan

    def _plan_generating(self, scheduled: list[Scheduled]) -> list[Request]:
        """One token for every running request that has just one to compute; returns the others. The hot loop.

        Preempts from the end of `running` while it walks from the start, so it never meets whom it took blocks from.
        """
        prompts: list[Request] = []
        size = self.limits.block_size
        for request in self.running:
            computed = request.num_scheduled_tokens
            pending = request.num_pending_tokens
            known = len(request.token_ids) + pending
            if known - computed != 1 or not request.row:
                prompts.append(request)
                continue
            if known >= request.max_tokens:
                continue  # what it may generate is all on its way
            new_blocks: Sequence[int] = ()
            if computed == len(request.blocks) * size:
                new_blocks = self._grow(request, computed + 1)
                if not new_blocks:
                    break  # it was the newest, and has given its own blocks back
            request.num_scheduled_tokens = computed + 1
            request.num_pending_tokens = pending + 1
            request.num_unanswered_steps += 1
            scheduled.append(Scheduled(request, 1, computed, new_blocks, True))
        return prompts

    def _chunk(self, request: Request, num_tokens: int) -> Scheduled:
        """Schedules `num_tokens` of a request that has blocks for all its known tokens."""
        computed = request.num_scheduled_tokens
        request.num_scheduled_tokens = computed + num_tokens
        request.num_unanswered_steps += 1
        samples = request.num_scheduled_tokens == len(request.token_ids) + request.num_pending_tokens
        request.num_pending_tokens += samples
        return Scheduled(request, num_tokens, computed, (), samples)

    def _begin_row(self, request: Request, admissions: list[Admission], now: float) -> None:
        """A row is made with the first tokens, not with the blocks: who waits for budget costs the shards nothing."""
        if request.row:
            return
        request.row = True
        admissions.append(Admission(request, request.num_scheduled_tokens))
        if request.admitted_s is None:
            request.admitted_s = now
            request.work.append(self._work)
            request.num_cached_tokens = request.num_scheduled_tokens
            self._counts.queried_tokens += request.num_prompt_tokens
            self._counts.hit_tokens += request.num_cached_tokens

    def _grow(self, request: Request, num_tokens: int) -> Sequence[int]:
        """Blocks for `num_tokens`, if need be taken from the newest; none when `request` itself had to give."""
        while True:
            new_blocks = self.blocks.grow(request, num_tokens)
            if new_blocks is not None:
                return new_blocks
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return ()

    def _preempt(self, request: Request) -> None:
        if request.row:
            request.num_preemptions += 1
            self._counts.preemptions += 1
        self._leave(request)
        self._wait(request)

    # ---- admission

    def _admit(self) -> list[Request]:
        """Gives blocks to waiting requests, in order of arrival; returns those that got them.

        Only who waits for another request to compute a common prefix is passed over. Who comes back after a preemption
        waits for his pending tokens, and nobody passes him: blocks are short.
        """
        admitted: list[Request] = []
        passed_over: list[Request] = []
        while self.waiting and len(self.running) < self._max_running:
            request = self.waiting[0]
            if request.num_unanswered_steps or self._full == (request, self.blocks.num_releases):
                break
            result = self.blocks.admit(request, reserve=self._reserve())
            if result is Admit.FULL:
                self._full = (request, self.blocks.num_releases)
                break
            self.waiting.popleft()
            if result is Admit.COMPUTING:
                passed_over.append(request)
            else:
                self._run(request)
                admitted.append(request)
        self.waiting.extendleft(reversed(passed_over))
        return admitted

    def _reserve(self) -> int:
        """Blocks kept back for the growth of those who run already, so that admitting one does not preempt another."""
        return min(len(self.running), 1 + self.limits.num_blocks // 32)

    def _run(self, request: Request) -> None:
        cached = request.num_committed_blocks * self.limits.block_size
        request.num_scheduled_tokens = request.num_acknowledged_tokens = cached
        request.phase = Phase.RUNNING
        insort(self.running, request, key=_by_id)

    # ---- answers

    def apply(self, response: pb.StepResponse, now: float) -> Outcome:
        """Takes in the answer to the oldest plan in flight. The caller delivers the tokens and calls `finish`."""
        plan = self._in_flight.popleft()
        if response.step != plan.step:
            raise Bug(f"Step {plan.step} was answered with step {response.step}. This is a bug.")
        self._work = ShardWork(self._work.num_steps + 1, self._work.forward_ns + response.forward_ns)
        outcome = Outcome([], [])
        errors = {error.request_id: error.message for error in response.errors}
        generations = {generation.request_id: generation for generation in response.generations}
        size = self.limits.block_size
        for request, num_tokens, _, _, samples in plan.scheduled:
            request.num_unanswered_steps -= 1
            request.num_pending_tokens -= samples
            if request.phase is Phase.FINISHED:
                continue  # a row-step that was computed for nothing
            generation = generations.get(request.id)
            if request.id in errors:
                outcome.failed.append((request, GenerationError(errors[request.id])))
                continue
            if samples:
                if generation is None:
                    outcome.failed.append((request, GenerationError("the shard returned no token. This is a bug.")))
                    continue
                request.token_ids.extend(generation.token_ids)
                if request.first_token_s is None or self._suspects:
                    self._has_produced(request, now)
            if generation is not None:
                outcome.generations.append((request, generation))
            if request.phase is Phase.RUNNING:  # else preempted meanwhile: what was computed is gone, the token stays
                request.num_acknowledged_tokens += num_tokens
                if request.num_acknowledged_tokens >= (request.num_committed_blocks + 1) * size:
                    self.blocks.commit(request)
        for request, _ in outcome.failed:
            self.finish(request, now)
        return outcome

    def _has_produced(self, request: Request, now: float) -> None:
        if request.first_token_s is None:
            request.first_token_s = now
            request.work.append(self._work)
        if self._suspects and request is self._suspects[0]:
            self._suspects.pop(0)  # it is not the one that kills the shards

    @staticmethod
    def take_prompt_logprobs(request: Request, generation: pb.Generation) -> tuple[int, list[float], list[Top]]:
        """(position, log-probabilities, alternatives) of the prompt tokens from there on that it has not had before.

        After a preemption or a crash in the middle of a prompt, the first of them are computed once more.
        """
        start = request.num_prompt_logprobs + 1  # the first prompt token has none
        new = slice(start - generation.prompt_logprobs_start, None)
        fresh = list(generation.prompt_logprobs[new])
        request.num_prompt_logprobs += len(fresh)
        top = [tuple(zip(top.ids, top.logprobs, strict=True)) for top in generation.prompt_top_tokens[new]]
        return start, fresh, top

    # ---- crashes

    def interrupt(self, now: float) -> list[tuple[Request, GenerationError]]:
        """The shards are gone, with rows, blocks and unanswered steps. Ends and returns the poisonous requests.

        Everything else that ran waits again, with the tokens it has. `resume` must come before the next `plan`.
        """
        poisonous = []
        for request in (*self.running, *self.waiting):
            if request.num_unanswered_steps:
                request.num_crashes += 1
                if request.num_crashes >= MAX_CRASHES:
                    poisonous.append(request)
                elif request not in self._suspects:
                    insort(self._suspects, request, key=_by_id)
            request.num_unanswered_steps = request.num_pending_tokens = 0
        for request in poisonous:
            self.finish(request, now)
        while self.running:
            request = self.running[-1]
            self._leave(request)
            self._wait(request)
        self._in_flight.clear()
        self._forget.clear()
        self._step = 0
        message = f"the model stopped {MAX_CRASHES} times while it computed this request; it is not tried again"
        return [(request, GenerationError(message)) for request in poisonous]

    def resume(self, limits: Limits, now: float) -> list[tuple[Request, ValidationError]]:
        """New shards, empty, perhaps with another pool. Ends and returns the requests that no longer fit into it."""
        self._use(limits)
        self._full = None
        too_long = [request for request in self.waiting if not self._fits(request)]
        for request in too_long:
            self.finish(request, now)
        return [(request, self._too_long(request)) for request in too_long]

    def _next_suspect(self) -> list[Request]:
        """After a crash: the oldest request that was in flight, alone in its step, until it has produced a token."""
        if self._in_flight:
            return []
        suspect = self._suspects[0]
        while suspect.phase is Phase.WAITING:
            has_room = len(self.running) < self._max_running
            # Nobody else computes now, so there is nobody to wait for.
            if has_room and self.blocks.admit(suspect, reserve=0, wait=False) is Admit.ADMITTED:
                self.waiting.remove(suspect)
                self._run(suspect)
            else:
                self._preempt(self.running[-1])
        return [suspect]

    # ---- numbers and checks

    def take_counts(self) -> Counts:
        """What has been counted since the last call."""
        counts, self._counts = self._counts, Counts()
        return counts

    def check_integrity(self) -> None:
        """Raises Bug when blocks, rows or counts are inconsistent. For tests and idle moments: O(blocks)."""
        self.blocks.check_integrity(self.running)
        for queue in (self.running, self.waiting):
            if any(a.id >= b.id for a, b in pairwise(queue)):
                raise Bug("requests are not in order of arrival. This is a bug.")
        for request in self.waiting:
            if request.blocks or request.row or request.num_scheduled_tokens:
                raise Bug(f"request {request.id} waits and still has blocks or a row. This is a bug.")
