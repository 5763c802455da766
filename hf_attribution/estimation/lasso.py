"""LASSO and elastic net of many outputs on one design matrix, the penalty of each chosen by cross-validation.

A datamodel is one LASSO per query, and all queries share the membership masks. scikit-learn solves them one after the
other; here they advance together, so that an iteration is one matrix product, and neither the products of the design
with itself nor the passes over it are repeated. `scripts/benchmark.py --sections datamodel` measures both, with the
same folds, grid and coefficients. Where there are few queries, or hardly any rows for the columns, scikit-learn's
coordinate descent is the faster one, and is used.
"""

import dataclasses
import functools
import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_attribution.errors import ConvergenceError
from hf_attribution.estimation.proximal import LeastSquares

QUERY_BLOCK = 256
# The paths serve to choose the penalty alone, and may stop short of their tolerance.
PATH_ITERATIONS, MAX_ITERATIONS = 1000, 50_000

# Duality gaps, as shares of the outputs' variance: of the paths (scikit-learn's default), and of the final fit.
PATH_TOLERANCE, FINAL_TOLERANCE = 1e-4, 1e-9

# Below so many queries, and below so many rows for a column, queries are solved one by one. Measured on 2 CPU cores.
MANY_QUERIES, ROWS_PER_COLUMN = 8, 0.15

# A path ends where its cross-validated error is above its minimum by this share of the error of predicting the mean:
# what follows are weaker and weaker penalties, which only fit more noise and take longest.
PAST_MINIMUM = 0.05


# From a fit to fewer rows, the penalties' errors are followed from so many steps of the grid before its penalty on.
STEPS_BEFORE = 10


class Start(NamedTuple):
    """A fit of the same queries to other rows of the same columns, to start from.

    Args:
        coefficients: `[Q, N]`.
        penalties: `[Q]`, infinite where there is none.
    """

    coefficients: np.ndarray
    penalties: np.ndarray


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
    start: Start | None = None,
) -> LassoFit:
    """Fit `|y - b - X w|² / 2M + α (ρ |w|₁ + (1 - ρ) |w|² / 2)` for each query, α by cross-validation, b free.

    α is that of outputs divided by their standard deviation, so that it does not depend on their unit.

    Warm-started along the penalties from the strongest down, until each query's duality gap is small. Row i of the
    design is held out in fold `i mod num_folds`, so that folds are alike where the rows are sorted.

    Args:
        design: `[M, N]`, a row a subset: its mask, or weights in its place.
        outputs: `[Q, M]`, none of them constant.
        l1_ratio: ρ, 1 for LASSO, between 0 and 1 for the elastic net.
        num_folds: Folds of the cross-validation.
        num_penalties: Penalties in the grid, evenly in their logarithm.
        smallest: The weakest penalty, as a share of the weakest that makes all coefficients zero. By default .001, or
            .01 where there are fewer rows than columns (as in glmnet): weaker ones reproduce any outputs.
        start: An earlier fit. Errors are then followed from a little before its penalties on, and from the strongest
            penalty where the best one is none of those: what is found is the same up to the paths' tolerance,
            unless an error has several minima along the penalties.

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
    targets = np.ascontiguousarray(outputs.T, dtype=np.float64)
    targets = targets - targets.mean(0)
    scale = targets.std(0)
    targets /= scale
    num_rows, num_columns = design.shape
    if smallest is None:
        smallest = 1e-3 if num_rows >= num_columns else 1e-2
    shares = np.logspace(0, math.log10(smallest), num_penalties)
    if start is None:
        start = Start(np.zeros((len(outputs), num_columns)), np.full(len(outputs), np.inf))
    one_by_one = len(outputs) < MANY_QUERIES or num_rows < ROWS_PER_COLUMN * num_columns
    fit = _fit_one_by_one if one_by_one else _fit_together
    start = start._replace(coefficients=start.coefficients / scale[:, None])
    found = fit(np.asarray(design), targets, l1_ratio, num_folds, shares, start)
    return dataclasses.replace(found, coefficients=found.coefficients * scale[:, None])


def _first_steps(start: Start, strongest: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Where in the grid to begin, int64 `[Q]`."""
    passed = (start.penalties[:, None] <= 1.001 * strongest[:, None] * shares).sum(1)  # single precision may differ
    return (passed - 1 - STEPS_BEFORE).clip(min=0)


def _fit_together(
    design: np.ndarray, targets: np.ndarray, ratio: float, num_folds: int, shares: np.ndarray, start: Start
) -> LassoFit:
    rows = torch.from_numpy(np.asarray(design, dtype=np.float32))
    strengths = torch.from_numpy(shares)
    folds = torch.arange(len(rows)) % num_folds
    # Without scores to speak of the fold problems are solved in single precision, and only the last in double.
    problems = [LeastSquares.of(rows, folds != fold) for fold in range(num_folds)]
    whole = LeastSquares.of(rows.double(), torch.ones(len(rows), dtype=torch.bool))
    coefficients, penalties, indices = [], [], []
    for where in torch.arange(targets.shape[1]).split(QUERY_BLOCK):
        block, known = torch.from_numpy(targets[:, where]), Start(*(each[where] for each in start))
        strongest = whole.linear(block).abs().amax(0) / ratio
        first = torch.from_numpy(_first_steps(known, strongest.numpy(), shares))
        begun = torch.from_numpy(known.coefficients.T.copy())
        paths = functools.partial(_path_errors, problems, rows, ratio=ratio, shares=strengths.float())
        errors = paths(block.float(), strongest.float(), first=first, start=begun.float())
        again = ((errors.argmin(0) == first) & (first > 0)).nonzero()[:, 0]
        if len(again):
            nothing = torch.zeros(rows.shape[1], len(again))
            errors[:, again] = paths(
                block[:, again].float(), strongest[again].float(), first=torch.zeros_like(again), start=nothing
            )
        chosen = errors.argmin(0)
        penalty = strongest * strengths[chosen]
        found, _, converged = whole.minimize(block, penalty, ratio, begun, FINAL_TOLERANCE, MAX_ITERATIONS)
        if not converged:
            raise _not_converged()
        coefficients.append(found)
        penalties.append(penalty)
        indices.append(chosen)
    return LassoFit(
        torch.cat(coefficients, 1).T.contiguous().numpy(), torch.cat(penalties).numpy(), torch.cat(indices).numpy()
    )


