"""Ridge regression on stored features, through the smaller of their Gram matrix and their kernel."""

import numpy as np
import torch
from torch import Tensor

from hf_attribution.curvature.dual import DampedKernel
from hf_attribution.gradients.stored import StoredProducts, StoredScores
from hf_attribution.store import FeatureStore


class RidgeRegression:
    """`φ (ΦᵀΦ + λI)⁻¹ Φᵀ` with λ = damping times the mean squared norm of Φ's rows.

    Everything is computed in blocks of training examples; beside them only the smaller of `[dim, dim]` and `[N, N]`
    is held.

    Args:
        train: Features Φ of N training examples.
        damping: In units of the features' mean squared norm.
        query: Features φ of Q queries, if there are any.

    Attributes:
        ridge: λ.
    """

    def __init__(self, train: FeatureStore, damping: float, query: FeatureStore | None = None) -> None:
        self._train, self._query, self._few = train, query, len(train) <= train.dim
        if self._few:
            features = in_memory(train)
            self._matrix = features @ features.T
        else:
            self._matrix = gram_matrix(train)
        self.ridge = damping * float(self._matrix.trace()) / len(train)
        self._damped = DampedKernel(self._matrix, self.ridge)

    def products(self) -> StoredProducts:
        """Scores of all training examples for the queries, as products with the stored features."""
        assert self._query is not None
        queries = in_memory(self._query)
        if not self._few:
            return StoredProducts(self._damped.solve(queries).float(), self._train)
        # Through the kernel each example has a vector of its own: a unit vector.
        solved, units = self._damped.solve(queries @ in_memory(self._train).T).float(), torch.eye(len(self._train))
        return StoredProducts(solved, self._train, lambda where, block: units[where])

    def scores(self) -> np.ndarray:
        """Scores of all training examples for the queries: float32 `[Q, N]`."""
        return StoredScores([self.products()]).matrix()

    def self_influence(self) -> np.ndarray:
        """`φ_i (ΦᵀΦ + λI)⁻¹ φ_i` of all training examples, their leverages: float32 `[N]`."""
        if self._few:
            return self._damped.solve(self._matrix).diagonal().float().numpy()
        own = [(self._damped.solve(block) * block).sum(1) for _, block in self._train.blocks()]
        return torch.cat(own).float().numpy()


def gram_matrix(features: FeatureStore) -> Tensor:
    """`ΦᵀΦ`: float64 `[dim, dim]`."""
    total = torch.zeros(features.dim, features.dim, dtype=torch.float64)
    for _, block in features.blocks():
        total += block.T @ block
    return total


def in_memory(features: FeatureStore) -> Tensor:
    """All features, float32 `[N, dim]`."""
    return torch.cat([block for _, block in features.blocks()])


def divide_by_roots(scores: np.ndarray, self_influence: np.ndarray) -> np.ndarray:
    """Columns `[Q, N]` divided by the root of the self-influence `[N]`; those whose example has no gradient stay 0."""
    roots = np.sqrt(self_influence.clip(min=0)).astype(scores.dtype)
    return np.divide(scores, roots, out=np.zeros_like(scores), where=roots > 0)
