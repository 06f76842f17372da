"""Helpers for tests of the core: a sink that collects, and a scheduler wired to a fake engine without gRPC or clock."""

from collections import deque
from dataclasses import dataclass, field, replace
from itertools import count

from fake_shard import Died, FakeConfig, FakeEngine, generate
from tgi_proto import generate_pb2 as pb
from tgi_router.request import FinishReason, Phase, Request, Token, Top, ValidRequest
from tgi_router.scheduler import Limits, Scheduler
from tgi_router.step_plan import StepPlan, encode


@dataclass
class Collector:
    """A sink that keeps everything and ends at `max_new_tokens`, or with the first token in `stop`."""

    max_new_tokens: int
    stop: frozenset[int] = frozenset()
    tokens: list[Token] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of the prompt, from position 1 on
    prompt_top: list[Top] = field(default_factory=list)  # likewise
    error: Exception | None = None
    reason: FinishReason | None = None

    def prompt_logprobs(self, start: int, logprobs: list[float], top: list[Top]) -> None:
        assert start == len(self.logprobs) + 1, "prompt log-probabilities have a gap or come twice"
        assert not self.tokens, "prompt log-probabilities after the first token"
        self.logprobs += logprobs
        self.prompt_top += top

    def token(self, token: Token) -> FinishReason | None:
        assert self.reason is None, "a token after the end"
        assert self.error is None, "a token after the end"
        self.tokens.append(token)
        if token.id in self.stop:
            self.reason = FinishReason.EOS_TOKEN
        elif len(self.tokens) == self.max_new_tokens:
            self.reason = FinishReason.LENGTH
        return self.reason

    def failed(self, error: Exception) -> None:
        assert self.error is None, "failed twice"
        self.error = error

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


def make_valid(
    prompt: int | list[int] = 5,
    max_new_tokens: int = 4,
    *,
    seed: int | None = None,
    prompt_logprobs: bool = False,
    prompt_top_n_tokens: int = 0,
    top_n_tokens: int = 0,
    cache_salt: str = "",
) -> ValidRequest:
    """prompt: its tokens, or how many (then 0, 1, 2 ...). seed: sample with it; None = greedy."""
    return ValidRequest(
        token_ids=tuple(range(prompt) if isinstance(prompt, int) else prompt),
        max_new_tokens=max_new_tokens,
        sampling=pb.SamplingParameters(do_sample=seed is not None, seed=seed or 0),
        prompt_logprobs=prompt_logprobs,
        prompt_top_n_tokens=prompt_top_n_tokens,
        top_n_tokens=top_n_tokens,
        cache_salt=cache_salt,
    )


def expected_ids(valid: ValidRequest, vocab: int, stop: frozenset[int] = frozenset()) -> list[int]:
    """The tokens of an undisturbed run, up to the first in `stop`."""
    ids = generate(list(valid.token_ids), valid.max_new_tokens, valid.sampling, vocab)
    end = next((i + 1 for i, token in enumerate(ids) if token in stop), len(ids))
    return ids[:end]


def limits_of(config: FakeConfig) -> Limits:
    return Limits(config.num_blocks, config.block_size, config.max_step_tokens, config.max_rows)


class Simulation:
    """Scheduler and engine; time counts what happened. Steps are executed when sent, answered later."""

    def __init__(self, **config: int) -> None:
        self.config = replace(FakeConfig(), **config)  # type: ignore[arg-type]
        self.engine = FakeEngine(self.config)
        self.scheduler = Scheduler(limits_of(self.config), count(1))
        self.answers: deque[tuple[StepPlan, bytes | None]] = deque()  # None: died in this step
        self.now = 0.0

    def submit(self, valid: ValidRequest, stop: frozenset[int] = frozenset()) -> Request:
        self.now += 1
        return self.scheduler.add(valid, Collector(valid.max_new_tokens, stop), self.now)

    def send(self) -> StepPlan | None:
        """Plans one step and lets the engine execute it."""
        self.now += 1
        plan = self.scheduler.plan(self.now)
        if plan is None:
            return None
        method, message = encode(plan)
        wire = (pb.PrefillRequest if method == "Prefill" else pb.DecodeRequest).FromString(message)
        admissions = list(wire.admissions) if isinstance(wire, pb.PrefillRequest) else []
        if self.answers and self.answers[-1][1] is None:
            self.answers.append((plan, None))
            return plan
        try:
            self.answers.append((plan, self.engine.step(admissions, wire.plan).SerializeToString()))
        except Died:
            self.answers.append((plan, None))
        return plan

    def answer(self) -> None:
        """Takes in the oldest answer, as the batcher does; a death is a crash."""
        self.now += 1
        _, answer = self.answers.popleft()
        if answer is None:
            self.crash()
            return
        outcome = self.scheduler.apply(pb.StepResponse.FromString(answer), self.now)
        for request, generation in outcome.generations:
            self._deliver(request, generation)
        for request, error in outcome.failed:
            request.sink.failed(error)

    def _deliver(self, request: Request, generation: pb.Generation) -> None:
        if generation.prompt_logprobs:
            start, fresh, top = self.scheduler.take_prompt_logprobs(request, generation)
            if fresh:
                request.sink.prompt_logprobs(start, fresh, top)
        for token_id, logprob in zip(generation.token_ids, generation.logprobs, strict=True):
            reason = request.sink.token(Token(token_id, logprob))
            if reason is not None:
                self.scheduler.finish(request, self.now, reason)

    def crash(self, **changes: int) -> None:
        """The shards die and come back, with `changes` to their configuration."""
        self.answers.clear()
        self.config = replace(self.config, **changes)  # type: ignore[arg-type]
        self.engine = FakeEngine(self.config)
        lost = self.scheduler.interrupt(self.now)
        for request, error in lost:
            request.sink.failed(error)
        for request, too_long in self.scheduler.resume(limits_of(self.config), self.now):
            request.sink.failed(too_long)

    def step(self) -> StepPlan | None:
        """One step with nothing else in flight."""
        plan = self.send()
        if plan is not None:
            self.answer()
        return plan

    def run(self, window: int = 2, max_steps: int = 10_000) -> int:
        """Until nothing is left to do; the number of steps it took."""
        for steps in range(max_steps):
            while len(self.answers) < window and self.send():
                pass
            if not self.answers:
                assert self.scheduler.is_idle, "nothing is sent, and yet something waits"
                self.scheduler.check_integrity()
                return steps
            self.answer()
        raise AssertionError(f"not finished after {max_steps} steps")


def collected(request: Request) -> Collector:
    """The sink of a request that a Simulation made."""
    sink = request.sink
    assert isinstance(sink, Collector)
    return sink


def assert_undisturbed(request: Request, vocab: int) -> None:
    """`request` has finished with exactly the tokens of an undisturbed run."""
    sink = collected(request)
    assert request.phase is Phase.FINISHED
    assert sink.error is None
    assert sink.ids == expected_ids(request.valid, vocab, sink.stop)
