"""Influence functions with Kronecker-factored curvature."""

import dataclasses
from typing import ClassVar

from hf_attribution.methods.preconditioned import Kronecker


@dataclasses.dataclass(frozen=True)
class KFac(Kronecker):
    """`∇m(query)ᵀ (A ⊗ G / R + λI)⁻¹ ∇gain(example)`, layer by layer.

    A and G are the sums of outer products of a layer's inputs (with a one for the bias) and of its output gradients,
    over R positions, without padding. Parameters other than the weights and biases of linear layers, convolutions and
    embeddings have a diagonal curvature.

    For the settings see `hf_attribution.methods.preconditioned.Kronecker`.
    """

    per_layer: bool = True

    name: ClassVar[str] = "kfac"
    paper: ClassVar[str] = "Martens & Grosse 2015, Optimizing neural networks with Kronecker-factored curvature"
    auto_damping: ClassVar[float] = 0.001
