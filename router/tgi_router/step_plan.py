"""StepPlan: what one step computes, how the token budget of a step is shared, and a plan's bytes for the shards.

PURE. scheduler.py makes plans, batcher.py encodes and sends them. The wire's meaning is in proto/generate.proto.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tgi_proto import generate_pb2 as pb

from .request import Request

Method = Literal["Prefill", "Decode"]


class Scheduled(NamedTuple):
    """Some tokens of one request in a step. A tuple, because one is made per token."""

    request: Request
    num_tokens: int  # >= 1
    num_computed_tokens: int  # of the request, when the step begins
    new_blocks: Sequence[int]  # appended to the block table the shards know
    samples: bool  # the step reaches the end of what is known: it yields a token


class Admission(NamedTuple):
    """A request whose row begins in a step; its tokens and blocks are as they are when the plan is made."""

    request: Request
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: rows in `forget` are dropped, then rows of `admissions` are made, then `scheduled` is computed."""

    step: int  # 1, 2, 3 ... since the shards were last reset
    forget: list[int]
    admissions: list[Admission]
    scheduled: list[Scheduled]


def share_budget(todo: Sequence[int], budget: int) -> list[int]:
    """How many tokens each prompt may compute in a step. todo: tokens left of each, in order of arrival.

    Half of the budget goes to the oldest, so that none can be overtaken for ever; the other half to those with the
    least left to compute, so that a short prompt does not wait for the long one before it. Either half passes on what
    it does not need; a prompt's grant is 0 only when the budget is used up.
    """
    if sum(todo) <= budget:
        return list(todo)
    grants = [0] * len(todo)

    def give(turns: Sequence[int], left: int) -> None:
        for i in turns:
            grant = min(left, todo[i] - grants[i])
            grants[i] += grant
            left -= grant

    oldest_first = range(len(todo))
    give(oldest_first, budget - budget // 2)
    give(sorted(oldest_first, key=todo.__getitem__), budget // 2)
    return grants


def encode(plan: StepPlan) -> tuple[Method, bytes]:
    """The method that carries `plan` and its message. At once after planning: admissions are read from the requests."""
    if not plan.admissions:
        return "Decode", pb.DecodeRequest(plan=_message(plan)).SerializeToString()
    message = pb.PrefillRequest(plan=_message(plan))
    for request, num_cached_tokens in plan.admissions:
        message.admissions.add(
            request_id=request.id,
            token_ids=request.token_ids,
            num_prompt_tokens=len(request.valid.token_ids),
            num_cached_tokens=num_cached_tokens,
            blocks=request.blocks,
            sampling=request.valid.sampling,
            top_n_tokens=request.valid.top_n_tokens,
            prompt_logprobs=request.wants_prompt_logprobs,
            prompt_top_n_tokens=request.valid.prompt_top_n_tokens,
            grammar=request.valid.grammar,
        )
    return "Prefill", message.SerializeToString()


def _message(plan: StepPlan) -> pb.StepPlan:
    message = pb.StepPlan(step=plan.step, forget=plan.forget)
    add = message.scheduled.add
    for request, num_tokens, computed, new_blocks, _ in plan.scheduled:
        if new_blocks:
            add(request_id=request.id, num_tokens=num_tokens, num_computed_tokens=computed, new_blocks=new_blocks)
        else:
            add(request_id=request.id, num_tokens=num_tokens, num_computed_tokens=computed)
    return message
