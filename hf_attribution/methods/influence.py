"""Influence functions: what a Newton step makes of leaving an example out."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from hf_attribution.curvature.operators import FlatRows, GramOperator, HessianOperator
from hf_attribution.curvature.ridge import MAX_DUAL, divide_by_roots, dual_scores, refuse_large_kernel, ridge_scores
from hf_attribution.curvature.solvers import Solution, arnoldi, cg, explicit, lissa
from hf_attribution.gradients.held import Source
from hf_attribution.gradients.layers import last_linear
from hf_attribution.gradients.products import gradient_kernel
from hf_attribution.gradients.projections import Projection
from hf_attribution.methods.base import Method, Scored
from hf_attribution.problem import Problem
from hf_attribution.tasks import Batch

CURVATURES = ("fisher", "gauss_newton", "hessian")
SOLVERS = ("auto", "dual", "explicit", "cg", "lissa", "arnoldi")

AUTO_DAMPING = 0.3
AUTO_DIM = 4096

# Up to these the exact kernel takes about as long as a training: numbers in all training gradients together, which are
# computed anew for every block that fits in memory, and multiplications for all pairs of them.
EXACT_SIZE, EXACT_PRODUCTS = 2**30, 2**40

# Parameters up to which a matrix of their curvature is formed rather than solved iteratively.
AUTO_EXPLICIT = 3000


@dataclasses.dataclass(frozen=True)
class Influence(Method):
    """`∇m(query)ᵀ (H + λI)⁻¹ (-∇loss(example))`, averaged over the checkpoints, with H a sum over training examples.

    Args:
        curvature: H. `"fisher"`: the empirical Fisher matrix, of the examples' own loss gradients; it stays meaningful
            for deep networks and is cheapest. `"gauss_newton"`: that of classifiers and regressions, equal to the
            Hessian for linear models. `"hessian"`: the true one, for small models at an optimum.
        solver: `"dual"`: exact, through the kernel of all pairs of training gradients (for `"gauss_newton"`, of all
            classes' too). `"explicit"`: exact, through the matrix of all pairs of parameters. `"cg"`, `"lissa"`,
            `"arnoldi"`: by products with H. `"auto"` chooses an exact one where there are few enough examples or
            parameters, else projected gradients (fisher) or cg.
        damping: λ in units of H's mean trace per example: for `"fisher"`, and for `"hessian"`, of the examples' mean
            squared gradient. `"auto"` uses .3; .1 to .3 suits ensembles of models trained on half of the data.
        normalize: `"self_influence"` divides an example's scores by the root of its influence on itself (Barshan et
            al. 2020), and makes them depend less on the damping.
        modules: Patterns of the modules whose parameters count; all by default.
        last_layer: Only the parameters of the last linear layer count.
        dim: Project the gradients to this dimension (fisher); `None` for exact ones; `"auto"` uses 4096 where exact
            ones would take too long.
        seed: Seed of the projection, or of arnoldi's start.
        tolerance: Relative residual that cg and lissa must reach.
        iterations: Products with H that cg and lissa may take, or the dimensions that arnoldi keeps.
    """

    curvature: str = "fisher"
    solver: str = "auto"
    damping: float | str = "auto"
    normalize: str | None = None
    modules: tuple[str, ...] | None = None
    last_layer: bool = False
    dim: int | str | None = "auto"
    seed: int = 0
    tolerance: float = 1e-4
    iterations: int = 1000

    name: ClassVar[str] = "influence"
    paper: ClassVar[str] = "Koh & Liang 2017, Understanding black-box predictions via influence functions"

    def __post_init__(self) -> None:
        known = {"curvature": CURVATURES, "solver": SOLVERS, "normalize": (None, "self_influence")}
        for setting, choices in known.items():
            if getattr(self, setting) not in choices:
                names = ", ".join(map(str, choices))
                raise ValueError(f"{setting} must be one of {names}, not {getattr(self, setting)}.")
        if self.damping != "auto" and not float(self.damping) > 0:
            raise ValueError(f"damping must be positive (the curvature can be singular), not {self.damping}.")
        if isinstance(self.dim, int) and (self.curvature != "fisher" or self.solver not in ("auto", "dual")):
            raise ValueError("dim=... projects gradients for curvature='fisher' with solver='auto' or 'dual' alone.")
        if self.curvature == "hessian" and self.solver == "dual":
            raise ValueError("The Hessian has no dual form: use solver='explicit' or 'cg', or another curvature.")
        if self.last_layer and self.modules is not None:
            raise ValueError("Give either last_layer=True or modules=[...].")

    def score(self, problem: Problem) -> Scored:
        """Solve for every checkpoint, and average."""
        values, notes = np.zeros(problem.shape, np.float32), []
        for number, (model, share) in enumerate(problem.models()):
            found, note = _Linearised(self, problem, model, number).score()
            values += share * found
            notes.append(note)
        choices = {"damping": self._damping, **notes[0], "lambda": [note["lambda"] for note in notes]}
        return Scored(values, choices)

    @property
    def _damping(self) -> float:
        return AUTO_DAMPING if self.damping == "auto" else float(self.damping)


class _Linearised:
    """The influence function of one model."""

    def __init__(self, method: Influence, problem: Problem, model: nn.Module, number: int) -> None:
        self.method, self.problem, self.model, self.number = method, problem, model, number
        self.damping, self.normalize = method._damping, method.normalize is not None
        self.modules = (last_linear(model),) if method.last_layer else method.modules
        self.gains = self._source(problem.task.gains)
        self.num_parameters = self.gains.gradients.num_parameters

    def score(self) -> tuple[np.ndarray, dict[str, Any]]:
        """Values `[Q, N]`, and what was chosen."""
        note: dict[str, Any] = {"modules": list(self.modules or ())} if self.method.last_layer else {}
        if self._dim is not None:
            values, ridge = self._projected(self._dim)
            return values, {**note, "solver": "dual", "dim": self._dim, "lambda": ridge}
        solver = self._solver
        values, found = self._dual() if solver == "dual" else self._by_products(solver)
        return values, {**note, "solver": solver, **found}

    def _source(self, function: Callable[[nn.Module, Batch], Tensor], split: str = "train") -> Source:
        rows = getattr(self.problem, split)
        return Source(self.problem.gradients(self.model, function, rows, self.modules), rows)

    @functools.cached_property
    def _queries(self) -> Source:
        return self._source(self.problem.task.measurement, "query")

    @functools.cached_property
    def _curvature_sources(self) -> list[Source]:
        """The rows of which H is the Gram matrix."""
        if self.method.curvature == "fisher":
            return [self.gains]

        def row(number: int, model: nn.Module, batch: Batch) -> Tensor:
            return self.problem.task.curvature_rows(model, batch)[0][:, number]

        return [self._source(functools.partial(row, number)) for number in range(self._rows_per_example)]

    @functools.cached_property
    def _rows_per_example(self) -> int:
        if self.method.curvature == "fisher":
            return 1
        probe = self.problem.train.probe().to(self.problem.device)
        with torch.no_grad():
            return self.problem.task.curvature_rows(self.model, probe.inputs)[0].shape[1]

    @property
    def _dim(self) -> int | None:
        """Dimension of the projection, if there is one."""
        if self.method.dim != "auto":
            return self.method.dim  # type: ignore[return-value]
        num_train = len(self.problem.train)
        size = num_train * self.num_parameters
        exact = num_train <= MAX_DUAL and size <= EXACT_SIZE and num_train * size <= EXACT_PRODUCTS
        wanted = self.method.curvature == "fisher" and self.method.solver == "auto"
        return AUTO_DIM if wanted and not exact else None

    @property
    def _solver(self) -> str:
        if self.method.solver != "auto":
            return self.method.solver
        if self.method.curvature != "hessian" and len(self.problem.train) * self._rows_per_example <= MAX_DUAL:
            return "dual"
        return "explicit" if self.num_parameters <= AUTO_EXPLICIT else "cg"

    def _projected(self, dim: int) -> tuple[np.ndarray, float]:
        projection, task = Projection(dim, self.method.seed + self.number), self.problem.task
        train = self.problem.features(self.model, task.gains, self.problem.train, projection, self.modules)
        query = self.problem.features(self.model, task.measurement, self.problem.query, projection, self.modules)
        unit = sum(float(block.square().sum()) for _, block in train.blocks()) / len(train)
        return ridge_scores(query, train, self.damping, self.normalize), self.damping * unit

    def _dual(self) -> tuple[np.ndarray, dict[str, Any]]:
        num_train = len(self.problem.train)
        refuse_large_kernel(num_train * self._rows_per_example)
        kernel, cross = gradient_kernel(self._curvature_sources, self._queries, self.problem.progress)
        ridge = self.damping * float(kernel.diagonal().sum(dtype=torch.float64)) / num_train
        coefficients = None if self.method.curvature == "fisher" else self._coefficients()
        return dual_scores(kernel, cross, ridge, coefficients, self.normalize).numpy(), {"lambda": ridge}

    def _coefficients(self) -> Tensor:
        """How the rows of an example add up to the gradient of its gain, `[N, K]`."""
        found = torch.empty(len(self.problem.train), self._rows_per_example)
        with torch.no_grad():
            for batch in self.problem.train.batches():
                inputs = batch.to(self.problem.device).inputs
                found[batch.indices] = self.problem.task.curvature_rows(self.model, inputs)[1].float().cpu()
        return found

    def _by_products(self, solver: str) -> tuple[np.ndarray, dict[str, Any]]:
        """By products with H: solve for every query, and multiply with every example."""
        gains, queries = FlatRows([self.gains]), FlatRows([self._queries])
        operator: GramOperator | HessianOperator
        if self.method.curvature == "hessian":
            ridge = self.damping * gains.squared_norm() / len(self.problem.train)
            parameters = self.gains.gradients.parameters
            operator = HessianOperator(self.model, self.problem.task.losses, self.problem.train, parameters, ridge)
        else:
            rows = gains if self.method.curvature == "fisher" else FlatRows(self._curvature_sources)
            ridge = self.damping * rows.squared_norm() / len(self.problem.train)
            operator = GramOperator(rows, ridge)
        scores, residual = torch.zeros(self.problem.shape), 0.0
        for where, query in queries.blocks():
            solution = self._solve(solver, operator, query)
            residual = max(residual, solution.residual)
            for columns, gain in gains:
                scores[where[:, None], columns] = (solution.values @ gain.T).cpu()
        if self.normalize:
            own = torch.zeros(len(self.problem.train))
            for columns, gain in gains.blocks():
                own[columns] = (self._solve(solver, operator, gain).values * gain).sum(1).cpu()
            scores = divide_by_roots(scores, own)
        return scores.numpy(), {"lambda": ridge, "residual": residual}

    def _solve(self, solver: str, operator: Callable[[Tensor], Tensor], rhs: Tensor) -> Solution:
        tolerance, iterations = self.method.tolerance, self.method.iterations
        if solver == "explicit":
            return explicit(operator, rhs)
        if solver == "arnoldi":
            return arnoldi(operator, rhs, iterations, self.method.seed)
        return (cg if solver == "cg" else lissa)(operator, rhs, tolerance=tolerance, max_iterations=iterations)
