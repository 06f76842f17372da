"""The scheduler's promises, one by one, against the fake engine."""

import pytest
from fake_shard import logprob
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import Simulation, assert_undisturbed, collected, make_valid
from tgi_proto import generate_pb2 as pb
from tgi_router.errors import Bug, GenerationError, ValidationError
from tgi_router.request import FinishReason, Phase, Request
from tgi_router.scheduler import Limits, Scheduler
from tgi_router.step_plan import StepPlan, share_budget


def tokens_of(plan: StepPlan | None, request: Request) -> int:
    """How many tokens of `request` a plan computes."""
    assert plan is not None
    return sum(scheduled.num_tokens for scheduled in plan.scheduled if scheduled.request is request)


# ---- one request


def test_a_request_generates_what_it_would_alone_and_ends() -> None:
    sim = Simulation()
    request = sim.submit(make_valid(9, 6, seed=7))
    sim.run()
    assert_undisturbed(request, sim.config.vocab)
    assert request.finish_reason is FinishReason.LENGTH
    times = (request.arrived_s, request.admitted_s, request.first_token_s, request.finished_s)
    assert list(times) == sorted(times)


def test_with_two_steps_in_flight_the_second_is_planned_before_the_first_is_answered() -> None:
    sim = Simulation()
    request = sim.submit(make_valid(5, 3))
    first, second = sim.send(), sim.send()
    assert tokens_of(first, request) == 5
    assert tokens_of(second, request) == 1
    assert request.num_pending_tokens == 2
    sim.answer()
    assert (request.num_pending_tokens, request.num_generated_tokens) == (1, 1)


def test_nothing_is_scheduled_beyond_max_new_tokens() -> None:
    sim = Simulation()
    sim.submit(make_valid(5, 2))
    assert [sim.send() is not None for _ in range(4)] == [True, True, False, False]
    sim.run()
    assert sim.engine.num_computed_tokens == 6, "the last token is never computed"


def test_a_finished_request_is_forgotten_even_when_nothing_else_runs() -> None:
    sim = Simulation()
    request = sim.submit(make_valid(5, 1))
    sim.step()
    plan = sim.step()
    assert plan is not None
    assert (plan.forget, plan.scheduled) == ([request.id], [])
    assert sim.send() is None


def test_a_step_computed_for_a_finished_request_is_dropped() -> None:
    sim = Simulation()
    token = collected(sim.submit(make_valid(5, 9)))
    sim.run()
    stop = frozenset({token.ids[0]})
    request = sim.submit(make_valid(5, 9), stop)
    sim.send()
    sim.send()
    sim.answer()
    assert request.phase is Phase.FINISHED
    assert request.finish_reason is FinishReason.EOS_TOKEN
    sim.run()
    assert len(collected(request).ids) == 1


def test_a_request_that_can_never_fit_is_refused_with_the_numbers_and_the_flag() -> None:
    sim = Simulation(num_blocks=4, block_size=4)
    with pytest.raises(ValidationError) as refused:
        sim.submit(make_valid(10, 8))
    for part in ("`max_new_tokens`", "10 `inputs` tokens", "8 `max_new_tokens`", "<= 17", "`--max-batch-total-tokens`"):
        assert part in refused.value.message
    request = sim.submit(make_valid(10, 7))
    sim.run()
    assert_undisturbed(request, sim.config.vocab)


# ---- the budget


def test_a_long_prompt_is_computed_in_chunks_beside_running_streams() -> None:
    sim = Simulation(max_step_tokens=16)
    stream = sim.submit(make_valid(4, 20))
    sim.step()
    long = sim.submit(make_valid(list(range(60, 110)), 2))
    chunks = []
    while not collected(long).tokens:
        plan = sim.step()
        assert tokens_of(plan, stream) == 1, "the running stream gets a token in every step"
        chunks.append(tokens_of(plan, long))
    assert chunks == [15, 15, 15, 5]


def test_a_short_prompt_does_not_wait_for_the_long_one_before_it() -> None:
    sim = Simulation(max_step_tokens=16, num_blocks=200)
    long = sim.submit(make_valid(list(range(400)), 2))
    sim.step()
    short = sim.submit(make_valid([120] * 6, 2))
    plan = sim.step()
    assert tokens_of(plan, short) == 6
    assert tokens_of(plan, long) == 10
    assert len(collected(short).tokens) == 1


