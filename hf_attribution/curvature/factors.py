"""Sums of outer products of the two factors of a layer's gradient, and the bases in which they are diagonal.

With inputs a and output gradients g at the positions of the examples, K-FAC approximates a layer's block of the
curvature, `Σ vec(g aᵀ) vec(g aᵀ)ᵀ`, by `A ⊗ G / R` with `A = Σ a aᵀ`, `G = Σ g gᵀ` and R the number of positions
(Martens & Grosse 2015; Grosse & Martens 2016 for convolutions; "expand" in Eschenhagen et al. 2023). All are sums over
examples. Positions at which no gradient arrives do not count: padding, and whatever the loss does not depend on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_attribution.curvature.blocks import Block, Side
from hf_attribution.gradients.terms import Lookup, Outer, Term, used_positions

# The longest side with one full factor; a longer one gets a factor for each run of so many neighbours.
MAX_SIDE, RUN = 4096, 1024


class FactorSums:
    """The factors of one block, while examples are added.

    Args:
        block: A block that is no vector.
        example: A tensor of the block's type and device.
    """

    def __init__(self, block: Block, example: Tensor) -> None:
        rows, columns = block.shape
        self.left = _Sum(_runs(rows) if block.kind == "linear" else None, rows, example)
        self.right = _Sum(_runs(columns), columns, example)
        self.count = example.new_zeros((), dtype=torch.float64)

    def add(self, terms: Sequence[Term]) -> None:
        """Add a batch's terms."""
        mixed = len({type(term) for term in terms}) > 1
        for term in terms:
            assert isinstance(term, (Outer, Lookup))
            left = term.left if isinstance(term, Outer) else term.ids[..., None]
            used = used_positions(term).flatten().nonzero()[:, 0]
            left, right = left.flatten(0, 1)[used], term.right.flatten(0, 1)[used]
            left_weight = right_weight = None
            if mixed:
                # A weight that is a table and a linear layer has gradients of two kinds, with factors of different
                # scale. A position then counts as much as its gradient is long: the trace is that of the block.
                left_weight, right_weight = right.square().sum(1), right.new_ones(len(right))
                if isinstance(term, Outer):
                    right_weight = left.square().sum(1)
                self.count += (left_weight * right_weight).sum(dtype=torch.float64)
            else:
                self.count += len(right)
            self.right.add(right, right_weight)
            if isinstance(term, Outer):
                self.left.add(left, left_weight)
            else:
                self.left.add_entries(left[:, 0], left_weight)

    def tensors(self) -> list[Tensor]:
        """The sums: over all examples, once they are added up over the parts of these."""
        return [*self.left.sums, *self.right.sums, self.count]

    def bases(self) -> tuple[Side, Side, Tensor]:
        """Eigenvectors of both factors, and the eigenvalues of `A ⊗ G / R`, `[rows, columns]`."""
        left, left_values = self.left.eigen()
        right, right_values = self.right.eigen()
        count = self.count.clamp(min=torch.finfo(torch.float64).tiny)
        values = left_values[:, None] * right_values / count
        return left, right, values.to(self.left.dtype)


class _Sum:
    """`Σ x xᵀ` in runs of coordinates, or its diagonal."""

    def __init__(self, runs: list[int] | None, size: int, example: Tensor) -> None:
        self.runs, self.size, self.dtype = runs, size, example.dtype
        self.sums = [example.new_zeros(n, n) for n in runs] if runs is not None else [example.new_zeros(size)]

    def add(self, values: Tensor, weights: Tensor | None) -> None:
        """Add rows `[n, size]`, weighted by `[n]`."""
        weighted = values if weights is None else values * weights[:, None]
        if self.runs is None:
            self.sums[0] += (weighted * values).sum(0)
            return
        parts = zip(self.sums, values.split(self.runs, 1), weighted.split(self.runs, 1), strict=True)
        for total, part, weighted_part in parts:
            total.addmm_(weighted_part.T, part)

    def add_entries(self, ids: Tensor, weights: Tensor | None) -> None:
        """Add one-hot rows."""
        ones = self.sums[0].new_ones(len(ids)) if weights is None else weights
        self.sums[0].index_add_(0, ids, ones)

    def eigen(self) -> tuple[Side, Tensor]:
        """The basis and the eigenvalues in it, in double precision."""
        if self.runs is None:
            return Side(self.size), self.sums[0].double()
        found = [torch.linalg.eigh(total.double()) for total in self.sums]
        values = torch.cat([values.clamp(min=0) for values, _ in found])
        return Side(self.size, tuple(vectors.to(self.dtype) for _, vectors in found)), values


def _runs(size: int) -> list[int]:
    if size <= MAX_SIDE:
        return [size]
    return [min(RUN, size - start) for start in range(0, size, RUN)]
