"""Which class, or other group, a row belongs to, and what belonging to the query's adds to its score."""

from typing import Any

import numpy as np

from hf_attribution.problem import Problem


def groups_of(problem: Problem, column: str | None, who: str) -> tuple[np.ndarray, np.ndarray]:
    """The groups of queries and training examples.

    Args:
        problem: Has the datasets with all their columns.
        column: The column that says it; by default the task's labels.
        who: Who asks, for the message.

    Returns:
        Groups `[Q]` and `[N]`.

    Raises:
        ValueError: If there is no such column, or the rows have no labels.
    """
    return (
        _groups(problem.query_dataset, problem, column, who),
        _groups(problem.train_dataset, problem, column, who),
    )


def add_group_effect(values: np.ndarray, query: np.ndarray, train: np.ndarray, weight: float) -> np.ndarray:
    """Scores with a standardised term for the examples of the query's group.

    Args:
        values: Scores `[Q, N]`.
        query: The queries' groups, `[Q]`.
        train: The training examples' groups, `[N]`.
        weight: Standard deviations of the query's scores to add per standard deviation of "same group".

    Returns:
        float32 `[Q, N]`. Queries whose group has none or all of the examples keep their scores.
    """
    same = (query[:, None] == train[None, :]).astype(np.float32)
    spread = same.std(1, keepdims=True)
    standardised = np.divide(same - same.mean(1, keepdims=True), spread, out=np.zeros_like(same), where=spread > 0)
    return values + weight * values.std(1, keepdims=True) * standardised


def _groups(dataset: Any, problem: Problem, column: str | None, who: str) -> np.ndarray:
    if column is not None:
        if column not in (getattr(dataset, "column_names", None) or ()):
            raise ValueError(f"{who}: there is no column {column!r} in a dataset.")
        return np.asarray(dataset.with_format(None)[column])
    labels = problem.task.labels(dataset)
    if labels is None:
        raise ValueError(
            f"{who} needs classes, and {problem.task.name} has none: name a column to compare, column=..., "
            "or leave it out."
        )
    return labels
