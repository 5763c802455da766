"""A curvature matrix of all parameters together, formed and decomposed: for small models."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_attribution.curvature.blocks import Block, Side
from hf_attribution.curvature.kronecker import BlockSpectrum
from hf_attribution.curvature.rows import CurvatureRows
from hf_attribution.curvature.solvers import MAX_EXPLICIT
from hf_attribution.errors import NonFiniteError, UnsupportedError
from hf_attribution.gradients.terms import Dense, Term, dense


@dataclasses.dataclass(frozen=True)
class FlatBlock(Block):
    """All parameters as one vector, one after the other.

    Args:
        sizes: How many numbers each parameter has.
    """

    sizes: tuple[int, ...] = ()

    def matrices(self, gradients: Mapping[str, Sequence[Term]], pack: bool = True) -> list[Term]:
        """One `Dense` of `[B, 1, P]`; 0 for parameters without gradient."""
        found = {name: dense(gradients[name]) for name in self.parameters if name in gradients}
        if not found:
            return []
        example = next(iter(found.values()))
        parts = [
            found[name] if name in found else example.new_zeros(len(example), size)
            for name, size in zip(self.parameters, self.sizes, strict=True)
        ]
        return [Dense(torch.cat(parts, dim=1)[:, None])]

    def split(self, matrices: Tensor) -> dict[str, Tensor]:
        """Vectors `[B, 1, P]` as values of the parameters, each `[B, size]`."""
        return dict(zip(self.parameters, matrices[:, 0].split(self.sizes, dim=1), strict=True))

    def join(self, gradients: Mapping[str, Sequence[Term]]) -> Tensor:
        """What `split` was given."""
        return torch.cat([dense(gradients[name]) for name in self.parameters], dim=1)[:, None]


def fit_flat(rows: CurvatureRows) -> BlockSpectrum:
    """Form the curvature matrix of its rows, summed over examples, and decompose it in double precision.

    Args:
        rows: Its rows.

    Returns:
        The one block.

    Raises:
        UnsupportedError: If there are too many parameters.
        NonFiniteError: If a gradient is NaN or infinite; the message names the row and the parameter.
    """
    parameters = rows.gradients[0].parameters
    sizes = tuple(parameter.numel() for parameter in parameters.values())
    block = FlatBlock("all parameters", tuple(parameters), (1, sum(sizes)), "vector", sizes=sizes)
    if sum(sizes) > MAX_EXPLICIT:
        raise UnsupportedError(
            f"The curvature of {sum(sizes)} parameters takes {8e-9 * sum(sizes) ** 2:.0f} GB as a matrix: use "
            "solver='ekfac', or fewer parameters with modules=[...] or last_layer=True."
        )
    total = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64, device=rows.device)
    for gradients in rows:
        for term in block.matrices(gradients.terms):
            vectors = term.dense().double()
            total.addmm_(vectors.T, vectors)
    if not total.isfinite().all():
        rows.refuse_non_finite()
        raise NonFiniteError("The curvature is infinite: its gradients are too large.")
    values, vectors = torch.linalg.eigh(total)
    basis = vectors.to(next(iter(parameters.values())).dtype)
    return BlockSpectrum(block, Side(1), Side(sum(sizes), (basis,)), values.clamp(min=0)[None])
