"""Gradient cosine: the gradient dot product without the gradients' lengths."""

import dataclasses
from typing import ClassVar

from hf_attribution.gradients.stored import StoredScores
from hf_attribution.methods.base import ProductMethod, Scored
from hf_attribution.problem import Problem


@dataclasses.dataclass(frozen=True)
class GradCos(ProductMethod):
    """Cosine of the query's measurement gradient and the example's gain gradient, averaged over the checkpoints.

    An example's influence on itself is 1, whatever it is: for that use another method.

    Args:
        dim: Project the gradients to this dimension; exact by default.
        seed: Seed of the projection.
        modules: Patterns of the modules whose parameters count; all by default.
        last_layer: Only the parameters of the last linear layer count.
    """

    name: ClassVar[str] = "grad_cos"
    paper: ClassVar[str] = "Charpiat et al. 2019, Input similarity from the neural network perspective"

    def score(self, problem: Problem) -> Scored:
        """Multiply the unit gradients."""
        return Scored(problem.average(lambda model, _: self.products(problem, model, normalize=True)))

    def stored_scores(self, problem: Problem) -> StoredScores:
        """Cosines of projected gradients."""
        dim = self.dim
        if dim is None:
            return super().stored_scores(problem)
        return problem.stored_sum(
            lambda model, _: problem.stored_products(model, self.modules_of(model), dim, self.seed, normalize=True)
        )
