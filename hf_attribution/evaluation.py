"""The linear datamodeling score of an attribution, with what is needed to judge it."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from hf_attribution.counterfactuals import Counterfactuals
from hf_attribution.errors import MismatchError
from hf_attribution.metric_cache import metric_core
from hf_attribution.scores import Scores

LABEL_COLUMNS = ("label", "labels")


@dataclass(frozen=True)
class LDSReport:
    """A linear datamodeling score with its interval, ceiling and protocol. Print it, or take `to_dict()`.

    Attributes:
        method: That was scored.
        lds: Mean over the queries whose correlation is defined; NaN if there is none.
        confidence_interval: For new queries and new subsets.
        confidence_level: Of the intervals.
        lds_per_query: `[Q]`; NaN where predictions or outputs do not vary.
        p_values: `[Q]`, two-sided.
        share_significant: Share of the defined queries with p < 0.05.
        num_undefined: Queries left out of the mean.
        ceiling: What a perfect prediction is expected to score; None with one seed a subset.
        protocol: How the outputs came about: that of the counterfactuals.
        group_column: The column whose counts were regressed out for the partial score, if any.
        num_groups: How many groups it has.
        partial_lds: The score of what is left; None without groups. The other `partial_` numbers likewise.
        partial_confidence_interval: As above.
        partial_lds_per_query: NaN also where the counts explain a row exactly.
        partial_num_undefined: As above.
        partial_ceiling: As above.
    """

    method: str
    lds: float
    confidence_interval: tuple[float, float]
    confidence_level: float
    lds_per_query: list[float]
    p_values: list[float]
    share_significant: float
    num_undefined: int
    ceiling: float | None
    protocol: dict[str, Any]
    group_column: str | None = None
    num_groups: int | None = None
    partial_lds: float | None = None
    partial_confidence_interval: tuple[float, float] | None = None
    partial_lds_per_query: list[float] | None = None
    partial_num_undefined: int | None = None
    partial_ceiling: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as a dictionary."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        plain = _line(self.lds, self.confidence_interval, self.confidence_level, self.ceiling)
        lines = [f"LDS of {self.method}", f"  LDS          {plain}"]
        undefined = f"{self.num_undefined} of {len(self.lds_per_query)} queries"
        if self.partial_lds is not None and self.partial_confidence_interval is not None:
            interval, ceiling = self.partial_confidence_interval, self.partial_ceiling
            partial = _line(self.partial_lds, interval, self.confidence_level, ceiling)
            lines.append(f"  partial LDS  {partial}, given counts of '{self.group_column}'")
            undefined += f", partial {self.partial_num_undefined}"
        elif self.group_column is not None:
            lines.append(
                f"  partial LDS  needs {_subsets_needed(self.num_groups or 0)} subsets "
                f"for the {self.num_groups} groups of '{self.group_column}'"
            )
        lines += [f"  protocol     {_protocol_line(self.protocol)}", f"  undefined    {undefined}"]
        return "\n".join(lines)


def evaluate_lds(
    scores: Scores,
    counterfactuals: Counterfactuals,
    train_dataset: datasets.Dataset | None = None,
    group_column: str | None = None,
    confidence_level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> LDSReport:
    """Judge scores by retrained models: the linear datamodeling score (Park et al. 2023) and what bounds it.

    The numbers are those of the metric `lds`. On labelled data most of a plain LDS is how many examples of
    each class a subset holds, so that with a `train_dataset` the partial LDS given these counts comes too.

    Args:
        scores: `[Q, N]`.
        counterfactuals: Outputs for the same Q queries of models retrained on subsets of the N examples.
        train_dataset: The N training examples. Its column `label` or `labels` gives the groups, if it holds
            an integer a row.
        group_column: Another column for the groups: a source, an author, a class.
        confidence_level: Of the intervals.
        num_resamples: Bootstrap resamples.
        seed: Of the bootstrap.

    Returns:
        The report.

    Raises:
        MismatchError: Scores and counterfactuals are of different data or measurements, or the method was
            fitted on subsets that it would be scored on.
        ValueError: There are fewer than 3 subsets, `group_column` is not a column of one value a row, or it
            has too many groups for the subsets.

    Example:
        >>> import numpy as np
        >>> from hf_attribution.counterfactuals import Subsets
        >>> values = np.random.default_rng(0).normal(size=(4, 30))
        >>> subsets = Subsets.random(30, 50)
        >>> outputs = np.repeat((subsets.masks @ values.T)[:, None], 2, axis=1)  # two equal seeds
        >>> report = evaluate_lds(Scores(values, method="oracle"), Counterfactuals(subsets, outputs))
        >>> round(report.lds, 3), round(report.ceiling, 3)
        (1.0, 1.0)
    """
    _check_belong_together(scores, counterfactuals)
    num_subsets = len(counterfactuals.subsets)
    counts, column = _group_counts(counterfactuals, train_dataset, group_column)
    num_groups = None if counts is None else counts.shape[1]
    if num_groups is not None and num_subsets < _subsets_needed(num_groups):
        if group_column is not None:
            raise ValueError(
                f"The {num_groups} groups of column '{group_column}' need {_subsets_needed(num_groups)} "
                f"subsets for a partial LDS and there are {num_subsets}: retrain on more, or group coarser."
            )
        counts = None  # a label column that nobody asked for; the report says what it would need

    numbers = metric_core("lds").compute_lds(
        scores.predict(counterfactuals.subsets),
        counterfactuals.mean(),
        covariates=counts,
        confidence_level=confidence_level,
        num_resamples=num_resamples,
        seed=seed,
    )
    partial_ceiling = None
    if counts is not None:
        partial_ceiling = _ceiling(counterfactuals, counts)
    known = {
        "fraction": counterfactuals.subsets.fraction,
        "num_subsets": num_subsets,
        "seeds": counterfactuals.outputs.shape[1],
    }
    return LDSReport(
        method=scores.method,
        confidence_level=confidence_level,
        ceiling=_ceiling(counterfactuals),
        partial_ceiling=partial_ceiling,
        protocol={**known, **counterfactuals.protocol},
        group_column=column,
        num_groups=num_groups,
        **numbers,
    )


def _check_belong_together(scores: Scores, counterfactuals: Counterfactuals) -> None:
    num_queries, num_outputs = len(scores.values), counterfactuals.outputs.shape[2]
    if num_queries != num_outputs:
        raise MismatchError(
            f"The scores are for {num_queries} queries and the counterfactuals for {num_outputs}: "
            "attribute the query dataset that the retrained models were asked about."
        )
    ours, theirs = (each.provenance.get("fingerprints", {}) for each in (scores, counterfactuals))
    for name in ("train", "query"):
        if name in ours and name in theirs and ours[name] != theirs[name]:
            raise MismatchError(
                f"Scores and counterfactuals are of different {name} datasets (fingerprints {ours[name]} and "
                f"{theirs[name]}): pass the same dataset, in the same order, to both."
            )
    attributed = scores.settings.get("measurement", scores.provenance.get("measurement"))
    measured = counterfactuals.protocol.get("measurement")
    if attributed is not None and measured is not None and attributed != measured:
        raise MismatchError(
            f"The scores attribute '{attributed}' and the counterfactuals measured '{measured}': "
            "use one task, with one measurement, for both."
        )
    fitted = set(scores.provenance.get("used_subsets", ()))
    shared = [m for m, key in enumerate(counterfactuals.subsets.keys()) if key in fitted] if fitted else []
    if shared:
        raise MismatchError(
            f"{len(shared)} of the {len(counterfactuals.subsets)} subsets (the first is {shared[0]}) fed "
            f"{scores.method} and would be counted in its favour: score it on other subsets."
        )


def read_groups(train_dataset: datasets.Dataset | None, column: str, num_examples: int) -> list[Any]:
    """Read the group of each training example.

    Args:
        train_dataset: The training data.
        column: The column that says it.
        num_examples: N, as the subsets have it.

    Returns:
        `[N]`.

    Raises:
        ValueError: There is no dataset, the column is not there, or it does not hold one group a row.
    """
    if train_dataset is None:
        raise ValueError(f"group_column='{column}' needs the train_dataset that has this column.")
    _check_rows(train_dataset, num_examples)
    if column not in train_dataset.column_names:
        raise ValueError(f"train_dataset has no column '{column}'; it has {train_dataset.column_names}.")
    groups = train_dataset.with_format(None)[column][:]
    for row, group in enumerate(groups):
        if group is None or isinstance(group, (list, dict)):
            raise ValueError(f"Column '{column}' must hold one group a row; row {row} holds {group!r}.")
    return groups


def _check_rows(train_dataset: datasets.Dataset, num_examples: int) -> None:
    if len(train_dataset) != num_examples:
        raise MismatchError(
            f"train_dataset has {len(train_dataset)} rows and the subsets are of {num_examples}: "
            "pass the dataset that was attributed and retrained on."
        )


def _group_counts(
    counterfactuals: Counterfactuals, train_dataset: datasets.Dataset | None, group_column: str | None
) -> tuple[np.ndarray | None, str | None]:
    """Return how many of each group each subset holds, `[M, K]`, and the column of the groups, if any."""
    num_examples = counterfactuals.subsets.num_examples
    if group_column is None and train_dataset is not None:
        _check_rows(train_dataset, num_examples)
        group_column = group_column_of(train_dataset)
    if group_column is None:
        return None, None
    return counterfactuals.subsets.counts(read_groups(train_dataset, group_column, num_examples)), group_column


def group_column_of(dataset: datasets.Dataset) -> str | None:
    """The column of class labels, one integer a row, if there is one."""
    for column in LABEL_COLUMNS:
        feature = dataset.features.get(column)
        is_scalar = isinstance(feature, (datasets.ClassLabel, datasets.Value))
        if is_scalar and str(feature.dtype).startswith(("int", "uint", "bool")):
            return column
    return None


def _subsets_needed(num_groups: int) -> int:
    """Return one more than the metric asks for: the ceiling's regression wants it."""
    return num_groups + 4


def _ceiling(counterfactuals: Counterfactuals, covariates: np.ndarray | None = None) -> float | None:
    """Return the noise ceiling, or None where one seed cannot tell or no query's outputs vary."""
    if counterfactuals.outputs.shape[1] < 2 or np.isnan(counterfactuals.reliability(covariates)).all():
        return None
    return counterfactuals.mean_ceiling(covariates)


def _line(value: float, interval: tuple[float, float], level: float, ceiling: float | None) -> str:
    bound = "ceiling unknown (one seed)" if ceiling is None else f"ceiling {ceiling:.3f}"
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}] at {level:.0%}, {bound}"


def _protocol_line(protocol: dict[str, Any]) -> str:
    def said(key: str) -> Any:
        return protocol.get(key, "not recorded")

    return (
        f"{said('name')}: {said('num_subsets')} subsets keep {protocol['fraction']:.3g} of the data, "
        f"seeds {said('seeds')}, initial weights {said('initial_weights')}, order {said('order')}, "
        f"measured {said('measurement')}"
    )
