"""The mathematics of the linear datamodeling score, on plain arrays: numpy and scipy, nothing else.

Letters: Q queries (rows), M subsets (columns), K covariates, B bootstrap resamples.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import orth
from scipy.stats import rankdata
from scipy.stats import t as student_t

# A row whose values differ by less than this, relative to their size, differs by rounding alone.
CONSTANT_TOLERANCE = 1e-12
# A residual smaller than this, relative to the spread of its row, is what rounding left of an exact fit: of float32
# sums over a few hundred examples some processors leave 1e-6.
RESIDUAL_TOLERANCE = 1e-5
# Residuals are compared to this many digits of the row's spread, so that rounding does not break exact ties.
RESIDUAL_DIGITS = 9
# Numbers in one block of the bootstrap: a few arrays of this size are alive at a time.
BLOCK_SIZE = 2**16
SIGNIFICANCE = 0.05


class Bootstrap(NamedTuple):
    """How to draw an interval."""

    confidence_level: float = 0.95
    num_resamples: int = 1000
    seed: int = 0


class RankPositions(NamedTuple):
    """Where the values of a row stand: its sorting order, and how many are below, and not above, each."""

    order: np.ndarray
    below: np.ndarray
    not_above: np.ndarray


Rows = np.ndarray | Sequence[Sequence[float]]


def compute_lds(
    predictions: Rows,
    references: Rows,
    covariates: Rows | None = None,
    confidence_level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Linear datamodeling score of predicted against true outputs, with its interval.

    Args:
        predictions: what the scores predict, `[Q, M]`.
        references: what the retrained models said, `[Q, M]`.
        covariates: what to regress out of both sides for the partial score, `[M, K]`.
        confidence_level: of the intervals, between 0 and 1.
        num_resamples: bootstrap resamples of the subsets.
        seed: of the bootstrap.

    Returns:
        The numbers listed in the metric's description, as Python floats, ints, lists and tuples.

    Raises:
        ValueError: shapes disagree, a row is ragged or not finite, or there are too few subsets.
    """
    if not 0 < confidence_level < 1:
        raise ValueError(f"confidence_level must lie between 0 and 1, got {confidence_level}")
    if num_resamples < 2:
        raise ValueError(f"num_resamples must be at least 2, got {num_resamples}")
    predictions, references = _matrix("predictions", predictions), _matrix("references", references)
    if predictions.shape != references.shape:
        raise ValueError(
            f"predictions {predictions.shape} and references {references.shape} must have one shape: "
            "a row per query, a column per subset"
        )
    num_subsets = predictions.shape[1]
    if num_subsets < 3:
        raise ValueError(f"a rank correlation needs at least 3 subsets, got {num_subsets}")
    basis = None if covariates is None else covariate_basis(_covariates(covariates, num_subsets))
    bootstrap = Bootstrap(confidence_level, num_resamples, seed)

    result = _score(predictions, references, bootstrap)
    rho = np.array(result["lds_per_query"])
    p_values = spearman_p_values(rho, num_subsets)
    result["p_values"] = p_values.tolist()
    result["share_significant"] = _mean(p_values[~np.isnan(rho)] < SIGNIFICANCE)
    if basis is not None:
        left = _score(residuals(predictions, basis), residuals(references, basis), bootstrap, basis.shape[1])
        result |= {f"partial_{name}": value for name, value in left.items()}
    return result


def _score(x: np.ndarray, y: np.ndarray, bootstrap: Bootstrap, num_regressors: int = 0) -> dict[str, Any]:
    """Return what the plain and the partial score have in common."""
    rho = spearman(x, y)
    defined = ~np.isnan(rho)
    return {
        "lds": _mean(rho[defined]),
        "lds_per_query": rho.tolist(),
        "confidence_interval": confidence_interval(x[defined], y[defined], rho[defined], bootstrap, num_regressors),
        "num_undefined": int((~defined).sum()),
    }


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rho of each row of `x` with the same row of `y`, `[Q, M]` each, average ranks for ties.

    Returns:
        float64 `[Q]`; NaN where either row is constant.
    """
    a, b = (rankdata(side, axis=1) - (side.shape[1] + 1) / 2 for side in (x, y))
    rho = np.full(len(x), np.nan)
    norm = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    np.divide((a * b).sum(1), norm, out=rho, where=_varies(x) & _varies(y))
    return np.clip(rho, -1, 1)


def spearman_p_values(rho: np.ndarray, num_subsets: int) -> np.ndarray:
    """Return two-sided p-values of `rho` `[Q]`, from Student's t with M - 2 degrees of freedom like scipy."""
    with np.errstate(divide="ignore"):
        t = rho * np.sqrt((num_subsets - 2) / ((1 - rho) * (1 + rho)))
    return 2 * student_t.sf(np.abs(t), num_subsets - 2)


