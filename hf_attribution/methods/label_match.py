"""Same label as the query: the baseline that embarrasses.

Random subsets hold more of one class than of another, and a model trained on more of a class favours it. Most of a
plain LDS on labelled data is that; methods that do not beat this baseline have not found the examples that matter.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from hf_attribution.methods.base import Method, Scored
from hf_attribution.problem import Problem
from hf_attribution.tasks import Task


@dataclasses.dataclass(frozen=True)
class LabelMatch(Method):
    """1 where the training example has the query's label, else 0.

    Args:
        column: A column to compare instead of the label, for example a text's source.
    """

    column: str | None = None

    name: ClassVar[str] = "label_match"
    paper: ClassVar[str] = ""

    def score(self, problem: Problem) -> Scored:
        """Compare the labels."""
        query, train = (self._groups(d, problem.task) for d in (problem.query_dataset, problem.train_dataset))
        return Scored((query[:, None] == train[None, :]).astype(np.float32))

    def _groups(self, dataset: Any, task: Task) -> np.ndarray:
        if self.column is not None:
            if self.column not in (getattr(dataset, "column_names", None) or ()):
                raise ValueError(f"label_match: there is no column {self.column!r} in a dataset.")
            return np.asarray(dataset.with_format(None)[self.column])
        labels = task.labels(dataset)
        if labels is None:
            raise ValueError(
                f"label_match needs classes, and {task.name} has none: name a column to compare, "
                "LabelMatch(column=...), or leave this baseline out."
            )
        return labels
