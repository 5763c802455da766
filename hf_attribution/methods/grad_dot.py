"""Gradient dot product: the first-order effect of one training step on an example."""

import dataclasses
from typing import ClassVar

import numpy as np

from hf_attribution.curvature.parts import Identity, Layout
from hf_attribution.gradients.stored import StoredScores
from hf_attribution.methods.base import ProductMethod, Scored
from hf_attribution.problem import Problem


@dataclasses.dataclass(frozen=True)
class GradDot(ProductMethod):
    """`⟨∇m(query), -∇loss(example)⟩`, averaged over the checkpoints.

    Args:
        dim: Project the gradients to this dimension; exact by default.
        seed: Seed of the projection.
        modules: Patterns of the modules whose parameters count; all by default.
        last_layer: Only the parameters of the last linear layer count.
    """

    name: ClassVar[str] = "grad_dot"
    paper: ClassVar[str] = "Charpiat et al. 2019, Input similarity from the neural network perspective"

    def score(self, problem: Problem) -> Scored:
        """Multiply the gradients."""
        return Scored(problem.average(lambda model, _: self.products(problem, model)))

    def stored_scores(self, problem: Problem) -> StoredScores:
        """Products of projected gradients."""
        dim = self.dim
        if dim is None:
            return super().stored_scores(problem)
        return problem.stored_sum(
            lambda model, _: problem.stored_products(model, self.modules_of(model), dim, self.seed)
        )

    def self_influence(self, problem: Problem) -> np.ndarray:
        """The gradients' squared lengths."""
        return problem.average(lambda model, _: self.squared_lengths(problem, model))

    def part_scores(self, problem: Problem, granularity: str) -> tuple[Layout, Scored]:
        """Multiply the gradients module by module, or token by token."""
        if self.dim is not None:
            return super().part_scores(problem, granularity)
        layout, values = problem.average_parts(
            lambda model, _: problem.part_products(model, granularity, Identity(), self.modules_of(model))
        )
        return layout, Scored(values)
