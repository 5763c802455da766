"""LASSO and elastic net of many outputs on one design matrix, the penalty of each chosen by cross-validation.

A datamodel is one LASSO per query, and all queries share the membership masks. A LASSO library solves them one after
the other; here they advance together, so that an iteration is one matrix product, and neither the products of the
design with itself nor the passes over it are repeated. On 2 CPU cores, 2,000 subsets x 1,000 examples x 200 queries
took scikit-learn's `LassoCV` 1.5 s a query and this module 0.1 s (`scripts/benchmark.py --sections datamodel` prints
the numbers of a machine), with the same folds, grid and coefficients. That is why there is no library here.
"""

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from hf_attribution.errors import ConvergenceError

# Up to this many columns the products of the design with itself are kept, where they are also the cheaper ones.
MAX_GRAM = 8192

QUERY_BLOCK = 256
# The paths serve to choose the penalty alone, and may stop short of their tolerance.
PATH_ITERATIONS, MAX_ITERATIONS = 1000, 50_000

# Duality gaps, as shares of the outputs' variance: of the paths (scikit-learn's default), and of the final fit.
PATH_TOLERANCE, FINAL_TOLERANCE = 1e-4, 1e-9

# A path ends where its cross-validated error is above its minimum by this share of the error of predicting the mean:
# what follows are weaker and weaker penalties, which only fit more noise and take longest.
PAST_MINIMUM = 0.05


@dataclasses.dataclass(frozen=True)
class LassoFit:
    """Fits of all queries.

    Attributes:
        coefficients: float64 `[Q, N]`.
        penalties: float64 `[Q]`, the penalty α chosen for each query.
        penalty_indices: int64 `[Q]`, its position in the grid, from the strongest.
    """

    coefficients: np.ndarray
    penalties: np.ndarray
    penalty_indices: np.ndarray


def fit_lasso(
    design: np.ndarray,
    outputs: np.ndarray,
    l1_ratio: float = 1.0,
    num_folds: int = 5,
    num_penalties: int = 100,
    smallest: float | None = None,
) -> LassoFit:
    """Fit `|y - b - X w|² / 2M + α (ρ |w|₁ + (1 - ρ) |w|² / 2)` for each query, α by cross-validation, b free.

    α is that of outputs divided by their standard deviation, so that it does not depend on their unit.

    Accelerated proximal gradients (Beck & Teboulle 2009) with restarts (O'Donoghue & Candès 2015), all queries
    together, warm-started along the penalties from the strongest down, until each query's duality gap is small. Row
    i of the design is held out in fold `i mod num_folds`, so that folds are alike where the rows are sorted.

    Args:
        design: `[M, N]`, a row a subset: its mask, or weights in its place.
        outputs: `[Q, M]`, none of them constant.
        l1_ratio: ρ, 1 for LASSO, between 0 and 1 for the elastic net.
        num_folds: Folds of the cross-validation.
        num_penalties: Penalties in the grid, evenly in their logarithm.
        smallest: The weakest penalty, as a share of the weakest that makes all coefficients zero. By default .001, or
            .01 where there are fewer rows than columns (as in glmnet): weaker ones reproduce any outputs.

    Returns:
        The fits.

    Raises:
        ConvergenceError: A final fit did not reach its tolerance.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> masks, truth = rng.random((400, 10)) < 0.5, np.array([[3.0, -2.0] + [0.0] * 8])
        >>> fit_lasso(masks, truth @ masks.T).coefficients.round(1)[0, :4].tolist()
        [3.0, -2.0, 0.0, 0.0]
    """
    rows = torch.from_numpy(np.asarray(design, dtype=np.float32))
    targets = torch.from_numpy(np.ascontiguousarray(outputs.T, dtype=np.float64))
    targets = targets - targets.mean(0)
    scale = targets.square().mean(0).sqrt()
    targets /= scale
    folds = torch.arange(len(rows)) % num_folds
    # Without scores to speak of the fold problems are solved in single precision, and only the last in double.
    problems = [_LeastSquares.of(rows, folds != fold) for fold in range(num_folds)]
    whole = _LeastSquares.of(rows.double(), torch.ones(len(rows), dtype=torch.bool))
    if smallest is None:
        smallest = 1e-3 if len(rows) >= rows.shape[1] else 1e-2
    shares = torch.logspace(0, math.log10(smallest), num_penalties, dtype=torch.float64)
    coefficients, penalties, indices = [], [], []
    for block in targets.split(QUERY_BLOCK, dim=1):
        strongest = whole.linear(block).abs().amax(0) / l1_ratio
        errors = _path_errors(problems, rows, block.float(), strongest.float(), shares.float(), l1_ratio)
        chosen = errors.argmin(0)
        penalty = strongest * shares[chosen]
        start = torch.zeros(rows.shape[1], block.shape[1], dtype=torch.float64)
        found, _, converged = whole.minimize(block, penalty, l1_ratio, start, FINAL_TOLERANCE, MAX_ITERATIONS)
        if not converged:
            raise ConvergenceError(
                f"The LASSO did not reach a duality gap of {FINAL_TOLERANCE:.0e} in {MAX_ITERATIONS} iterations: "
                "retrain on more subsets, or use penalty='ridge'."
            )
        coefficients.append(found)
        penalties.append(penalty)
        indices.append(chosen)
    return LassoFit(
        (torch.cat(coefficients, 1) * scale).T.contiguous().numpy(),
        torch.cat(penalties).numpy(),
        torch.cat(indices).numpy(),
    )


def _path_errors(
    problems: list["_LeastSquares"], rows: Tensor, targets: Tensor, strongest: Tensor, shares: Tensor, ratio: float
) -> Tensor:
    """Cross-validated mean squared errors `[K, Q]`; infinite where the path was not followed."""
    errors = torch.full((len(shares), targets.shape[1]), torch.inf)
    going = torch.arange(targets.shape[1])
    states = [torch.zeros(rows.shape[1], len(going)) for _ in problems]
    for step, share in enumerate(shares):
        error = torch.zeros(len(going))
        for number, problem in enumerate(problems):
            own = targets[:, going]
            states[number], center, _ = problem.minimize(
                own, strongest[going] * share, ratio, states[number], PATH_TOLERANCE, PATH_ITERATIONS
            )
            held = ~problem.kept
            # Single folds count by their size: an error is the mean over all subsets.
            error += (own[held] - rows[held] @ states[number] - center).square().sum(0)
        errors[step, going] = error / len(rows)
        on = errors[step, going] <= errors[:, going].amin(0) + PAST_MINIMUM
        if not on.any():
            break
        going, states = going[on], [state[:, on] for state in states]
    return errors


@dataclasses.dataclass(frozen=True)
class _LeastSquares:
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
    def of(cls, rows: Tensor, kept: Tensor) -> "_LeastSquares":
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
        """Minimize for one penalty a query. Queries that have converged leave the iteration.

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
