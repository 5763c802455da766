"""Similarity of hidden states: what the model itself finds alike."""

import dataclasses
from typing import ClassVar

import numpy as np
from torch import nn

from hf_attribution.methods.base import Method, Scored
from hf_attribution.methods.representations import SIMILARITIES, check_choices, representations
from hf_attribution.problem import Problem


@dataclasses.dataclass(frozen=True)
class RepresentationSimilarity(Method):
    """Similarity of hidden states, averaged over the checkpoints.

    Args:
        layer: Name of the module whose output is the hidden state. By default what goes into the last linear layer:
            the input of a classifier, or of a language model's head.
        pooling: How the states of tokens or pixels become one: `"mean"`, `"max"`, or for sequences `"first"` or
            `"last"` (padding does not count).
        similarity: `"cosine"`, `"dot"`, or `"negative_distance"`, minus the squared Euclidean distance.
    """

    layer: str | None = None
    pooling: str = "mean"
    similarity: str = "cosine"

    name: ClassVar[str] = "representation_similarity"
    paper: ClassVar[str] = "Hanawa et al. 2021, Evaluation of similarity-based explanations"

    def __post_init__(self) -> None:
        check_choices(self.pooling, self.similarity)

    def score(self, problem: Problem) -> Scored:
        """Compare the hidden states."""
        compare = SIMILARITIES[self.similarity]

        def one_model(model: nn.Module, number: int) -> np.ndarray:
            query, train = (
                representations(model, problem.task, split, self.layer, self.pooling)
                for split in (problem.query, problem.train)
            )
            return compare(query, train).numpy()

        return Scored(problem.average(one_model))
