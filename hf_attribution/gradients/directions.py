"""Inner products of training gradients with a few directions in parameter space: preconditioned query gradients."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_attribution.data import Batch
from hf_attribution.gradients import products
from hf_attribution.gradients.checks import refuse_non_finite
from hf_attribution.gradients.filling import Filling
from hf_attribution.gradients.held import Held, Source, concatenate, hold
from hf_attribution.gradients.per_example import Gradients
from hf_attribution.gradients.terms import Dense, dense, packed, take, truncated
from hf_attribution.processes import add_up, count


class Preconditioner(Protocol):
    """A positive definite matrix P of all parameters, applied to the gradients of a block of examples at a time."""

    def __call__(self, block: Sequence[Gradients]) -> list[Gradients]:
        """`P g`. All processes of a launch call this with the same block, and may share what it takes."""

    def quadratic_forms(self, block: Sequence[Gradients]) -> list[Tensor]:
        """`gᵀ P g`, `[B]` of each part of the block. Each process calls this with blocks of its own."""


def directional_products(
    queries: Source,
    train: Source,
    preconditioner: Preconditioner,
    rank: int | None = None,
    progress: bool = True,
    unfinished: Path | None = None,
) -> np.ndarray:
    """`⟨P g(query), g(example)⟩` for all queries and training examples.

    The directions `P g` are kept dense, or by entry for embedding tables, or with a low rank, for as many queries as
    fit in `products.BLOCK_BYTES`; the training data are read once for each such block. Training gradients are factors
    until, layer by layer, a batch of them is multiplied.

    Args:
        queries: The queries' gradients.
        train: The training examples' gradients, with respect to the same parameters.
        preconditioner: P.
        rank: Rank to which a direction's matrices are truncated, "query batching" of Grosse et al. (2023, section
            3.2.2); exact by default.
        progress: Whether to show a progress bar.
        unfinished: How the names of files begin that say how far this has come, see `Filling`.

    Returns:
        float32 `[Q, N]`.
    """
    filling = Filling(len(queries.split), train.split, unfinished)
    with filling.bar(progress) as bar:
        for directions in _directions(queries, preconditioner, rank):
            _fill(filling, directions.indices.numpy(), directions, train, bar)
            del directions  # before the next ones are made
    return filling.scores


def block_products(block: Sequence[Gradients], train: Source, bar: tqdm) -> np.ndarray:
    """Inner products of directions with the gradients of all training examples, in one pass over these.

    Args:
        block: q directions, as the parts of a block.
        train: The training examples' gradients.
        bar: A progress bar, of pairs.

    Returns:
        float32 `[q, N]`.
    """
    directions = _joined([hold(gradients) for gradients in block])
    filling = Filling(len(directions), train.split)
    _fill(filling, np.arange(len(directions)), directions, train, bar)
    return filling.scores


def self_products(train: Source, preconditioner: Preconditioner, progress: bool = True) -> np.ndarray:
    """`⟨P g(i), g(i)⟩` of every example of a source: float32 `[N]`, by blocks as of queries."""
    values = np.zeros(len(train.split), dtype=np.float32)
    with tqdm(total=len(values), desc="self-influence", unit="rows", leave=False, disable=not progress) as bar:
        for block in gradient_blocks(train, shared=True):
            for gradients, found in zip(block, preconditioner.quadratic_forms(block), strict=True):
                refuse_non_finite(found, gradients.indices, "The self-influence")
                values[gradients.indices.numpy()] = found.cpu().numpy()
                bar.update(len(found) * count())
    add_up(values)
    return values


def block_size(source: Source) -> int:
    """How many gradients of a source fit in `products.BLOCK_BYTES`."""
    itemsize = next(iter(source.gradients.parameters.values())).element_size()
    # Once dense, and once more while parts are joined.
    return max(1, products.BLOCK_BYTES // (2 * max(4, itemsize) * source.gradients.num_parameters))


def gradient_blocks(source: Source, shared: bool = False) -> Iterator[list[Gradients]]:
    """The gradients of all rows of a source, in blocks whose dense form would fit in `products.BLOCK_BYTES`.

    Args:
        source: The rows.
        shared: Whether the processes of a launch share them.

    Yields:
        Blocks of consecutive rows of the pass, as parts of batches.
    """
    size = block_size(source)
    block: list[Gradients] = []
    held = 0
    for batch in source.split.batches(shared=shared):
        parts = source.split.in_parts(source.gradients, batch.to(source.gradients.device))
        while parts:
            gradients, start = parts.pop(0), 0
            while start < len(gradients.indices):
                part = rows_of(gradients, slice(start, start + size - held))
                block.append(part)
                held, start = held + len(part.indices), start + len(part.indices)
                if held == size:
                    yield block
                    block, held = [], 0
            del gradients, part  # whoever takes a block may clear it, to have its memory back
    if block:
        yield block


def rows_of(gradients: Gradients, where: slice) -> Gradients:
    """Some examples of a batch."""
    terms = {name: [take(term, where) for term in terms] for name, terms in gradients.terms.items()}
    return Gradients(gradients.indices[where], gradients.values[where], terms)


def _directions(queries: Source, preconditioner: Preconditioner, rank: int | None) -> Iterator[Held]:
    """`P g` of all queries, for as many at a time as fit in `products.BLOCK_BYTES`."""
    parts: list[Held] = []
    for block in gradient_blocks(queries):
        found = [hold(_truncated(gradients, queries, rank)) for gradients in preconditioner(block)]
        block.clear()
        more = sum(held.num_bytes for held in found)
        parts += found
        del found
        # Twice what is held: once more while parts are joined.
        if 2 * (sum(held.num_bytes for held in parts) + more) > products.BLOCK_BYTES:
            yield _joined(parts)
    if parts:
        yield _joined(parts)


def _fill(filling: Filling, rows: np.ndarray, directions: Held, train: Source, bar: tqdm) -> None:
    """Fill the rows of some directions, in one pass over the training examples."""

    def products_with(batch: Batch) -> Tensor:
        return directions.products(hold(_packed(train.gradients(batch))))

    done = filling.begin(rows)
    bar.update(len(rows) * int(done.sum()))
    for batch in train.split.batches(done, shared=True):
        values = torch.cat(train.split.in_parts(products_with, batch.to(train.gradients.device)), dim=1)
        refuse_non_finite(values.T, batch.indices, "An inner product with the gradient")
        filling.scores[np.ix_(rows, batch.indices.numpy())] = values.cpu().numpy()
        filling.note(batch.indices.numpy())
        bar.update(values.numel() * count())
    filling.end(rows)


def _joined(parts: list[Held]) -> Held:
    """The parts as one; the list is emptied, so that the memory is theirs no longer."""
    joined = concatenate(parts) if len(parts) > 1 else parts[0]
    parts.clear()
    return joined


def _truncated(gradients: Gradients, queries: Source, rank: int | None) -> Gradients:
    if rank is None:
        return gradients
    terms = dict(gradients.terms)
    for name, parameter in queries.gradients.parameters.items():
        # One after the other, and each in the place of what it is made from.
        if parameter.ndim > 1 and name in terms and all(isinstance(term, Dense) for term in terms[name]):
            terms[name] = [truncated(dense(terms[name]), (len(parameter), parameter[0].numel()), rank)]
    return Gradients(gradients.indices, gradients.values, terms)


def _packed(gradients: Gradients) -> Gradients:
    terms = {name: [packed(term) for term in terms] for name, terms in gradients.terms.items()}
    return Gradients(gradients.indices, gradients.values, terms)
