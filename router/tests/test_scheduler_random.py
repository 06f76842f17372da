"""Thousands of random steps through the scheduler, with the fake engine as oracle: it knows what a slot must hold."""

from typing import Any

from fake_shard import logprob
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulation import Simulation, collected, expected_ids, make_valid
from tgi_router.errors import GenerationError, ValidationError
from tgi_router.request import Phase, Request

STOP = frozenset({3, 5})
POISON, BROKEN = 99, 98  # tokens of prompts only: the vocabulary ends at 90
DOCUMENTS = [[7 * (i + d) % 80 for i in range(40)] for d in range(3)]  # prompts share prefixes

prompts = st.builds(
    lambda document, shared, tail: DOCUMENTS[document][:shared] + tail,
    st.integers(0, 2),
    st.integers(0, 24),
    st.sampled_from([[], [], [1], [2, 4]]) | st.lists(st.integers(0, 80), max_size=5) | st.just([1, BROKEN, 2]),
).filter(bool)


class Core(RuleBasedStateMachine):
    """Arrivals, cancellations, answers with several steps in flight, row errors, crashes, poison, tiny pools."""

    @initialize(
        block_size=st.integers(1, 5),
        num_blocks=st.integers(3, 16),
        max_step_tokens=st.integers(1, 20),
        max_rows=st.integers(1, 8),
        window=st.integers(1, 3),
    )
    def start(self, window: int, **config: int) -> None:
        self.sim = Simulation(vocab=90, error_token=BROKEN, poison_token=POISON, max_steps_in_flight=window, **config)
        self.window = window
        self.requests: list[Request] = []
        self.cancelled: list[Request] = []
        self.crashes: dict[int, int] = {}  # request id -> crashes while it was in flight

    @rule(
        prompt=prompts,
        poisoned=st.sampled_from([False] * 12 + [True]),
        max_new_tokens=st.integers(1, 12),
        options=st.fixed_dictionaries(
            {
                "seed": st.none() | st.integers(0, 3),
                "prompt_logprobs": st.booleans(),
                "prompt_top_n_tokens": st.integers(0, 1),
                "cache_salt": st.sampled_from(["", "", "x"]),
            }
        ),
    )
    def submit(self, prompt: list[int], poisoned: bool, max_new_tokens: int, options: dict[str, Any]) -> None:
        valid = make_valid([*prompt, POISON] if poisoned else prompt, max_new_tokens, **options)
        fits = len(valid.token_ids) + max_new_tokens - 1 <= self.sim.config.num_blocks * self.sim.config.block_size
        try:
            self.requests.append(self.sim.submit(valid, STOP))
            assert fits
        except ValidationError:
            assert not fits

    @rule(document=st.integers(0, 2), lengths=st.lists(st.integers(1, 20), min_size=2, max_size=6))
    def burst(self, document: int, lengths: list[int]) -> None:
        for length in lengths:
            self.submit(DOCUMENTS[document][:length], False, 12, {"seed": length})

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        if request.phase is not Phase.FINISHED:
            self.cancelled.append(request)
        self.sim.scheduler.finish(request, self.sim.now)

    @precondition(lambda self: len(self.sim.answers) < self.window)
    @rule()
    def send(self) -> None:
        self.sim.send()

    @precondition(lambda self: self.sim.answers)
    @rule()
    def answer(self) -> None:
        if self.sim.answers[0][1] is None:
            self.note_crash()
        self.sim.answer()

    @rule(times=st.integers(1, 8))
    def work(self, times: int) -> None:
        for _ in range(times):
            while len(self.sim.answers) < self.window and self.sim.send():
                pass
            if self.sim.answers:
                self.answer()

    @rule(crash=st.sampled_from([False] * 5 + [True]), num_blocks=st.none() | st.integers(3, 16))
    def crash(self, crash: bool, num_blocks: int | None) -> None:
        if crash:
            self.note_crash()
            self.sim.crash(**({} if num_blocks is None else {"num_blocks": num_blocks}))

    def note_crash(self) -> None:
        for request in self.requests:
            if request.phase is not Phase.FINISHED and request.num_unanswered_steps:
                self.crashes[request.id] = self.crashes.get(request.id, 0) + 1

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "sim"):
            self.sim.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "sim"):
            return
        most = 200 + 4 * sum(len(r.valid.token_ids) + r.valid.max_new_tokens for r in self.requests)
        for _ in range(most):
            self.work(1)
            if self.sim.scheduler.is_idle:
                break
        assert self.sim.scheduler.is_idle, "somebody starves"
        self.sim.run(self.window)
        for request in self.requests:
            self.check_end(request)
        assert self.sim.scheduler.blocks.num_used == 0
        assert not self.sim.engine.rows, "a row was never forgotten"

    def check_end(self, request: Request) -> None:
        """Every request ends, and in the only way it may."""
        sink, valid = collected(request), request.valid
        assert request.phase is Phase.FINISHED
        expected = expected_ids(valid, 90, STOP)
        assert sink.ids == expected[: len(sink.ids)]
        assert sink.logprobs == [logprob(token) for token in valid.token_ids[1:]][: len(sink.logprobs)]
        if request in self.cancelled:
            return
        if self.crashes.get(request.id, 0) >= 2:
            assert isinstance(sink.error, GenerationError)
        elif isinstance(sink.error, ValidationError):  # a crash left it a smaller pool
            assert request.num_generated_tokens < valid.max_new_tokens
        elif BROKEN in valid.token_ids:
            assert isinstance(sink.error, GenerationError)
        else:
            assert POISON not in valid.token_ids
            assert sink.error is None
            assert sink.ids == expected
            assert sink.reason is request.finish_reason is not None
            scored = valid.token_ids[1:] if valid.prompt_logprobs else ()
            assert sink.logprobs == [logprob(token) for token in scored]
            tops = [((token, logprob(token)),) for token in scored]
            assert sink.prompt_top == (tops if valid.prompt_top_n_tokens else [])


TestCore = Core.TestCase
TestCore.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
