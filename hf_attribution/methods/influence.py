"""Influence functions: what a Newton step makes of leaving an example out."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from hf_attribution.curvature.dual import MAX_ROWS, FisherKernel, GaussNewtonKernel
from hf_attribution.curvature.iterative import Products
from hf_attribution.curvature.operators import FlatRows, GramOperator, HessianOperator
from hf_attribution.curvature.ridge import RidgeRegression, divide_by_roots
from hf_attribution.curvature.rows import CurvatureRows
from hf_attribution.curvature.solvers import Solution, arnoldi, cg, explicit, lissa
from hf_attribution.gradients.held import Source
from hf_attribution.gradients.projections import Projection
from hf_attribution.gradients.stored import StoredProducts, StoredScores
from hf_attribution.methods.base import GradientMethod, Scored, positive_damping
from hf_attribution.methods.groups import add_group_effect, groups_of
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


_Inverse = FisherKernel | GaussNewtonKernel | RidgeRegression | Products


@dataclasses.dataclass(frozen=True)
class Influence(GradientMethod):
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
        group_effect: Add to each query's scores this many of their standard deviations for examples of its class (as
            far as these are not the average): gradients underrate what more of a class does. 1 is a good weight; it
            raises the LDS and leaves the partial LDS, given class counts, as it is.
        dim: Project the gradients to this dimension (fisher); `None` for exact ones; `"auto"` uses 4096 where exact
            ones would take too long.
        seed: Seed of the projection, or of arnoldi's start.
        tolerance: Relative residual that cg and lissa must reach.
        iterations: Products with H that cg and lissa may take, or the dimensions that arnoldi keeps.
        modules: Patterns of the modules whose parameters count; all by default.
        last_layer: Only the parameters of the last linear layer count.
    """

    curvature: str = "fisher"
    solver: str = "auto"
    damping: float | str = "auto"
    normalize: str | None = None
    group_effect: float | None = None
    dim: int | str | None = "auto"
    seed: int = 0
    tolerance: float = 1e-4
    iterations: int = 1000

    name: ClassVar[str] = "influence"
    paper: ClassVar[str] = "Koh & Liang 2017, Understanding black-box predictions via influence functions"

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {"curvature": CURVATURES, "solver": SOLVERS, "normalize": (None, "self_influence")}
        for setting, choices in known.items():
            if getattr(self, setting) not in choices:
                names = ", ".join(map(str, choices))
                raise ValueError(f"{setting} must be one of {names}, not {getattr(self, setting)}.")
        positive_damping(self.damping, AUTO_DAMPING)
        if isinstance(self.dim, int) and (self.curvature != "fisher" or self.solver not in ("auto", "dual")):
            raise ValueError("dim=... projects gradients for curvature='fisher' with solver='auto' or 'dual' alone.")
        if self.curvature == "hessian" and self.solver == "dual":
            raise ValueError("The Hessian has no dual form: use solver='explicit' or 'cg', or another curvature.")
        if self.group_effect is not None and not self.group_effect >= 0:
            raise ValueError(f"group_effect must not be negative, not {self.group_effect}.")

    def score(self, problem: Problem) -> Scored:
        """Solve for every checkpoint, and average."""
        values, notes = np.zeros(problem.shape, np.float32), []
        for number, (model, share) in enumerate(problem.models()):
            linearised = _Linearised(self, problem, model, number)
            inverse, note = linearised.inverse(linearised.source(problem.task.measurement, "query"))
            found = inverse.scores()
            if self.normalize:
                found = divide_by_roots(found, inverse.self_influence())
            if isinstance(inverse, Products):
                note["residual"] = inverse.residual
            values += share * found
            notes.append({**note, "lambda": inverse.ridge})
        choices = _joined(linearised.damping, notes)
        if self.group_effect is not None:
            values = add_group_effect(values, *groups_of(problem, None, "group_effect="), self.group_effect)
        return Scored(values, choices)

    def stored_scores(self, problem: Problem) -> StoredScores:
        """Products of solved query features with training features, where gradients are projected."""
        notes: list[dict[str, Any]] = []

        def products(model: nn.Module, number: int) -> StoredProducts:
            linearised = _Linearised(self, problem, model, number)
            if linearised.dim is None or self.group_effect is not None:
                super(Influence, self).stored_scores(problem)  # which refuses
            inverse = linearised.projected(linearised.source(problem.task.measurement, "query"))
            notes.append({**linearised.note, "solver": "dual", "dim": linearised.dim, "lambda": inverse.ridge})
            found = inverse.products()
            if not self.normalize:
                return found
            shares = torch.from_numpy(
                divide_by_roots(np.ones((1, len(problem.train)), np.float32), inverse.self_influence())[0]
            )
            return dataclasses.replace(
                found, vectors=lambda where, block: found.vectors(where, block) * shares[where, None]
            )

        stored = problem.stored_sum(products)
        return dataclasses.replace(stored, choices=_joined(positive_damping(self.damping, AUTO_DAMPING), notes))

    def settled(self, problem: Problem) -> "Influence":
        """Choose between exact and projected gradients, and the solver."""
        for model, _ in dataclasses.replace(problem, checkpoints=problem.checkpoints[:1]).models():
            linearised = _Linearised(self, problem, model, 0)
            dim = linearised.dim
            solver = self.solver if dim is not None else linearised.solver
        return dataclasses.replace(self, dim=dim, solver=solver)

    def self_influence(self, problem: Problem) -> np.ndarray:
        """Solve for every checkpoint and training example, and average."""
        return problem.average(
            lambda model, number: _Linearised(self, problem, model, number).inverse()[0].self_influence()
        )


