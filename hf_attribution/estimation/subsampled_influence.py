"""Subsampled influence: outputs of the models that saw an example against those that did not."""

import dataclasses
from typing import ClassVar

import numpy as np

from hf_attribution.counterfactuals import Counterfactuals
from hf_attribution.estimation.base import (
    Context,
    Estimated,
    Estimator,
    check_memberships,
    constant_queries,
    note_constant,
)


@dataclasses.dataclass(frozen=True)
class SubsampledInfluence(Estimator):
    """`E[m | i ∈ S] - E[m | i ∉ S]`, means over the retrained models.

    Where the subsets are all of one size, a subset with an example has one other example less than a subset without:
    of an additive effect τ the difference is `τ_i` minus the mean of the others' τ.
    """

    name: ClassVar[str] = "subsampled_influence"
    paper: ClassVar[str] = "Feldman & Zhang 2020, What neural networks memorize and why"

    def estimate(self, counterfactuals: Counterfactuals, context: Context) -> Estimated:
        """Subtract the two means.

        Args:
            counterfactuals: Outputs of models retrained on M subsets of any kind.
            context: Not used.

        Returns:
            Values `[Q, N]`; in the choices `constant_queries`, where there are any.
        """
        check_memberships(counterfactuals.subsets, self.name)
        outputs = counterfactuals.mean()
        constant = constant_queries(outputs)
        values = mean_differences(counterfactuals.subsets.masks, outputs)
        values[constant] = 0
        return Estimated(values, note_constant({}, constant, self.name))


def mean_differences(masks: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Mean outputs of the subsets with an example minus those without.

    Args:
        masks: bool `[M, N]`, no column of one value.
        outputs: `[Q, M]`.

    Returns:
        float64 `[Q, N]`.

    Example:
        >>> mean_differences(np.array([[True], [False], [False]]), np.array([[5.0, 1.0, 2.0]])).tolist()
        [[3.5]]
    """
    centered = outputs - outputs.mean(axis=1, keepdims=True)  # so that the sums of those with and without add to zero
    kept = np.count_nonzero(masks, axis=0)
    return (centered @ masks) * (1 / kept + 1 / (len(masks) - kept))
