"""Random scores: the baseline below which something is wrong."""

import dataclasses
from typing import ClassVar

import numpy as np

from hf_attribution.methods.base import Method, Scored
from hf_attribution.problem import Problem


@dataclasses.dataclass(frozen=True)
class Random(Method):
    """Independent standard normal scores.

    Args:
        seed: Their seed.
    """

    seed: int = 0

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = ""

    def score(self, problem: Problem) -> Scored:
        """Draw the scores."""
        return Scored(np.random.default_rng(self.seed).standard_normal(problem.shape, dtype=np.float32))
