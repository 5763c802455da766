"""LoGra: influence functions in the space of gradients projected from both sides of each weight matrix."""

import dataclasses
from typing import ClassVar

import numpy as np
from torch import nn

from hf_attribution.curvature.ridge import RidgeRegression
from hf_attribution.gradients.projections import Projection
from hf_attribution.gradients.stored import StoredProducts, StoredScores
from hf_attribution.methods.base import GradientMethod, Scored, positive_damping
from hf_attribution.problem import Problem

AUTO_DAMPING = 0.3


@dataclasses.dataclass(frozen=True)
class LoGra(GradientMethod):
    """`φ(query) (ΦᵀΦ + λI)⁻¹ φ(example)`, φ the projected gradients of measurement and gain, averaged over models.

    A weight matrix's gradient G is projected to `P G Q`, which is never formed. The paper keeps a block of the
    curvature per layer; here the layers' projections are added up in one vector of `dim`, as `grad_dot` and TRAK
    store it, and the curvature between layers counts. The projections are random, not from a PCA.

    Args:
        dim: Dimension of the projection.
        damping: λ as a multiple of the mean squared norm of the training features; `"auto"` uses .3.
        seed: Seed of the projection.
        modules: Patterns of the modules whose parameters count; all by default. The paper uses the linear layers.
        last_layer: Only the parameters of the last linear layer count.
    """

    dim: int = 2048
    damping: float | str = "auto"
    seed: int = 0

    name: ClassVar[str] = "logra"
    paper: ClassVar[str] = "Choe et al. 2024, What is your data worth to GPT?"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_damping(self.damping, AUTO_DAMPING)

    def score(self, problem: Problem) -> Scored:
        """Solve in the space of the projections."""
        stored = self.stored_scores(problem)
        return Scored(stored.matrix(), stored.choices)

    def stored_scores(self, problem: Problem) -> StoredScores:
        """Products of solved query features with training features."""

        def products(model: nn.Module, number: int) -> StoredProducts:
            projection, modules = Projection(self.dim, self.seed + number), self.modules_of(model)
            train = problem.features(model, problem.task.gains, problem.train, projection, modules)
            query = problem.features(model, problem.task.measurement, problem.query, projection, modules)
            return RidgeRegression(train, self._damping, query).products()

        return dataclasses.replace(problem.stored_sum(products), choices={"damping": self._damping})

    def self_influence(self, problem: Problem) -> np.ndarray:
        """The leverages of the training features."""

        def leverages(model: nn.Module, number: int) -> np.ndarray:
            projection, modules = Projection(self.dim, self.seed + number), self.modules_of(model)
            train = problem.features(model, problem.task.gains, problem.train, projection, modules)
            return RidgeRegression(train, self._damping).self_influence()

        return problem.average(leverages)

    @property
    def _damping(self) -> float:
        return positive_damping(self.damping, AUTO_DAMPING)