def covariate_basis(covariates: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis `[M, rank]` of the centred columns of `covariates` `[M, K]`.

    Centring stands for the intercept; columns are scaled to unit length first, so that a column of token
    counts does not hide a column of flags from the numerical rank.
    """
    centred = covariates - covariates.mean(0)
    centred = centred[:, _varies(covariates.T)]
    return orth(centred / np.linalg.norm(centred, axis=0), rcond=1e-10)


def residuals(values: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Return what least squares on `basis` `[M, rank]` and an intercept leaves of each row `[Q, M]`.

    In units of each row's spread, which ranks do not see; exactly zero where nothing is left.
    """
    centred = values - values.mean(1, keepdims=True)
    spread = np.ptp(values, axis=1, keepdims=True)
    left = centred - (centred @ basis) @ basis.T
    left = np.divide(left, spread, out=np.zeros_like(left), where=_varies(values)[:, None])
    nothing = np.ptp(left, axis=1) < RESIDUAL_TOLERANCE
    return np.where(nothing[:, None], 0.0, left.round(RESIDUAL_DIGITS))


def confidence_interval(
    x: np.ndarray, y: np.ndarray, rho: np.ndarray, bootstrap: Bootstrap, num_regressors: int = 0
) -> tuple[float, float]:
    """Interval for the mean over queries of Spearman's rho, for new queries and new subsets.

    Resampling queries and subsets together and taking percentiles counts the noise that belongs to one
    query and one subset three times (Owen 2007), and a resample's duplicates pull rho towards zero as much
    again as few subsets do. So the two resamplings are kept apart. The variance is that of two-way
    clustering (Cameron, Gelbach and Miller 2011): between queries + between resamples of the
    subsets - what both hold, never below either. Resampling queries has its closed form; subsets are
    resampled jointly for all queries, and their bootstrap also gives the bias, which is taken off. Limits
    are Student's t with Satterthwaite's degrees of freedom, on Fisher's z scale.

    Args:
        x: one side, `[Q, M]`, of the queries whose rho is defined.
        y: the other side, `[Q, M]`.
        rho: their `spearman`, `[Q]`.
        bootstrap: level, resamples and seed.
        num_regressors: rank of what was regressed out of both sides: degrees of freedom that are gone.

    Returns:
        Lower and upper limit; NaN where there is no query.
    """
    num_queries, num_subsets = x.shape
    if num_queries == 0:
        return float("nan"), float("nan")
    means, variances = bootstrap_subsets(x, y, bootstrap)
    estimate = float(rho.mean())
    slope = (1 - estimate) * (1 + estimate)  # d rho / d z on Fisher's scale
    if slope < CONSTANT_TOLERANCE:
        return estimate, estimate

    subset_df = num_subsets - 1 - num_regressors
    inflation = (num_subsets - 1) / subset_df
    by_query = float(rho.var(ddof=1)) / num_queries if num_queries > 1 else 0.0
    by_subset = inflation * float(means.var(ddof=1))
    by_both = inflation * float(variances.sum()) / num_queries**2
    variance = max(by_query + by_subset - by_both, by_query, by_subset)
    if variance == 0:
        return estimate, estimate
    query_term = by_query**2 / (num_queries - 1) if num_queries > 1 else 0.0
    df = variance**2 / (query_term + (variance - by_query) ** 2 / subset_df)

    centre = np.arctanh(estimate) - (means.mean() - estimate) / slope
    half = student_t.ppf(0.5 + bootstrap.confidence_level / 2, df) * np.sqrt(variance) / slope
    # Without its bias the estimate of many queries can lie beside the interval; a reader would take that for
    # a fault, so that the interval is extended to it.
    low, high = np.tanh(centre - half), np.tanh(centre + half)
    return float(min(low, estimate)), float(max(high, estimate))


def bootstrap_subsets(x: np.ndarray, y: np.ndarray, bootstrap: Bootstrap) -> tuple[np.ndarray, np.ndarray]:
    """Spearman's rho in resamples of the subsets (columns), drawn once for all queries (rows).

    A resample is a count per subset. The average rank of a value is the mean of how many drawn values are
    below it and how many are not above it, and both are entries of the cumulative counts in sorted order:
    exact ranks, ties and all, from one sort per query.

    Args:
        x: one side, `[Q, M]`.
        y: the other side, `[Q, M]`.
        bootstrap: the B resamples to draw and their seed.

    Returns:
        The mean over queries in each resample, at most `[B]`, and each query's variance over resamples,
        `[Q]`. A rho that a resample leaves undefined (all draws tied) is left out of both.
    """
    num_queries, num_subsets = x.shape
    rng = np.random.default_rng(bootstrap.seed)
    positions = [(_rank_positions(x[q]), _rank_positions(y[q])) for q in range(num_queries)]
    block = max(1, BLOCK_SIZE // num_subsets)
    means, total, squares, known = [], np.zeros(num_queries), np.zeros(num_queries), np.zeros(num_queries)
    for start in range(0, bootstrap.num_resamples, block):
        size = min(block, bootstrap.num_resamples - start)
        drawn = rng.multinomial(num_subsets, np.full(num_subsets, 1 / num_subsets), size=size)
        counts = np.ascontiguousarray(drawn.T, dtype=np.float64)
        block_sum, block_known = np.zeros(size), np.zeros(size)
        for q, (row_x, row_y) in enumerate(positions):
            rho, is_known = _resampled_spearman(row_x, row_y, counts)
            block_sum += rho
            block_known += is_known
            total[q] += rho.sum()
            squares[q] += rho @ rho
            known[q] += is_known.sum()
        means.append(block_sum[block_known > 0] / block_known[block_known > 0])
    variances = (squares - total**2 / np.maximum(known, 1)) / np.maximum(known - 1, 1)
    return np.concatenate(means), np.maximum(variances, 0)


def _rank_positions(row: np.ndarray) -> RankPositions:
    below = rankdata(row, method="min").astype(np.int64) - 1
    not_above = rankdata(row, method="max").astype(np.int64)
    return RankPositions(np.argsort(row, kind="stable"), below, not_above)


def _resampled_spearman(x: RankPositions, y: RankPositions, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rho (0 where undefined) and whether it is defined, `[B]` each, for `counts` `[M, B]`."""
    a, b = _resampled_ranks(x, counts), _resampled_ranks(y, counts)
    weighted = counts * a
    covariance = np.einsum("mb,mb->b", weighted, b)
    product = np.einsum("mb,mb->b", weighted, a) * np.einsum("mb,mb,mb->b", counts, b, b)
    known = product > 0
    return np.divide(covariance, np.sqrt(product), out=np.zeros_like(product), where=known), known


def _resampled_ranks(row: RankPositions, counts: np.ndarray) -> np.ndarray:
    """Return the average ranks less their mean, `[M, B]`, of one row in resamples `counts` `[M, B]`."""
    cumulative = np.zeros((len(counts) + 1, counts.shape[1]))
    np.cumsum(counts[row.order], axis=0, out=cumulative[1:])
    ranks = cumulative[row.below]
    ranks += cumulative[row.not_above]
    ranks -= len(counts)
    return ranks / 2


def _varies(rows: np.ndarray) -> np.ndarray:
    """Return whether each row holds more than one value, rounding apart, bool `[rows]`."""
    return np.ptp(rows, axis=1) > CONSTANT_TOLERANCE * np.abs(rows).max(axis=1)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


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


def _covariates(rows: Rows, num_subsets: int) -> np.ndarray:
    matrix = _matrix("covariates", rows)
    if len(matrix) != num_subsets:
        raise ValueError(f"covariates need a row per subset: {len(matrix)} rows for {num_subsets} subsets")
    if num_subsets < matrix.shape[1] + 3:
        raise ValueError(
            f"{matrix.shape[1]} covariates need at least {matrix.shape[1] + 3} subsets, got {num_subsets}"
        )
    return matrix
