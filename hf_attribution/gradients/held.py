"""Gradients of many examples held in memory, each parameter's in the form in which inner products are cheapest."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hf_attribution.data import Split
from hf_attribution.gradients.per_example import Gradients, PerExampleGradients
from hf_attribution.gradients.terms import Term, dense, inner_products, join, squared_norms

Segment = tuple[slice, list[Term]]


@dataclasses.dataclass(frozen=True)
class Held:
    """Gradients of n examples.

    Args:
        indices: Positions of the examples in their dataset, `[n]`.
        values: The values that were differentiated, `[n]`.
        segments: For each parameter, its gradients, by consecutive examples that have any.
    """

    indices: Tensor
    values: Tensor
    segments: dict[str, list[Segment]]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def num_bytes(self) -> int:
        """Memory of the gradients."""
        terms = [term for segments in self.segments.values() for _, terms in segments for term in terms]
        return sum(v.nbytes for term in terms for v in vars(term).values() if isinstance(v, Tensor))

    def products(self, other: "Held") -> Tensor:
        """Inner products with the gradients of n' others: `[n, n']`."""
        total = self.values.new_zeros(len(self), len(other))
        for name in self.segments.keys() & other.segments.keys():
            for rows, terms in self.segments[name]:
                for columns, other_terms in other.segments[name]:
                    total[rows, columns] += inner_products(terms, other_terms)
        return total

    def flat(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The gradients as plain vectors, `[n, P]`.

        Args:
            parameters: The parameters, in the order in which they follow each other.

        Returns:
            The gradients; 0 for parameters that the values do not depend on.
        """
        sizes = [parameter.numel() for parameter in parameters.values()]
        total = self.values.new_zeros(len(self), sum(sizes))
        for name, part in zip(parameters, total.split(sizes, dim=1), strict=True):
            for rows, terms in self.segments.get(name, ()):
                part[rows] = dense(terms)
        return total

    def norms(self) -> Tensor:
        """The gradients' lengths, `[n]`."""
        total = torch.zeros_like(self.values)
        for segments in self.segments.values():
            for rows, terms in segments:
                total[rows] += squared_norms(terms)
        return total.sqrt()


@dataclasses.dataclass(frozen=True)
class Source:
    """The rows of a split, and what computes their gradients.

    Args:
        gradients: What computes the gradients.
        split: The rows.
        only: Those of them that count, `[N]` bool; all by default.
    """

    gradients: PerExampleGradients
    split: Split
    only: np.ndarray | None = None

    @property
    def rows(self) -> np.ndarray:
        """The dataset positions of the rows that count, in order."""
        return np.arange(len(self.split)) if self.only is None else np.flatnonzero(self.only)

    def batches(self, skip: np.ndarray | None = None, shared: bool = False) -> Iterator[Held]:
        """The gradients of all rows, or of this process's share, batch by batch, without batches of skipped rows."""
        for batch in self.split.batches(skip, self.only, shared):
            found = self.split.in_parts(self.gradients, batch.to(self.gradients.device))
            yield concatenate([hold(gradients) for gradients in found])


def hold(gradients: Gradients) -> Held:
    """The gradients of a batch, as they were computed."""
    everything = slice(0, len(gradients.indices))
    segments = {name: [(everything, list(terms))] for name, terms in gradients.terms.items()}
    return Held(gradients.indices, gradients.values, segments)


def concatenate(parts: Sequence[Held]) -> Held:
    """Gradients one after the other.

    Args:
        parts: Gradients of n₁, n₂, ... examples.

    Returns:
        Gradients of all of them, one matrix (or pair of factors) per parameter where all parts have it.
    """
    starts = np.cumsum([0, *map(len, parts)])
    segments: dict[str, list[Segment]] = {}
    for name in dict.fromkeys(name for part in parts for name in part.segments):
        found = [
            (slice(start + rows.start, start + rows.stop), terms)
            for start, part in zip(starts[:-1].tolist(), parts, strict=True)
            for rows, terms in part.segments.get(name, ())
        ]
        joined = join([terms for _, terms in found])
        complete = sum(rows.stop - rows.start for rows, _ in found) == starts[-1]
        if len(joined) == 1 and complete:
            segments[name] = [(slice(0, int(starts[-1])), joined[0])]
        else:
            segments[name] = found
    return Held(torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts]), segments)
