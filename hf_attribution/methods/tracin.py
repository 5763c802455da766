"""TracIn: gradient dot products along the training run, weighted by the learning rate."""

import dataclasses
from typing import ClassVar

from hf_attribution.gradients.projections import Projection
from hf_attribution.methods.base import Method, Scored
from hf_attribution.problem import Problem


@dataclasses.dataclass(frozen=True)
class TracIn(Method):
    """TracInCP: `Σ_c η_c ⟨∇m(query; θ_c), -∇loss(example; θ_c)⟩` over checkpoints of one run.

    The checkpoints are the `checkpoint-*` folders of a Trainer, with the learning rates it saved in them.

    Args:
        modules: Patterns of the modules whose parameters count; all by default. The paper uses the last layer.
        dim: Project the gradients to this dimension; exact by default.
        seed: Seed of the projection.
    """

    modules: tuple[str, ...] | None = None
    dim: int | None = None
    seed: int = 0

    name: ClassVar[str] = "tracin"
    paper: ClassVar[str] = "Pruthi et al. 2020, Estimating training data influence by tracing gradient descent"
    needs_checkpoints: ClassVar[bool] = True

    def score(self, problem: Problem) -> Scored:
        """Add up the checkpoints."""
        projection = None if self.dim is None else Projection(self.dim, self.seed)
        values = sum(
            len(problem.checkpoints) * share * problem.products(model, self.modules, projection)
            for model, share in problem.models()
        )
        return Scored(values, {"learning_rates": [checkpoint.weight for checkpoint in problem.checkpoints]})
