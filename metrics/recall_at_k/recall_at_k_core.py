"""The mathematics of finding known sources, on plain lists and arrays: numpy and scipy, nothing else.

Letters: Q queries.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import norm


def compute_recall_at_k(
    predictions: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]],
    k: int | Sequence[int] = (1, 5, 10),
    confidence_level: float = 0.95,
) -> dict[str, Any]:
    """How often, and how high, the known sources of each query are ranked.

    Args:
        predictions: Q rankings of examples, best first; the first so many of each are enough.
        references: Q lists of the examples that are the query's sources, at least one each.
        k: how many of the top are looked at.
        confidence_level: of the intervals, between 0 and 1.

    Returns:
        The numbers listed in the metric's description, as Python floats, lists, tuples and dictionaries.

    Raises:
        ValueError: a query has no source, a ranking is too short or names an example twice; the row is named.
    """
    if not 0 < confidence_level < 1:
        raise ValueError(f"confidence_level must lie between 0 and 1, got {confidence_level}")
    ks = [int(each) for each in np.atleast_1d(k)]
    if not ks or min(ks) < 1:
        raise ValueError(f"k must be at least 1, got {ks}")
    if len(predictions) != len(references) or not len(predictions):
        raise ValueError(f"there are {len(predictions)} rankings and {len(references)} lists of sources: give Q each")
    hits = [_hits(row, *pair, max(ks)) for row, pair in enumerate(zip(predictions, references, strict=True))]
    recalls = {each: [float(found[:each].sum()) / total for found, total in hits] for each in ks}
    reciprocal = [1 / (1 + int(np.argmax(found))) if found.any() else 0.0 for found, _ in hits]
    return {
        "recall_at_k": {each: float(np.mean(values)) for each, values in recalls.items()},
        "recall_confidence_intervals": {each: interval(values, confidence_level) for each, values in recalls.items()},
        "mrr": float(np.mean(reciprocal)),
        "mrr_confidence_interval": interval(reciprocal, confidence_level),
        "reciprocal_rank_per_query": reciprocal,
    }


def interval(values: Sequence[float], confidence_level: float) -> tuple[float, float]:
    """Interval for the mean of numbers between 0 and 1: Wilson's (1927).

    That of a share: exact in spirit where every value is 0 or 1, and too wide, never too narrow, where some lie
    between, whose variance is smaller. Unlike a bootstrap's it is no point where all values are equal.

    Args:
        values: one number for each query.
        confidence_level: of the interval.

    Returns:
        Lower and upper limit.
    """
    mean, number, z = float(np.mean(values)), len(values), float(norm.ppf(0.5 + confidence_level / 2))
    centre = (mean + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z / (1 + z**2 / number) * np.sqrt(mean * (1 - mean) / number + z**2 / (4 * number**2))
    return float(max(centre - half, 0.0)), float(min(centre + half, 1.0))


def _hits(row: int, ranking: Sequence[int], sources: Sequence[int], longest: int) -> tuple[np.ndarray, int]:
    """Return whether each ranked example is a source, bool, and how many sources there are.

    Raises:
        ValueError: the row cannot be scored.
    """
    if not len(sources):
        raise ValueError(f"references row {row} is empty: a query without a known source has no recall, leave it out")
    if len(ranking) < longest:
        raise ValueError(
            f"predictions row {row} ranks {len(ranking)} examples: recall at {longest} needs {longest}, give more or "
            "a smaller k"
        )
    if len(set(ranking)) < len(ranking):
        raise ValueError(f"predictions row {row} names an example twice: give each at its best rank alone")
    return np.isin(np.asarray(ranking), np.asarray(sources)), len(set(sources))
