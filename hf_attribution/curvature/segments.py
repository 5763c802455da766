"""What a stretch of training with constant curvature makes of a small change of the parameters (Bae et al. 2024).

With the mean curvature H, the steps' learning rates adding up to t, and an optimiser that multiplies gradients by a
diagonal P, gradient flow takes a change δ to `S δ` and adds `-r` for a constant gradient g that is added to the
training's:

    S = P^(1/2) exp(-t C) P^(-1/2),   r = P^(1/2) (I - exp(-t C)) C⁻¹ P^(1/2) g,   C = P^(1/2) H P^(1/2).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hf_attribution.curvature.blocks import Block, Side, rotated, scaled
from hf_attribution.curvature.kronecker import BlockSpectrum
from hf_attribution.gradients.per_example import Gradients
from hf_attribution.gradients.terms import Dense, Lookup, Term

# Directions in parameter space, as the terms of each block's matrices.
Matrices = dict[str, list[Term]]


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of training with constant curvature.

    Args:
        spectra: The blocks of C, with the eigenvalues of the mean curvature. The basis of a block's columns may leave
            out eigenvectors whose eigenvalue is 0.
        time: t.
        roots: The diagonal of `P^(1/2)` as each block's matrix `[rows, columns]`; nothing where P is the identity.
    """

    spectra: tuple[BlockSpectrum, ...]
    time: float
    roots: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def start(self, gradients: Gradients) -> Matrices:
        """The blocks' matrices of some gradients."""
        found = {s.block.name: s.block.matrices(gradients.terms) for s in self.spectra}
        return {name: terms for name, terms in found.items() if terms}

    def response(self, directions: Matrices) -> Matrices:
        """`rᵀ`: how much each entry of a constant gradient moves the parameters along the directions."""
        return self._apply(directions, self._response, self.roots)

    def back(self, directions: Matrices) -> Matrices:
        """`Sᵀ`: the directions before the stretch that it takes to these."""
        return self._apply(directions, lambda x: torch.exp(-self.time * x), {n: 1 / r for n, r in self.roots.items()})

    def gradients(self, directions: Matrices, like: Gradients) -> Gradients:
        """Directions by parameter, as gradients of the same examples as others."""
        terms: dict[str, list[Term]] = {}
        for block in (spectrum.block for spectrum in self.spectra):
            found = directions.get(block.name, [])
            if all(isinstance(term, Dense) for term in found):
                for term in found:
                    assert isinstance(term, Dense)
                    terms.update({name: [Dense(part)] for name, part in block.split(term.values).items()})
            else:
                terms[block.parameters[0]] = found
        return Gradients(like.indices, like.values, terms)

    def _response(self, eigenvalues: Tensor) -> Tensor:
        """`(1 - exp(-t x)) / x`, which is t at 0."""
        safe = torch.where(eigenvalues > 0, eigenvalues, 1.0)
        return torch.where(eigenvalues > 0, -torch.expm1(-self.time * safe) / safe, self.time)

    def _apply(
        self, directions: Matrices, function: Callable[[Tensor], Tensor], after: Mapping[str, Tensor]
    ) -> Matrices:
        found: Matrices = {}
        for spectrum in self.spectra:
            name = spectrum.block.name
            if name not in directions:
                continue
            terms = _times(directions[name], self.roots.get(name), spectrum.block)
            found[name] = _times(_multiplied(terms, spectrum, function), after.get(name), spectrum.block)
        return found


def block_matrix(block: Block, values: Mapping[str, Tensor]) -> Tensor:
    """One value for every entry of a block's parameters, as its matrix `[rows, columns]`."""
    return block.join({name: [Dense(values[name][None])] for name in block.parameters})[0]


def _multiplied(terms: list[Term], spectrum: BlockSpectrum, function: Callable[[Tensor], Tensor]) -> list[Term]:
    """Matrices multiplied with a function of the curvature."""
    weights = function(spectrum.eigenvalues.double()).to(spectrum.eigenvalues)
    if weights.shape == spectrum.block.shape:
        values = scaled(terms, spectrum.left, spectrum.right, weights)
        return [Dense(values)] if isinstance(values, Tensor) else list(values)
    (basis,), (whole,) = spectrum.right.vectors, terms
    assert isinstance(whole, Dense)
    rest = function(weights.new_zeros(1, dtype=torch.float64)).to(weights)
    return [Dense(rest * whole.values + ((whole.values @ basis) * (weights - rest)) @ basis.T)]


def _times(terms: Sequence[Term], factors: Tensor | None, block: Block) -> list[Term]:
    """Matrices multiplied entry by entry."""
    if factors is None:
        return list(terms)
    if all(isinstance(term, Lookup) for term in terms):
        tables = [term for term in terms if isinstance(term, Lookup)]
        return [Lookup(table.ids, table.right * factors[table.ids], table.rows) for table in tables]
    rows, columns = (Side(size) for size in block.shape)
    return [Dense(torch.cat([matrices * factors for _, matrices in rotated(terms, rows, columns)]))]
