"""What counts of groups explain of retrained outputs, taken out of a regression's both sides, and put back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_attribution.subsets import Subsets


@dataclasses.dataclass(frozen=True)
class GroupCounts:
    """Counts of groups as covariates without a penalty, beside a free intercept.

    To fit them and a penalised regression together is to fit the penalised one on residuals of both sides, and the
    counts on what that leaves (Frisch & Waugh 1933, Lovell 1963). Counts of subsets of one size add up to it, so that
    the groups' common shift is not determined: the smallest effects are taken, which add to zero.

    Attributes:
        members: int64 `[N]`, the group of each example, 0 to K - 1.
        centered: `[M, K]`, the counts less their means.
        basis: `[M, r]`, orthonormal, of the intercept and the counts.
    """

    members: np.ndarray
    centered: np.ndarray
    basis: np.ndarray

    @classmethod
    def of(cls, subsets: Subsets, groups: Sequence[Any]) -> GroupCounts:
        """Count the groups in subsets.

        Args:
            subsets: The M subsets.
            groups: `[N]`, the group of each example.

        Returns:
            The counts.

        Raises:
            ValueError: There are too few subsets for the groups.
        """
        counts = subsets.counts(groups).astype(np.float64)
        num_subsets, num_groups = counts.shape
        if num_subsets < num_groups + 4:
            raise ValueError(
                f"The effects of {num_groups} groups need at least {num_groups + 4} subsets, and there are "
                f"{num_subsets}: retrain on more, or group coarser."
            )
        centered = counts - counts.mean(0)
        vectors, values, _ = np.linalg.svd(centered, full_matrices=False)
        varying = vectors[:, values > 1e-9 * max(values.max(), 1.0)]
        basis = np.concatenate([np.full((num_subsets, 1), num_subsets**-0.5), varying], axis=1)
        return cls(np.unique(np.asarray(groups), return_inverse=True)[1], centered, basis)

    @property
    def leverage(self) -> np.ndarray:
        """`[M]`, the share of each subset's output in its own fitted value."""
        return np.square(self.basis).sum(1)

    def residuals(self, columns: np.ndarray) -> np.ndarray:
        """What intercept and counts leave of each column; zeros where that is rounding.

        Args:
            columns: `[M, C]`.

        Returns:
            float64 `[M, C]`.
        """
        columns = columns.astype(np.float64)
        left = columns - self.basis @ (self.basis.T @ columns)
        left[:, np.abs(left).max(0) <= 1e-12 * np.abs(columns).max(0)] = 0
        return left

    def own_part(self, scores: np.ndarray) -> np.ndarray:
        """Scores `[Q, N]` less their groups' medians: about what a sparse fit beside the groups gave each example."""
        own = np.array(scores, dtype=np.float64)
        for group in np.unique(self.members):
            own[:, self.members == group] -= np.median(own[:, self.members == group], axis=1, keepdims=True)
        return own

    def effects(self, outputs: np.ndarray) -> np.ndarray:
        """Regress outputs on the counts.

        Args:
            outputs: `[M, Q]`.

        Returns:
            `[Q, N]`: for each example what one more of its group adds to the output.
        """
        coefficients = np.linalg.lstsq(self.centered, outputs - outputs.mean(0), rcond=1e-9)[0]
        return coefficients.T[:, self.members]
