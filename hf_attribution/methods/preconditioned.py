"""What methods share whose scores are `∇m(query)ᵀ P (-∇loss(example))`, with P fitted to the training data."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from torch import nn

from hf_attribution.curvature.damping import layer_ridges
from hf_attribution.curvature.kronecker import KroneckerCurvature
from hf_attribution.curvature.parts import Layout
from hf_attribution.curvature.rows import CURVATURES, CurvatureRows
from hf_attribution.gradients.directions import Preconditioner, block_size, directional_products, self_products
from hf_attribution.gradients.held import Source
from hf_attribution.inputs import weights_fingerprint
from hf_attribution.methods.base import GradientMethod, Scored, positive_damping
from hf_attribution.methods.fits import kept_fit
from hf_attribution.problem import Problem

AUTO_RANK = 32


@dataclasses.dataclass(frozen=True)
class Preconditioned(GradientMethod, abc.ABC):
    """Base of the methods whose P is a damped inverse of block-diagonal curvature. Averages over the checkpoints.

    Args:
        damping: λ in units of the mean squared length of the curvature's gradients, with the curvature a sum over
            training examples. `"auto"` uses the method's own choice, recorded with the scores.
        modules: Patterns (`fnmatch`) of the modules whose parameters count; all by default.
        last_layer: Only the parameters of the last linear layer count.
        query_rank: Rank to which the matrices of a query's preconditioned gradient are truncated, so that many more
            queries are scored in one pass over the training data; None is exact. `"auto"` truncates to 32, as Grosse
            et al. (2023) do, only where the queries need several passes otherwise; recorded with the scores. Scores
            of modules and tokens are exact.
    """

    damping: float | str = "auto"
    query_rank: int | str | None = "auto"

    auto_damping: ClassVar[float]

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_damping(self.damping, self.auto_damping)
        rank = self.query_rank
        if not (rank is None or rank == "auto" or (type(rank) is int and rank > 0)):
            raise ValueError(f"query_rank must be a positive integer, None or 'auto', not {rank!r}.")

    @abc.abstractmethod
    def fit(self, problem: Problem, model: nn.Module, number: int) -> tuple[Preconditioner, dict[str, Any]]:
        """P for one model, and what was chosen for it."""

    def score(self, problem: Problem) -> Scored:
        """Precondition the queries' gradients, and multiply them with those of the training examples."""
        notes: list[dict[str, Any]] = []

        def one(model: nn.Module, number: int) -> np.ndarray:
            preconditioner, note = self.fit(problem, model, number)
            queries, train = problem.sources(model, self.modules_of(model))
            rank = self._rank(queries)
            notes.append({"query_rank": rank, **note})
            unfinished = problem.unfinished(lambda: (self.name, self.settings, number, rank))
            return directional_products(queries, train, preconditioner, rank, problem.progress, unfinished)

        return Scored(problem.average(one), self._choices(notes))

    def part_scores(self, problem: Problem, granularity: str) -> tuple[Layout, Scored]:
        """The same, module by module, or token by token."""
        notes: list[dict[str, Any]] = []

        def one(model: nn.Module, number: int) -> tuple[Layout, np.ndarray]:
            preconditioner, note = self.fit(problem, model, number)
            notes.append(note)
            return problem.part_products(model, granularity, preconditioner, self.modules_of(model))

        layout, values = problem.average_parts(one)
        return layout, Scored(values, self._choices(notes))

    def self_influence(self, problem: Problem) -> np.ndarray:
        """`∇gain(i)ᵀ P ∇gain(i)` of every training example, averaged over the checkpoints: float32 `[N]`."""

        def one(model: nn.Module, number: int) -> np.ndarray:
            preconditioner, _ = self.fit(problem, model, number)
            _, train = problem.sources(model, self.modules_of(model))
            return self_products(train, preconditioner, problem.progress)

        return problem.average(one)

    def _choices(self, notes: list[dict[str, Any]]) -> dict[str, Any]:
        shared = {key: value for key, value in notes[0].items() if key != "lambda"}
        return {"damping": self._damping, **shared, "lambda": [note["lambda"] for note in notes]}

    def _rank(self, queries: Source) -> int | None:
        if self.query_rank == "auto":
            return AUTO_RANK if len(queries.split) > block_size(queries) else None
        assert not isinstance(self.query_rank, str)
        return self.query_rank

    @property
    def _damping(self) -> float:
        return positive_damping(self.damping, self.auto_damping)


@dataclasses.dataclass(frozen=True)
class Kronecker(Preconditioned):
    """Base of the methods that invert a `KroneckerCurvature`.

    Args:
        damping: λ in units of the mean squared length of the curvature's gradients (its trace per example), with the
            curvature a sum over training examples. `"auto"` uses the method's own choice, recorded with the scores.
        modules: Patterns (`fnmatch`) of the modules whose parameters count; all by default.
        last_layer: Only the parameters of the last linear layer count.
        per_layer: Whether the unit is that of each layer's own gradients, so that every layer has a λ of its own.
        curvature: `"true_fisher"`: the Fisher matrix by targets drawn from the model, one for each example's own;
            `"gauss_newton"`: what that is on average, for classifiers and regressions, at the cost of a pass for each
            class; `"fisher"`: the empirical Fisher matrix, of the gradients of the losses themselves.
        seed: Seed of the drawn targets.
    """

    per_layer: bool = False
    curvature: str = "true_fisher"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.curvature not in CURVATURES:
            raise ValueError(f"curvature must be one of {', '.join(CURVATURES)}, not {self.curvature}.")

    def fit(self, problem: Problem, model: nn.Module, number: int) -> tuple[Preconditioner, dict[str, Any]]:
        """The inverse of the curvature of one model, which is kept in the problem's `cache_dir`, see `kept_fit`."""
        modules = self.modules_of(model)
        curvature = self._curvature(problem, model, modules, self.seed + number)
        units = curvature.units if self.per_layer else dict.fromkeys(curvature.units, curvature.unit)
        ridges = layer_ridges(self._damping, units)
        inverse = curvature.to(problem.device).inverse(ridges)
        note: dict[str, Any] = {"modules": list(modules or ())} if self.last_layer else {}
        return inverse, {**note, "lambda": ridges if self.per_layer else next(iter(ridges.values()))}

    def _curvature(
        self, problem: Problem, model: nn.Module, modules: Sequence[str] | None, seed: int
    ) -> KroneckerCurvature:
        settings = {
            "kind": self.name,
            "curvature": self.curvature,
            "seed": seed if self.curvature == "true_fisher" else None,
            "modules": list(modules) if modules is not None else None,
        }

        def rows() -> CurvatureRows:
            return CurvatureRows(model, problem.task, problem.train, self.curvature, modules, seed)

        return kept_fit(problem, model, self.name, rows, settings, weights_fingerprint(model))
