"""The mathematics of leave-one-out correlations, on plain arrays: numpy and scipy, nothing else.

Letters: Q queries (rows), L examples that were left out one at a time (columns).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata
from scipy.stats import t as student_t

# A row whose values differ by less than this, relative to their size, differs by rounding alone.
CONSTANT_TOLERANCE = 1e-12
# Numbers in one block of the jackknife: a few arrays of this size are alive at a time.
BLOCK_SIZE = 2**20

Rows = np.ndarray | Sequence[Sequence[float]]


def compute_loo_correlation(predictions: Rows, references: Rows, confidence_level: float = 0.95) -> dict[str, Any]:
    """Correlate predicted with true leave-one-out effects.

    Args:
        predictions: effects that the scores predict, `[Q, L]`.
        references: true effects, `[Q, L]`.
        confidence_level: of the intervals, between 0 and 1.

    Returns:
        The numbers listed in the metric's description, as Python floats, ints, lists and tuples.

    Raises:
        ValueError: shapes disagree, a row is ragged or not finite, or there are too few examples.
    """
    if not 0 < confidence_level < 1:
        raise ValueError(f"confidence_level must lie between 0 and 1, got {confidence_level}")
    x, y = _matrix("predictions", predictions), _matrix("references", references)
    if x.shape != y.shape:
        raise ValueError(
            f"predictions {x.shape} and references {y.shape} must have one shape: a row per query, a column per "
            "example that was left out"
        )
    if x.shape[1] < 4:
        raise ValueError(f"a correlation with an interval needs at least 4 examples, got {x.shape[1]}")
    defined = _varies(x) & _varies(y)
    result: dict[str, Any] = {}
    for name, ranked in (("pearson", False), ("spearman", True)):
        per_query = np.full(len(x), np.nan)
        per_query[defined] = correlations(x[defined], y[defined], ranked)
        known = per_query[defined]
        result[name] = float(known.mean()) if known.size else float("nan")
        result[f"{name}_per_query"] = per_query.tolist()
        left_out = jackknife(x[defined], y[defined], ranked)
        result[f"{name}_confidence_interval"] = confidence_interval(known, left_out, confidence_level)
    return {**result, "num_undefined": int((~defined).sum())}


def correlations(x: np.ndarray, y: np.ndarray, ranked: bool) -> np.ndarray:
    """Pearson's (or, of ranks, Spearman's) correlation of each row of `x` with that of `y`, `[Q, L]` each: `[Q]`."""
    if ranked:
        x, y = rankdata(x, axis=1), rankdata(y, axis=1)
    a, b = (side - side.mean(1, keepdims=True) for side in (x, y))
    return np.clip((a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1)), -1, 1)


def jackknife(x: np.ndarray, y: np.ndarray, ranked: bool) -> np.ndarray:
    """Return the correlation of each row without each of its columns, `[Q, L]`.

    Ranks need not be sorted anew: without column j, those above it move down by one, and its ties by a half.
    A row that is constant without a column keeps its correlation there: that column is all that it says.
    """
    num_queries, num_columns = x.shape
    values = np.empty((num_queries, num_columns))
    for query in range(num_queries):
        whole = correlations(x[query : query + 1], y[query : query + 1], ranked)[0]
        for columns in _blocks(num_columns):
            kept = np.ones((len(columns), num_columns))
            kept[np.arange(len(columns)), columns] = 0
            a, b = (_without(side[query], columns, kept, ranked) for side in (x, y))
            norm = (a * a).sum(1) * (b * b).sum(1)
            left = np.full(len(columns), whole)
            np.divide((a * b).sum(1), np.sqrt(norm), out=left, where=norm > 0)
            values[query, columns] = left
    return values


def _without(row: np.ndarray, columns: np.ndarray, kept: np.ndarray, ranked: bool) -> np.ndarray:
    """Return the centred values (or ranks) of a row without each of some columns, zero there: `[columns, L]`."""
    if ranked:
        other = row[columns, None]
        values = rankdata(row) - (other < row) - 0.5 * (other == row)
    else:
        values = np.broadcast_to((row - row.mean()) / np.ptp(row), kept.shape)
    centred = (values - (values * kept).sum(1, keepdims=True) / (row.size - 1)) * kept
    return np.where(np.abs(centred).max(1, keepdims=True) > CONSTANT_TOLERANCE, centred, 0.0)


def confidence_interval(per_query: np.ndarray, left_out: np.ndarray, confidence_level: float) -> tuple[float, float]:
    """Interval for the mean correlation over new queries and new examples.

    Queries share the examples, so that their correlations are not independent. The variance is that of two-way
    clustering (Cameron, Gelbach and Miller 2011): between queries + between examples - what both hold, never
    below either; the latter two, and the bias, by the jackknife over examples. Limits are Student's t with
    Satterthwaite's degrees of freedom, on Fisher's z scale; the interval holds the estimate.

    Args:
        per_query: the correlation of each query, `[Q]`.
        left_out: the same without each of the examples, `[Q, L]`.
        confidence_level: of the interval.

    Returns:
        Lower and upper limit; NaN where there is no query.
    """
    num_queries, num_columns = left_out.shape
    if num_queries == 0:
        return float("nan"), float("nan")
    estimate = float(per_query.mean())
    slope = (1 - estimate) * (1 + estimate)  # d r / d z on Fisher's scale
    if slope < CONSTANT_TOLERANCE:
        return estimate, estimate
    scale = (num_columns - 1) ** 2 / num_columns
    by_query = float(per_query.var(ddof=1)) / num_queries if num_queries > 1 else 0.0
    by_example = scale * float(left_out.mean(0).var(ddof=1))
    by_both = scale * float(left_out.var(1, ddof=1).sum()) / num_queries**2
    variance = max(by_query + by_example - by_both, by_query, by_example)
    if variance == 0:
        return estimate, estimate
    query_term = by_query**2 / (num_queries - 1) if num_queries > 1 else 0.0
    df = variance**2 / (query_term + (variance - by_query) ** 2 / (num_columns - 1))
    half = student_t.ppf(0.5 + confidence_level / 2, df) * np.sqrt(variance) / slope
    # Rank correlations of few examples are biased towards zero, by much where there are many queries.
    centre = np.arctanh(estimate) - (num_columns - 1) * (left_out.mean() - estimate) / slope
    low, high = np.tanh(centre - half), np.tanh(centre + half)
    return float(min(low, estimate)), float(max(high, estimate))


def _blocks(num_columns: int) -> Iterator[np.ndarray]:
    size = max(1, BLOCK_SIZE // num_columns)
    return (np.arange(start, min(start + size, num_columns)) for start in range(0, num_columns, size))


def _varies(rows: np.ndarray) -> np.ndarray:
    """Return whether each row holds more than one value, rounding apart, bool `[rows]`."""
    return np.ptp(rows, axis=1) > CONSTANT_TOLERANCE * np.abs(rows).max(axis=1)


def _matrix(name: str, rows: Rows) -> np.ndarray:
    """Return `rows` as a float64 matrix.

    Raises:
        ValueError: it is no matrix or not finite; the message names the row.
    """
    rows = list(rows)
    if not rows or any(np.ndim(row) != 1 for row in rows):
        raise ValueError(f"{name} must be a matrix: a list of one or more equally long rows of numbers")
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(f"{name} row {i} has {len(row)} values, row 0 has {len(rows[0])}")
    matrix = np.array(rows, dtype=np.float64)
    if not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise ValueError(f"{name} row {row} is not finite: {matrix[row, column]} in column {column}")
    return matrix
