"""TRAK: a linear model in the space of randomly projected gradients, averaged over models."""

import dataclasses
from typing import ClassVar

import numpy as np
import torch

from hf_attribution.curvature.ridge import ridge_scores
from hf_attribution.gradients.projections import Projection
from hf_attribution.methods.base import Method, Scored
from hf_attribution.problem import Problem

AUTO_DAMPING = 1.0


@dataclasses.dataclass(frozen=True)
class Trak(Method):
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
    """

    dim: int = 2048
    damping: float | str = "auto"
    seed: int = 0
    projection: str = "two_sided"
    modules: tuple[str, ...] | None = None

    name: ClassVar[str] = "trak"
    paper: ClassVar[str] = "Park et al. 2023, TRAK: Attributing model behavior at scale"

    def __post_init__(self) -> None:
        if self.damping != "auto" and not float(self.damping) > 0:
            raise ValueError(f"damping must be positive (the kernel can be singular), not {self.damping}.")

    def score(self, problem: Problem) -> Scored:
        """Fit the linear model of every checkpoint, and average."""
        damping = AUTO_DAMPING if self.damping == "auto" else float(self.damping)
        margins = problem.task.margins()
        train_function = problem.task.gains if margins is None else margins.measurement
        fitted, other_classes = np.zeros(problem.shape, np.float32), np.zeros(problem.shape[1], np.float32)
        for number, (model, share) in enumerate(problem.models()):
            projection = Projection(self.dim, self.seed + number, self.projection)
            train = problem.features(model, train_function, problem.train, projection, self.modules)
            query = problem.features(model, problem.task.measurement, problem.query, projection, self.modules)
            fitted += share * ridge_scores(query, train, damping)
            if margins is not None:
                other_classes += share * torch.sigmoid(-torch.from_numpy(train.values)).numpy()
        values = fitted if margins is None else fitted * other_classes
        return Scored(values, {"damping": damping})
