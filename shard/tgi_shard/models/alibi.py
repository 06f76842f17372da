"""ALiBi slopes (arXiv 2108.12409), as Bloom and Falcon order them when the number of heads is no power of two."""

import math


def slopes(heads: int) -> tuple[float, ...]:
    """2^(-8 i / n) for i = 1 .. n, n the largest power of two in `heads`; then, for the rest, every second of 2 n."""
    power = 2 ** math.floor(math.log2(heads))
    first = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    rest = [2.0 ** (-4 * i / power) for i in range(1, 2 * (heads - power) + 1, 2)]
    return tuple(first + rest)
