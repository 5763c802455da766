"""A curvature matrix of all parameters together, decomposed: for small models, or few training examples."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_attribution.curvature.blocks import Block, Side
from hf_attribution.curvature.kronecker import BlockSpectrum
from hf_attribution.curvature.rows import CurvatureRows
from hf_attribution.curvature.solvers import MAX_EXPLICIT
from hf_attribution.errors import NonFiniteError, UnsupportedError
from hf_attribution.gradients.per_example import Gradients
from hf_attribution.gradients.terms import Dense, Term, dense
from hf_attribution.processes import add_up, in_order


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


# Bytes of the rows of a curvature matrix, and as many of its eigenvectors, up to which these are formed.
MAX_BYTES = 2**32

# Eigenvalues below this share of the largest are rounding.
NOISE = {torch.float64: 1e-13, torch.float32: 1e-6}


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
    block, size = _flat_block(rows), rows.gradients[0].num_parameters
    if size > MAX_EXPLICIT:
        raise UnsupportedError(
            f"The curvature of {size} parameters takes {8e-9 * size**2:.0f} GB as a matrix: use solver='ekfac', or "
            "fewer parameters with modules=[...] or last_layer=True."
        )
    total = torch.zeros(size, size, dtype=torch.float64, device=rows.device)
    for gradients in rows:
        for term in block.matrices(gradients.terms):
            vectors = term.dense().double()
            total.addmm_(vectors.T, vectors)
    add_up(total)
    _refuse_non_finite(total, rows)
    values, vectors = torch.linalg.eigh(total)
    basis = vectors.to(rows.gradients[0].dtype)
    return BlockSpectrum(block, Side(1), Side(size, (basis,)), values.clamp(min=0)[None].to(basis))


def dual_bytes(rows: CurvatureRows, num_rows: int) -> int:
    """The memory of so many rows of a curvature matrix and as many eigenvectors, in bytes."""
    gradients = rows.gradients[0]
    return 2 * num_rows * gradients.num_parameters * torch.finfo(gradients.dtype).bits // 8


def fit_dual(rows: CurvatureRows, num_rows: int) -> BlockSpectrum:
    """Decompose the curvature matrix through the kernel of its rows, which are kept in memory.

    Args:
        rows: Its rows.
        num_rows: n, how many there are.

    Returns:
        The one block, with the r eigenvectors whose eigenvalues are not 0 as the basis of its columns, `[P, r]`.

    Raises:
        UnsupportedError: If the rows do not fit.
        NonFiniteError: If a gradient is NaN or infinite; the message names the row and the parameter.
    """
    block, gradients = _flat_block(rows), rows.gradients[0]
    size = gradients.num_parameters
    needed = dual_bytes(rows, num_rows)
    if needed > MAX_BYTES:
        raise UnsupportedError(
            f"The {num_rows} rows of the curvature of {size} parameters, and its eigenvectors, take "
            f"{needed / 1e9:.0f} GB: use solver='ekfac', fewer checkpoints, or fewer parameters with modules=[...] or "
            "last_layer=True."
        )
    matrix = torch.empty(num_rows, size, dtype=gradients.dtype, device=rows.device)
    filled = 0
    for (vectors,) in in_order(((_vectors(block, batch),) for batch in rows), at_once=1):
        matrix[filled : filled + len(vectors)] = vectors
        filled += len(vectors)
    kernel = matrix @ matrix.T
    _refuse_non_finite(kernel, rows)
    values, vectors = torch.linalg.eigh(kernel.double())
    kept = values > NOISE[gradients.dtype] * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    basis = matrix.T @ (vectors / values.sqrt()).to(matrix)
    return BlockSpectrum(block, Side(1), Side(size, (basis,)), values[None].to(basis))


def _vectors(block: FlatBlock, gradients: Gradients) -> Tensor:
    """The gradients of a batch as `[B, P]`; 0 where the values depend on no parameter."""
    found = block.matrices(gradients.terms)
    return found[0].dense().flatten(1) if found else gradients.values.new_zeros(len(gradients.indices), block.shape[1])


def _flat_block(rows: CurvatureRows) -> FlatBlock:
    parameters = rows.gradients[0].parameters
    sizes = tuple(parameter.numel() for parameter in parameters.values())
    return FlatBlock("all parameters", tuple(parameters), (1, sum(sizes)), "vector", sizes=sizes)


def _refuse_non_finite(matrix: Tensor, rows: CurvatureRows) -> None:
    if not matrix.isfinite().all():
        rows.refuse_non_finite()
        raise NonFiniteError("The curvature is infinite: its gradients are too large.")
