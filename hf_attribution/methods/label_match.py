"""Same label as the query: the baseline that embarrasses.

Random subsets hold more of one class than of another, and a model trained on more of a class favours it. Most of a
plain LDS on labelled data is that; methods that do not beat this baseline have not found the examples that matter.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from hf_attribution.methods.base import Method, Scored
from hf_attribution.methods.groups import groups_of
from hf_attribution.problem import Problem


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
        query, train = groups_of(problem, self.column, self.name)
        return Scored((query[:, None] == train[None, :]).astype(np.float32))
