"""Inner products of training gradients with a few directions in parameter space: preconditioned query gradients."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_attribution.gradients import products
from hf_attribution.gradients.checks import refuse_non_finite
from hf_attribution.gradients.held import Source, concatenate, hold
from hf_attribution.gradients.per_example import Gradients
from hf_attribution.gradients.terms import packed, take


class Preconditioner(Protocol):
    """A positive definite matrix P of all parameters, applied to the gradients of a block of examples at a time."""

    def __call__(self, block: Sequence[Gradients]) -> list[Gradients]:
        """`P g`."""

    def quadratic_forms(self, block: Sequence[Gradients]) -> list[Tensor]:
        """`gᵀ P g`, `[B]` of each part of the block."""


def directional_products(
    queries: Source, train: Source, preconditioner: Preconditioner, progress: bool = True
) -> np.ndarray:
    """`⟨P g(query), g(example)⟩` for all queries and training examples.

    The directions `P g` are kept dense, or by entry for embedding tables, for as many queries as fit in
    `products.BLOCK_BYTES`; the training data are read once for each such block. Training gradients are factors until,
    layer by layer, a batch of them is multiplied.

    Args:
        queries: The queries' gradients.
        train: The training examples' gradients, with respect to the same parameters.
        preconditioner: P.
        progress: Whether to show a progress bar.

    Returns:
        float32 `[Q, N]`.
    """
    scores = np.zeros((len(queries.split), len(train.split)), dtype=np.float32)
    with tqdm(
        total=scores.size, desc="gradient products", unit="pairs", unit_scale=True, leave=False, disable=not progress
    ) as bar:
        for block in gradient_blocks(queries):
            rows = torch.cat([gradients.indices for gradients in block]).numpy()
            scores[rows] = block_products(preconditioner(block), train, bar)
    return scores


def block_products(block: Sequence[Gradients], train: Source, bar: tqdm) -> np.ndarray:
    """Inner products of directions with the gradients of all training examples, in one pass over these.

    Args:
        block: q directions, as the parts of a block.
        train: The training examples' gradients.
        bar: A progress bar, of pairs.

    Returns:
        float32 `[q, N]`.
    """
    parts = [hold(gradients) for gradients in block]
    directions = concatenate(parts) if len(parts) > 1 else parts[0]
    del parts
    products = np.zeros((len(directions), len(train.split)), dtype=np.float32)
    for batch in train.split.batches():
        gradients = train.gradients(batch.to(train.gradients.device))
        found = directions.products(hold(_packed(gradients)))
        refuse_non_finite(found.T, gradients.indices, "An inner product with the gradient")
        products[:, gradients.indices.numpy()] = found.cpu().numpy()
        bar.update(found.numel())
    return products


def self_products(train: Source, preconditioner: Preconditioner, progress: bool = True) -> np.ndarray:
    """`⟨P g(i), g(i)⟩` of every example of a source: float32 `[N]`, by blocks as of queries."""
    values = np.zeros(len(train.split), dtype=np.float32)
    with tqdm(total=len(values), desc="self-influence", unit="rows", leave=False, disable=not progress) as bar:
        for block in gradient_blocks(train):
            for gradients, found in zip(block, preconditioner.quadratic_forms(block), strict=True):
                refuse_non_finite(found, gradients.indices, "The self-influence")
                values[gradients.indices.numpy()] = found.cpu().numpy()
                bar.update(len(found))
    return values


def gradient_blocks(source: Source) -> Iterator[list[Gradients]]:
    """The gradients of all rows of a source, in blocks whose dense form would fit in `products.BLOCK_BYTES`."""
    itemsize = next(iter(source.gradients.parameters.values())).element_size()
    # Once dense, and once more while parts are joined.
    size = max(1, products.BLOCK_BYTES // (2 * max(4, itemsize) * source.gradients.num_parameters))
    block: list[Gradients] = []
    held = 0
    for batch in source.split.batches():
        gradients = source.gradients(batch.to(source.gradients.device))
        start = 0
        while start < len(gradients.indices):
            part = rows_of(gradients, slice(start, start + size - held))
            block.append(part)
            held, start = held + len(part.indices), start + len(part.indices)
            if held == size:
                yield block
                block, held = [], 0
    if block:
        yield block


def rows_of(gradients: Gradients, where: slice) -> Gradients:
    """Some examples of a batch."""
    terms = {name: [take(term, where) for term in terms] for name, terms in gradients.terms.items()}
    return Gradients(gradients.indices[where], gradients.values[where], terms)


def _packed(gradients: Gradients) -> Gradients:
    terms = {name: [packed(term) for term in terms] for name, terms in gradients.terms.items()}
    return Gradients(gradients.indices, gradients.values, terms)
