"""Random projections of gradients to a few thousand dimensions that keep their inner products on average.

Every projection is linear, and the projections of all parameters are added up into one vector, so that each
parameter has the whole dimension to itself and only the noise is shared. The random numbers of a parameter come from
the seed and its name: they are the same whatever else is projected, and are never kept in full for large ones.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hf_attribution.gradients.per_example import Gradients
from hf_attribution.gradients.terms import Lookup, Outer, Term, dense
from hf_attribution.seeds import derive_seed


@dataclasses.dataclass(frozen=True)
class Projection:
    """A random projection of gradients. Inner products of projections are unbiased for those of gradients.

    Args:
        dim: Dimension k of the projections.
        seed: Seed of the random numbers.
        kind: `"two_sided"`: each weight matrix is multiplied from both sides by small random matrices, `P G Q`, which
            needs only the factors of its gradient (Choe et al. 2024), then sketched. `"sparse"`: a sparse
            Johnson-Lindenstrauss sketch of the gradient (Kane & Nelson 2014), one nonzero per entry. `"rademacher"`
            and `"gaussian"`: a dense random matrix, generated block by block (Park et al. 2023); the cost is k
            times the number of parameters for every example.

    Raises:
        ValueError: If the kind is unknown or the dimension is not positive.

    Example:
        >>> projection = Projection(dim=512, seed=0)
        >>> features = projection(gradients(batch))  # doctest: +SKIP
    """

    dim: int = 2048
    seed: int = 0
    kind: str = "two_sided"

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"Unknown projection {self.kind!r}: choose one of {', '.join(_KINDS)}.")
        if self.dim < 1:
            raise ValueError(f"The dimension of a projection must be positive, not {self.dim}.")

    def __call__(self, gradients: Gradients, shapes: dict[str, torch.Size]) -> Tensor:
        """Project a batch.

        Args:
            gradients: Gradients of B examples.
            shapes: The shape of every parameter.

        Returns:
            `[B, dim]`.
        """
        total = gradients.values.new_zeros(len(gradients.indices), self.dim)
        for name, terms in gradients.terms.items():
            _KINDS[self.kind](total, terms, shapes[name], (self.seed, name))
        return total


Key = tuple[int, str]


def add_two_sided(total: Tensor, terms: Sequence[Term], shape: torch.Size, key: Key) -> None:
    """Add `sketch(P G Q)` for a weight matrix G; vectors and small matrices are sketched as they are."""
    rows, columns = _matrix_shape(shape)
    if min(rows, columns) == 1 or rows * columns <= _SMALL:
        return add_sparse(total, terms, shape, key)
    kept_rows, kept_columns = _kept(rows, columns, _OVERSAMPLING * total.shape[1])
    left = _side(rows, kept_rows, (*key, "rows"), total.device)
    right = _side(columns, kept_columns, (*key, "columns"), total.device)
    for term in terms:
        _add_sketch(total, _multiply(term, left, right, rows, columns).flatten(1), (*key, "core"))
    return None


def add_sparse(total: Tensor, terms: Sequence[Term], shape: torch.Size, key: Key) -> None:
    """Add every entry of the gradient, with a random sign, to one coordinate."""
    _add_sketch(total, dense(terms), (*key, "entries"))


def add_rademacher(total: Tensor, terms: Sequence[Term], shape: torch.Size, key: Key) -> None:
    """Add the gradient multiplied by a dense matrix of random signs."""
    _add_blocks(total, dense(terms), key, _signs)


def add_gaussian(total: Tensor, terms: Sequence[Term], shape: torch.Size, key: Key) -> None:
    """Add the gradient multiplied by a dense Gaussian matrix."""
    _add_blocks(total, dense(terms), key, lambda size, generator: torch.randn(size, generator=generator))


_KINDS: dict[str, Callable[[Tensor, Sequence[Term], torch.Size, Key], None]] = {
    "two_sided": add_two_sided,
    "sparse": add_sparse,
    "rademacher": add_rademacher,
    "gaussian": add_gaussian,
}

# The two sides keep this many times `dim` entries, which a sketch folds up: products of two small random matrices
# are noisier than one matrix of the same size, and a larger core costs little.
_OVERSAMPLING = 4

# Matrices of so few entries are cheaper to form than to multiply from both sides, and lose less.
_SMALL = 2**15

# Random numbers that are generated at once: 16 MiB of float32.
_BLOCK = 2**22


@functools.lru_cache(maxsize=4096)
def _matrix_shape(shape: torch.Size) -> tuple[int, int]:
    kept = [size for size in shape if size != 1] or [1]
    return kept[0], math.prod(kept[1:])


def _kept(rows: int, columns: int, entries: int) -> tuple[int, int]:
    """How many rows and columns of `P G Q` to keep: about square, and no side larger than it was."""
    side = math.isqrt(entries)
    kept_rows = min(rows, side)
    kept_columns = min(columns, entries // kept_rows)
    return min(rows, entries // kept_columns), kept_columns


@functools.lru_cache(maxsize=4096)
def _side(size: int, kept: int, key: tuple[int | str, ...], device: torch.device) -> Tensor | None:
    """A random `[size, kept]` matrix with `E[P Pᵀ] = I`, or `None` for the identity."""
    if kept >= size:
        return None
    generator = torch.Generator().manual_seed(derive_seed(*key))
    return (_signs((size, kept), generator) / math.sqrt(kept)).to(device)


def _multiply(term: Term, left: Tensor | None, right: Tensor | None, rows: int, columns: int) -> Tensor:
    """`Pᵀ G Q` of every example, from factors where that is less work. `[B, kept rows, kept columns]`."""
    if isinstance(term, Outer) and _factors_are_cheaper(term, left, right):
        lefts = term.left if left is None else term.left @ left
        return lefts.transpose(1, 2) @ (term.right if right is None else term.right @ right)
    if isinstance(term, Lookup):
        rights = term.right if right is None else term.right @ right
        if left is None:
            return Lookup(term.ids, rights, term.rows).dense().unflatten(1, (rows, -1))
        return left[term.ids].transpose(1, 2) @ rights
    matrix = term.dense().unflatten(1, (rows, columns))
    matrix = matrix if right is None else matrix @ right
    return matrix if left is None else left.T @ matrix


def _factors_are_cheaper(term: Outer, left: Tensor | None, right: Tensor | None) -> bool:
    positions, rows, columns = term.left.shape[1], term.left.shape[2], term.right.shape[2]
    kept_rows, kept_columns = rows if left is None else left.shape[1], columns if right is None else right.shape[1]
    sides = (0 if left is None else rows * kept_rows) + (0 if right is None else columns * kept_columns)
    factored = positions * (sides + kept_rows * kept_columns)
    formed = positions * rows * columns + rows * (0 if right is None else columns * kept_columns)
    formed += 0 if left is None else rows * kept_rows * kept_columns
    return factored < formed


def _add_sketch(total: Tensor, values: Tensor, key: tuple[int | str, ...]) -> None:
    """Add every column of `values`, with a random sign, to one of `total [B, dim]`, from a random one onwards.

    The signs alone make it unbiased; which columns meet does not matter, so none is looked up anywhere.
    """
    dim, size = total.shape[1], values.shape[1]
    signs, start = _random_signs(size, dim, key, values.device)
    signed = values * signs.to(values)
    whole = size // dim * dim
    if whole:
        total += signed[:, :whole].unflatten(1, (-1, dim)).sum(1)
    rest = signed[:, whole:]
    before_the_end = min(dim - start, rest.shape[1])
    total[:, start : start + before_the_end] += rest[:, :before_the_end]
    total[:, : rest.shape[1] - before_the_end] += rest[:, before_the_end:]


@functools.lru_cache(maxsize=4096)
def _random_signs(size: int, dim: int, key: tuple[int | str, ...], device: torch.device) -> tuple[Tensor, int]:
    generator = torch.Generator().manual_seed(derive_seed(*key))
    return _signs((size,), generator).to(device), derive_seed(*key, "start") % dim


def _add_blocks(
    total: Tensor, values: Tensor, key: Key, draw: Callable[[tuple[int, ...], torch.Generator], Tensor]
) -> None:
    dim = total.shape[1]
    for start, stop in _blocks(values.shape[1], max(1, _BLOCK // dim)):
        generator = torch.Generator().manual_seed(derive_seed(*key, start))
        total += values[:, start:stop] @ draw((stop - start, dim), generator).to(values) / math.sqrt(dim)


def _blocks(size: int, step: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + step, size)) for start in range(0, size, step))


def _signs(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, size, generator=generator, dtype=torch.int8).float().mul_(2).sub_(1)
