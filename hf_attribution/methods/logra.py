"""LoGra: influence functions in the space of gradients projected from both sides of each weight matrix."""

import dataclasses
from typing import ClassVar

import numpy as np

from hf_attribution.curvature.ridge import ridge_scores
from hf_attribution.gradients.projections import Projection
from hf_attribution.methods.base import Method, Scored
from hf_attribution.problem import Problem

AUTO_DAMPING = 0.3


@dataclasses.dataclass(frozen=True)
class LoGra(Method):
    """`φ(query) (ΦᵀΦ + λI)⁻¹ φ(example)`, φ the projected gradients of measurement and gain, averaged over models.

    A weight matrix's gradient G is projected to `P G Q`, which is never formed. The paper keeps a block of the
    curvature per layer; here the layers' projections are added up in one vector of `dim`, as `grad_dot` and TRAK
    store it, and the curvature between layers counts. The projections are random, not from a PCA.

    Args:
        dim: Dimension of the projection.
        damping: λ as a multiple of the mean squared norm of the training features; `"auto"` uses .3.
        seed: Seed of the projection.
        modules: Patterns of the modules whose parameters count; all by default. The paper uses the linear layers.
    """

    dim: int = 2048
    damping: float | str = "auto"
    seed: int = 0
    modules: tuple[str, ...] | None = None

    name: ClassVar[str] = "logra"
    paper: ClassVar[str] = "Choe et al. 2024, What is your data worth to GPT?"

    def __post_init__(self) -> None:
        if self.damping != "auto" and not float(self.damping) > 0:
            raise ValueError(f"damping must be positive (the kernel can be singular), not {self.damping}.")

    def score(self, problem: Problem) -> Scored:
        """Solve in the space of the projections."""
        damping = AUTO_DAMPING if self.damping == "auto" else float(self.damping)
        values = np.zeros(problem.shape, np.float32)
        for number, (model, share) in enumerate(problem.models()):
            projection = Projection(self.dim, self.seed + number)
            train = problem.features(model, problem.task.gains, problem.train, projection, self.modules)
            query = problem.features(model, problem.task.measurement, problem.query, projection, self.modules)
            values += share * ridge_scores(query, train, damping)
        return Scored(values, {"damping": damping})
