"""The host's division of a step into programs: every row once, every key once, and no more parts than were wanted."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tgi_shard.kernels.tiles import Tile
from tgi_shard.kernels.work_list import MAX_SPLITS, WorkList, work_list

TILE = Tile(16, 32, 4, 2, 1)
LENGTHS = st.lists(st.tuples(st.integers(1, 70), st.integers(0, 3000)), min_size=1, max_size=12)


def divide(lengths: list[tuple[int, int]], window: int | None, group: int, programs: int) -> WorkList:
    """`lengths`: (tokens in the step, tokens before them) of requests 5, 6, 7 …"""
    query = np.array([q for q, _ in lengths])
    context = query + np.array([before for _, before in lengths])
    return work_list(np.arange(5, 5 + len(lengths)), query, context, window, group, TILE, programs)


@settings(deadline=None)
@given(LENGTHS, st.sampled_from([1, 3, 4, 16]), st.integers(1, 200))
def test_every_row_is_in_one_block_and_every_split_of_it_is_listed_once(
    lengths: list[tuple[int, int]], group: int, programs: int
) -> None:
    work = divide(lengths, None, group, programs)
    listed = sorted((request, block, split) for request, block, split, _, _ in work.items.tolist())
    splits = {(request, block): count for request, block, _, count, _ in work.items.tolist()}
    expected = [
        (5 + i, block, split)
        for i, (query, _) in enumerate(lengths)
        for block in range(-(-query * group // TILE.rows))
        for split in range(splits[5 + i, block])
    ]
    assert listed == expected
    assert work.rows == min(TILE.rows, max(query for query, _ in lengths) * group)


@settings(deadline=None)
@given(LENGTHS, st.sampled_from([None, 1, 100, 1000]), st.integers(1, 200))
def test_splits_are_never_empty_and_their_parts_lie_side_by_side(
    lengths: list[tuple[int, int]], window: int | None, programs: int
) -> None:
    group = 4
    work = divide(lengths, window, group, programs)
    next_part = 0
    for request, block, first_part, splits in work.groups.tolist():
        assert first_part == next_part
        assert 2 <= splits <= MAX_SPLITS
        next_part += splits
        query, before = lengths[request - 5]
        # As the kernel has it: tiles from the first key seen to the last, in equal shares.
        first = max(0, before + block * TILE.rows // group - window + 1) if window else 0
        last = before + min(((block + 1) * TILE.rows - 1) // group, query - 1)
        tiles = -(-(last + 1 - first // TILE.keys * TILE.keys) // TILE.keys)
        share = -(-tiles // splits)
        assert (splits - 1) * share < tiles
    assert work.num_parts == next_part
    assert work.num_parts <= 2 * programs
    split_items = {(request, block) for request, block, _, splits, _ in work.items.tolist() if splits > 1}
    assert split_items == {(request, block) for request, block, _, _ in work.groups.tolist()}


def test_long_contexts_are_split_only_while_there_are_too_few_programs() -> None:
    assert len(divide([(1, 3000)], None, 4, 1).groups) == 0
    assert divide([(1, 3000)], None, 4, 8).groups[0, 3] == 8
    assert len(divide([(1, 3000)] * 8, None, 4, 8).groups) == 0
    one_long = divide([(1, 30)] * 3 + [(1, 3000)], None, 4, 8)
    assert [request for request, *_ in one_long.groups.tolist()] == [8]


def test_the_longest_work_comes_first() -> None:
    work = divide([(1, 100), (1, 3000), (1, 1000)], None, 4, 1)
    assert work.items[:, 0].tolist() == [6, 7, 5]
