"""Queries beside the training examples that helped and harmed them most."""

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from hf_attribution.scores import Scores, largest


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
    found = (largest(sign * row, min(k, len(row))) for sign in (1, -1))
    helpful, harmful = ([(int(i), float(row[i])) for i in rows] for rows in found)
    return helpful, harmful


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
        table.add_row("query", "", str(query), _marked_up(query_dataset, query, column), style="bold")
        helpful, harmful = ranked(scores, query, k)
        for kind, found in (("helped", helpful), ("harmed", harmful)):
            for row, score in found:
                table.add_row(kind, f"{score:.3g}", str(row), _marked_up(train_dataset, row, column))
        table.add_section()
    return table


def describe(dataset: Any, row: int, column: str, length: int = 160) -> str:
    """The beginning of a row's text, on one line, behind its label."""
    label, text = label_of(dataset, row), _beginning(dataset, row, column, length)
    return f"{label}: {text}" if label else text


def label_of(dataset: Any, row: int) -> str:
    """A row's label as people call it; empty where there is none."""
    feature = dataset.features.get("label")
    if feature is None:
        return ""
    value = dataset.with_format(None)[int(row)]["label"]
    return feature.int2str(value) if hasattr(feature, "int2str") and value is not None else str(value)


def _beginning(dataset: Any, row: int, column: str, length: int) -> str:
    # Of 10 MB of text no more is split than can be shown.
    text = " ".join(str(dataset.with_format(None)[int(row)][column])[: 10 * length].split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _marked_up(dataset: Any, row: int, column: str) -> str:
    label = label_of(dataset, row)
    text = escape(_beginning(dataset, row, column, 160))
    return f"[dim]{escape(label)}[/dim] {text}" if label else text
