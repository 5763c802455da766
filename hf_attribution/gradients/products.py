"""Inner products between the gradients of queries and of training examples: exact, or from stored projections."""

import dataclasses

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_attribution.data import Split
from hf_attribution.gradients.features import FeatureStore
from hf_attribution.gradients.per_example import Gradients, PerExampleGradients, refuse_non_finite
from hf_attribution.gradients.terms import dense, inner_products, is_large_table, squared_norms

# Bytes that the gradients of a block of queries may take; the training data are read once per block.
QUERY_BLOCK_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class _Block:
    """Gradients of some queries: one matrix per parameter, or, for vocabulary-sized tables, the factors."""

    matrices: dict[str, Tensor]
    batches: list[Gradients]
    norms: Tensor

    def products(self, train: Gradients) -> Tensor:
        """Inner products with a batch of training gradients: `[queries, B]`."""
        total = self.norms.new_zeros(len(self.norms), len(train.indices))
        for name, terms in train.terms.items():
            if name in self.matrices:
                total += self.matrices[name] @ dense(terms).T
            else:
                of_table = [inner_products(batch.terms[name], terms) for batch in self.batches if name in batch.terms]
                total += torch.cat(of_table) if of_table else 0
        return total


def gradient_products(
    queries: PerExampleGradients,
    query_split: Split,
    train: PerExampleGradients,
    train_split: Split,
    normalize: bool = False,
    progress: bool = True,
) -> np.ndarray:
    """Exact inner products of the gradients of all queries with those of all training examples.

    Queries are taken in blocks that fit in memory, and the training data are read once per block.

    Args:
        queries: What computes the queries' gradients.
        query_split: The queries.
        train: What computes the training examples' gradients.
        train_split: The training examples.
        normalize: Whether to take cosines.
        progress: Whether to show a progress bar.

    Returns:
        float32 `[Q, N]`. A cosine with a zero gradient is 0.
    """
    scores = np.zeros((len(query_split), len(train_split)), dtype=np.float32)
    block: list[Gradients] = []
    rows = 0
    size = max(1, QUERY_BLOCK_BYTES // (4 * queries.num_parameters))
    batches = len(train_split) * -(-len(query_split) // size)
    with tqdm(total=batches, unit="rows", desc="gradient products", leave=False, disable=not progress) as bar:
        for batch in query_split.batches():
            block.append(queries(batch.to(queries.device)))
            rows += len(batch.indices)
            if rows >= size:
                _score_block(scores, block, train, train_split, normalize, bar)
                block, rows = [], 0
        if block:
            _score_block(scores, block, train, train_split, normalize, bar)
    return scores


def feature_products(queries: FeatureStore, train: FeatureStore, normalize: bool = False) -> np.ndarray:
    """Inner products (or cosines) of stored projections: float32 `[Q, N]`, in blocks of matrix products."""
    left = torch.cat([block for _, block in queries.blocks()])
    left = torch.nn.functional.normalize(left) if normalize else left
    scores = np.empty((len(queries), len(train)), dtype=np.float32)
    for where, block in train.blocks():
        block = torch.nn.functional.normalize(block) if normalize else block
        scores[:, where] = (left @ block.T).numpy()
    return scores


def _score_block(
    scores: np.ndarray,
    batches: list[Gradients],
    train: PerExampleGradients,
    train_split: Split,
    normalize: bool,
    bar: tqdm,
) -> None:
    block = _make_block(batches, normalize)
    rows = torch.cat([batch.indices for batch in batches]).numpy()
    for batch in train_split.batches():
        gradients = train(batch.to(train.device))
        products = block.products(gradients)
        if normalize:
            products = products / (block.norms[:, None] * _norms(gradients)).clamp(
                min=torch.finfo(products.dtype).tiny
            )
        refuse_non_finite(products.T, batch.indices, "An inner product with the gradient")
        scores[np.ix_(rows, batch.indices.numpy())] = products.cpu().numpy()
        bar.update(len(batch.indices))


def _make_block(batches: list[Gradients], normalize: bool) -> _Block:
    names = {name for batch in batches for name in batch.terms}
    tables = {n for n in names if any(n in batch.terms and is_large_table(batch.terms[n]) for batch in batches)}
    matrices = {}
    for name in names - tables:
        size = next(dense(batch.terms[name]).shape[1] for batch in batches if name in batch.terms)
        matrices[name] = torch.cat([
            dense(b.terms[name]) if name in b.terms else b.values.new_zeros(len(b.indices), size) for b in batches
        ])  # fmt: skip
    norms = torch.cat([_norms(batch) if normalize else torch.ones_like(batch.values) for batch in batches])
    kept = [dataclasses.replace(b, terms={n: t for n, t in b.terms.items() if n in tables}) for b in batches]
    return _Block(matrices, kept, norms)


def _norms(gradients: Gradients) -> Tensor:
    return torch.stack([squared_norms(terms) for terms in gradients.terms.values()]).sum(0).sqrt()