def test_the_oldest_prompt_always_gets_half_of_the_budget() -> None:
    sim = Simulation(max_step_tokens=16, num_blocks=300, max_rows=8)
    long = sim.submit(make_valid(list(range(100)), 1))
    while not collected(long).tokens:
        sim.submit(make_valid([110 + len(sim.scheduler.waiting)] * 12, 1))  # short prompts without end
        plan = sim.step()
        assert tokens_of(plan, long) >= min(8, 100 - long.num_scheduled_tokens)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 60))
def test_the_budget_is_used_up_and_the_oldest_and_the_shortest_get_on(todo: list[int], budget: int) -> None:
    grants = share_budget(todo, budget)
    assert sum(grants) == min(sum(todo), budget)
    assert all(0 <= grant <= need for grant, need in zip(grants, todo, strict=True))
    assert grants[0] >= min(todo[0], (budget + 1) // 2)
    if min(todo) <= budget // 2:
        assert grants[todo.index(min(todo))] == min(todo)


# ---- rows, blocks, preemption


def test_no_more_requests_run_than_there_are_rows() -> None:
    sim = Simulation(max_rows=2)
    requests = [sim.submit(make_valid([i] * 3, 5)) for i in range(6)]
    while not sim.scheduler.is_idle:
        sim.step()
        assert len(sim.scheduler.running) <= 2
    for request in requests:
        assert_undisturbed(request, sim.config.vocab)


def test_requests_are_admitted_in_order_of_arrival() -> None:
    sim = Simulation(max_rows=1)
    requests = [sim.submit(make_valid([i] * 3, 2)) for i in range(5)]
    sim.run()
    times = [request.finished_s or 0 for request in requests]
    assert times == sorted(times)


def test_the_head_of_the_queue_is_not_overtaken_by_one_that_needs_less() -> None:
    sim = Simulation(num_blocks=10, block_size=4)
    sim.submit(make_valid([1] * 20, 8))
    sim.step()
    large = sim.submit(make_valid([2] * 24, 2))
    small = sim.submit(make_valid([3] * 2, 2))
    sim.run()
    assert (large.admitted_s or 0) <= (small.admitted_s or 0)


def test_when_the_head_of_the_queue_leaves_the_next_is_tried() -> None:
    sim = Simulation(num_blocks=10, block_size=4)
    sim.submit(make_valid([1] * 20, 8))
    sim.step()
    large = sim.submit(make_valid([2] * 24, 2))
    small = sim.submit(make_valid([3] * 2, 2))
    sim.step()
    sim.scheduler.finish(large, sim.now)
    assert tokens_of(sim.step(), small) == 2


def test_without_blocks_the_newest_is_preempted_and_later_continues_with_the_same_tokens() -> None:
    sim = Simulation(num_blocks=8, block_size=4)
    old = sim.submit(make_valid([1] * 8, 16, seed=1))
    new = sim.submit(make_valid([2] * 8, 16, seed=2))
    sim.run()
    assert old.num_preemptions == 0
    assert new.num_preemptions >= 1
    assert (old.finished_s or 0) < (new.finished_s or 0)
    for request in (old, new):
        assert_undisturbed(request, sim.config.vocab)
    assert sim.scheduler.take_counts().preemptions == new.num_preemptions


def test_a_preempted_request_waits_for_its_pending_tokens() -> None:
    sim = Simulation(num_blocks=8, block_size=4)
    old = sim.submit(make_valid([1] * 8, 16))
    new = sim.submit(make_valid([2] * 8, 16))
    while new.phase is not Phase.WAITING or not new.num_pending_tokens:
        if len(sim.answers) == 2:
            sim.answer()
        sim.send()
    sim.scheduler.finish(old, sim.now)  # now there is room
    while new.num_pending_tokens:
        sim.send()
        assert new.phase is Phase.WAITING
        sim.answer()
    sim.send()
    assert new.phase is Phase.RUNNING
    sim.run()
    assert_undisturbed(new, sim.config.vocab)


def test_a_preempted_request_stands_before_all_that_came_later() -> None:
    sim = Simulation(num_blocks=8, block_size=4, max_rows=2)
    sim.submit(make_valid([1] * 8, 16))
    new = sim.submit(make_valid([2] * 8, 16))
    later = [sim.submit(make_valid([3 + i], 1)) for i in range(3)]
    while new.phase is not Phase.WAITING or not new.num_preemptions:
        sim.step()
    assert [request.id for request in sim.scheduler.waiting] == [new.id, *(request.id for request in later)]


def test_a_token_that_ends_a_preempted_request_ends_it_where_it_waits() -> None:
    sim = Simulation(num_blocks=8, block_size=4)
    old = sim.submit(make_valid([1] * 8, 16))
    new = sim.submit(make_valid([2] * 8, 16))
    while new.phase is not Phase.WAITING or not new.num_pending_tokens:
        if len(sim.answers) == 2:
            sim.answer()
        sim.send()
    collected(new).stop = frozenset(range(sim.config.vocab))
    sim.run()
    assert new.phase is Phase.FINISHED
    assert new.finish_reason is FinishReason.EOS_TOKEN
    assert_undisturbed(old, sim.config.vocab)


# ---- the prefix cache


def test_a_second_request_computes_only_what_is_new() -> None:
    sim = Simulation()
    sim.submit(make_valid(20, 1))
    sim.run()
    before = sim.engine.num_computed_tokens
    request = sim.submit(make_valid(22, 1))
    sim.run()
    assert request.num_cached_tokens == 20
    assert sim.engine.num_computed_tokens - before == 2
    counts = sim.scheduler.take_counts()
    assert (counts.queried_tokens, counts.hit_tokens) == (42, 20)


def test_a_conversation_finds_its_generated_tokens_again() -> None:
    sim = Simulation()
    first = sim.submit(make_valid(10, 9))
    sim.run()
    second = sim.submit(make_valid([*range(10), *collected(first).ids, 1, 2, 3], 1))
    sim.run()
    assert second.num_cached_tokens == 16, "18 tokens of the first have been computed, in blocks of 4"
    assert_undisturbed(second, sim.config.vocab)


def test_simultaneous_requests_compute_their_common_prefix_once() -> None:
    sim = Simulation(max_step_tokens=16)
    requests = [sim.submit(make_valid([*range(33), 50 + i], 3)) for i in range(5)]
    sim.run()
    assert sim.engine.num_computed_tokens == 34 + 4 * 2 + 5 * 2
    for request in requests:
        assert_undisturbed(request, sim.config.vocab)


def test_when_the_one_who_computes_the_prefix_leaves_the_next_goes_on() -> None:
    sim = Simulation(max_step_tokens=8)
    first = sim.submit(make_valid(33, 3))
    others = [sim.submit(make_valid([*range(33), i], 3)) for i in range(3)]
    sim.send()
    assert len(sim.scheduler.waiting) == 3
    sim.scheduler.finish(first, sim.now)
    sim.run()
    for request in others:
        assert_undisturbed(request, sim.config.vocab)


def test_who_waits_for_a_prefix_does_not_hold_up_the_others() -> None:
    sim = Simulation(max_step_tokens=8)
    sim.submit(make_valid(33, 3))
    waits = sim.submit(make_valid(33, 3))
    other = sim.submit(make_valid([99] * 3, 3))
    assert tokens_of(sim.step(), other) == 3
    assert waits.phase is Phase.WAITING


def test_who_waits_for_a_prefix_is_admitted_although_one_behind_does_not_fit() -> None:
    sim = Simulation(max_step_tokens=8, num_blocks=12, block_size=4)
    sim.submit(make_valid(20, 20))
    waits = sim.submit(make_valid(18, 3))
    large = sim.submit(make_valid([99] * 30, 3))
    for _ in range(3):
        sim.step()
    assert waits.phase is Phase.RUNNING
    assert waits.num_cached_tokens == 16
    assert large.phase is Phase.WAITING


# ---- prompt log-probabilities


def test_prompt_logprobs_come_for_every_token_but_the_first_once() -> None:
    sim = Simulation(max_step_tokens=8)
    prompt = list(range(30))
    sim.submit(make_valid(prompt, 1))
    sim.run()
    request = sim.submit(make_valid(prompt, 2, prompt_logprobs=True))
    sim.run()
    assert request.num_cached_tokens == 0, "they need the whole prompt computed"
    assert collected(request).logprobs == [logprob(token) for token in prompt[1:]]


def test_prompt_logprobs_survive_an_interruption_without_repetition() -> None:
    sim = Simulation(max_step_tokens=8)
    prompt = list(range(30))
    request = sim.submit(make_valid(prompt, 2, prompt_logprobs=True))
    sim.step()
    sim.step()
    sim.crash()
    sim.run()
    assert collected(request).logprobs == [logprob(token) for token in prompt[1:]]


def test_after_its_prompt_logprobs_are_here_a_preempted_request_may_use_the_cache() -> None:
    sim = Simulation(num_blocks=8, block_size=4)
    old = sim.submit(make_valid([1] * 8, 16, seed=1))
    new = sim.submit(make_valid([2] * 8, 16, seed=2, prompt_logprobs=True))
    sim.run()
    assert new.num_preemptions >= 1
    assert sim.engine.num_computed_tokens < 2 * 23 + 16, "not all of it was computed again"
    assert collected(new).logprobs == [logprob(2)] * 7
    for request in (old, new):
        assert_undisturbed(request, sim.config.vocab)


# ---- cancelling, failing rows


def test_a_cancelled_request_gives_its_blocks_back_at_once() -> None:
    sim = Simulation()
    request = sim.submit(make_valid(20, 10))
    sim.send()
    sim.send()
    sim.scheduler.finish(request, sim.now)
    assert sim.scheduler.blocks.num_used == 0
    plan = sim.send()
    assert plan is not None
    assert plan.forget == [request.id]
    sim.run()
    assert collected(request).tokens == []


def test_cancelling_twice_or_after_the_end_does_nothing() -> None:
    sim = Simulation()
    request = sim.submit(make_valid(4, 1))
    sim.run()
    sim.scheduler.finish(request, sim.now)
    assert request.finish_reason is FinishReason.LENGTH
    waiting = sim.submit(make_valid(4, 1))
    sim.scheduler.finish(waiting, sim.now)
    sim.scheduler.finish(waiting, sim.now)
    assert sim.send() is None


def test_a_row_error_fails_its_request_alone() -> None:
    sim = Simulation(error_token=127, vocab=120)
    good = [sim.submit(make_valid([i] * 6, 8, seed=i)) for i in range(3)]
    bad = sim.submit(make_valid([7] * 9 + [127], 8))
    good += [sim.submit(make_valid([10 + i] * 6, 8, seed=i)) for i in range(3)]
    sim.run()
    assert isinstance(collected(bad).error, GenerationError)
    assert "cannot compute token 127" in str(collected(bad).error)
    for request in good:
        assert_undisturbed(request, 120)


def test_nothing_of_a_failed_row_enters_the_cache_unless_its_step_was_answered() -> None:
    sim = Simulation(error_token=127, vocab=120, max_step_tokens=4, block_size=2)
    bad = sim.submit(make_valid([1, 2, 3, 4, 5, 127, 6, 7], 2))
    sim.run()
    assert bad.phase is Phase.FINISHED
    assert sim.scheduler.blocks.num_kept == 2, "the first chunk was fine, the second was not"
    good = sim.submit(make_valid([1, 2, 3, 4, 5, 6, 7, 8], 2))
    sim.run()
    assert good.num_cached_tokens == 4
    assert_undisturbed(good, 120)


def test_an_answer_without_the_expected_token_fails_the_request() -> None:
    sim = Simulation()
    request = sim.submit(make_valid(4, 2))
    plan = sim.scheduler.plan(0.0)
    assert plan is not None
    outcome = sim.scheduler.apply(pb.StepResponse(step=1), 0.0)
    assert [failed for failed, _ in outcome.failed] == [request]


def test_an_answer_to_another_step_is_a_bug() -> None:
    sim = Simulation()
    sim.submit(make_valid(4, 2))
    sim.scheduler.plan(0.0)
    with pytest.raises(Bug, match="answered with step 9"):
        sim.scheduler.apply(pb.StepResponse(step=9), 0.0)


# ---- crashes


def test_after_a_crash_every_request_continues_with_the_same_tokens() -> None:
    sim = Simulation()
    requests = [sim.submit(make_valid([i] * (4 + i), 12, seed=i)) for i in range(5)]
    for _ in range(6):
        sim.step()
    sim.crash()
    sim.run()
    for request in requests:
        assert_undisturbed(request, sim.config.vocab)
    assert [request.num_crashes for request in requests] == [0] * 5, "no step of theirs was unanswered"


def test_tokens_of_an_unanswered_step_are_generated_again() -> None:
    sim = Simulation()
    request = sim.submit(make_valid(6, 12, seed=3))
    sim.step()
    sim.send()
    sim.send()
    sim.crash()
    assert (request.num_crashes, request.num_pending_tokens, request.num_generated_tokens) == (1, 0, 1)
    sim.run()
    assert_undisturbed(request, sim.config.vocab)


def test_a_poisonous_request_fails_alone_after_two_crashes() -> None:
    sim = Simulation(poison_token=127, vocab=120)
    good = [sim.submit(make_valid([i] * 6, 8, seed=i)) for i in range(3)]
    bad = sim.submit(make_valid([5, 127, 5], 8))
    good += [sim.submit(make_valid([10 + i] * 6, 8, seed=i)) for i in range(3)]
    sim.run()
    assert isinstance(collected(bad).error, GenerationError)
    assert bad.num_crashes == 2
    for request in good:
        assert_undisturbed(request, 120)
        assert request.num_crashes == 1


def test_suspects_are_alone_in_their_steps_until_each_has_produced_a_token() -> None:
    sim = Simulation(max_step_tokens=16)
    suspects = [sim.submit(make_valid([i] * (20 if i == 1 else 4), 8)) for i in range(3)]
    sim.send()
    sim.send()
    sim.crash()
    newcomer = sim.submit(make_valid([9] * 4, 2))
    seen = []
    while newcomer.phase is Phase.WAITING:
        plan = sim.send()
        assert plan is not None
        assert sim.send() is None or newcomer.phase is Phase.RUNNING, "a suspect has one step in flight"
        seen.append([scheduled.request.id for scheduled in plan.scheduled])
        while sim.answers:
            sim.answer()
    assert seen[:4] == [[suspects[0].id], [suspects[1].id], [suspects[1].id], [suspects[2].id]]
    assert len(seen[4]) == 4, "then everybody"
    sim.run()


def test_quarantine_makes_room_for_a_suspect_by_preempting_the_cleared() -> None:
    sim = Simulation(num_blocks=12, block_size=4)
    requests = [sim.submit(make_valid([i] * 10, 12, seed=i)) for i in range(3)]
    sim.send()
    sim.crash(num_blocks=6)
    sim.run()
    for request in requests:
        assert_undisturbed(request, sim.config.vocab)


def test_a_suspect_that_is_cancelled_is_a_suspect_no_more() -> None:
    sim = Simulation()
    suspect = sim.submit(make_valid(4, 4))
    sim.send()
    sim.crash()
    sim.scheduler.finish(suspect, sim.now)
    other = sim.submit(make_valid([3] * 4, 4))
    sim.run()
    assert_undisturbed(other, sim.config.vocab)


def test_a_request_that_no_longer_fits_after_a_restart_is_told_so() -> None:
    sim = Simulation(num_blocks=12, block_size=4)
    request = sim.submit(make_valid(20, 20))
    sim.step()
    sim.crash(num_blocks=5)
    assert isinstance(collected(request).error, ValidationError)
    assert sim.scheduler.is_idle


def test_who_did_not_fit_before_a_crash_is_tried_again_after_it() -> None:
    sim = Simulation(num_blocks=8, block_size=4)
    first = sim.submit(make_valid([1] * 20, 2))
    second = sim.submit(make_valid([2] * 20, 2))
    sim.step()
    sim.crash()
    sim.scheduler.finish(first, sim.now)
    sim.run()
    assert_undisturbed(second, sim.config.vocab)


def test_limits_without_room_are_a_bug() -> None:
    with pytest.raises(Bug, match="leave no room"):
        Scheduler(Limits(num_blocks=0, block_size=4, max_step_tokens=4, max_running=4), iter(()))