def _fit_one_by_one(
    design: np.ndarray, targets: np.ndarray, ratio: float, num_folds: int, shares: np.ndarray, start: Start
) -> LassoFit:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import enet_path

    def path_errors(target: np.ndarray, grid: np.ndarray, begun: np.ndarray) -> np.ndarray:
        errors = np.zeros(len(grid))
        for (kept, held), (centered, mean, products) in zip(splits, problems, strict=True):
            path = enet_path(
                centered, target[kept] - target[kept].mean(), l1_ratio=ratio, alphas=grid, precompute=products,
                tol=PATH_TOLERANCE, max_iter=PATH_ITERATIONS, coef_init=begun.copy(),
            )[1]  # fmt: skip
            errors += np.square(target[held, None] - target[kept].mean() - (rows[held] - mean) @ path).sum(0)
        return errors

    rows = np.asfortranarray(design, dtype=np.float64)
    numbers = np.arange(len(rows))
    splits = [(numbers[numbers % num_folds != fold], numbers[fold::num_folds]) for fold in range(num_folds)]
    problems = [_centered(rows[kept]) for kept, _ in splits]
    whole, _, gram = _centered(rows)
    strongest = np.abs(whole.T @ targets).max(0) / len(rows) / ratio
    first = _first_steps(start, strongest, shares)
    coefficients, indices = np.empty((targets.shape[1], rows.shape[1])), np.empty(targets.shape[1], dtype=np.int64)
    with warnings.catch_warnings():
        # Paths may stop short of their tolerance, and the final fit is checked below.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for query, target in enumerate(targets.T):
            grid, begun = strongest[query] * shares, start.coefficients[query]
            near = slice(first[query], first[query] + 2 * STEPS_BEFORE + 1) if first[query] else slice(None)
            errors = path_errors(target, grid[near], begun)
            if first[query] and errors.argmin() in (0, len(errors) - 1):
                near, errors = slice(None), path_errors(target, grid, np.zeros_like(begun))
            indices[query] = (near.start or 0) + errors.argmin()
            _, found, gaps = enet_path(
                whole, target, l1_ratio=ratio, alphas=grid[indices[query]][None], precompute=gram,
                tol=FINAL_TOLERANCE, max_iter=MAX_ITERATIONS, coef_init=begun.copy(),
            )  # fmt: skip
            if gaps[0] > FINAL_TOLERANCE * len(rows):
                raise _not_converged()
            coefficients[query] = found[:, 0]
    return LassoFit(coefficients, strongest * shares[indices], indices)


def _centered(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | bool]:
    """Centered rows, their mean, and their products where those are smaller."""
    mean = rows.mean(0)
    centered = np.asfortranarray(rows - mean)
    return centered, mean, centered.T @ centered if len(rows) > rows.shape[1] else False


def _not_converged() -> ConvergenceError:
    return ConvergenceError(
        f"The LASSO did not reach a duality gap of {FINAL_TOLERANCE:.0e} in {MAX_ITERATIONS} iterations: "
        "retrain on more subsets, or use penalty='ridge'."
    )


def _path_errors(
    problems: list["LeastSquares"],
    rows: Tensor,
    targets: Tensor,
    strongest: Tensor,
    first: Tensor,
    start: Tensor,
    shares: Tensor,
    ratio: float,
) -> Tensor:
    """Cross-validated mean squared errors `[K, Q]`, from steps `[Q]` on; infinite where the path was not followed."""
    errors = torch.full((len(shares), targets.shape[1]), torch.inf)
    going = torch.arange(targets.shape[1])
    states = [start.clone() for _ in problems]
    for _ in range(len(shares)):
        step = first[going]
        error = torch.zeros(len(going))
        for number, problem in enumerate(problems):
            own = targets[:, going]
            states[number], center, _ = problem.minimize(
                own, strongest[going] * shares[step], ratio, states[number], PATH_TOLERANCE, PATH_ITERATIONS
            )
            held = ~problem.kept
            # Single folds count by their size: an error is the mean over all subsets.
            error += (own[held] - rows[held] @ states[number] - center).square().sum(0)
        errors[step, going] = error / len(rows)
        on = errors[step, going] <= errors[:, going].amin(0) + PAST_MINIMUM
        on &= step + 1 < len(shares)
        if not on.any():
            break
        first = first + 1
        going, states = going[on], [state[:, on] for state in states]
    return errors
