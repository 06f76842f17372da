"""FreeBlocks: the free block ids as maximal runs of neighbours, so that a request's blocks lie side by side.

PURE. Owns nothing but the set of free ids; block_manager.py, its only caller, decides what becomes free. An attention
backend on CPU reads a run of neighbouring blocks as one view without copying, hence the care. Every operation costs
O(1), whatever the size of the pool.
"""

from collections import OrderedDict
from itertools import pairwise


class FreeBlocks:
    """
    taken/free:    # # . . . . # # # . # . . . . . . .        runs: 2..6, 9..10, 11..18 as {start: end}

    A run is found by its start, by its end (to merge with a freed neighbour) or by its size class (bit length).
    A block in use is never inside a run, so the block after it is free exactly when it *starts* a run.
    """

    def __init__(self, num_blocks: int) -> None:
        self._end: dict[int, int] = {}  # start of a run -> its end (exclusive)
        self._start: dict[int, int] = {}  # end of a run -> its start
        self._by_size: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_blocks.bit_length() + 1)]
        self._count = num_blocks
        if num_blocks:
            self._insert(0, num_blocks)

    def __len__(self) -> int:
        return self._count

    def add(self, block: int) -> None:
        """`block` becomes free; it joins the runs beside it."""
        start, end = block, block + 1
        if block in self._start:
            start = self._start[block]
            self._remove(start, block)
        if end in self._end:
            joined = self._end[end]
            self._remove(end, joined)
            end = joined
        self._insert(start, end)
        self._count += 1

    def take(self, count: int, last: int | None) -> list[int]:
        """`count` blocks (<= len(self)) in the order in which they should be used, in as few runs as is cheap.

        last: the block they follow; its right neighbours are taken when free.
        """
        blocks: list[int] = []
        while count:
            if last is not None and last + 1 in self._end:
                begin, end = last + 1, self._end[last + 1]
                self._remove(begin, end)
            else:
                begin, end = self._place(count)
            stop = min(end, begin + count)
            if stop < end:
                self._insert(stop, end)
            blocks += range(begin, stop)
            count -= stop - begin
            self._count -= stop - begin
            last = stop - 1
        return blocks

    def _place(self, count: int) -> tuple[int, int]:
        """Cuts a place for `count` blocks with room to grow out of one of the largest runs: (begin, end of the run).

        The middle of it, so that whoever owns the block before the run can grow as well.
        """
        by_size = next(starts for starts in reversed(self._by_size) if starts)
        start = next(iter(by_size))
        end = self._end[start]
        self._remove(start, end)
        begin = start + max(0, end - start - count) // 2 if start else 0  # nobody stands before block 0
        if start < begin:
            self._insert(start, begin)
        return begin, end

    def _insert(self, start: int, end: int) -> None:
        self._end[start] = end
        self._start[end] = start
        self._by_size[(end - start).bit_length()][start] = None

    def _remove(self, start: int, end: int) -> None:
        del self._end[start]
        del self._start[end]
        del self._by_size[(end - start).bit_length()][start]

    def runs(self) -> list[tuple[int, int]]:
        """All runs (start, end) in ascending order; for check_integrity and tests."""
        return sorted(self._end.items())

    def check_integrity(self) -> list[str]:
        """What is wrong, one sentence each: overlapping or unmerged runs, indices that disagree."""
        runs = self.runs()
        wrong = [f"free runs {a} and {b} touch or overlap" for a, b in pairwise(runs) if a[1] >= b[0]]
        if sorted((end, start) for start, end in runs) != sorted(self._start.items()):
            wrong.append("the indices of free runs by start and by end disagree")
        if sorted(start for starts in self._by_size for start in starts) != [start for start, _ in runs]:
            wrong.append("the index of free runs by size disagrees with the one by start")
        if sum(end - start for start, end in runs) != self._count:
            wrong.append(f"{self._count} free blocks counted, runs hold {sum(end - start for start, end in runs)}")
        return wrong
