"""DataInf: the inverse of an average replaced by an average of inverses, which have a closed form."""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import nn

from hf_attribution.curvature.mean_inverse import MeanInverse
from hf_attribution.gradients.directions import Preconditioner
from hf_attribution.methods.preconditioned import Preconditioned
from hf_attribution.problem import Problem


@dataclasses.dataclass(frozen=True)
class DataInf(Preconditioned):
    """Layer by layer, `∇m(query)ᵀ mean_j (∇ℓ_j ∇ℓ_jᵀ + λI)⁻¹ ∇gain(example)`, by the Sherman-Morrison formula.

    Meant for adapters of low rank (LoRA): `modules=("*lora*",)` where other parameters are trained, too. λ is in
    units of each layer's own mean squared gradient length.
    """

    name: ClassVar[str] = "datainf"
    paper: ClassVar[str] = "Kwon et al. 2024, DataInf: efficiently estimating data influence in LoRA-tuned models"
    auto_damping: ClassVar[float] = 0.1

    def fit(self, problem: Problem, model: nn.Module, number: int) -> tuple[Preconditioner, dict[str, Any]]:
        """The mean of the inverses: the training data are read once for λ, and once per block of queries."""
        _, train = problem.sources(model, self.modules_of(model))
        with torch.no_grad():
            inverse = MeanInverse(train, self._damping, problem.progress)
        return inverse, {"lambda": inverse.ridges}
