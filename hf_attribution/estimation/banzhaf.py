"""Data Banzhaf: an example's mean marginal contribution to a random subset of the others."""

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
from hf_attribution.estimation.subsampled_influence import mean_differences


@dataclasses.dataclass(frozen=True)
class Banzhaf(Estimator):
    """The Banzhaf value by maximum sample reuse: every retrained model counts for every example.

    It is defined over subsets that hold each example with probability ½, independently: `Subsets.independent(N, M)`.
    Random halves of one size will do up to a common shift, see `SubsampledInfluence`.
    """

    name: ClassVar[str] = "banzhaf"
    paper: ClassVar[str] = "Wang & Jia 2023, Data Banzhaf: A robust data valuation framework"

    def estimate(self, counterfactuals: Counterfactuals, context: Context) -> Estimated:
        """Subtract the mean outputs without an example from those with it (Wang & Jia, eq. 5).

        Args:
            counterfactuals: Outputs of models retrained on M subsets that hold an example with probability ½.
            context: Not used.

        Returns:
            Values `[Q, N]`; in the choices `subset_sizes`, "independent" or "fixed", and `constant_queries`, where
            there are any.

        Raises:
            ValueError: The subsets keep another fraction.
        """
        subsets = counterfactuals.subsets
        kept = np.count_nonzero(subsets.masks, axis=1) / subsets.num_examples
        # Half an example for odd N, and 5 standard deviations of a binomial share.
        allowed = 0.5 / subsets.num_examples + 2.5 / np.sqrt(subsets.num_examples)
        mean_allowed = 0.5 / subsets.num_examples + 2.5 / np.sqrt(subsets.masks.size)
        if np.abs(kept - 0.5).max() > allowed or abs(kept.mean() - 0.5) > mean_allowed:
            raise ValueError(
                f"The Banzhaf value is over subsets that keep each example with probability 0.5, and these keep "
                f"{kept.min():.3g} to {kept.max():.3g}: retrain on Subsets.independent(N, M), or use "
                "'subsampled_influence', which takes any fraction."
            )
        check_memberships(subsets, self.name)
        outputs = counterfactuals.mean()
        constant = constant_queries(outputs)
        values = mean_differences(subsets.masks, outputs)
        values[constant] = 0
        sizes = "fixed" if np.ptp(kept) == 0 else "independent"
        return Estimated(values, note_constant({"subset_sizes": sizes}, constant, self.name))
