"""kNN-Shapley: exact Shapley values of the training examples of a nearest-neighbour classifier on hidden states."""

import dataclasses
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from hf_attribution.methods.base import Method, Scored
from hf_attribution.methods.groups import groups_of
from hf_attribution.methods.representations import SIMILARITIES, check_choices, representations
from hf_attribution.problem import Problem

# Numbers in the arrays of a block of queries.
BLOCK_SIZE = 2**22


@dataclasses.dataclass(frozen=True)
class KNNShapley(Method):
    """The Shapley value of each example for the share of the query's k nearest neighbours that have its label.

    Exact, by one sort for each query. It takes the model's hidden states, and says nothing of how they came to be.

    Args:
        k: Neighbours.
        layer: Name of the module whose output is the hidden state; by default what goes into the last linear layer.
        pooling: How the states of tokens or pixels become one: `"mean"`, `"max"`, `"first"`, `"last"`.
        similarity: What near is: `"negative_distance"`, `"cosine"` or `"dot"`.
        column: A column to compare instead of the label, where rows have no class: a text's source.
    """

    k: int = 5
    layer: str | None = None
    pooling: str = "mean"
    similarity: str = "negative_distance"
    column: str | None = None

    name: ClassVar[str] = "knn_shapley"
    paper: ClassVar[str] = "Jia et al. 2019, Efficient task-specific data valuation for nearest neighbor algorithms"

    def __post_init__(self) -> None:
        check_choices(self.pooling, self.similarity)
        if self.k < 1:
            raise ValueError(f"k must be at least 1, not {self.k}.")

    def score(self, problem: Problem) -> Scored:
        """Sort the examples by similarity, for every query."""
        query_labels, train_labels = groups_of(problem, self.column, self.name)

        def one_model(model: nn.Module, number: int) -> np.ndarray:
            query, train = (
                representations(model, problem.task, split, self.layer, self.pooling)
                for split in (problem.query, problem.train)
            )
            return knn_shapley_scores(query, train, query_labels, train_labels, self.k, self.similarity)

        return Scored(problem.average(one_model))


def knn_shapley_scores(
    query: Tensor, train: Tensor, query_labels: np.ndarray, train_labels: np.ndarray, k: int, similarity: str
) -> np.ndarray:
    """Shapley values for given states, a block of queries at a time.

    Args:
        query: States `[Q, d]`.
        train: States `[N, d]`.
        query_labels: `[Q]`.
        train_labels: `[N]`.
        k: Neighbours.
        similarity: One of `SIMILARITIES`.

    Returns:
        float32 `[Q, N]`.
    """
    values = np.empty((len(query), len(train)), dtype=np.float32)
    size = max(1, BLOCK_SIZE // len(train))
    for start in range(0, len(query), size):
        rows = slice(start, start + size)
        similarities = SIMILARITIES[similarity](query[rows], train).numpy()
        values[rows] = knn_shapley(similarities, query_labels[rows, None] == train_labels, k)
    return values


def knn_shapley(similarities: np.ndarray, same: np.ndarray, k: int) -> np.ndarray:
    """Shapley values for the utility `Σ_{j ≤ min(k, |S|)} 1[the j-th nearest of S has the label] / k`.

    Args:
        similarities: `[Q, N]`. Of equal ones the first counts as nearer.
        same: bool `[Q, N]`, whether the example has the query's label.
        k: Neighbours.

    Returns:
        float32 `[Q, N]` (Jia et al. 2019, theorem 1).

    Example:
        >>> knn_shapley(np.array([[3.0, 2.0, 1.0]]), np.array([[True, False, True]]), k=1).round(2).tolist()
        [[0.83, -0.17, 0.33]]
    """
    count = same.shape[1]
    # The theorem's value of the farthest, and what each is worth more than the next farther one.
    weights = np.minimum(k, np.arange(1, count + 1)) / np.arange(1, count + 1) / k
    order = np.argsort(-similarities, axis=1, kind="stable")
    matches = np.take_along_axis(same, order, axis=1).astype(np.float64)
    matches[:, :-1] -= matches[:, 1:].copy()
    matches *= weights
    values = np.empty(same.shape, dtype=np.float32)
    np.put_along_axis(values, order, np.cumsum(matches[:, ::-1], axis=1)[:, ::-1].astype(np.float32), axis=1)
    return values
