"""Influence functions with Kronecker-factored curvature whose eigenvalues are corrected."""

import dataclasses
from typing import ClassVar

from hf_attribution.methods.preconditioned import Kronecker


@dataclasses.dataclass(frozen=True)
class EKFac(Kronecker):
    """`∇m(query)ᵀ (U diag(Λ) Uᵀ + λI)⁻¹ ∇gain(example)`, layer by layer, in the eigenbasis U of K-FAC's factors.

    Λ are the squared entries of the gradients in that basis, summed over training examples (George et al. 2018).

    For the settings see `hf_attribution.methods.preconditioned.Kronecker`.
    """

    per_layer: bool = True

    name: ClassVar[str] = "ekfac"
    paper: ClassVar[str] = "Grosse et al. 2023, Studying large language model generalization with influence functions"
    auto_damping: ClassVar[float] = 0.001
