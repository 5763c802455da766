"""Second moments of gradients, factored as Adafactor keeps them, and gradients divided by their roots.

An optimiser like Adam takes steps of `gradient / √V`, and so does the geometry in which examples should be compared. V
of a weight matrix is kept as its row and column means (Shazeer & Stern 2018), so that a gradient that is known by its
factors stays so.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_attribution.artefacts import Artefact
from hf_attribution.data import Batch
from hf_attribution.gradients.held import Source
from hf_attribution.gradients.per_example import Gradients, PerExampleGradients
from hf_attribution.gradients.terms import Dense, Lookup, Outer, Term
from hf_attribution.processes import add_up

# Added to a row's or column's second moment, as a share of the mean one: some, rare tokens say, have none.
EPSILON = 1e-3

# Below this share of the overall second moment a parameter's gradient is rounding: attention, for one, does not depend
# on its keys' bias. It is divided by the overall one, and stays negligible.
NOISE = 1e-8


@dataclasses.dataclass(frozen=True)
class SecondMoments(Artefact):
    """What gradients are divided by: for each parameter, seen as a matrix, a factor per row and one per column.

    Args:
        rows: `[rows]` for each parameter.
        columns: `[columns]` for each parameter; one column for a vector.
    """

    kind: ClassVar[str] = "second moments"

    rows: dict[str, Tensor]
    columns: dict[str, Tensor]

    def to(self, device: torch.device) -> "SecondMoments":
        """The same on a device."""
        rows, columns = (
            {name: factor.to(device) for name, factor in factors.items()} for factors in (self.rows, self.columns)
        )
        return SecondMoments(rows, columns)

    def divide(self, gradients: Gradients) -> Gradients:
        """Gradients divided by the roots of their second moments, in the form they come in."""
        divided = {
            name: [_divided(term, self.rows[name], self.columns[name]) for term in terms]
            for name, terms in gradients.terms.items()
        }
        return dataclasses.replace(gradients, terms=divided)

    def _pack(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        factors = (("rows", self.rows), ("columns", self.columns))
        return {f"{side}.{name}": f.cpu().numpy() for side, of_all in factors for name, f in of_all.items()}, {}

    @classmethod
    def _unpack(cls, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> "SecondMoments":
        rows, columns = (
            {key.removeprefix(side): torch.from_numpy(array) for key, array in arrays.items() if key.startswith(side)}
            for side in ("rows.", "columns.")
        )
        return cls(rows, columns)


class DividedGradients:
    """Per-example gradients divided by the roots of second moments. What `PerExampleGradients` is, but for that.

    Args:
        gradients: What computes the gradients.
        moments: Their second moments.
    """

    def __init__(self, gradients: PerExampleGradients, moments: SecondMoments) -> None:
        self.gradients, self.moments = gradients, moments
        self.parameters = gradients.parameters

    def __call__(self, batch: Batch) -> Gradients:
        """The divided gradients of a batch."""
        return self.moments.divide(self.gradients(batch))


def second_moments(source: Source) -> SecondMoments:
    """Mean squares of the gradients of all rows of a source.

    Of a parameter that is used several times in a forward pass, each use counts for itself.

    Args:
        source: The rows.

    Returns:
        Their factors: `rows[i] columns[j]` has the row and column means of the mean squares.
    """
    parameters, number = source.gradients.parameters, len(source.rows)
    dtype = source.gradients.dtype  # at least single precision: in half, sums stall
    rows = {name: p.new_zeros(p.shape[0] if p.ndim else 1, dtype=dtype) for name, p in parameters.items()}
    columns = {name: p.new_zeros(p.numel() // len(rows[name]), dtype=dtype) for name, p in parameters.items()}
    for batch in source.split.batches(only=source.only, shared=True):
        for gradients in source.split.in_parts(source.gradients, batch.to(source.gradients.device)):
            for name, terms in gradients.terms.items():
                for term in terms:
                    row, column = _squares(term, len(rows[name]))
                    rows[name] += row / (number * len(columns[name]))
                    columns[name] += column / (number * len(rows[name]))
    add_up(*rows.values(), *columns.values())
    sizes = [parameter.numel() for parameter in parameters.values()]
    overall = sum(row.mean() * size for row, size in zip(rows.values(), sizes, strict=True)) / sum(sizes)
    for name, row in rows.items():
        mean = row.mean()
        if mean > NOISE * overall:
            rows[name], columns[name] = row / mean + EPSILON, columns[name] + EPSILON * mean
        else:
            rows[name] = torch.ones_like(row)
            columns[name] = torch.full_like(columns[name], float(overall) or 1.0)
    return SecondMoments(rows, columns)


def _squares(term: Term, rows: int) -> tuple[Tensor, Tensor]:
    """Squared entries of all of a term's gradients, summed over examples and over columns, or rows; none is formed."""
    if isinstance(term, Dense):
        squares = term.values.reshape(len(term), rows, -1).square().sum(0)
        return squares.sum(1), squares.sum(0)
    across = term.right @ term.right.transpose(1, 2)
    if isinstance(term, Outer):
        along = term.left @ term.left.transpose(1, 2)
        row = (term.left * (across @ term.left)).sum((0, 1))
    else:
        along = (term.ids[:, :, None] == term.ids[:, None]).to(across)
        row = across.new_zeros(rows).index_add_(0, term.ids.flatten(), (along * across).sum(2).flatten())
    return row, (term.right * (along @ term.right)).sum((0, 1))


def _divided(term: Term, rows: Tensor, columns: Tensor) -> Term:
    left, right = rows.rsqrt(), columns.rsqrt()
    if isinstance(term, Dense):
        values = term.values.reshape(len(term), len(left), len(right)) * left[:, None] * right
        return Dense(values.view_as(term.values))
    if isinstance(term, Outer):
        return Outer(term.left * left, term.right * right)
    return Lookup(term.ids, term.right * right * left[term.ids][..., None], term.rows)
