"""Choosing a setting by retrained subsets, and an honest score of what was chosen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from hf_attribution.counterfactuals import Counterfactuals
from hf_attribution.evaluation import LDSReport, evaluate_lds
from hf_attribution.scores import Scores

# No interval is wanted of a candidate's score: the fewest resamples that the metric takes.
_RESAMPLES = 100


@dataclasses.dataclass(frozen=True, eq=False)
class CrossFit:
    """What a choice among candidates scores on subsets that it was not made on.

    Attributes:
        lds: The mean over folds of the LDS of what the other folds chose.
        partial_lds: The same of the partial LDS; None without groups.
        reports: The report of every fold.
        settings: What the other folds chose, for every fold.
        scores: What all subsets together choose. It has used them: score it on others, or report `lds`.
    """

    lds: float
    partial_lds: float | None
    reports: tuple[LDSReport, ...]
    settings: tuple[dict[str, Any], ...]
    scores: Scores

    def __str__(self) -> str:
        partial = "" if self.partial_lds is None else f", partial LDS {self.partial_lds:.3f}"
        chosen = "; ".join(str(settings) for settings in self.settings)
        return f"LDS {self.lds:.3f}{partial}, cross-fitted over {len(self.reports)} folds, which chose {chosen}"


def choose(
    candidates: Sequence[Scores],
    counterfactuals: Counterfactuals,
    train_dataset: datasets.Dataset | None = None,
    group_column: str | None = None,
    criterion: str = "lds",
) -> Scores:
    """The candidate that predicts some retrained subsets best: the same method with several dampings, say.

    The subsets count as used from then on: `evaluate_lds` refuses to score what was chosen on them.

    Args:
        candidates: Scores for the same queries and training examples.
        counterfactuals: Outputs of models retrained on a few subsets, 16 or more.
        train_dataset: For the partial LDS, as in `evaluate_lds`.
        group_column: As there.
        criterion: `"lds"` or `"partial_lds"`.

    Returns:
        The best candidate. Its provenance names all candidates with their numbers.

    Raises:
        ValueError: If there are no candidates, the criterion is unknown or undefined, or needs groups that are not
            there.
        MismatchError: If a candidate and the counterfactuals are of different data, or it has used them already.

    Example:
        >>> dampings = [
        ...     trainer.attribute(test, method=Influence(damping=d)) for d in (0.03, 0.1, 0.3, 1.0)
        ... ]  # doctest: +SKIP
        >>> best = choose(dampings, truth.select(range(20)))  # doctest: +SKIP
        >>> print(evaluate_lds(best, truth.select(range(20, len(truth)))))  # doctest: +SKIP
    """
    if not candidates:
        raise ValueError("There are no candidates to choose from.")
    if criterion not in ("lds", "partial_lds"):
        raise ValueError(f"criterion must be 'lds' or 'partial_lds', not {criterion!r}.")
    found = [_criterion(scores, counterfactuals, train_dataset, group_column, criterion) for scores in candidates]
    best = candidates[int(np.argmax(found))]
    listed = [
        {"method": scores.method, "settings": scores.settings, criterion: value}
        for scores, value in zip(candidates, found, strict=True)
    ]
    used = [*best.provenance.get("used_subsets", ()), *counterfactuals.subsets.keys()]
    provenance = {**best.provenance, "used_subsets": used, "chosen_from": listed}
    return dataclasses.replace(best, provenance=provenance)


def cross_fit(
    candidates: Sequence[Scores],
    counterfactuals: Counterfactuals,
    train_dataset: datasets.Dataset | None = None,
    group_column: str | None = None,
    criterion: str = "lds",
    num_folds: int = 2,
) -> CrossFit:
    """Choose among candidates and score the choice, on the same retrained subsets but never the same ones at once.

    Args:
        candidates: Scores for the same queries and training examples.
        counterfactuals: Outputs of models retrained on subsets.
        train_dataset: For the partial LDS, as in `evaluate_lds`.
        group_column: As there.
        criterion: What to choose by, `"lds"` or `"partial_lds"`.
        num_folds: Parts that the subsets fall into: each is scored by what the others choose.

    Returns:
        The cross-fitted score, and the choice of all subsets together.

    Raises:
        ValueError: If there are fewer than 2 folds, or fewer than 3 subsets in a fold; or as `choose`.
        MismatchError: As `choose`.

    Example:
        >>> print(cross_fit(dampings, truth, train))  # doctest: +SKIP
    """
    num_subsets = len(counterfactuals.subsets)
    if num_folds < 2 or num_subsets < 3 * num_folds:
        raise ValueError(
            f"{num_subsets} subsets cannot be cross-fitted in {num_folds} folds: there must be at least 2 folds, of 3 "
            "subsets each."
        )
    groups = (train_dataset, group_column)
    reports, settings = [], []
    for fold in range(num_folds):
        here = np.arange(num_subsets) % num_folds == fold
        chosen = choose(candidates, counterfactuals.select(np.flatnonzero(~here)), *groups, criterion)
        reports.append(evaluate_lds(chosen, counterfactuals.select(np.flatnonzero(here)), *groups))
        settings.append({"method": chosen.method, **chosen.settings})
    partial = [report.partial_lds for report in reports]
    return CrossFit(
        lds=float(np.mean([report.lds for report in reports])),
        partial_lds=None if None in partial else float(np.mean(np.array(partial, dtype=float))),
        reports=tuple(reports),
        settings=tuple(settings),
        scores=choose(candidates, counterfactuals, *groups, criterion),
    )


def _criterion(
    scores: Scores,
    counterfactuals: Counterfactuals,
    train_dataset: datasets.Dataset | None,
    group_column: str | None,
    criterion: str,
) -> float:
    report = evaluate_lds(scores, counterfactuals, train_dataset, group_column, num_resamples=_RESAMPLES)
    value = getattr(report, criterion)
    if value is None:
        raise ValueError(
            "criterion='partial_lds' needs groups, and enough subsets for them: pass the train_dataset (and its "
            "group_column)."
        )
    if math.isnan(value):
        raise ValueError(f"The {criterion} of {scores.method} is undefined on these subsets: its scores are constant.")
    return float(value)
