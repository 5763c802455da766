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
        return dense(left) @ dense(right).T
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
    factor = term.left if isinstance(term, Outer) else term.right
    counts = (used := (factor != 0).any(2)).sum(1)
    longest = max(1, int(counts.max()))
    if longest == factor.shape[1]:
        return term
    kept = used.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    rows = torch.arange(len(kept), device=kept.device)[:, None]
    if isinstance(term, Outer):
        return Outer(term.left[rows, kept], term.right[rows, kept])
    return Lookup(term.ids[rows, kept], term.right[rows, kept], term.rows)


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
    if all(_is_rank_one(terms) for terms in batches):
        factors = [terms[0] for terms in batches]
        return [[Outer(*(torch.cat([getattr(f, side) for f in factors]) for side in ("left", "right")))]]
    return [[Dense(torch.cat([dense(terms) for terms in batches]))]]


def _is_rank_one(terms: Sequence[Term]) -> bool:
    """Whether each gradient is a single outer product: a linear layer that sees one position per example."""
    return len(terms) == 1 and isinstance(terms[0], Outer) and terms[0].left.shape[1] == 1


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
