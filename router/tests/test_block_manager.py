"""Blocks and the prefix cache: who holds what, what is found again, what is evicted first."""

import dataclasses

import pytest
from simulation import Collector, make_valid
from tgi_router.block_manager import Admit, BlockManager
from tgi_router.errors import Bug
from tgi_router.request import Request

A = list(range(100, 140))
B = list(range(200, 240))


class Pool:
    """A block manager, and requests whose tokens are computed at once when they are admitted."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.blocks = BlockManager(num_blocks, block_size)
        self.requests: list[Request] = []

    def request(self, tokens: list[int], **options: object) -> Request:
        valid = dataclasses.replace(make_valid(tokens), **options)  # type: ignore[arg-type]
        self.requests.append(Request(len(self.requests) + 1, valid, Collector(1), 0.0))
        return self.requests[-1]

    def admit(self, tokens: list[int], **options: object) -> Request:
        request = self.request(tokens, **options)
        assert self.blocks.admit(request, reserve=0) is Admit.ADMITTED
        return request

    def compute(self, request: Request, num_tokens: int | None = None) -> None:
        request.num_acknowledged_tokens = len(request.token_ids) if num_tokens is None else num_tokens
        self.blocks.commit(request)
        self.check()

    def run(self, tokens: list[int], **options: object) -> int:
        """A request's whole life; the number of tokens it found in the cache."""
        request = self.admit(tokens, **options)
        hits = request.num_committed_blocks * self.blocks.block_size
        self.compute(request)
        self.release(request)
        return hits

    def release(self, request: Request) -> None:
        self.blocks.release(request)
        self.check()

    def check(self) -> None:
        self.blocks.check_integrity(self.requests)


def test_a_prefix_is_found_again_in_whole_blocks() -> None:
    pool = Pool(12, 2)
    assert pool.run(A[:8]) == 0
    assert pool.run(A[:8] + B[:2]) == 8
    assert pool.run(A[:7]) == 6, "a block that is only partly the same is not shared"
    assert pool.run(A[:3] + B[:5]) == 2


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    pool = Pool(12, 2)
    pool.run(A[:8])
    assert pool.run(A[:8]) == 6
    assert pool.run(A[:1]) == 0


def test_a_shared_block_is_held_by_both_and_kept_after_both() -> None:
    pool = Pool(12, 2)
    pool.run(A[:4])
    first, second = pool.admit(A[:6]), pool.admit(A[:6], prompt_logprobs=False)
    assert first.blocks[:2] == second.blocks[:2]
    assert first.blocks[2] != second.blocks[2]
    pool.release(first)
    assert pool.blocks.num_kept == 0
    pool.release(second)
    assert pool.blocks.num_kept == 2
    assert pool.blocks.num_used == 0


def test_nothing_is_found_that_was_not_computed() -> None:
    pool = Pool(12, 2)
    request = pool.admit(A[:8])
    pool.compute(request, num_tokens=5)
    pool.release(request)
    assert pool.blocks.num_kept == 2
    assert pool.run(A[:8]) == 4


def test_generated_tokens_are_found_too() -> None:
    pool = Pool(12, 2)
    request = pool.admit(A[:4])
    pool.compute(request)
    assert pool.blocks.grow(request, 8) is not None
    request.token_ids += A[4:8]
    pool.compute(request)
    pool.release(request)
    assert pool.run(A[:8] + B[:1]) == 8


def test_salts_do_not_share() -> None:
    pool = Pool(12, 2)
    pool.run(A[:8], cache_salt="adapter")
    assert pool.run(A[:8]) == 0
    assert pool.run(A[:8], cache_salt="adapter") == 6


def test_prompt_logprobs_need_the_whole_prompt_computed() -> None:
    pool = Pool(12, 2)
    pool.run(A[:8])
    assert pool.run(A[:8], prompt_logprobs=True) == 0


def test_the_least_recently_used_prefix_is_evicted_first_from_its_end() -> None:
    pool = Pool(8, 2)
    pool.run(A[:8])
    pool.run(B[:8])
    assert pool.run([*A[:8], 1]) == 8, "A is now more recently used than B"
    pool.run(list(range(4)))  # takes the last two blocks of B
    assert pool.run(B[:5]) == 4


def test_blocks_in_use_are_never_evicted() -> None:
    pool = Pool(6, 2)
    holder = pool.admit(A[:8])
    pool.compute(holder)
    request = pool.request(B[:6])
    assert pool.blocks.admit(request, reserve=0) is Admit.FULL
    assert request.blocks == []
    assert pool.blocks.grow(holder, 12) is not None
    assert pool.blocks.grow(holder, 13) is None
    assert len(holder.blocks) == 6


