"""How far the outputs of retrainings are signal and how far noise: agreement between training seeds."""

from __future__ import annotations

import numpy as np

from hf_attribution.errors import MismatchError, NonFiniteError


def seed_agreement(outputs: np.ndarray, covariates: np.ndarray | None = None) -> np.ndarray:
    """Correlate the outputs of different training seeds.

    Args:
        outputs: `[M, R, Q]`: subsets, seeds, queries.
        covariates: `[M, K]`, regressed out of the outputs beforehand with an intercept.

    Returns:
        float64 `[Q]`: the Spearman correlation over the subsets, averaged over the pairs of seeds; NaN where
        the outputs do not vary.

    Raises:
        ValueError: There are fewer than 2 seeds or 3 subsets, or too many covariates for the subsets.
    """
    num_subsets, num_seeds, num_queries = outputs.shape
    if num_seeds < 2:
        raise ValueError("Reliability needs at least 2 seeds a subset, and there is 1: retrain with seeds=2.")
    if num_subsets < 3:
        raise ValueError(f"Reliability needs at least 3 subsets; there are {num_subsets}: retrain on more.")
    values = outputs.reshape(num_subsets, -1).astype(np.float64)
    if covariates is not None:
        values = residuals(values, np.asarray(covariates, dtype=np.float64))
    ranks = _unit_ranks(values).reshape(num_subsets, num_seeds, num_queries)
    # With unit vectors z_r, |sum_r z_r|^2 = R + (the sum of the R (R - 1) pairwise correlations).
    total = np.square(ranks.sum(axis=1)).sum(axis=0)
    return (total - num_seeds) / (num_seeds * (num_seeds - 1))


def spearman_brown(correlation: np.ndarray, times: int) -> np.ndarray:
    """Step the reliability of one measurement up to that of the mean of several (Spearman 1910, Brown 1910).

    Args:
        correlation: The reliability r of one.
        times: Their number R.

    Returns:
        `R r / (1 + (R - 1) r)`, of the same shape; minus infinity where the measurements cancel exactly.
    """
    with np.errstate(divide="ignore"):
        return times * correlation / np.maximum(1 + (times - 1) * correlation, 0.0)


def residuals(values: np.ndarray, covariates: np.ndarray) -> np.ndarray:
    """Return what is left of the columns `[M, C]` with covariates `[M, K]` and an intercept regressed out.

    Raises:
        MismatchError: There is not one row of covariates for each subset.
        NonFiniteError: A covariate is NaN or infinite.
        ValueError: They leave fewer than 3 degrees of freedom.
    """
    if covariates.ndim != 2 or len(covariates) != len(values):
        raise MismatchError(
            f"Covariates must be [subsets, K] with {len(values)} subsets; their shape is {covariates.shape}."
        )
    if not np.isfinite(covariates).all():
        raise NonFiniteError(
            f"Covariate {np.argwhere(~np.isfinite(covariates))[0].tolist()} [subset, k] is not finite."
        )
    centred = covariates - covariates.mean(axis=0)
    scale = np.abs(centred).max(axis=0)
    scaled = centred[:, scale > 0] / scale[scale > 0]
    # Class counts add up to the subset's size: the columns depend on each other, and only their span matters.
    basis, strength, _ = np.linalg.svd(scaled, full_matrices=False)
    basis = basis[:, strength > 1e-10 * strength.max(initial=0.0)]
    if len(values) - basis.shape[1] < 4:
        raise ValueError(f"{basis.shape[1]} covariates leave too little of {len(values)} subsets: retrain on more.")
    residuals = values - values.mean(axis=0)
    residuals -= basis @ (basis.T @ residuals)
    # Nothing but rounding is left where the covariates explain all: that is no variation.
    smallest = np.finfo(np.float32).eps * np.abs(values).max(axis=0)
    return np.where(np.abs(residuals).max(axis=0) > smallest, residuals, 0.0)


def _unit_ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks down each column `[M, C]`, centred and of length 1; NaN where all are equal."""
    from scipy.stats import rankdata

    ranks = rankdata(values, axis=0) - (len(values) + 1) / 2
    with np.errstate(invalid="ignore"):
        return ranks / np.linalg.norm(ranks, axis=0)
