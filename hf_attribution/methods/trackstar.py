"""TrackStar: cosines of projected gradients in the geometry of the optimiser and of the gradients' correlations."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_attribution.curvature.dual import DampedKernel
from hf_attribution.curvature.ridge import gram_matrix, in_memory
from hf_attribution.gradients.projections import Projection
from hf_attribution.gradients.stored import StoredProducts, StoredScores
from hf_attribution.methods.base import GradientMethod, Scored, positive_damping
from hf_attribution.methods.fits import kept_moments
from hf_attribution.problem import Problem
from hf_attribution.store import FeatureStore

AUTO_DAMPING = 0.1


@dataclasses.dataclass(frozen=True)
class TrackStar(GradientMethod):
    """Cosine of `R^(-1/2) P (gradient / √V)` of query and example, averaged over the checkpoints.

    V are the second moments of the training gradients, as Adafactor keeps them. P is a two-sided random projection. R
    is the mixed autocorrelation of the projections: `mix` times the queries' mean outer product, the rest the
    training examples'. The paper keeps a block of R per layer; here it is of all layers' projections together.

    Args:
        dim: Dimension of the projection.
        mix: Share of the queries in R: what all queries have in common says little about any of them.
        damping: Added to R, as a multiple of its mean eigenvalue; `"auto"` uses .1.
        seed: Seed of the projection.
        modules: Patterns of the modules whose parameters count; all by default.
        last_layer: Only the parameters of the last linear layer count.
    """

    dim: int = 2048
    mix: float = 0.5
    damping: float | str = "auto"
    seed: int = 0

    name: ClassVar[str] = "trackstar"
    paper: ClassVar[str] = (
        "Chang et al. 2024, Scalable influence and fact tracing for large language model pretraining"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_damping(self.damping, AUTO_DAMPING)
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix must be between 0 and 1, not {self.mix}.")

    def score(self, problem: Problem) -> Scored:
        """Whiten the projections, and compare their directions."""
        stored = self.stored_scores(problem)
        return Scored(stored.matrix(), stored.choices)

    def stored_scores(self, problem: Problem) -> StoredScores:
        """Products of whitened projections of unit length."""

        def products(model: nn.Module, number: int) -> StoredProducts:
            modules, projection = self.modules_of(model), Projection(self.dim, self.seed + number)
            moments = kept_moments(problem, model, modules)
            train = problem.features(model, problem.task.gains, problem.train, projection, modules, moments)
            query = problem.features(model, problem.task.measurement, problem.query, projection, modules, moments)
            mixed = self.mix * _autocorrelation(query) + (1 - self.mix) * _autocorrelation(train)
            # The Cholesky factor whitens as the inverse root does, but for a rotation.
            damped = DampedKernel(mixed, self._damping * float(mixed.trace()) / len(mixed))

            def whitened(where: slice, block: Tensor) -> Tensor:
                return torch.nn.functional.normalize(damped.whiten(block).float())

            return StoredProducts(whitened(slice(None), in_memory(query)), train, whitened)

        return dataclasses.replace(problem.stored_sum(products), choices={"damping": self._damping})

    @property
    def _damping(self) -> float:
        return positive_damping(self.damping, AUTO_DAMPING)


def _autocorrelation(features: FeatureStore) -> Tensor:
    """Mean outer product, of trace 1, `[dim, dim]` in double precision."""
    total = gram_matrix(features)
    trace = total.trace()
    return total / trace if trace > 0 else total
