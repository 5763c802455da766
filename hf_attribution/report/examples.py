"""Queries beside the training examples that helped and harmed them most."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from hf_attribution.scores import Scores


def ranked(scores: Scores, query: int, k: int) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """The k most helpful and the k most harmful training examples of a query, as (row, score).

    Args:
        scores: Scores `[Q, N]`.
        query: The query's row.
        k: How many of each.

    Returns:
        The most helpful, best first, and the most harmful, worst first.
    """
    row = scores.values[query]
    order = np.argsort(-row, kind="stable")
    return [(int(i), float(row[i])) for i in order[:k]], [(int(i), float(row[i])) for i in order[::-1][:k]]


def text_examples(
    scores: Scores, train_dataset: Any, query_dataset: Any, queries: Sequence[int], column: str, k: int = 3
) -> Table:
    """A table of text queries and the training texts that shaped them.

    Args:
        scores: Scores `[Q, N]`.
        train_dataset: The training rows.
        query_dataset: The query rows.
        queries: Which queries to show.
        column: The column that holds the text.
        k: How many helpful and harmful examples of each.

    Returns:
        A rich table.
    """
    table = Table(title=f"What shaped some queries, by {scores.method}", title_justify="left", show_lines=False)
    for name in ("", "score", "row", "text"):
        table.add_column(name, justify="right" if name in ("score", "row") else "left")
    for query in queries:
        table.add_row("query", "", str(query), _describe(query_dataset, query, column), style="bold")
        helpful, harmful = ranked(scores, query, k)
        for kind, found in (("helped", helpful), ("harmed", harmful)):
            for row, score in found:
                table.add_row(kind, f"{score:.3g}", str(row), _describe(train_dataset, row, column))
        table.add_section()
    return table


def plot_image_examples(
    scores: Scores,
    train_dataset: Any,
    query_dataset: Any,
    queries: Sequence[int],
    path: str | Path,
    column: str = "image",
    k: int = 5,
) -> None:
    """Draw image queries, each with the training images that helped and harmed it most.

    Args:
        scores: Scores `[Q, N]`.
        train_dataset: The training rows.
        query_dataset: The query rows.
        queries: Which queries to show.
        path: A `.png`, `.svg` or `.pdf` file to write.
        column: The column that holds the image.
        k: How many helpful and harmful images of each.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.95 * (2 * k + 1), 1.25 * len(queries)), layout="constrained")
    axes = figure.subplots(len(queries), 2 * k + 1, squeeze=False)
    for line, query in zip(axes, queries, strict=True):
        helpful, harmful = ranked(scores, query, k)
        shown = [(query_dataset, query, "query", "black")]
        shown += [(train_dataset, row, f"{score:+.2g}", "tab:green") for row, score in helpful]
        shown += [(train_dataset, row, f"{score:+.2g}", "tab:red") for row, score in harmful]
        for cell, (dataset, row, title, colour) in zip(line, shown, strict=True):
            cell.imshow(np.asarray(dataset.with_format(None)[row][column]), cmap="grey")
            cell.set_title(f"{title}\n{_label(dataset, row)}", fontsize=7, color=colour)
            cell.set_axis_off()
    figure.suptitle(f"Query, the {k} most helpful and the {k} most harmful training images, by {scores.method}")
    figure.savefig(path, dpi=150)


def _describe(dataset: Any, row: int, column: str, length: int = 160) -> str:
    text = " ".join(str(dataset.with_format(None)[row][column]).split())
    shortened = text if len(text) <= length else text[: length - 1] + "…"
    label = _label(dataset, row)
    return f"[dim]{escape(label)}[/dim] {escape(shortened)}" if label else escape(shortened)


def _label(dataset: Any, row: int) -> str:
    feature = dataset.features.get("label")
    if feature is None:
        return ""
    value = dataset.with_format(None)[row]["label"]
    return feature.int2str(value) if hasattr(feature, "int2str") else str(value)
