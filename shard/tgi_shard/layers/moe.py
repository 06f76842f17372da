"""Mixture of experts: which experts a token goes through, and all their products at once.

Every expert is split over the ranks like any feed-forward layer, so each rank has an equal share of every expert.
Tokens are sorted by expert. On CUDA one grouped product serves all experts (`GroupedExperts`): the host neither loops
nor waits. On CPU only the experts that some token chose are visited, each with the packed product that is fastest there
(`VisitedExperts`): one kernel call costs microseconds, reading an expert's weights milliseconds (docs/journal.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parallel import Parallel
from .linear import Matmul
from .mlp import ACTIVATIONS, Activation


@dataclass(frozen=True, slots=True)
class SoftmaxRouter:
    """The largest probabilities of a softmax over all experts; normalized: divided by their sum."""

    normalized: bool


@dataclass(frozen=True, slots=True)
class SparseMixer:
    """Two experts one after the other, each weighed by a softmax over those within a margin of the best.

    As transformers' models/phimoe at inference. The second is sought without the first, but the margin is relative to
    the first's scale where the score is larger than the best.
    """

    jitter: float  # half the margin, relative


Router = SoftmaxRouter | SparseMixer


def route(router: Router, logits: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """logits `[T, experts]` → weights `[T, active]` float32 and experts `[T, active]`, by falling weight."""
    logits = logits.float()
    if isinstance(router, SoftmaxRouter):
        weights, experts = logits.softmax(-1).topk(active, dim=-1)
        return (weights / weights.sum(-1, keepdim=True) if router.normalized else weights), experts
    first_weight, first = _mix(logits, logits, router.jitter)
    second_weight, second = _mix(logits, logits.scatter(-1, first, float("-inf")), router.jitter)
    return torch.cat((first_weight, second_weight), -1), torch.cat((first, second), -1)


def _mix(scores: Tensor, candidates: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """The best candidate `[T, 1]` and its weight among those close to it."""
    best, expert = candidates.max(-1, keepdim=True)
    scale = torch.maximum(scores.abs(), best)
    close = candidates.masked_fill((best - scores) / scale > 2 * jitter, float("-inf"))
    return close.softmax(-1).gather(-1, expert), expert


class Experts(Protocol):
    """This rank's share of every expert."""

    num_bytes: int

    def __call__(self, x: Tensor, experts: Tensor) -> Tensor:
        """Rows `[N, E]` sorted by their experts `[N]` → `[N, E]`, this rank's part of the sum."""


class VisitedExperts:
    def __init__(self, gate_up: Sequence[Matmul], down: Sequence[Matmul], activation: Activation) -> None:
        """One matrix per expert; gate_up: rows of gate, then as many of up."""
        self._gate_up, self._down, self._activation = gate_up, down, ACTIVATIONS[activation]
        self.num_bytes = sum(matmul.num_bytes for matmul in (*gate_up, *down))

    def __call__(self, x: Tensor, experts: Tensor) -> Tensor:
        out = torch.empty_like(x)
        visited, counts = torch.unique_consecutive(experts, return_counts=True)
        start = 0
        for expert, count in zip(visited.tolist(), counts.tolist(), strict=True):
            rows = slice(start, start + count)
            gate, up = self._gate_up[expert](x[rows]).chunk(2, -1)
            out[rows] = self._down[expert](self._activation(gate).mul_(up))
            start += count
        return out


class GroupedExperts:
    def __init__(self, gate_up: Tensor, down: Tensor, activation: Activation) -> None:
        """gate_up `[experts, 2 F, E]`, down `[experts, E, F]`."""
        self._gate_up, self._down = gate_up.transpose(1, 2), down.transpose(1, 2)
        self._activation = ACTIVATIONS[activation]
        self._numbers = torch.arange(gate_up.shape[0], device=gate_up.device)
        self.num_bytes = gate_up.nbytes + down.nbytes

    def __call__(self, x: Tensor, experts: Tensor) -> Tensor:
        ends = torch.searchsorted(experts, self._numbers, right=True, out_int32=True)  # of each expert's rows
        gate, up = F.grouped_mm(x, self._gate_up, offs=ends).chunk(2, -1)
        return F.grouped_mm(self._activation(gate).mul_(up), self._down, offs=ends)


class SharedExpertLayer:
    """sigmoid(logit) * down(activation(gate(x)) * up(x)), this rank's part of the sum."""

    def __init__(self, gate_up: Matmul, down: Matmul, activation: Activation) -> None:
        self._gate_up, self._down, self._activation = gate_up, down, ACTIVATIONS[activation]
        self.num_bytes = gate_up.num_bytes + down.num_bytes

    def __call__(self, x: Tensor, logit: Tensor) -> Tensor:
        """x `[T, E]`, logit `[T, 1]` → `[T, E]`."""
        gate, up = self._gate_up(x).chunk(2, -1)
        return self._down(self._activation(gate).mul_(up)).mul_(logit.sigmoid())


class MoeLayer:
    """The weighted sum of each token's experts."""

    def __init__(
        self,
        gate: Matmul,
        router: Router,
        active: int,
        experts: Experts,
        shared: SharedExpertLayer | None,
        parallel: Parallel,
    ) -> None:
        """gate: hidden states to one logit per expert, and one more for the shared expert; whole on every rank."""
        self._gate, self._router, self._active = gate, router, active
        self._experts, self._shared, self._parallel = experts, shared, parallel
        self.num_bytes = gate.num_bytes + experts.num_bytes + (0 if shared is None else shared.num_bytes)

    def __call__(self, x: Tensor) -> Tensor:
        logits = self._gate(x)
        routed = logits if self._shared is None else logits[:, :-1]
        weights, experts = route(self._router, routed, self._active)  # [T, k]
        flat, order = experts.flatten().sort(stable=True)
        results = torch.empty(len(order), x.shape[1], dtype=x.dtype, device=x.device)
        results[order] = self._experts(x[order // self._active], flat)
        # Added up in the order of the weights, whoever else is in the step.
        out = (results.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1).to(x.dtype)
        if self._shared is not None:
            out += self._shared(x, logits[:, -1:])
        return self._parallel.all_reduce(out)
