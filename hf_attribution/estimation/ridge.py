"""Ridge regression of many outputs on one design matrix, each penalty by leaving one row out, in closed form."""

import dataclasses

import numpy as np
from scipy import linalg

# Penalties in units of the mean squared norm of a centered row.
PENALTIES = np.logspace(-3, 3, 37)


@dataclasses.dataclass(frozen=True)
class RidgeFit:
    """Fits of all queries.

    Attributes:
        coefficients: float64 `[Q, N]`.
        penalties: float64 `[Q]`, the λ of `|y - b - X w|² + λ |w|²` chosen for each query.
    """

    coefficients: np.ndarray
    penalties: np.ndarray


def fit_ridge(design: np.ndarray, outputs: np.ndarray, leverage: np.ndarray | None = None) -> RidgeFit:
    """Fit `|y - b - X w|² + λ |w|²` for each query, b free, λ by the error of leaving one row out.

    One eigendecomposition, of the smaller of `XᵀX` and `XXᵀ`, serves all penalties and queries; the error of leaving
    each row out follows from the fit to all of them (Hastie et al. 2009, The elements of statistical learning, 7.64).

    Args:
        design: `[M, N]`, a row a subset.
        outputs: `[Q, M]`.
        leverage: `[M]`, of covariates, the intercept among them, that were regressed out of both; by default 1/M.

    Returns:
        The fits.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> masks, truth = rng.random((400, 3)) < 0.5, np.array([[3.0, -2.0, 0.0]])
        >>> fit_ridge(masks, truth @ masks.T).coefficients.round(1).tolist()
        [[3.0, -2.0, 0.0]]
    """
    rows = np.asarray(design, dtype=np.float64)
    rows = rows - rows.mean(0)
    targets = outputs.T - outputs.mean(1)
    left, squares = _left_singular(rows)
    fixed = 1 / len(rows) if leverage is None else leverage
    penalties = PENALTIES * (squares.sum() / len(rows))
    rotated = left.T @ targets
    errors = np.empty((len(penalties), targets.shape[1]))
    for number, penalty in enumerate(penalties):
        shrinkage = squares / (squares + penalty)
        own = fixed + left**2 @ shrinkage
        residuals = targets - left @ (shrinkage[:, None] * rotated)
        errors[number] = np.mean((residuals / (1 - own)[:, None]) ** 2, axis=0)
    chosen = penalties[errors.argmin(0)]
    coefficients = rows.T @ (left @ (rotated / (squares[:, None] + chosen)))
    return RidgeFit(coefficients.T, chosen)


def _left_singular(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors `[M, r]` of centered rows with their squared singular values `[r]`, without the zeros."""
    high = len(rows) > rows.shape[1]
    squares, vectors = linalg.eigh(rows.T @ rows if high else rows @ rows.T)
    kept = squares > squares[-1] * max(rows.shape) * np.finfo(np.float64).eps
    squares, vectors = squares[kept], vectors[:, kept]
    return (rows @ vectors / np.sqrt(squares) if high else vectors), squares
