"""Per-example gradients of one parameter, in the form in which they are cheapest.

The gradient of a weight matrix is a sum of outer products over an example's positions, `Σ_t left_t right_tᵀ`.
Kept as its factors it is small, and projections and inner products can be taken without ever forming it. A
parameter that is used several times in a forward pass has several terms, and its gradient is their sum.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Dense:
    """Gradients as they are: `values [B, *parameter shape]`."""

    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def dense(self) -> Tensor:
        """The gradients, flattened: `[B, P]`."""
        return self.values.flatten(1)


@dataclasses.dataclass(frozen=True)
class Outer:
    """Gradients `Σ_t left[b, t] right[b, t]ᵀ` of a parameter of `rows` times `columns` entries.

    Args:
        left: Factors of the parameter's rows, `[B, T, rows]`.
        right: Factors of its columns, `[B, T, columns]`.
    """

    left: Tensor
    right: Tensor

    def __len__(self) -> int:
        return len(self.left)

    def dense(self) -> Tensor:
        """The gradients, flattened: `[B, P]`."""
        return torch.bmm(self.left.transpose(1, 2), self.right).flatten(1)


class LowRank(Outer):
    """Few outer products that are close to a sum of many: kept as they are, and formed a few examples at a time."""


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Gradients of an embedding table: `right[b, t]` added to row `ids[b, t]`.

    Args:
        ids: Rows of the table, `[B, T]`.
        right: What is added to them, `[B, T, columns]`.
        rows: How many rows the table has.
    """

    ids: Tensor
    right: Tensor
    rows: int

    def __len__(self) -> int:
        return len(self.ids)

    def dense(self) -> Tensor:
        """The gradients, flattened: `[B, P]`. Large: one table per example."""
        table = self.right.new_zeros(len(self), self.rows, self.right.shape[-1])
        index = self.ids[..., None].expand_as(self.right)
        return table.scatter_add_(1, index, self.right).flatten(1)


Term = Dense | Outer | Lookup


def dense(terms: Sequence[Term]) -> Tensor:
    """The gradients that the terms add up to, flattened: `[B, P]`."""
    total = terms[0].dense()
    for term in terms[1:]:
        total = total + term.dense()
    return total