class _Linearised:
    """The influence function of one model."""

    def __init__(self, method: Influence, problem: Problem, model: nn.Module, number: int) -> None:
        self.method, self.problem, self.model, self.number = method, problem, model, number
        self.damping = positive_damping(method.damping, AUTO_DAMPING)
        self.modules = method.modules_of(model)
        self.gains = self.source(problem.task.gains)

    def source(self, function: Callable[[nn.Module, Batch], Tensor], split: str = "train") -> Source:
        """Gradients of a function for all rows of a split."""
        rows = getattr(self.problem, split)
        return Source(self.problem.gradients(self.model, function, rows, self.modules), rows)

    def inverse(self, queries: Source | None = None) -> tuple[_Inverse, dict[str, Any]]:
        """What multiplies with the inverse of H, and what was chosen."""
        note, dim, solver, progress = self.note, self.dim, self.solver, self.problem.progress
        if dim is not None:
            return self.projected(queries), {**note, "solver": "dual", "dim": dim}
        note["solver"] = solver
        if solver != "dual":
            return self._products(solver, queries), note
        if self.method.curvature == "fisher":
            return FisherKernel(self.gains, queries, self.damping, progress), note
        return GaussNewtonKernel(self._curvature_rows, self.gains, queries, self.damping, progress), note

    def projected(self, queries: Source | None) -> RidgeRegression:
        """The same through stored projected gradients of the dimension `dim`."""
        assert self.dim is not None
        projection, problem = Projection(self.dim, self.method.seed + self.number), self.problem
        train = problem.features(self.model, problem.task.gains, problem.train, projection, self.modules)
        query = None
        if queries is not None:
            query = problem.features(self.model, problem.task.measurement, problem.query, projection, self.modules)
        return RidgeRegression(train, self.damping, query)

    def _products(self, solver: str, queries: Source | None) -> Products:
        method, gains = self.method, FlatRows([self.gains], shared=True)
        operator: GramOperator | HessianOperator
        if method.curvature == "hessian":
            ridge = self.damping * gains.squared_norm() / len(self.problem.train)
            parameters = self.gains.gradients.parameters
            operator = HessianOperator(self.model, self.problem.task.losses, self.problem.train, parameters, ridge)
        else:
            rows = gains if method.curvature == "fisher" else FlatRows(self._curvature_rows, shared=True)
            ridge = self.damping * rows.squared_norm() / len(self.problem.train)
            operator = GramOperator(rows, ridge)
        solve = _solver(solver, method, operator)
        return Products(solve, ridge, gains, FlatRows([queries]) if queries is not None else None)

    @functools.cached_property
    def _curvature_rows(self) -> list[Source]:
        """The rows of which the Gauss-Newton matrix is the Gram matrix, a source for each of those of an example."""
        rows = CurvatureRows(self.model, self.problem.task, self.problem.train, "gauss_newton", self.modules)
        return [Source(gradients, self.problem.train) for gradients in rows.gradients]

    @property
    def note(self) -> dict[str, Any]:
        """What was chosen of the model."""
        return {"modules": list(self.modules or ())} if self.method.last_layer else {}

    @property
    def dim(self) -> int | None:
        """Dimension of the projection, if there is one."""
        if self.method.dim != "auto":
            return self.method.dim  # type: ignore[return-value]
        num_train = len(self.problem.train)
        size = num_train * self.gains.gradients.num_parameters
        exact = num_train <= MAX_ROWS and size <= EXACT_SIZE and num_train * size <= EXACT_PRODUCTS
        wanted = self.method.curvature == "fisher" and self.method.solver == "auto"
        return AUTO_DIM if wanted and not exact else None

    @property
    def solver(self) -> str:
        if self.method.solver != "auto":
            return self.method.solver
        rows_per_example = len(self._curvature_rows) if self.method.curvature == "gauss_newton" else 1
        if self.method.curvature != "hessian" and len(self.problem.train) * rows_per_example <= MAX_ROWS:
            return "dual"
        return "explicit" if self.gains.gradients.num_parameters <= AUTO_EXPLICIT else "cg"


def _joined(damping: float, notes: list[dict[str, Any]]) -> dict[str, Any]:
    """What was chosen for all models, of which each has a λ of its own."""
    return {"damping": damping, **notes[0], "lambda": [note["lambda"] for note in notes]}


def _solver(name: str, method: Influence, operator: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Solution]:
    """A solver with its settings, as a function of right-hand sides."""
    if name == "explicit":
        return functools.partial(explicit, operator)
    if name == "arnoldi":
        return functools.partial(arnoldi, operator, rank=method.iterations, seed=method.seed)
    solver = cg if name == "cg" else lissa
    return functools.partial(solver, operator, tolerance=method.tolerance, max_iterations=method.iterations)
