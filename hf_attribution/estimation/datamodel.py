"""Datamodels: a sparse linear model of retrained outputs in which examples were trained on."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from hf_attribution.counterfactuals import Counterfactuals
from hf_attribution.estimation.base import (
    Context,
    Estimated,
    Estimator,
    check_memberships,
    constant_queries,
    logger,
    note_constant,
)
from hf_attribution.estimation.groups import GroupCounts
from hf_attribution.estimation.lasso import Start, fit_lasso
from hf_attribution.estimation.ridge import fit_ridge
from hf_attribution.evaluation import read_groups
from hf_attribution.scores import Scores

PENALTIES = ("lasso", "elastic_net", "ridge")


@dataclasses.dataclass(frozen=True)
class Datamodel(Estimator):
    """Regression of each query's outputs on the masks, with a free intercept; the scores are the coefficients.

    The penalty of each query is the one that predicts subsets best that its fit has not seen. Subsets that are all of
    one size leave the scores' common shift to the penalty: they determine differences between examples alone, which
    is what predictions for subsets of that size need.

    With a `group_column` a score is the effect of the example's class (or source), which is not penalised, plus its
    own, which is. Hundreds of models tell the effects of ten classes well, and those of a thousand examples hardly:
    a penalty that has to serve both makes the classes' too small.

    Args:
        penalty: `"lasso"` (the paper's), `"elastic_net"`, or `"ridge"`, which is often best with fewer subsets than
            examples: the LASSO can give no more examples a score than there are subsets.
        l1_ratio: Share of the LASSO in the elastic net; 1 is the LASSO.
        folds: Of the cross-validation. The ridge leaves out one subset at a time, in closed form.
        num_penalties: Strengths that are tried, from one that makes all scores zero to a thousandth of it.
        group_column: Column of the training data whose counts in a subset are covariates. `estimate` then needs the
            `train_dataset`.
    """

    penalty: str = "lasso"
    l1_ratio: float = 0.5
    folds: int = 5
    num_penalties: int = 100
    group_column: str | None = None

    name: ClassVar[str] = "datamodel"
    paper: ClassVar[str] = "Ilyas et al. 2022, Datamodels: Predicting predictions from training data"

    def __post_init__(self) -> None:
        if self.penalty not in PENALTIES:
            raise ValueError(f"penalty must be one of {', '.join(PENALTIES)}, not {self.penalty!r}.")
        if not 0 < self.l1_ratio <= 1:
            raise ValueError(
                f"l1_ratio must be above 0 and at most 1 (for 0 use penalty='ridge'), not {self.l1_ratio}."
            )
        if self.folds < 2 or self.num_penalties < 2:
            raise ValueError(
                f"There must be at least 2 folds and 2 penalties, not {self.folds} and {self.num_penalties}."
            )

    def estimate(self, counterfactuals: Counterfactuals, context: Context) -> Estimated:
        """Fit one regression a query.

        Args:
            counterfactuals: Outputs of models retrained on M subsets of any kind.
            context: Has the training examples, for their groups, and perhaps scores of fewer subsets, to start from.

        Returns:
            Values `[Q, N]`; in the choices the `penalties` chosen, `subsets_per_example`, and, where there are any,
            `zero_queries` (the fit found no example worth a score) and `constant_queries`.
        """
        check_memberships(counterfactuals.subsets, self.name)
        masks, outputs = counterfactuals.subsets.masks, counterfactuals.mean()
        previous = context.previous
        if self.group_column is None:
            return self.regress(masks, outputs, start=_start(previous, previous.values) if previous else None)
        groups = read_groups(context.train_dataset, self.group_column, masks.shape[1])
        counts = GroupCounts.of(counterfactuals.subsets, groups)
        # Residuals of all subsets go into the folds: the little that they know of each other is the same for each
        # penalty. The ridge takes it into account.
        start = _start(previous, counts.own_part(previous.values)) if previous else None
        own, choices = self.regress(counts.residuals(masks), counts.residuals(outputs.T).T, counts.leverage, start)
        return Estimated(own + counts.effects(outputs.T - masks @ own.T), choices)

    def regress(
        self,
        design: np.ndarray,
        outputs: np.ndarray,
        leverage: np.ndarray | None = None,
        start: Start | None = None,
    ) -> Estimated:
        """Fit one regression a query on any design.

        Args:
            design: `[M, N]`, a row a subset: its mask, or weights in its place.
            outputs: `[Q, M]`.
            leverage: `[M]`, of covariates that were regressed out of both; by default of an intercept.
            start: An earlier fit to start from; the ridge, in closed form, needs none.

        Returns:
            As `estimate`.

        Raises:
            ValueError: There are too few subsets for the folds.
        """
        num_subsets, num_examples = design.shape
        if num_subsets < max(3, self.folds):
            raise ValueError(
                f"{self.name} needs at least {max(3, self.folds)} subsets to choose a penalty on {self.folds} folds, "
                f"and there are {num_subsets}: retrain on more."
            )
        if num_subsets < num_examples:
            logger.warning(
                f"There are {num_subsets} subsets for {num_examples} examples: more unknowns than equations, so that "
                "the penalty decides among many fits alike. The LASSO can give at most "
                f"{num_subsets} examples a score; 'ridge' spreads it. Judge the scores on other subsets."
            )
        constant = constant_queries(outputs)
        values = np.zeros((len(outputs), num_examples))
        penalties = np.full(len(outputs), np.inf)
        if not constant.all():
            if self.penalty == "ridge":
                ridge = fit_ridge(design, outputs[~constant], leverage)
                values[~constant], penalties[~constant] = ridge.coefficients, ridge.penalties
            else:
                ratio = 1.0 if self.penalty == "lasso" else self.l1_ratio
                known = Start(*(each[~constant] for each in start)) if start else None
                lasso = fit_lasso(design, outputs[~constant], ratio, self.folds, self.num_penalties, start=known)
                values[~constant], penalties[~constant] = lasso.coefficients, lasso.penalties
        choices: dict[str, Any] = {
            "penalties": [float(penalty) if np.isfinite(penalty) else None for penalty in penalties],
            "subsets_per_example": num_subsets / num_examples,
        }
        zero = np.flatnonzero(~values.any(axis=1) & ~constant).tolist()
        if zero:
            logger.warning(
                f"{self.name}: for {len(zero)} queries (the first is {zero[0]}) no example predicts outputs of "
                "subsets held out, and all scores are 0: retrain on more subsets, or use penalty='ridge'."
            )
            choices["zero_queries"] = zero
        return Estimated(values, note_constant(choices, constant, self.name))


def _start(previous: Scores, own: np.ndarray) -> Start:
    """An earlier fit from its scores, and what of them its examples have of their own."""
    penalties = previous.provenance["choices"]["penalties"]
    return Start(own.astype(np.float64), np.array([np.inf if each is None else each for each in penalties]))
