"""TRAK: a linear model in the space of randomly projected gradients, averaged over models."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from hf_attribution.curvature.ridge import RidgeRegression
from hf_attribution.gradients.projections import Projection
from hf_attribution.gradients.stored import StoredScores
from hf_attribution.methods.base import GradientMethod, Scored, positive_damping
from hf_attribution.problem import Problem
from hf_attribution.store import FeatureStore

AUTO_DAMPING = 1.0


@dataclasses.dataclass(frozen=True)
class Trak(GradientMethod):
    """`mean_c [φ_c(query) (Φ_cᵀΦ_c + λI)⁻¹ Φ_cᵀ] · mean_c [1 - p_c(example)]`, over checkpoints c.

    φ is the projected gradient of the correct-class margin of a classifier, and `1 - p` the probability of the other
    classes; for tasks with many predictions per example φ is the gradient of minus the loss, which contains that
    factor, and there is no other. Independently trained models beat checkpoints of one run, and ten beat one.

    Args:
        dim: Dimension of the projection.
        damping: λ as a multiple of the mean squared norm of the training features; `"auto"` uses 1.
        seed: Seed of the projection.
        projection: Kind of projection, see `hf_attribution.gradients.projections.Projection`.
        modules: Patterns of the modules whose parameters count; all by default.
        last_layer: Only the parameters of the last linear layer count.
    """

    dim: int = 2048
    damping: float | str = "auto"
    seed: int = 0
    projection: str = "two_sided"

    name: ClassVar[str] = "trak"
    paper: ClassVar[str] = "Park et al. 2023, TRAK: Attributing model behavior at scale"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_damping(self.damping, AUTO_DAMPING)

    def score(self, problem: Problem) -> Scored:
        """Fit the linear model of every checkpoint, and average."""
        stored = self.stored_scores(problem)
        return Scored(stored.matrix(), stored.choices)

    def stored_scores(self, problem: Problem) -> StoredScores:
        """Products of solved query features with training features, times the probability of the other classes."""
        terms, others = [], []
        for model, share, projection, train in self._features(problem):
            modules = self.modules_of(model)
            query = problem.features(model, problem.task.measurement, problem.query, projection, modules)
            products = RidgeRegression(train, self._damping, query).products()
            terms.append(dataclasses.replace(products, queries=share * products.queries))
            others.append(share * _other_classes(train))
        weights = np.sum(others, axis=0) if problem.task.margins() is not None else None
        return StoredScores(terms, weights, {"damping": self._damping})

    def self_influence(self, problem: Problem) -> np.ndarray:
        """The leverages of the training features, times the probability of the other classes."""
        leverages, other_classes = np.zeros((2, problem.shape[1]), np.float32)
        for _, share, _, train in self._features(problem):
            leverages += share * RidgeRegression(train, self._damping).self_influence()
            other_classes += share * _other_classes(train)
        return leverages * other_classes if problem.task.margins() is not None else leverages

    @property
    def _damping(self) -> float:
        return positive_damping(self.damping, AUTO_DAMPING)

    def _features(self, problem: Problem) -> Iterator[tuple[nn.Module, float, Projection, FeatureStore]]:
        """Of every model: itself, its share, a projection, and the training examples' features."""
        margins = problem.task.margins()
        function = problem.task.gains if margins is None else margins.measurement
        for number, (model, share) in enumerate(problem.models()):
            projection = Projection(self.dim, self.seed + number, self.projection)
            train = problem.features(model, function, problem.train, projection, self.modules_of(model))
            yield model, share, projection, train


def _other_classes(train: FeatureStore) -> np.ndarray:
    """`1 - p` of the training examples, from their margins."""
    return torch.sigmoid(-torch.from_numpy(train.values)).numpy()