def inner_products(left: Sequence[Term], right: Sequence[Term]) -> Tensor:
    """Inner products of all gradients of one batch with all of another, for one parameter.

    Args:
        left: The terms of one batch, of `B` examples.
        right: The terms of the other, of `B'` examples.

    Returns:
        `[B, B']`.
    """
    if _is_rank_one(left) and _is_rank_one(right):
        (one,), (other,) = left, right
        assert isinstance(one, Outer)
        assert isinstance(other, Outer)
        return (one.left[:, 0] @ other.left[:, 0].T) * (one.right[:, 0] @ other.right[:, 0].T)
    if not (is_large_table(left) and is_large_table(right)):
        formed = dense(right).T
        if not _is_low_rank(left):
            return dense(left) @ formed
        step = max(1, _FORMED // len(formed))
        parts = [[take(term, slice(start, start + step)) for term in left] for start in range(0, len(left[0]), step)]
        return torch.cat([dense(part) @ formed for part in parts])
    # Example by example on the left: all pairs of positions of all pairs of examples would not fit.
    products = [
        torch.stack([_factored_products(take(one, slice(b, b + 1)), other) for b in range(len(one))])
        for one in left
        for other in right
    ]
    return torch.stack(products).sum(0)


def squared_norms(terms: Sequence[Term]) -> Tensor:
    """Squared norm of each example's gradient, for one parameter: `[B]`."""
    if _is_rank_one(terms):
        (term,) = terms
        assert isinstance(term, Outer)
        return term.left.square().sum((1, 2)) * term.right.square().sum((1, 2))
    if not is_large_table(terms):
        return dense(terms).square().sum(1)
    examples = [[take(term, slice(b, b + 1)) for term in terms] for b in range(len(terms[0]))]
    return torch.stack([inner_products(example, example)[0, 0] for example in examples])


def take(term: Term, where: slice) -> Term:
    """Some examples of a batch."""
    if isinstance(term, Dense):
        return Dense(term.values[where])
    if isinstance(term, Outer):
        return Outer(term.left[where], term.right[where])
    return Lookup(term.ids[where], term.right[where], term.rows)


def times(term: Term, factor: float) -> Term:
    """The same gradients, each multiplied by a number."""
    if isinstance(term, Dense):
        return Dense(term.values * factor)
    if isinstance(term, Outer):
        return Outer(term.left * factor, term.right)
    return Lookup(term.ids, term.right * factor, term.rows)


def packed(term: Term) -> Term:
    """The same gradients without positions that add nothing: padding, and what the value does not depend on."""
    if isinstance(term, Dense):
        return term
    used = used_positions(term)
    longest = max(1, int(used.sum(1).max()))
    if longest == used.shape[1]:
        return term
    kept = used.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    rows = torch.arange(len(kept), device=kept.device)[:, None]
    if isinstance(term, Outer):
        return Outer(term.left[rows, kept], term.right[rows, kept])
    return Lookup(term.ids[rows, kept], term.right[rows, kept], term.rows)


def truncated(values: Tensor, shape: tuple[int, int], rank: int) -> Term:
    """The nearest matrices of some rank, up to the error of a randomised decomposition (Halko et al. 2011).

    Args:
        values: Matrices, flattened: `[B, rows * columns]`.
        shape: Rows and columns.
        rank: The most outer products that a matrix is kept as.

    Returns:
        `LowRank` factors, or where these are no smaller than the matrices, those themselves.
    """
    if rank * sum(shape) >= values.shape[1]:
        return Dense(values)
    # The subspace is drawn: from a generator of its own, for the same scores every time.
    matrices = values.unflatten(1, shape)
    draw = torch.Generator().manual_seed(0)
    basis = torch.randn(shape[1], rank, generator=draw, dtype=torch.float64).to(values)
    for _ in range(3):
        basis = torch.linalg.qr(matrices.transpose(1, 2) @ torch.linalg.qr(matrices @ basis).Q).Q
    return LowRank((matrices @ basis).transpose(1, 2), basis.transpose(1, 2))


def used_positions(term: Outer | Lookup) -> Tensor:
    """The positions at which a gradient arrives, `[B, T]` bool."""
    factor = term.left if isinstance(term, Outer) else term.right
    return factor.abs().amax(2) != 0  # several times as fast as `any`


def is_large_table(terms: Sequence[Term]) -> bool:
    """Whether these are gradients of a vocabulary-sized table, which are never formed."""
    return any(isinstance(term, Lookup) and term.rows * term.right.shape[-1] > _LARGE_TABLE for term in terms)


def join(batches: Sequence[Sequence[Term]]) -> list[list[Term]]:
    """One parameter's gradients of several batches, held in the form in which inner products are cheapest.

    Args:
        batches: The terms of each batch.

    Returns:
        The terms of all examples as of one batch; those of tables, which are never formed, batch by batch still.
    """
    if any(is_large_table(terms) for terms in batches):
        return [list(terms) for terms in batches]
    if all(_is_rank_one(terms) for terms in batches) or all(_is_low_rank(terms) for terms in batches):
        factors = [terms[0] for terms in batches]
        kind = LowRank if isinstance(factors[0], LowRank) else Outer
        return [[kind(*(torch.cat([getattr(f, side) for f in factors]) for side in ("left", "right")))]]
    return [[Dense(torch.cat([dense(terms) for terms in batches]))]]


def _is_rank_one(terms: Sequence[Term]) -> bool:
    """Whether each gradient is a single outer product: a linear layer that sees one position per example."""
    return len(terms) == 1 and isinstance(terms[0], Outer) and terms[0].left.shape[1] == 1


def _is_low_rank(terms: Sequence[Term]) -> bool:
    return len(terms) == 1 and isinstance(terms[0], LowRank)


# Numbers of low-rank gradients that are formed at once.
_FORMED = 2**22

# Entries of an embedding table from which on one dense gradient per example costs more than the factors' products.
_LARGE_TABLE = 2**18


def _factored_products(one: Term, batch: Term) -> Tensor:
    """Inner products of one example with a batch, from factors: `Σ_tt' (left_t · left_t') (right_t · right_t')`.

    Args:
        one: A term of one example.
        batch: A term of `B` examples.

    Returns:
        `[B]`.
    """
    if isinstance(one, Dense) or isinstance(batch, Dense):
        return batch.dense() @ one.dense()[0]
    if isinstance(one, Lookup) and isinstance(batch, Lookup):
        lefts = (one.ids[0][:, None, None] == batch.ids).to(batch.right.dtype)
    elif isinstance(one, Lookup) and isinstance(batch, Outer):
        lefts = batch.left[..., one.ids[0]].permute(2, 0, 1)
    elif isinstance(one, Outer) and isinstance(batch, Lookup):
        lefts = one.left[0][:, batch.ids]
    else:
        lefts = torch.einsum("tm,bsm->tbs", one.left[0], batch.left)  # type: ignore[union-attr]
    return (lefts * torch.einsum("tn,bsn->tbs", one.right[0], batch.right)).sum((0, 2))
