"""Damped inverses of a curvature matrix that is known by its products with vectors."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hf_attribution.curvature.operators import FlatRows
from hf_attribution.curvature.solvers import Solution
from hf_attribution.processes import add_up


class Products:
    """`(H + λI)⁻¹` by a solver, for a block of right-hand sides at a time.

    Args:
        solve: The solver, of right-hand sides `[R, P]`.
        ridge: λ.
        gains: The training examples' gradients, shared.
        queries: The queries' gradients, if there are any.

    Attributes:
        residual: The largest relative residual so far.
    """

    def __init__(
        self, solve: Callable[[Tensor], Solution], ridge: float, gains: FlatRows, queries: FlatRows | None
    ) -> None:
        self._solve, self.ridge, self._gains, self._queries = solve, ridge, gains, queries
        self.residual = 0.0

    def scores(self) -> np.ndarray:
        """`u (H + λI)⁻¹ g`: float32 `[Q, N]`."""
        assert self._queries is not None
        scores = torch.zeros(len(self._queries), len(self._gains), dtype=torch.float32)
        for where, block in self._queries.blocks():
            solved = self._solved(block)
            for columns, gain in self._gains:
                scores[where[:, None], columns] = (solved @ gain.T).to(scores)
        add_up(scores)
        return scores.numpy()

    def self_influence(self) -> np.ndarray:
        """`g (H + λI)⁻¹ g`: float32 `[N]`."""
        own = torch.zeros(len(self._gains), dtype=torch.float32)
        # All processes solve for the same block at a time, and share the products that this takes.
        for columns, gain in FlatRows(self._gains.sources).blocks():
            own[columns] = (self._solved(gain) * gain).sum(1).to(own)
        return own.numpy()

    def _solved(self, rhs: Tensor) -> Tensor:
        solution = self._solve(rhs)
        self.residual = max(self.residual, solution.residual)
        return solution.values
