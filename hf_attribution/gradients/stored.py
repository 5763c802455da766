"""Scores that are inner products with stored features: the whole matrix, or the largest of each row without it."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_attribution.errors import NonFiniteError
from hf_attribution.store import FeatureStore
from hf_attribution.store.reader import BLOCK_BYTES


def as_stored(where: slice, block: Tensor) -> Tensor:
    """The features themselves."""
    return block


def unit_length(where: slice, block: Tensor) -> Tensor:
    """The features divided by their lengths."""
    return torch.nn.functional.normalize(block)


@dataclasses.dataclass(frozen=True)
class StoredProducts:
    """Inner products of the queries' vectors with the training examples', which are made of stored features.

    Args:
        queries: `[Q, width]`.
        train: Features of N training examples.
        vectors: Makes vectors `[rows, width]` of a block of features: takes their positions and `[rows, dim]`.
    """

    queries: Tensor
    train: FeatureStore
    vectors: Callable[[slice, Tensor], Tensor] = as_stored


@dataclasses.dataclass(frozen=True)
class StoredScores:
    """Sums of such products over models, times a weight for each training example.

    Args:
        terms: A term for each model, of the same queries and training examples.
        weights: float32 `[N]`; all 1 by default.
        choices: What automatic settings chose; JSON.
    """

    terms: Sequence[StoredProducts]
    weights: np.ndarray | None = None
    choices: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of queries and of training examples."""
        return len(self.terms[0].queries), len(self.terms[0].train)

    def blocks(self, queries: slice = slice(None)) -> Iterator[tuple[slice, np.ndarray]]:
        """The scores of some queries in blocks of training examples, in one pass over the stores.

        Args:
            queries: Which queries, all by default.

        Yields:
            Which training examples, and float32 `[queries, examples]`.
        """
        for blocks in zip(*(term.train.blocks(self.block_rows) for term in self.terms), strict=True):
            where = blocks[0][0]
            products = (
                term.queries[queries] @ term.vectors(where, block).T
                for term, (_, block) in zip(self.terms, blocks, strict=True)
            )
            total = next(products)
            for product in products:
                total = total + product
            if self.weights is not None:
                total = total * torch.from_numpy(self.weights[where])
            yield where, total.numpy()

    def matrix(self) -> np.ndarray:
        """All scores, float32 `[Q, N]`."""
        scores = np.empty(self.shape, dtype=np.float32)
        for where, block in self.blocks():
            scores[:, where] = block
        return scores

    def top(self, k: int, progress: bool = True, queries: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """The largest scores of each query, exactly, one pass over the stores for each block of queries.

        Args:
            k: How many.
            progress: Whether to show a progress bar.
            queries: Which queries, all by default.

        Returns:
            Positions of training examples, int64 `[Q, k]`, and their scores, float32 `[Q, k]`, largest first; of
            equal scores the lower position comes first.

        Raises:
            NonFiniteError: If a score is NaN or infinite; the message names the query and the row.
        """
        asked, num_examples = range(self.shape[0])[queries], self.shape[1]
        num_queries, k = len(asked), min(k, num_examples)
        indices, scores = np.zeros((num_queries, k), np.int64), np.zeros((num_queries, k), np.float32)
        step = max(1, BLOCK_BYTES // (4 * self.block_rows))
        with tqdm(
            total=num_queries * num_examples, desc="top scores", unit="pairs", unit_scale=True, leave=False,
            disable=not progress,
        ) as bar:  # fmt: skip
            for start in range(0, num_queries, step):
                some = asked[start : start + step]
                largest = _Largest(len(some), k)
                for where, block in self.blocks(slice(some.start, some.stop)):
                    _refuse_non_finite(block, some.start, where.start)
                    largest.add(where.start, block)
                    bar.update(block.size)
                indices[start : start + step], scores[start : start + step] = largest.indices, largest.scores
        return indices, scores

    def query_vectors(self) -> Tensor:
        """The vectors of all terms side by side, `[Q, width]`."""
        return torch.cat([term.queries for term in self.terms], dim=1)

    def vectors(self, where: slice) -> Tensor:
        """The same of some training examples, with their weights: inner products with those are the scores."""
        parts = [term.vectors(where, term.train.read(where.start, where.stop)) for term in self.terms]
        joined = torch.cat(parts, dim=1)
        return joined if self.weights is None else joined * torch.from_numpy(self.weights[where])[:, None]

    @property
    def block_rows(self) -> int:
        """Training examples in a block."""
        return max(1, BLOCK_BYTES // (4 * sum(term.train.dim for term in self.terms)))


class _Largest:
    """The k largest of each row of a matrix that comes in blocks of columns, in their order.

    Args:
        rows: Number of rows.
        k: How many are kept.
    """

    def __init__(self, rows: int, k: int) -> None:
        self.scores = np.full((rows, k), -np.inf, dtype=np.float32)
        self.indices = np.zeros((rows, k), dtype=np.int64)

    def add(self, start: int, block: np.ndarray) -> None:
        """Take in the columns from `start` on: `[rows, columns]`."""
        # Later columns of a score that is in already lose against the earlier ones.
        candidates = block > self.scores[:, -1:]
        for row in np.flatnonzero(candidates.any(1)):
            columns = np.flatnonzero(candidates[row])
            scores = np.concatenate([self.scores[row], block[row, columns]])
            indices = np.concatenate([self.indices[row], start + columns])
            kept = np.argsort(-scores, kind="stable")[: self.scores.shape[1]]
            self.scores[row], self.indices[row] = scores[kept], indices[kept]


def _refuse_non_finite(block: np.ndarray, first_query: int, first_row: int) -> None:
    if not np.isfinite(block).all():
        query, row = (int(index) for index in np.argwhere(~np.isfinite(block))[0])
        raise NonFiniteError(
            f"The score of query {first_query + query} and train row {first_row + row} is {block[query, row]}: look "
            "for a gradient that is not finite in one of the two, or raise the damping."
        )
