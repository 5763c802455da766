"""Inner products between the gradients of queries and of training examples: exact, or from stored projections."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_attribution.gradients.checks import refuse_non_finite
from hf_attribution.gradients.filling import Filling
from hf_attribution.gradients.held import Held, Source, concatenate
from hf_attribution.processes import add_up, count, share

# Bytes that the gradients of a block of rows may take; all other data are read once per block.
BLOCK_BYTES = 2**30

# Of a block, what is multiplied at once: a kernel is symmetric, and half of its tiles need not be computed.
TILE_BYTES = 2**26


def gradient_products(
    queries: Source, train: Source, normalize: bool = False, progress: bool = True, unfinished: Path | None = None
) -> np.ndarray:
    """Exact inner products of the gradients of all queries with those of all training examples.

    Queries are taken in blocks that fit in memory, and the training data are read once per block. Processes of a
    launch share that; each computes the queries' gradients for itself.

    Args:
        queries: The queries' gradients.
        train: The training examples' gradients, with respect to the same parameters.
        normalize: Whether to take cosines.
        progress: Whether to show a progress bar.
        unfinished: How the names of files begin that say how far this has come, see `Filling`.

    Returns:
        float32 `[Q, N]`. A cosine with a zero gradient is 0.
    """
    filling, stream = Filling(len(queries.split), train.split, unfinished), queries.batches()
    with filling.bar(progress) as bar:
        while block := _take_block(stream):
            norms = [tile.norms() if normalize else None for tile in block]
            rows = np.concatenate([tile.indices.numpy() for tile in block])
            done = filling.begin(rows)
            bar.update(len(rows) * int(done.sum()))
            for batch in train.batches(done, shared=True):
                batch_norms = batch.norms() if normalize else None
                for tile, lengths in zip(block, norms, strict=True):
                    products = tile.products(batch)
                    if lengths is not None and batch_norms is not None:
                        both = lengths[:, None] * batch_norms
                        products = products / both.clamp(min=torch.finfo(products.dtype).tiny)
                    refuse_non_finite(products.T, batch.indices, "An inner product with the gradient")
                    filling.scores[np.ix_(tile.indices.numpy(), batch.indices.numpy())] = products.cpu().numpy()
                    bar.update(products.numel() * count())
                filling.note(batch.indices.numpy())
            filling.end(rows)
    return filling.scores


def squared_lengths(source: Source) -> Tensor:
    """Squared lengths of all gradients of a source: `[N]`, in dataset order."""
    found = torch.zeros(len(source.split), dtype=source.gradients.dtype)
    for held in source.batches(shared=True):
        lengths = held.norms().square()
        refuse_non_finite(lengths, held.indices, "The squared length of a gradient")
        found[held.indices] = lengths.to(found)
    add_up(found)
    return found


def gradient_kernel(
    rows: Sequence[Source], others: Sequence[Source], progress: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """Exact inner products of all gradients of some sources with each other, and with those of other sources.

    Rows are taken in blocks that fit in memory; for each, the rows after it and the others are read once. Processes
    of a launch share that and the products; each computes the block's gradients for itself.

    Args:
        rows: Sources with n rows in all, on the same model.
        others: Sources on the same model, of whole splits.
        progress: Whether to show a progress bar.

    Returns:
        `[n, n]`, in the order of the sources and of their datasets' rows, and for each other source of m rows its
        inner products with them, `[m, n]`; float32, for models in double precision float64.
    """
    examples = np.concatenate([source.rows for source in rows])
    size = len(examples)
    kernel = torch.zeros(size, size, dtype=rows[0].gradients.dtype)
    crosses = [kernel.new_zeros(len(other.split), size) for other in others]
    done = np.zeros(size, dtype=bool)
    with tqdm(total=size, desc="gradient kernel", unit="rows", leave=False, disable=not progress) as bar:
        while not done.all():
            block = _take_block(_positioned(rows, done))
            for tile in block:
                own = tile.norms().square()
                refuse_non_finite(own, torch.from_numpy(examples)[tile.indices], "The squared length of a gradient")
                done[tile.indices] = True
                bar.update(len(tile))
            for tile, other in share(itertools.combinations_with_replacement(block, 2)):
                _fill(kernel, tile, other)
            for batch in _positioned(rows, done, shared=True):
                for tile in block:
                    _fill(kernel, tile, batch)
            for source, cross in zip(others, crosses, strict=True):
                for batch in source.batches(shared=True):
                    for tile in block:
                        products = batch.products(tile)
                        what = f"An inner product with the gradient of the {source.split.name} row"
                        refuse_non_finite(products, batch.indices, what)
                        cross[batch.indices[:, None], tile.indices] = products.to(cross)
    add_up(kernel, *crosses)
    return kernel, crosses


def _fill(kernel: Tensor, one: Held, other: Held) -> None:
    products = one.products(other).to(kernel)
    kernel[one.indices[:, None], other.indices] = products
    kernel[other.indices[:, None], one.indices] = products.T


def _take_block(stream: Iterator[Held]) -> list[Held]:
    """As many batches as fit in a block, in tiles; empty at the end."""
    tiles: list[Held] = []
    parts: list[Held] = []
    held = tile = 0
    for batch in stream:
        parts.append(batch)
        held, tile = held + batch.num_bytes, tile + batch.num_bytes
        full = held + batch.num_bytes > BLOCK_BYTES
        if full or tile + batch.num_bytes > TILE_BYTES:
            tiles.append(concatenate(parts))
            parts, tile = [], 0
        if full:
            return tiles
    return [*tiles, concatenate(parts)] if parts else tiles


def _positioned(rows: Sequence[Source], done: np.ndarray, shared: bool = False) -> Iterator[Held]:
    """The batches of all sources that are not done, with positions among all rows."""
    start = 0
    for source in rows:
        chosen = source.rows
        positions = np.full(len(source.split), -1)
        positions[chosen] = np.arange(start, start + len(chosen))
        skip = np.zeros(len(source.split), dtype=bool)
        skip[chosen] = done[positions[chosen]]
        for batch in source.batches(skip, shared):
            yield Held(torch.from_numpy(positions)[batch.indices], batch.values, batch.segments)
        start += len(chosen)
