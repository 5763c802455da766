"""Figures for notebooks and papers, drawn by matplotlib (`pip install hf-attribution[report]`).

Each function returns a `matplotlib.figure.Figure`, which a notebook shows; `figure.savefig("lds.pdf")` writes it. None
touches pyplot's state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_attribution.counterfactuals import Counterfactuals
from hf_attribution.evaluation import evaluate_lds
from hf_attribution.report.comparison import Entry
from hf_attribution.report.content import shown_columns
from hf_attribution.report.examples import describe, label_of, ranked
from hf_attribution.scores import Scores

if TYPE_CHECKING:
    import datasets
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HELPFUL, HARMFUL = "#1f6fd6", "#c2410c"
# A baseline that costs nothing still needs a place on a logarithmic axis.
LEAST_COST = 1e-3


def plot_lds(
    scores: Scores,
    counterfactuals: Counterfactuals,
    train_dataset: datasets.Dataset | None = None,
    query: int | None = None,
) -> Figure:
    """Draw how well scores predict retraining: one query's outputs, and the LDS of all queries.

    Args:
        scores: `[Q, N]`.
        counterfactuals: Outputs of retrained models for the same queries.
        train_dataset: As for `evaluate_lds`: gives the partial LDS in the title.
        query: Whose predicted and true outputs are drawn; by default that of the median LDS.

    Returns:
        Left, a point a subset: the mean output of the models retrained on it against the sum of its scores. Right, a
        histogram of the queries' LDS, with the mean and the noise ceiling.

    Raises:
        MismatchError: Scores and counterfactuals do not belong together.
        IndexError: There is no such query.

    Example:
        >>> import numpy as np
        >>> from hf_attribution.counterfactuals import Subsets
        >>> values, subsets = np.random.default_rng(0).normal(size=(4, 30)), Subsets.random(30, 50)
        >>> truth = Counterfactuals(subsets, (subsets.masks @ values.T)[:, None])
        >>> len(plot_lds(Scores(values, method="oracle"), truth).axes)
        2
    """
    figure = _figure((9.6, 4.2))
    report = evaluate_lds(scores, counterfactuals, train_dataset)
    per_query = np.array(report.lds_per_query)
    if query is None:
        query = int(np.argsort(np.where(np.isnan(per_query), -np.inf, per_query))[len(per_query) // 2])
    if not 0 <= query < len(per_query):
        raise IndexError(f"There is no query {query}: the scores are for {len(per_query)}.")
    points, counts = figure.subplots(1, 2)
    predicted, true = scores.predict(counterfactuals.subsets)[query], counterfactuals.mean()[query]
    if counterfactuals.outputs.shape[1] > 1:  # the spread of the seeds is what no prediction can know
        seeds = counterfactuals.outputs[:, :, query]
        spread = [true - seeds.min(axis=1), seeds.max(axis=1) - true]
        points.errorbar(predicted, true, spread, fmt="none", ecolor="lightgrey", elinewidth=1, zorder=0)
    points.plot(predicted, true, "o", color=HELPFUL, markersize=4, alpha=0.8)
    measured = report.protocol.get("measurement", "output")
    points.set(
        title=f"query {query}: LDS {per_query[query]:.2f}",
        xlabel="sum of the subset's scores",
        ylabel=f"{measured} after retraining on the subset",
    )
    counts.hist(per_query[~np.isnan(per_query)], bins=20, color=HELPFUL, alpha=0.8)
    lines = [("mean", report.lds, "-"), *([] if report.ceiling is None else [("ceiling", report.ceiling, "--")])]
    for name, value, style in lines:
        counts.axvline(value, color="black", linestyle=style, linewidth=1, label=f"{name} {value:.2f}")
    low, high = report.confidence_interval
    counts.axvspan(low, high, color="black", alpha=0.12, linewidth=0, label=f"{report.confidence_level:.0%} interval")
    counts.legend(frameon=False, fontsize=8)
    counts.set(title="all queries", xlabel="LDS", ylabel="queries")
    partial = "" if report.partial_lds is None else f", partial {report.partial_lds:.2f} given '{report.group_column}'"
    figure.suptitle(f"{scores.method}: LDS {report.lds:.2f} [{low:.2f}, {high:.2f}]{partial}")
    return figure


def plot_cost(entries: Sequence[Entry], title: str = "How well scores predict retraining") -> Figure:
    """Draw LDS (and partial LDS) with interval against cost in trainings, on a logarithmic axis.

    Args:
        entries: The methods, all scored on the same retrained models: see `compare`.
        title: What stands above it.

    Returns:
        The figure. Methods whose cost or LDS is not known are left out.

    Raises:
        ValueError: There are no entries.

    Example:
        >>> plot_cost(compare({"trak": trak, "influence": influence}, truth, train))  # doctest: +SKIP
    """
    if not entries:
        raise ValueError("There is nothing to compare: pass at least one entry.")
    kinds = [("LDS", "lds", "confidence_interval", "ceiling")]
    if any(entry.report.partial_lds is not None for entry in entries):
        kinds.append(("partial LDS", "partial_lds", "partial_confidence_interval", "partial_ceiling"))
    figure = _figure((6.4 * len(kinds), 4.6))
    for axes, (name, *fields) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        _draw_costs(axes, entries, *fields)
        axes.set(xscale="log", xlabel="cost of the scores, in trainings", ylabel=name)
        axes.margins(x=0.2)
    figure.suptitle(title)
    return figure


def plot_top(
    scores: Scores,
    train_dataset: datasets.Dataset,
    query_dataset: datasets.Dataset,
    queries: Sequence[int] = (0, 1, 2),
    k: int = 5,
    column: str | None = None,
) -> Figure:
    """Draw queries, each with the training examples that helped and harmed it most.

    Args:
        scores: Scores `[Q, N]`.
        train_dataset: The training rows.
        query_dataset: The query rows.
        queries: Which queries to show.
        k: How many helpful and harmful examples of each.
        column: The column of the image or text; by default the first that a report would show.

    Returns:
        A line a query. Images: the query, the helpful, the harmful. Texts: a bar a score, with the text beside it.

    Raises:
        ValueError: No column can be shown, or a query is not there.

    Example:
        >>> plot_top(scores, train, test, queries=[3, 14])  # doctest: +SKIP
    """
    import datasets

    shown = [column] if column is not None else shown_columns(train_dataset, None, "label")[:1]
    if not shown or shown[0] not in train_dataset.column_names:
        raise ValueError(f"There is no column {column or 'of images or texts'} in {train_dataset.column_names}.")
    missing = [query for query in queries if not 0 <= query < len(scores.values)]
    if missing:
        raise ValueError(f"There is no query {missing[0]}: the scores are for {len(scores.values)}.")
    is_image = isinstance(train_dataset.features[shown[0]], datasets.Image)
    draw = _draw_images if is_image else _draw_texts
    return draw(scores, train_dataset, query_dataset, queries, k, shown[0])


def _draw_images(
    scores: Scores, train_dataset: Any, query_dataset: Any, queries: Sequence[int], k: int, column: str
) -> Figure:
    figure = _figure((0.95 * (2 * k + 1), 1.25 * len(queries)))
    axes = figure.subplots(len(queries), 2 * k + 1, squeeze=False)
    for line, query in zip(axes, queries, strict=True):
        helpful, harmful = ranked(scores, query, k)
        shown = [(query_dataset, query, "query", "black")]
        shown += [(train_dataset, row, f"{score:+.2g}", HELPFUL) for row, score in helpful]
        shown += [(train_dataset, row, f"{score:+.2g}", HARMFUL) for row, score in harmful]
        for cell in line:
            cell.set_axis_off()
        for cell, (dataset, row, title, colour) in zip(line, shown, strict=False):
            image = dataset.with_format(None)[int(row)][column]
            if image is None:
                cell.text(0.5, 0.5, "no image", ha="center", va="center", fontsize=7)
            else:
                cell.imshow(np.asarray(image), cmap="grey")
            cell.set_title(f"{title}\n{label_of(dataset, row)}", fontsize=7, color=colour, parse_math=False)
    figure.suptitle(f"Query, the {k} most helpful and the {k} most harmful training images, by {scores.method}")
    return figure


def _draw_texts(
    scores: Scores, train_dataset: Any, query_dataset: Any, queries: Sequence[int], k: int, column: str
) -> Figure:
    figure = _figure((9.6, (0.7 + 0.3 * 2 * k) * len(queries)))
    for axes, query in zip(figure.subplots(len(queries), 1, squeeze=False)[:, 0], queries, strict=True):
        helpful, harmful = ranked(scores, query, k)
        shown = [*helpful, *reversed(harmful)]
        places = np.arange(len(shown))[::-1]
        values = [score for _, score in shown]
        axes.barh(places, values, color=[HELPFUL if value > 0 else HARMFUL for value in values], alpha=0.35)
        axes.axvline(0, color="grey", linewidth=0.8)
        for place, (row, score) in zip(places, shown, strict=True):
            text = f"{score:+.2g}  {describe(train_dataset, row, column, 110)}"
            axes.text(0.01, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=7,
                      parse_math=False)  # fmt: skip
        axes.set_title(f"query {query}: {describe(query_dataset, query, column, 110)}", fontsize=8, loc="left",
                       parse_math=False)  # fmt: skip
        axes.set_yticks([])
        axes.tick_params(labelsize=7)
    figure.suptitle(f"The {k} most helpful and the {k} most harmful training texts, by {scores.method}")
    return figure


def _draw_costs(axes: Axes, entries: Sequence[Entry], score: str, interval: str, ceiling: str) -> None:
    for number, entry in enumerate(entries):
        value, bounds = getattr(entry.report, score), getattr(entry.report, interval)
        if value is None or math.isnan(value) or math.isnan(entry.trainings):
            continue
        cost, colour = max(entry.trainings, LEAST_COST), f"C{number % 10}"
        axes.errorbar(cost, value, [[value - bounds[0]], [bounds[1] - value]], fmt="o", color=colour, capsize=3)
        axes.annotate(entry.label, (cost, value), (6, 5), textcoords="offset points", fontsize=8, color=colour,
                      parse_math=False)  # fmt: skip
    bound = getattr(entries[0].report, ceiling)
    if bound is not None:
        axes.axhline(bound, color="grey", linestyle="--", linewidth=1)
        axes.annotate("noise ceiling", (0.01, bound), xycoords=("axes fraction", "data"), va="bottom", fontsize=8,
                      color="grey")  # fmt: skip
    axes.axhline(0, color="lightgrey", linewidth=0.8, zorder=0)


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install hf-attribution[report].") from error
    return Figure(figsize=size, dpi=150, layout="constrained")