def test_hits_that_are_only_kept_count_as_taken() -> None:
    pool = Pool(4, 2)
    pool.run(A[:8])  # all four blocks are kept
    assert pool.blocks.num_available == 4
    request = pool.request([*A[:8], 1])  # four hits and one new block: one too many
    assert pool.blocks.admit(request, reserve=0) is Admit.FULL
    assert pool.blocks.num_kept == 4
    pool.check()


def test_an_admission_leaves_a_reserve() -> None:
    pool = Pool(4, 2)
    request = pool.request(A[:6])
    assert pool.blocks.admit(request, reserve=2) is Admit.FULL
    assert pool.blocks.admit(request, reserve=1) is Admit.ADMITTED


def test_a_common_prefix_is_computed_once_and_waited_for() -> None:
    pool = Pool(16, 2)
    first = pool.admit(A[:8])
    second = pool.request(A[:8])
    assert pool.blocks.admit(second, reserve=0) is Admit.COMPUTING
    pool.compute(first, num_tokens=4)
    assert pool.blocks.admit(second, reserve=0) is Admit.COMPUTING, "two of the four blocks are there, the third is not"
    pool.compute(first)
    assert pool.blocks.admit(second, reserve=0) is Admit.ADMITTED
    assert second.blocks[:3] == first.blocks[:3]
    pool.check()


def test_who_waits_for_a_prefix_goes_on_when_its_computer_is_gone() -> None:
    pool = Pool(16, 2)
    first = pool.admit(A[:8])
    second = pool.request(A[:8])
    assert pool.blocks.admit(second, reserve=0) is Admit.COMPUTING
    pool.release(first)
    assert pool.blocks.admit(second, reserve=0) is Admit.ADMITTED


def test_prompts_that_differ_do_not_wait() -> None:
    pool = Pool(16, 2)
    pool.admit(A[:8])
    assert pool.blocks.admit(pool.request(B[:8]), reserve=0) is Admit.ADMITTED
    assert pool.blocks.admit(pool.request(A[:8], cache_salt="other"), reserve=0) is Admit.ADMITTED


def test_a_block_computed_twice_is_cached_once() -> None:
    pool = Pool(16, 2)
    first, second = pool.admit(A[:8]), pool.request(A[:8])
    assert pool.blocks.admit(second, reserve=0, wait=False) is Admit.ADMITTED
    pool.compute(first)
    pool.compute(second)
    pool.release(first)
    pool.release(second)
    assert pool.blocks.num_kept == 4
    assert pool.run(A[:8] + B[:1]) == 8


def test_eviction_of_a_duplicates_parent_does_not_corrupt() -> None:
    """`second` hangs its third block below an entry it does not hold; that entry may go first."""
    pool = Pool(6, 2)
    first, second = pool.admit(A[:4]), pool.request(A[:4])
    assert pool.blocks.admit(second, reserve=0, wait=False) is Admit.ADMITTED
    pool.compute(first)
    pool.compute(second)
    pool.release(first)
    assert pool.blocks.grow(second, 8) is not None
    second.token_ids += A[4:8]
    pool.run([1, 2, 3, 4])  # evicts both entries of `first`
    pool.compute(second)
    pool.release(second)
    assert pool.run(A[:4]) == 0


def test_admitting_twice_is_a_bug() -> None:
    pool = Pool(6, 2)
    request = pool.admit(A[:4])
    with pytest.raises(Bug, match="already has blocks"):
        pool.blocks.admit(request, reserve=0)


def test_an_inconsistency_is_found() -> None:
    pool = Pool(6, 2)
    request = pool.admit(A[:4])
    request.blocks = [request.blocks[0], request.blocks[0]]
    with pytest.raises(Bug, match="is lost"):
        pool.check()


def test_a_pool_of_a_hundred_thousand_blocks_costs_no_more_per_step() -> None:
    """Work is counted, not timed: taking and giving back must not walk the pool."""
    pool = Pool(100_000, 16)
    requests = [pool.request([i] * 160) for i in range(50)]
    for request in requests:
        assert pool.blocks.admit(request, reserve=0) is Admit.ADMITTED
    assert len(pool.blocks._free.runs()) <= 51
    assert all(request.blocks == list(range(request.blocks[0], request.blocks[0] + 10)) for request in requests)
