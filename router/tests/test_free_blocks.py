"""Free blocks as runs of neighbours: equal to a plain set, and laid out so that requests can grow."""

from hypothesis import given, settings
from hypothesis import strategies as st
from tgi_router.free_blocks import FreeBlocks


def runs_in(blocks: list[int]) -> int:
    """How many runs of ascending neighbours `blocks` consists of."""
    return sum(1 for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1] + 1)


def test_blocks_are_taken_in_ascending_order() -> None:
    free = FreeBlocks(8)
    assert free.take(3, None) == [0, 1, 2]
    assert len(free) == 5


def test_a_request_grows_into_the_block_after_its_last() -> None:
    free = FreeBlocks(16)
    mine = free.take(2, None)
    other = free.take(2, None)
    assert other[0] > mine[-1] + 1, "room is left between two requests"
    mine += free.take(1, mine[-1])
    other += free.take(1, other[-1])
    assert runs_in(mine) == runs_in(other) == 1


def test_freed_neighbours_become_one_run() -> None:
    free = FreeBlocks(6)
    taken = free.take(6, None)
    for block in (4, 2, 3):
        free.add(block)
    assert free.runs() == [(2, 5)]
    assert free.take(3, taken[0]) == [2, 3, 4]


def test_a_need_larger_than_any_run_is_met_from_several() -> None:
    free = FreeBlocks(8)
    free.take(8, None)
    for block in (0, 3, 4, 5, 6):
        free.add(block)
    assert free.take(5, None) == [3, 4, 5, 6, 0]
    assert len(free) == 0


def test_64_requests_growing_in_turns_stay_contiguous() -> None:
    free = FreeBlocks(8192)
    tables = [free.take(4, None) for _ in range(64)]
    for _ in range(40):
        for table in tables:
            table += free.take(1, table[-1])
    assert sum(runs_in(table) for table in tables) <= 70


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 40), st.data())
def test_agrees_with_a_set(num_blocks: int, data: st.DataObject) -> None:
    free, expected, taken = FreeBlocks(num_blocks), set(range(num_blocks)), []
    for _ in range(data.draw(st.integers(1, 30))):
        if taken and data.draw(st.booleans()):
            block = taken.pop(data.draw(st.integers(0, len(taken) - 1)))
            free.add(block)
            expected.add(block)
        elif expected:
            count = data.draw(st.integers(1, len(expected)))
            last = data.draw(st.sampled_from(taken)) if taken else None
            blocks = free.take(count, last)
            assert len(blocks) == len(set(blocks)) == count
            assert expected.issuperset(blocks)
            if last is not None and last + 1 in expected:
                assert blocks[0] == last + 1
            expected.difference_update(blocks)
            taken += blocks
        assert free.check_integrity() == []
        assert len(free) == len(expected)
        assert [block for start, end in free.runs() for block in range(start, end)] == sorted(expected)
