"""The mathematics of brittleness, on plain arrays: numpy and scipy, nothing else.

Letters: Q queries, S sizes of removed sets.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import norm

Sizes = np.ndarray | Sequence[float | None]


def compute_brittleness(
    predictions: Sizes,
    references: Sizes,
    max_size: int,
    sizes: Sequence[int] | None = None,
    confidence_level: float = 0.95,
) -> dict[str, Any]:
    """How few examples must be removed to flip predictions, if the scores name them, or if chance does.

    Args:
        predictions: for each query the size of the smallest set of top-scored examples whose removal flips its
            prediction, `[Q]`; NaN (or None) where none of up to `max_size` does.
        references: the same of random sets, `[Q]`.
        max_size: the largest size that was tried.
        sizes: where the share of flipped predictions is read off, `[S]`; by default powers of two up to `max_size`.
        confidence_level: of the intervals, between 0 and 1.

    Returns:
        The numbers listed in the metric's description, as Python floats, ints, lists and tuples.

    Raises:
        ValueError: a size is out of range, or numbers of queries differ.
    """
    if not 0 < confidence_level < 1:
        raise ValueError(f"confidence_level must lie between 0 and 1, got {confidence_level}")
    if max_size < 1:
        raise ValueError(f"max_size must be at least 1, got {max_size}")
    smallest = _sizes("predictions", predictions, max_size)
    random = _sizes("references", references, max_size)
    if len(smallest) != len(random):
        raise ValueError(f"there are {len(smallest)} predictions and {len(random)} references: give one a query each")
    grid = _grid(max_size) if sizes is None else [int(size) for size in sizes]
    if not grid or min(grid) < 1 or max(grid) > max_size:
        raise ValueError(f"sizes must lie between 1 and max_size={max_size}, got {grid}")
    # A set that was not found is larger than any: infinitely large.
    smaller = (smallest < random) + 0.5 * (smallest == random)
    flipped = [smallest <= size for size in grid]
    return {
        "sizes": grid,
        "share_flipped": [float(each.mean()) for each in flipped],
        "confidence_intervals": [share_interval(each.mean(), len(each), confidence_level) for each in flipped],
        "random_share_flipped": [float((random <= size).mean()) for size in grid],
        "median_size": _median(smallest),
        "random_median_size": _median(random),
        "share_smaller": float(smaller.mean()),
        "share_smaller_confidence_interval": share_interval(smaller.mean(), len(smaller), confidence_level),
        "num_flipped": int(np.isfinite(smallest).sum()),
        "random_num_flipped": int(np.isfinite(random).sum()),
    }


def share_interval(share: float, number: int, confidence_level: float) -> tuple[float, float]:
    """Wilson's (1927) interval for a share of so many queries; with halves for ties it is too wide, if anything."""
    z = float(norm.ppf(0.5 + confidence_level / 2))
    centre = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z / (1 + z**2 / number) * np.sqrt(share * (1 - share) / number + z**2 / (4 * number**2))
    return float(max(centre - half, 0.0)), float(min(centre + half, 1.0))


def _median(sizes: np.ndarray) -> float:
    """Return the size from which on at least half of the predictions are flipped; NaN where none is."""
    median = np.sort(sizes)[(len(sizes) - 1) // 2]
    return float(median) if np.isfinite(median) else float("nan")


def _grid(max_size: int) -> list[int]:
    powers = 2 ** np.arange(int(np.log2(max_size)) + 1)
    return np.unique(np.append(powers, max_size)).tolist()


def _sizes(name: str, values: Sizes, max_size: int) -> np.ndarray:
    """Return the sizes as float64, infinite where no set was found.

    Raises:
        ValueError: one is no size; the message names the row.
    """
    sizes = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    if sizes.ndim != 1 or not sizes.size:
        raise ValueError(f"{name} must be one size for each query; their shape is {sizes.shape}")
    for row in np.flatnonzero(~np.isnan(sizes)):
        if not 1 <= sizes[row] <= max_size or sizes[row] != int(sizes[row]):
            raise ValueError(
                f"{name} row {row} is {sizes[row]:g}: a size is a whole number from 1 to max_size={max_size}, or NaN "
                "where no set was found"
            )
    return np.where(np.isnan(sizes), np.inf, sizes)
