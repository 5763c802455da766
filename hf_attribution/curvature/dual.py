"""Damped inverses of a Gram matrix `H = Σ_r r rᵀ` through the kernel of its rows, by Woodbury's identity."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_attribution.errors import UnsupportedError
from hf_attribution.gradients.held import Source
from hf_attribution.gradients.products import gradient_kernel, gradient_products, squared_lengths

# Rows of a kernel up to which it and its factor, in double precision, fit into the memory of most machines.
MAX_ROWS = 20_000

# Of the Gauss-Newton matrix, rows are left out whose squared lengths add up to this share of λ. They cannot change
# what is solved for by a larger share (on a trained CNN it was 3e-5), and in a trained network they are most rows.
NEGLIGIBLE = 1e-2


class DampedKernel:
    """`(R Rᵀ + λI)⁻¹`, in double precision: λ is small beside the largest eigenvalues.

    Args:
        kernel: `R Rᵀ`, `[n, n]`.
        ridge: λ. Where it is 0 since every row is, so is what is solved for: 1 does as well.
    """

    def __init__(self, kernel: Tensor, ridge: float) -> None:
        damped = kernel.double() if kernel.dtype != torch.float64 else kernel.clone()
        damped.diagonal().add_(ridge if ridge > 0 else 1.0)
        self._factor = torch.linalg.cholesky(damped)

    def whiten(self, rows: Tensor) -> Tensor:
        """Rows `[m, n]` whose inner products are `rows (R Rᵀ + λI)⁻¹ rowsᵀ`: float64 `[m, n]`."""
        return torch.linalg.solve_triangular(self._factor, rows.T.double(), upper=False).T

    def solve(self, rows: Tensor) -> Tensor:
        """`rows (R Rᵀ + λI)⁻¹`: float64 `[m, n]`, of rows `[m, n]`."""
        return torch.cholesky_solve(rows.T.double(), self._factor).T


class FisherKernel:
    """The empirical Fisher matrix, whose rows are the gradients of the examples' gains.

    Args:
        gains: The training examples' gradients.
        queries: The queries' gradients, if there are any.
        damping: λ in units of the mean squared length of a row.
        progress: Whether to show a progress bar.

    Attributes:
        ridge: λ.
    """

    def __init__(self, gains: Source, queries: Source | None, damping: float, progress: bool) -> None:
        refuse_large_kernel(len(gains.rows))
        self._kernel, self._crosses = gradient_kernel([gains], [queries] if queries else [], progress)
        self.ridge = damping * float(self._kernel.diagonal().mean(dtype=torch.float64))
        self._damped = DampedKernel(self._kernel, self.ridge)

    def scores(self) -> np.ndarray:
        """`u (H + λI)⁻¹ g`: float32 `[Q, N]`."""
        return self._damped.solve(self._crosses[0]).float().numpy()

    def self_influence(self) -> np.ndarray:
        """`g (H + λI)⁻¹ g`: float32 `[N]`."""
        return self._damped.solve(self._kernel).diagonal().float().numpy()


class GaussNewtonKernel:
    """The Gauss-Newton matrix, whose rows are several for each example.

    The examples' gradients are not among the rows: `u (H + λI)⁻¹ g = (u·g - u Rᵀ (R Rᵀ + λI)⁻¹ R g) / λ`.

    Args:
        rows: The rows, a source for each of those of an example.
        gains: The training examples' gradients.
        queries: The queries' gradients, if there are any.
        damping: λ in units of H's mean trace per example.
        progress: Whether to show progress bars.

    Attributes:
        ridge: λ.
    """

    def __init__(
        self, rows: Sequence[Source], gains: Source, queries: Source | None, damping: float, progress: bool
    ) -> None:
        self._gains, self._queries, self._progress = gains, queries, progress
        lengths = torch.stack([squared_lengths(source) for source in rows]).double()
        self.ridge = damping * float(lengths.sum()) / len(gains.split)
        kept = _not_negligible(lengths.flatten(), NEGLIGIBLE * self.ridge).view_as(lengths).numpy()
        refuse_large_kernel(int(kept.sum()))
        chosen = [
            dataclasses.replace(source, only=mask) for source, mask in zip(rows, kept, strict=True) if mask.any()
        ]
        kernel, (self._gain_cross, *self._query_cross) = gradient_kernel(
            chosen, [gains, queries] if queries else [gains], progress
        )
        self._damped = DampedKernel(kernel, self.ridge)

    def scores(self) -> np.ndarray:
        """`u (H + λI)⁻¹ g`: float32 `[Q, N]`."""
        assert self._queries is not None
        products = gradient_products(self._queries, self._gains, progress=self._progress)
        explained = self._damped.solve(self._query_cross[0]) @ self._gain_cross.T.double()
        return self._divided(torch.from_numpy(products) - explained)

    def self_influence(self) -> np.ndarray:
        """`g (H + λI)⁻¹ g`: float32 `[N]`."""
        explained = (self._damped.solve(self._gain_cross) * self._gain_cross).sum(1)
        return self._divided((squared_lengths(self._gains) - explained).clamp(min=0))

    def _divided(self, values: Tensor) -> np.ndarray:
        return (values / self.ridge).float().numpy() if self.ridge > 0 else np.zeros(values.shape, np.float32)


def refuse_large_kernel(rows: int) -> None:
    """Refuse a kernel that does not fit.

    Args:
        rows: Its rows.

    Raises:
        UnsupportedError: If they are too many; the message names the memory and the way out.
    """
    if rows > MAX_ROWS:
        raise UnsupportedError(
            f"solver='dual' with {rows} rows takes {20e-9 * rows**2:.0f} GB for their kernel: project the gradients, "
            "dim=4096 (curvature='fisher'), or use solver='cg'."
        )


def _not_negligible(lengths: Tensor, budget: float) -> Tensor:
    """Which rows are left when the shortest, as many as have squared lengths `[n]` of a budget together, go: bool."""
    ordered, order = lengths.sort()
    kept = torch.empty(len(lengths), dtype=torch.bool)
    kept[order] = ordered.cumsum(0) > budget
    kept[order[-1]] = True
    return kept
