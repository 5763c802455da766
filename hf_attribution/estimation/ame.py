"""Average marginal effects: an example's mean contribution to subsets of several sizes, by LASSO."""

import dataclasses
from typing import ClassVar

import numpy as np

from hf_attribution.counterfactuals import Counterfactuals
from hf_attribution.estimation.base import Context, Estimated, Estimator, check_memberships
from hf_attribution.estimation.datamodel import Datamodel
from hf_attribution.subsets import Subsets


@dataclasses.dataclass(frozen=True)
class AME(Estimator):
    """LASSO of outputs on weighted memberships, of subsets drawn with several fractions.

    Draw them by `Subsets.independent`. An example that is in a subset of fraction p weighs `1 / p`, one that is not
    `-1 / (1 - p)`, both over √v with `v = E[1 / (p (1 - p))]`: these are uncorrelated with variance 1, and √v times
    their coefficients are the effects (Lin et al. 2022, proposition 3.1).

    Args:
        fractions: That the subsets were drawn with.
        folds: Of the cross-validation of the penalty.
    """

    fractions: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    folds: int = 5

    name: ClassVar[str] = "ame"
    paper: ClassVar[str] = "Lin et al. 2022, Measuring the effect of training data on deep learning predictions"

    def estimate(self, counterfactuals: Counterfactuals, context: Context) -> Estimated:
        """Fit one LASSO a query.

        Args:
            counterfactuals: Outputs of models retrained on M subsets at these fractions.
            context: Not used.

        Returns:
            Values `[Q, N]`; choices as for `Datamodel`.
        """
        subsets = counterfactuals.subsets
        check_memberships(subsets, self.name)
        drawn = self._drawn(subsets)
        spread = np.sqrt(np.mean(1 / (drawn * (1 - drawn))))
        design = np.where(subsets.masks, 1 / drawn, -1 / (1 - drawn)) / spread
        values, choices = Datamodel(folds=self.folds).regress(design, counterfactuals.mean())
        return Estimated(values * spread, choices)

    def _drawn(self, subsets: Subsets) -> np.ndarray:
        """The fraction that each subset was drawn with: the nearest to its size.

        Returns:
            `[M, 1]`.

        Raises:
            ValueError: A subset was drawn with none of them, or all with one.
        """
        fractions, kept = np.asarray(self.fractions), subsets.masks.mean(axis=1)
        drawn = fractions[np.abs(kept[:, None] - fractions).argmin(axis=1)]
        # Five standard deviations of a binomial share.
        far = np.abs(kept - drawn) > 5 * np.sqrt(drawn * (1 - drawn) / subsets.num_examples)
        remedy = (
            "retrain on Subsets.independent(N, M, fractions=(...)), or give AME(fractions=...) those that were used."
        )
        if far.any():
            raise ValueError(
                f"Subset {int(far.argmax())} keeps {kept[far.argmax()]:.3g} of the examples, and the effects are "
                f"over subsets drawn with the fractions {', '.join(map(str, self.fractions))}: {remedy}"
            )
        if len(set(drawn.tolist())) < min(2, len(fractions)):
            raise ValueError(f"All subsets were drawn with the fraction {drawn[0]}: {remedy}")
        return drawn[:, None]
