"""Methods side by side: how well each predicts retraining, and what it cost."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from hf_attribution.evaluation import LDSReport

# A baseline that costs nothing still needs a place on a logarithmic axis.
LEAST_COST = 1e-3


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
    for entry in sorted(entries, key=lambda entry: -_sortable(entry.report.lds)):
        report = entry.report
        row = [entry.label, _score(report.lds, report.confidence_interval)]
        if partial:
            row.append(_score(report.partial_lds, report.partial_confidence_interval))
        table.add_row(*row, f"{entry.seconds:.1f}", f"{entry.trainings:.2f}")
    ceilings = ["noise ceiling", _number(entries[0].report.ceiling)]
    table.add_section()
    table.add_row(*ceilings, *([_number(entries[0].report.partial_ceiling)] if partial else []), "", "", style="dim")
    return table


def plot_comparison(entries: Sequence[Entry], title: str, path: str | Path) -> None:
    """Draw LDS (and partial LDS) with interval against cost in trainings, on a logarithmic axis.

    Args:
        entries: The methods, all scored on the same retrained models.
        title: What stands above it.
        path: A `.png`, `.svg` or `.pdf` file to write.
    """
    from matplotlib.figure import Figure

    kinds = [("LDS", "lds", "confidence_interval", "ceiling")]
    if any(entry.report.partial_lds is not None for entry in entries):
        kinds.append(("partial LDS", "partial_lds", "partial_confidence_interval", "partial_ceiling"))
    figure = Figure(figsize=(6.4 * len(kinds), 4.6), layout="constrained")
    for position, (name, score, interval, ceiling) in enumerate(kinds):
        axes = figure.add_subplot(1, len(kinds), position + 1)
        for number, entry in enumerate(entries):
            value, bounds = getattr(entry.report, score), getattr(entry.report, interval)
            if value is None or math.isnan(value):
                continue
            cost, colour = max(entry.trainings, LEAST_COST), f"C{number % 10}"
            axes.errorbar(cost, value, [[value - bounds[0]], [bounds[1] - value]], fmt="o", color=colour, capsize=3)
            axes.annotate(entry.label, (cost, value), (6, 5), textcoords="offset points", fontsize=8, color=colour)
        if getattr(entries[0].report, ceiling) is not None:
            axes.axhline(getattr(entries[0].report, ceiling), color="grey", linestyle="--", linewidth=1)
            axes.annotate("noise ceiling", (0.01, getattr(entries[0].report, ceiling)),
                          xycoords=("axes fraction", "data"), va="bottom", fontsize=8, color="grey")  # fmt: skip
        axes.axhline(0, color="lightgrey", linewidth=0.8, zorder=0)
        axes.set(xscale="log", xlabel="cost of the scores, in trainings", ylabel=name)
        axes.margins(x=0.2)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def _score(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None or interval is None or math.isnan(value):
        return "undefined"
    return f"{_short(value, 3)} [{_short(interval[0], 2)}, {_short(interval[1], 2)}]"


def _short(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("0.", ".", 1)


def _number(value: float | None) -> str:
    return "needs 2 seeds" if value is None else _short(value, 3)


def _sortable(value: float) -> float:
    return -math.inf if math.isnan(value) else value
