"""Damped inverses of a Gram matrix `H = Σ_r row rowᵀ`, through the smaller of H and its kernel."""

import numpy as np
import torch
from torch import Tensor

from hf_attribution.errors import UnsupportedError
from hf_attribution.gradients.features import FeatureStore

# Rows of a kernel up to which it and its factor, in double precision, fit into the memory of most machines.
MAX_DUAL = 20_000


def ridge_scores(query: FeatureStore, train: FeatureStore, damping: float, normalize: bool = False) -> np.ndarray:
    """`φ(query) (ΦᵀΦ + λI)⁻¹ Φᵀ` with λ = damping times the mean squared norm of Φ's rows: float32 `[Q, N]`.

    Args:
        query: Features of Q queries.
        train: Features Φ of N training examples.
        damping: In units of the features' mean squared norm.
        normalize: Whether to divide each column by the root of its self-influence, `φ_iᵀ (ΦᵀΦ + λI)⁻¹ φ_i`.

    Returns:
        Scores, computed in blocks of training examples; beside them only `[dim, dim]` and `[Q, dim]` are held.
    """
    queries = torch.cat([block for _, block in query.blocks()])
    if len(train) <= train.dim:
        features = torch.cat([block for _, block in train.blocks()])
        kernel = features @ features.T
        ridge = damping * float(kernel.trace()) / len(train)
        return dual_scores(kernel, queries @ features.T, ridge, normalize=normalize).numpy()
    kernel = torch.zeros(train.dim, train.dim, dtype=torch.float64)
    for _, block in train.blocks():
        kernel += block.T @ block
    factor = damped_factor(kernel, damping * float(kernel.trace()) / len(train))
    solved = torch.cholesky_solve(queries.T.double(), factor).T.float()
    scores = np.empty((len(query), len(train)), dtype=np.float32)
    for where, block in train.blocks():
        found = solved @ block.T
        if normalize:
            found = divide_by_roots(found, (torch.cholesky_solve(block.T.double(), factor).T * block).sum(1))
        scores[:, where] = found.numpy()
    return scores


def dual_scores(
    kernel: Tensor, cross: Tensor, ridge: float, coefficients: Tensor | None = None, normalize: bool = False
) -> Tensor:
    """`u(query)ᵀ (H + λI)⁻¹ g_i` by Woodbury's identity, `u Rᵀ (R Rᵀ + λI)⁻¹ B`: no parameter-sized matrix.

    R are the n rows of which H is the Gram matrix, and every `g_i = Σ_k B[i, k] row[k, i]` is a combination of them:
    for the empirical Fisher, g_i is the row itself.

    Args:
        kernel: `R Rᵀ`, `[n, n]`.
        cross: `u Rᵀ`, `[Q, n]`.
        ridge: λ.
        coefficients: B, `[N, K]`, where rows come K times N; each example's own row by default.
        normalize: Whether to divide each column by the root of its self-influence, `g_iᵀ (H + λI)⁻¹ g_i`.

    Returns:
        float32 `[Q, N]`; 0 where the query's or the example's gradient is.
    """
    coefficients = coefficients if coefficients is not None else torch.ones(len(kernel), 1)
    weights = coefficients.T.double()
    factor = damped_factor(kernel, ridge)

    def combine(values: Tensor) -> Tensor:
        """From n columns to N."""
        return (values.unflatten(1, weights.shape) * weights).sum(1)

    scores = combine(torch.cholesky_solve(cross.T.double(), factor).T)
    if normalize:
        solved = torch.cholesky_solve(combine(kernel.double()), factor).unflatten(0, weights.shape)
        scores = divide_by_roots(scores, (torch.diagonal(solved, dim1=1, dim2=2) * weights).sum(0))
    return scores.float()


def damped_factor(kernel: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of `kernel + λI`, in double precision: λ is small beside the largest eigenvalues.

    Args:
        kernel: A Gram matrix.
        ridge: λ. Where it is 0 since every row is, so is what is solved for: 1 does as well.

    Returns:
        The lower factor.
    """
    damped = kernel.double() if kernel.dtype != torch.float64 else kernel.clone()
    damped.diagonal().add_(ridge if ridge > 0 else 1.0)
    return torch.linalg.cholesky(damped)


def divide_by_roots(scores: Tensor, self_influence: Tensor) -> Tensor:
    """Columns divided by the root of the self-influence; those whose example has no gradient stay 0."""
    roots = self_influence.clamp(min=0).sqrt().to(scores)
    return torch.where(roots > 0, scores / roots, 0.0)


def refuse_large_kernel(rows: int) -> None:
    """Refuse a kernel that does not fit.

    Args:
        rows: Its rows.

    Raises:
        UnsupportedError: If they are too many; the message names the memory and the way out.
    """
    if rows > MAX_DUAL:
        raise UnsupportedError(
            f"solver='dual' with {rows} rows takes {20e-9 * rows**2:.0f} GB for their kernel: project the gradients, "
            "dim=4096 (curvature='fisher'), or use solver='cg'."
        )
