"""Methods side by side: how well each predicts retraining, and what it cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from hf_attribution.counterfactuals import Counterfactuals
from hf_attribution.errors import MismatchError
from hf_attribution.evaluation import LDSReport, evaluate_lds
from hf_attribution.scores import Scores

if TYPE_CHECKING:
    import datasets


@dataclasses.dataclass(frozen=True)
class Entry:
    """One method in a comparison.

    Args:
        label: What it is called there.
        report: Its LDS.
        seconds: What computing its scores took.
        trainings: The same, in units of one training of the model.
    """

    label: str
    report: LDSReport
    seconds: float
    trainings: float


def compare(
    scores: Mapping[str, Scores],
    counterfactuals: Counterfactuals,
    train_dataset: datasets.Dataset | None = None,
    group_column: str | None = None,
    confidence_level: float = 0.95,
) -> list[Entry]:
    """Judge several scores by the same retrained models, and say what each cost.

    The unit of cost is one training on all of the data: a retraining on half of it took half as long. What scores do
    not record (the trainings of an ensemble they were given, say) is not in their cost.

    Args:
        scores: Scores by what they are to be called.
        counterfactuals: Outputs of retrained models.
        train_dataset: As for `evaluate_lds`.
        group_column: As for `evaluate_lds`.
        confidence_level: Of the intervals.

    Returns:
        An entry for each, in their order. Seconds and trainings are NaN where they are not recorded.

    Raises:
        MismatchError: Scores and counterfactuals do not belong together; the message names the scores.
        ValueError: As for `evaluate_lds`.

    Example:
        >>> import numpy as np
        >>> from hf_attribution.counterfactuals import Subsets
        >>> values, subsets = np.random.default_rng(0).normal(size=(4, 30)), Subsets.random(30, 50)
        >>> truth = Counterfactuals(subsets, (subsets.masks @ values.T)[:, None], provenance={"seconds": 100.0})
        >>> oracle = Scores(values, method="oracle", provenance={"seconds": 8.0})
        >>> [(entry.label, round(entry.report.lds, 2), entry.trainings) for entry in compare({"it": oracle}, truth)]
        [('it', 1.0, 2.0)]
    """
    num_subsets, num_seeds, _ = counterfactuals.outputs.shape
    retraining = counterfactuals.provenance.get("seconds", math.nan) / (num_subsets * num_seeds)
    training = retraining / counterfactuals.subsets.fraction
    entries = []
    for label, each in scores.items():
        try:
            report = evaluate_lds(each, counterfactuals, train_dataset, group_column, confidence_level)
        except MismatchError as error:
            raise MismatchError(f"{label}: {error}") from error
        seconds = each.provenance.get("seconds", math.nan)
        entries.append(Entry(label, report, seconds, seconds / training))
    return entries


def comparison_table(entries: Sequence[Entry], title: str) -> Table:
    """A table of methods, best first.

    Args:
        entries: The methods, all scored on the same retrained models.
        title: What stands above it.

    Returns:
        A rich table: print it with `rich.print` or a `rich.console.Console`.
    """
    partial = any(entry.report.partial_lds is not None for entry in entries)
    table = Table(title=title, title_justify="left")
    table.add_column("method", overflow="fold")
    for name in ["LDS", *(["partial LDS"] if partial else []), "seconds", "trainings"]:
        table.add_column(name, justify="right", no_wrap=True)
    for entry in best_first(entries):
        report = entry.report
        row = [entry.label, _score(report.lds, report.confidence_interval)]
        if partial:
            row.append(_score(report.partial_lds, report.partial_confidence_interval))
        table.add_row(*row, f"{entry.seconds:.1f}", f"{entry.trainings:.2f}")
    ceilings = ["noise ceiling", _number(entries[0].report.ceiling)]
    table.add_section()
    table.add_row(*ceilings, *([_number(entries[0].report.partial_ceiling)] if partial else []), "", "", style="dim")
    return table


def best_first(entries: Sequence[Entry]) -> list[Entry]:
    """Entries by their LDS; where it is not defined, last."""
    return sorted(entries, key=lambda entry: math.inf if math.isnan(entry.report.lds) else -entry.report.lds)


def _score(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None or interval is None or math.isnan(value):
        return "undefined"
    return f"{_short(value, 3)} [{_short(interval[0], 2)}, {_short(interval[1], 2)}]"


def _short(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("0.", ".", 1)


def _number(value: float | None) -> str:
    return "needs 2 seeds" if value is None else _short(value, 3)
