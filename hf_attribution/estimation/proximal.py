"""Elastic nets of many outputs on one design matrix, all at once, by accelerated proximal gradients."""

import dataclasses
import math

import torch
from torch import Tensor

# Up to this many columns the products of the design with itself are kept, where they are also the cheaper ones.
MAX_GRAM = 8192


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """Squared errors of some rows of a design, with a free intercept.

    The rows are never copied: those left out count as zeros. Where the design is wider than it is high, or very wide,
    nothing of the size `[N, N]` is formed either.
    """

    rows: Tensor
    kept: Tensor
    mean: Tensor
    gram: Tensor | None
    lipschitz: float

    @classmethod
    def of(cls, rows: Tensor, kept: Tensor) -> "LeastSquares":
        """Squared errors of the rows `[M, N]` where `kept`, bool `[M]`."""
        weights = kept.to(rows.dtype)
        mean = weights @ rows / weights.sum()
        gram = None
        if rows.shape[1] <= min(2 * len(rows), MAX_GRAM):
            centered = (rows - mean) * weights[:, None]
            gram = centered.T @ centered / weights.sum()
        problem = cls(rows, kept, mean, gram, 0.0)
        return dataclasses.replace(problem, lipschitz=problem._largest_eigenvalue())

    def products(self, coefficients: Tensor) -> Tensor:
        """`XᵀX w / M` of the centered rows, `[N, Q]`."""
        if self.gram is not None:
            return self.gram @ coefficients
        return self._transposed(self.rows @ coefficients - self.mean @ coefficients)

    def linear(self, targets: Tensor) -> Tensor:
        """`Xᵀy / M` of the centered rows and targets, `[N, Q]`."""
        return self._transposed(targets - targets[self.kept].mean(0))

    def _transposed(self, residuals: Tensor) -> Tensor:
        # Residuals of the rows that count add up to zero, so that the rows need not be centered.
        return self.rows.T @ (residuals * self.kept[:, None]) / self.kept.sum()

    def _largest_eigenvalue(self) -> float:
        vector = torch.randn(len(self.mean), 1, generator=torch.Generator().manual_seed(0)).to(self.mean.dtype)
        norm = vector.norm()
        for _ in range(50):
            vector = self.products(vector / norm)
            norm = vector.norm()
        return 1.05 * float(norm)  # power iteration comes from below

    def minimize(
        self, targets: Tensor, penalty: Tensor, ratio: float, start: Tensor, tolerance: float, max_iterations: int
    ) -> tuple[Tensor, Tensor, bool]:
        """Minimize for one penalty a query, from a start `[N, Q]`. Queries that have converged leave the iteration.

        Beck & Teboulle 2009, FISTA, with the restarts of O'Donoghue & Candès 2015. Stops where the duality gap is at
        most `tolerance` times the targets' variance.

        Returns:
            Coefficients `[N, Q]`, intercepts `[Q]`, and whether all queries have converged.
        """
        result = start.clone()
        linear, energy = self.linear(targets), _variance(targets[self.kept])
        lasso, ridge = penalty * ratio, penalty * (1 - ratio)
        going = torch.arange(targets.shape[1])
        current, product = start, self.products(start)
        ahead, ahead_product, momentum = current, product, 1.0
        size = 1 / self.lipschitz
        for iteration in range(max_iterations + 1):
            if iteration % 4 == 0:
                gap = _duality_gap(current, product, linear, energy, lasso, ridge)
                open_ = gap > tolerance * energy
                if iteration == max_iterations or open_.float().mean() <= 0.7:
                    result[:, going] = current
                    if iteration == max_iterations or not open_.any():
                        break
                    current, product, ahead, ahead_product, linear = (
                        each[:, open_] for each in (current, product, ahead, ahead_product, linear)
                    )
                    energy, lasso, ridge, going = (each[open_] for each in (energy, lasso, ridge, going))
            moved = ahead + size * (linear - ahead_product)
            new = torch.sign(moved) * (moved.abs() - size * lasso).clamp(min=0) / (1 + size * ridge)
            new_product = self.products(new)
            following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            uphill = ((ahead - new) * (new - current)).sum(0) > 0  # restart: momentum points the wrong way
            inertia = torch.where(uphill, 0.0, (momentum - 1) / following)
            ahead = new + inertia * (new - current)
            ahead_product = new_product + inertia * (new_product - product)
            current, product, momentum = new, new_product, following
        return result, targets[self.kept].mean(0) - self.mean @ result, not bool(open_.any())


def _variance(targets: Tensor) -> Tensor:
    return (targets - targets.mean(0)).square().mean(0)


def _duality_gap(
    coefficients: Tensor, product: Tensor, linear: Tensor, energy: Tensor, lasso: Tensor, ridge: Tensor
) -> Tensor:
    """How far each query's objective is from its minimum at most.

    The elastic net is the LASSO of a design with √(M ridge) times the identity below it.

    Returns:
        `[Q]`.
    """
    fitted = (linear * coefficients).sum(0)
    squares = ridge * coefficients.square().sum(0)
    residual = energy - 2 * fitted + (coefficients * product).sum(0) + squares
    correlation = (linear - product - ridge * coefficients).abs().amax(0)
    scale = (lasso / correlation.clamp(min=torch.finfo(correlation.dtype).tiny)).clamp(max=1)
    dual = scale * (energy - fitted) - scale.square() * residual / 2
    return residual / 2 + lasso * coefficients.abs().sum(0) - dual
