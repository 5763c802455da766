"""Diagonal matrices that multiply gradients, such as Adam's."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_attribution.artefacts import fingerprint
from hf_attribution.gradients.per_example import Gradients
from hf_attribution.gradients.terms import Dense, Lookup, Term, dense, is_large_table, squared_norms


class Elementwise:
    """The preconditioner that multiplies every entry of a gradient by a factor.

    Args:
        factors: The factors of each parameter, in its shape; not negative.
    """

    def __init__(self, factors: Mapping[str, Tensor]) -> None:
        self.factors = factors

    @property
    def fingerprint(self) -> str:
        """A hash of all factors."""
        return fingerprint(*(factor.cpu().numpy() for factor in self.factors.values()))

    def __call__(self, block: Sequence[Gradients]) -> list[Gradients]:
        """`P g`."""
        return [multiplied(gradients, self.factors) for gradients in block]

    def quadratic_forms(self, block: Sequence[Gradients]) -> list[Tensor]:
        """`gᵀ P g`, `[B]` of each part of the block."""
        roots = {name: factor.sqrt() for name, factor in self.factors.items()}
        found = []
        for gradients in block:
            total = torch.zeros_like(gradients.values)
            for terms in multiplied(gradients, roots).terms.values():
                total += squared_norms(terms)
            found.append(total)
        return found


def multiplied(gradients: Gradients, factors: Mapping[str, Tensor]) -> Gradients:
    """Gradients with every entry multiplied by its factor: dense, or for large tables by entry."""
    terms = {name: _multiplied(terms, factors[name]) for name, terms in gradients.terms.items()}
    return Gradients(gradients.indices, gradients.values, terms)


def _multiplied(terms: Sequence[Term], factor: Tensor) -> list[Term]:
    tables = [term for term in terms if isinstance(term, Lookup)]
    if is_large_table(terms) and len(tables) == len(terms):
        return [Lookup(table.ids, table.right * factor[table.ids], table.rows) for table in tables]
    return [Dense(dense(terms) * factor.flatten())]
