"""A gradient in blocks: the matrix of each layer, with the bias as one more column, and every other parameter.

The gradient of a linear layer is `Σ_t g_t [a_t, 1]ᵀ` over the positions t, with inputs a and output gradients g: its
bias belongs to an input that is always one (Martens & Grosse 2015). A convolution is a linear layer on patches. An
embedding table is one on one-hot inputs, with a row for each entry.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_attribution.errors import UnsupportedError
from hf_attribution.gradients.per_example import Gradients
from hf_attribution.gradients.terms import Dense, Lookup, Outer, Term, dense, packed, take

# Numbers of dense gradients that are formed at once: 4 MiB of float32.
CHUNK = 2**20


@dataclasses.dataclass(frozen=True)
class Block:
    """Parameters that share one block of the curvature, as one matrix.

    Args:
        name: The module's name, or the parameter's.
        parameters: The names of the parameters: one, or a weight and its bias.
        shape: Rows (outputs, or a table's entries) and columns (inputs, and one for the bias).
        kind: `"linear"`, `"table"` (an embedding, perhaps tied to a linear layer) or `"vector"` (anything else, as
            one row).
        transposed: Whether the weight's rows are inputs, as those of transformers' `Conv1D`.
    """

    name: str
    parameters: tuple[str, ...]
    shape: tuple[int, int]
    kind: str
    transposed: bool = False

    @property
    def has_bias(self) -> bool:
        """Whether the last column is a bias."""
        return len(self.parameters) == 2

    def matrices(self, gradients: Mapping[str, list[Term]], pack: bool = True) -> list[Term]:
        """The terms of the block's matrix.

        Args:
            gradients: The terms of every parameter.
            pack: Whether to leave out positions that add nothing.

        Returns:
            For a vector, one `Dense` of `[B, 1, columns]`; else `Outer` and `Lookup` terms with the block's rows and
            columns. Nothing where there is no gradient.

        Raises:
            UnsupportedError: If a layer's gradient comes without factors, in this batch and not in the probe.
        """
        terms = gradients.get(self.parameters[0], [])
        if self.kind == "vector":
            return [Dense(dense(terms)[:, None])] if terms else []
        return [self._matrix(packed(term) if pack else term) for term in terms]

    def split(self, matrices: Tensor) -> dict[str, Tensor]:
        """Matrices `[B, rows, columns]` as values of the block's parameters, each `[B, P]`."""
        weight = matrices[..., :-1] if self.has_bias else matrices
        weight = weight.transpose(1, 2) if self.transposed else weight
        parts = {self.parameters[0]: weight.flatten(1)}
        # Copied, for a view of the last column would keep all the others.
        return {**parts, self.parameters[1]: matrices[..., -1].clone()} if self.has_bias else parts

    def join(self, gradients: Mapping[str, list[Term]]) -> Tensor:
        """What `split` was given: matrices `[B, rows, columns]`, from values of the block's parameters."""
        weight = dense(gradients[self.parameters[0]])
        rows, columns = self.shape[0], self.shape[1] - self.has_bias
        weight = weight.unflatten(1, (columns, rows) if self.transposed else (rows, columns))
        weight = weight.transpose(1, 2) if self.transposed else weight
        return torch.cat([weight, dense(gradients[self.parameters[1]])[..., None]], 2) if self.has_bias else weight

    def _matrix(self, term: Term) -> Term:
        if isinstance(term, Dense):
            raise UnsupportedError(
                f"The gradient of {self.parameters[0]} has no factors for some rows, so that {self.name} has no "
                "Kronecker-factored curvature: leave it out with modules=[...], or use method='diagonal'."
            )
        if isinstance(term, Lookup):
            return term
        left, right = (term.right, term.left) if self.transposed else (term.left, term.right)
        if self.has_bias:
            right = torch.cat([right, right.new_ones(*right.shape[:2], 1)], dim=2)
        return Outer(left, right)


@dataclasses.dataclass(frozen=True)
class Side:
    """An orthonormal basis of a block's rows or columns.

    Args:
        size: Their number.
        vectors: The basis, as columns, of each run of consecutive coordinates; none for the standard basis.
    """

    size: int
    vectors: tuple[Tensor, ...] = ()

    @property
    def cost(self) -> int:
        """Multiplications that a rotation takes."""
        return sum(vectors.numel() for vectors in self.vectors)

    def rotate(self, values: Tensor) -> Tensor:
        """Coordinates `[..., size]` in the basis."""
        if len(self.vectors) <= 1:
            return values @ self.vectors[0] if self.vectors else values
        parts = values.split([len(vectors) for vectors in self.vectors], dim=-1)
        return torch.cat([part @ vectors for part, vectors in zip(parts, self.vectors, strict=True)], dim=-1)

    def back(self, values: Tensor) -> Tensor:
        """From coordinates in the basis, `[..., size]`, what `rotate` was given."""
        return Side(self.size, tuple(vectors.T for vectors in self.vectors)).rotate(values)


def make_blocks(model: nn.Module, probe: Gradients, parameters: Mapping[str, Tensor]) -> list[Block]:
    """The blocks of the chosen parameters.

    Args:
        model: The model.
        probe: Gradients of a few examples.
        parameters: The chosen parameters.

    Returns:
        The blocks, in the order of the parameters.
    """
    blocks: dict[str, Block] = {}
    biases: set[str] = set()
    for name, parameter in parameters.items():
        owner, _, own = name.rpartition(".")
        terms = probe.terms.get(name, [])
        if own != "weight" or not terms or any(isinstance(term, Dense) for term in terms):
            blocks[name] = Block(name, (name,), (1, parameter.numel()), "vector")
            continue
        module, bias = model.get_submodule(owner), f"{owner}.bias" if owner else "bias"
        rows, columns = len(parameter), parameter[0].numel()
        if any(isinstance(term, Lookup) for term in terms):
            blocks[name] = Block(name, (name,), (rows, columns), "table")
            continue
        transposed = isinstance(module, Conv1D)
        rows, columns = (columns, rows) if transposed else (rows, columns)
        # A bias that the layer adds wherever it multiplies by the weight, and nobody else.
        if bias in parameters and len(probe.terms.get(bias, [])) == len(terms):
            biases.add(bias)
            blocks[name] = Block(owner, (name, bias), (rows, columns + 1), "linear", transposed)
        else:
            blocks[name] = Block(name, (name,), (rows, columns), "linear", transposed)
    return [block for name, block in blocks.items() if name not in biases]


def rotated(terms: Sequence[Term], left: Side, right: Side) -> Iterator[tuple[slice, Tensor]]:
    """The matrices of a batch in the bases of rows and columns, some examples at a time.

    Args:
        terms: Terms of a block, `matrices(...)`.
        left: The basis of its rows.
        right: The basis of its columns.

    Yields:
        Which examples, and `Uᵀ G V` of them, `[b, rows, columns]`.
    """
    step = max(1, CHUNK // (left.size * right.size))
    for start in range(0, len(terms[0]), step):
        where = slice(start, min(start + step, len(terms[0])))
        parts = [_rotated(take(term, where), left, right) for term in terms]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        yield where, total


def sum_of_squares(terms: Sequence[Term], left: Side, right: Side) -> Tensor:
    """Squared entries of all matrices in the bases, summed over the examples: `[rows, columns]`."""
    if _is_rank_one(terms):
        lefts, rights = _rotated_factors(terms[0], left, right)
        return lefts.square().T @ rights.square()
    if _is_table(terms):
        _, ids, values = _entries(terms, right)
        return values.new_zeros(left.size, right.size).index_add_(0, ids, values.square())
    total = torch.zeros(())
    for _, matrices in rotated(terms, left, right):
        # In place is six times as fast; matrices of factors are made here, others may be the caller's.
        squares = matrices.square() if any(isinstance(term, Dense) for term in terms) else matrices.square_()
        total = squares.sum(0) + total.to(matrices)
    return total


def quadratic_forms(terms: Sequence[Term], left: Side, right: Side, weights: Tensor) -> Tensor:
    """Squared entries of each matrix in the bases, weighted and added up: `[B]`.

    Args:
        terms: Terms of a block.
        left: The basis of its rows.
        right: The basis of its columns.
        weights: The weights, `[rows, columns]`.

    Returns:
        A number per example.
    """
    if _is_rank_one(terms):
        lefts, rights = _rotated_factors(terms[0], left, right)
        return ((lefts.square() @ weights) * rights.square()).sum(1)
    if _is_table(terms):
        examples, ids, values = _entries(terms, right)
        return weights.new_zeros(len(terms[0])).index_add_(0, examples, (values.square() * weights[ids]).sum(1))
    return torch.cat([(m.square() * weights).sum((1, 2)) for _, m in rotated(terms, left, right)])


def scaled(terms: Sequence[Term], left: Side, right: Side, weights: Tensor) -> Tensor | list[Term]:
    """Matrices with every entry in the bases multiplied by its weight, in the standard basis again.

    Args:
        terms: Terms of a block.
        left: The basis of its rows.
        right: The basis of its columns.
        weights: The weights, `[rows, columns]`.

    Returns:
        `[B, rows, columns]`, or for a table, whose matrices are never formed, terms.
    """
    if _is_table(terms):
        tables = [term for term in terms if isinstance(term, Lookup)]
        return [Lookup(t.ids, right.back(right.rotate(t.right) * weights[t.ids]), t.rows) for t in tables]
    found = weights.new_empty(len(terms[0]), left.size, right.size)
    for where, matrices in rotated(terms, left, right):
        found[where] = left.back(right.back(matrices * weights).transpose(1, 2)).transpose(1, 2)
    return found


def _rotated(term: Term, left: Side, right: Side) -> Tensor:
    if isinstance(term, Outer):
        positions = term.left.shape[1]
        if positions * (left.cost + right.cost) <= right.size * left.cost + left.size * right.cost:
            return left.rotate(term.left).transpose(1, 2) @ right.rotate(term.right)
        matrices = term.left.transpose(1, 2) @ term.right
    elif isinstance(term, Lookup):
        # Entries are never rotated.
        return Lookup(term.ids, right.rotate(term.right), term.rows).dense().unflatten(1, (left.size, right.size))
    else:
        matrices = term.values
    return left.rotate(right.rotate(matrices).transpose(1, 2)).transpose(1, 2)


def _rotated_factors(term: Term, left: Side, right: Side) -> tuple[Tensor, Tensor]:
    assert isinstance(term, Outer)
    return left.rotate(term.left[:, 0]), right.rotate(term.right[:, 0])


def _is_rank_one(terms: Sequence[Term]) -> bool:
    return len(terms) == 1 and isinstance(terms[0], Outer) and terms[0].left.shape[1] == 1


def _is_table(terms: Sequence[Term]) -> bool:
    return all(isinstance(term, Lookup) for term in terms)


def _entries(terms: Sequence[Term], right: Side) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of a table that examples looked up: example `[U]`, entry `[U]`, rotated gradient `[U, columns]`."""
    tables = [term for term in terms if isinstance(term, Lookup)]
    ids, values = torch.cat([t.ids for t in tables], dim=1), torch.cat([t.right for t in tables], dim=1)
    examples = torch.arange(len(ids), device=ids.device)[:, None]
    keys, where = torch.unique(examples * tables[0].rows + ids, return_inverse=True)
    summed = values.new_zeros(len(keys), values.shape[-1]).index_add_(0, where.flatten(), values.flatten(0, 1))
    return keys // tables[0].rows, keys % tables[0].rows, right.rotate(summed)
