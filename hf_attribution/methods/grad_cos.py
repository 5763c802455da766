"""Gradient cosine: the gradient dot product without the gradients' lengths."""

import dataclasses
from typing import ClassVar

from hf_attribution.gradients.projections import Projection
from hf_attribution.methods.base import Method, Scored
from hf_attribution.problem import Problem


@dataclasses.dataclass(frozen=True)
class GradCos(Method):
    """Cosine of the query's measurement gradient and the example's gain gradient, averaged over the checkpoints.

    Args:
        modules: Patterns of the modules whose parameters count; all by default.
        dim: Project the gradients to this dimension; exact by default.
        seed: Seed of the projection.
    """

    modules: tuple[str, ...] | None = None
    dim: int | None = None
    seed: int = 0

    name: ClassVar[str] = "grad_cos"
    paper: ClassVar[str] = "Charpiat et al. 2019, Input similarity from the neural network perspective"

    def score(self, problem: Problem) -> Scored:
        """Multiply the unit gradients."""
        projection = None if self.dim is None else Projection(self.dim, self.seed)
        return Scored(
            sum(
                share * problem.products(model, self.modules, projection, normalize=True)
                for model, share in problem.models()
            )
        )
