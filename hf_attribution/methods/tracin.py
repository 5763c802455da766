"""TracIn: gradient dot products along the training run, weighted by the learning rate."""

import dataclasses
from typing import ClassVar

import numpy as np

from hf_attribution.curvature.parts import Identity, Layout
from hf_attribution.methods.base import GradientMethod, Scored
from hf_attribution.problem import Problem


@dataclasses.dataclass(frozen=True)
class TracIn(GradientMethod):
    """TracInCP: `Σ_c η_c ⟨∇m(query; θ_c), -∇loss(example; θ_c)⟩` over checkpoints of one run.

    The checkpoints are the `checkpoint-*` folders of a Trainer, with the learning rates it saved in them.

    Args:
        dim: Project the gradients to this dimension; exact by default.
        seed: Seed of the projection.
        modules: Patterns of the modules whose parameters count; all by default.
        last_layer: Only the parameters of the last linear layer count, as in the paper.
    """

    dim: int | None = None
    seed: int = 0

    name: ClassVar[str] = "tracin"
    paper: ClassVar[str] = "Pruthi et al. 2020, Estimating training data influence by tracing gradient descent"
    needs_checkpoints: ClassVar[bool] = True

    def score(self, problem: Problem) -> Scored:
        """Add up the checkpoints."""
        values = problem.average(lambda model, _: problem.products(model, self.modules_of(model), self.dim, self.seed))
        rates = [checkpoint.weight for checkpoint in problem.checkpoints]
        return Scored(len(rates) * values, {"learning_rates": rates})

    def self_influence(self, problem: Problem) -> np.ndarray:
        """The gradients' squared lengths, added up over the checkpoints."""
        return len(problem.checkpoints) * problem.average(
            lambda model, _: problem.squared_lengths(model, self.modules_of(model), self.dim, self.seed)
        )

    def part_scores(self, problem: Problem, granularity: str) -> tuple[Layout, Scored]:
        """Add up the checkpoints module by module, or token by token."""
        if self.dim is not None:
            return super().part_scores(problem, granularity)
        layout, values = problem.average_parts(
            lambda model, _: problem.part_products(model, granularity, Identity(), self.modules_of(model))
        )
        rates = [checkpoint.weight for checkpoint in problem.checkpoints]
        return layout, Scored(len(rates) * values, {"learning_rates": rates})
