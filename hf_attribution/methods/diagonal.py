"""Influence functions with the diagonal of the Fisher matrix."""

import dataclasses
from typing import ClassVar

from hf_attribution.methods.preconditioned import Kronecker


@dataclasses.dataclass(frozen=True)
class Diagonal(Kronecker):
    """`Σ_p ∂m(query) ∂gain(example) / (H_pp + λ)`, with H_pp the diagonal of the Fisher matrix.

    For the settings see `hf_attribution.methods.preconditioned.Kronecker`.
    """

    name: ClassVar[str] = "diagonal"
    paper: ClassVar[str] = "Kirkpatrick et al. 2017, Overcoming catastrophic forgetting in neural networks"
    auto_damping: ClassVar[float] = 0.1
