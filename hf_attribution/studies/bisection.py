"""Bisection of many queries at once: all of a round's questions are put together, so that retrainings are shared."""

from collections.abc import Callable, Sequence

import numpy as np

# Whether removing the first `size` examples of its order flips a query, for each pair (query, size).
Flips = Callable[[Sequence[tuple[int, int]]], Sequence[bool] | np.ndarray]


def smallest_flipping(flips: Flips, queries: Sequence[int], max_size: int) -> dict[int, int]:
    """Find for each query a size that flips it while the next smaller one does not.

    That is the smallest one where a set that flips a query still does when more is removed. After a first round at
    `max_size`, each round halves what is left, so that there are at most `1 + ceil(log2(max_size))` of them.

    Args:
        flips: Tells for pairs of a query and a size whether removing so many flips it; called once a round.
        queries: The queries.
        max_size: The largest size to try.

    Returns:
        Query to size; a query that is not flipped by `max_size` is not in it. Nothing is asked about size 0, which
        flips no query.

    Raises:
        ValueError: `max_size` is less than 1.

    Example:
        >>> smallest_flipping(lambda pairs: [size >= 3 * query for query, size in pairs], [1, 2, 3], max_size=8)
        {1: 3, 2: 6}
    """
    if max_size < 1:
        raise ValueError(f"max_size={max_size}: allow at least 1 example to be removed.")
    flipped = flips([(query, max_size) for query in queries]) if len(queries) else []
    flipping = {query: max_size for query, is_flipped in zip(queries, flipped, strict=True) if is_flipped}
    holding = dict.fromkeys(flipping, 0)
    while pairs := [(q, (holding[q] + size) // 2) for q, size in flipping.items() if size - holding[q] > 1]:
        for (query, size), is_flipped in zip(pairs, flips(pairs), strict=True):
            (flipping if is_flipped else holding)[query] = size
    return flipping
