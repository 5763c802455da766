"""What a page says, as plain data: of each query the examples at either end, and how far to believe them.

Scores are read a query at a time, and only the rows that are shown are read from the datasets, so that memory does not
grow with their length.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from transformers import default_data_collator

from hf_attribution.counterfactuals import Counterfactuals
from hf_attribution.data import Split
from hf_attribution.errors import MismatchError
from hf_attribution.evaluation import group_column_of, read_groups
from hf_attribution.part_scores import PartScores
from hf_attribution.report.comparison import Entry
from hf_attribution.report.content import group_name, read_items, share_of, shown_columns
from hf_attribution.report.examples import ranked
from hf_attribution.report.token_colours import TokenColours
from hf_attribution.scores import Scores, largest

# Rows of the rankings over all queries.
NUM_RANKED = 50


@dataclasses.dataclass(frozen=True)
class Rows:
    """The two datasets of a page, and what is shown of them.

    Attributes:
        train: N training rows.
        query: Q query rows.
        columns: Of the training and of the query rows: what is shown.
        group_column: The class, source or author of a row, if there is one.
        checked: Of either dataset: whether its fingerprint is the one that the scores were computed for. False
            where that could not be told, because the scores or the dataset lack what it takes.
    """

    train: datasets.Dataset
    query: datasets.Dataset
    columns: tuple[list[str], list[str]]
    group_column: str | None
    checked: dict[str, bool]


def check_datasets(
    scores: Scores,
    train: datasets.Dataset,
    query: datasets.Dataset,
    columns: Sequence[str] | None = None,
    group_column: str | None = None,
) -> Rows:
    """Refuse datasets that the scores are not for.

    Args:
        scores: `[Q, N]`.
        train: The training rows.
        query: The query rows.
        columns: What is to be shown of a row.
        group_column: The column of the group; by default a column of class labels, if there is one.

    Returns:
        The datasets with what is shown of them.

    Raises:
        MismatchError: A dataset has another length, or other rows.
        TypeError: One is no `datasets.Dataset`.
        ValueError: A column is not there.
    """
    checked = {}
    for name, dataset, length in (("train", train, scores.values.shape[1]), ("query", query, len(scores.values))):
        if not isinstance(dataset, datasets.Dataset):
            raise TypeError(f"The {name} dataset is a {type(dataset).__name__}; a page shows a datasets.Dataset.")
        if len(dataset) != length:
            raise MismatchError(
                f"The scores are for {length} {name} rows and the {name} dataset has {len(dataset)}: pass the one "
                "that was attributed, in the same order."
            )
        checked[name] = _check_fingerprint(scores.provenance, dataset, name)
    column = group_column or group_column_of(train)
    if column is not None and group_column is not None:
        read_groups(train, column, len(train))
    shown = tuple(shown_columns(dataset, columns, column) for dataset in (train, query))
    return Rows(train, query, (shown[0], shown[1]), column, checked)


def page_data(
    scores: Scores,
    rows: Rows,
    k: int,
    max_queries: int,
    self_influence: np.ndarray | None = None,
    tokens: PartScores | None = None,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """Collect what the page shows of queries and training examples.

    Args:
        scores: `[Q, N]`.
        rows: The datasets.
        k: How many helpful and harmful examples of each query.
        max_queries: The first so many queries are shown.
        self_influence: `[N]`, each example's influence on itself.
        tokens: Scores of tokens.
        tokenizer: The tokenizer of the rows' `input_ids`.

    Returns:
        JSON: `queries`, each with its content and the rows and scores at its ends; `examples`, the content of every
        training row that is named; `rankings`.
    """
    num_queries = min(len(scores.values), max_queries)
    ends = [ranked(scores, query, k) for query in range(num_queries)]
    rankings = _rankings(scores, self_influence)
    named = {row for both in ends for end in both for row, _ in end}
    named |= {row for ranking in rankings for row, _ in ranking["rows"]}
    share = share_of(len(named) + num_queries)
    colours = TokenColours(tokens, tokenizer, scores.values.shape, share) if tokens is not None else None
    pieces = colours.pieces if colours is not None else None
    examples = dict(read_items(rows.train, named, rows.columns[0], rows.group_column, share, pieces))
    contents = dict(read_items(rows.query, range(num_queries), rows.columns[1], rows.group_column, share))
    queries = []
    for query, (helpful, harmful) in enumerate(ends):
        item = {**contents[query], "helpful": _short_pairs(helpful), "harmful": _short_pairs(harmful)}
        if colours is not None:
            of_query = {row for row, _ in (*helpful, *harmful)}
            item["colours"] = {row: colours.values(query, row) for row in sorted(of_query)}
        queries.append(item)
    return {
        "columns": {"train": rows.columns[0], "query": rows.columns[1]},
        "group_column": rows.group_column,
        "queries": queries,
        "examples": examples,
        "rankings": rankings,
    }


def truth_data(entry: Entry, scores: Scores, counterfactuals: Counterfactuals, num_queries: int) -> dict[str, Any]:
    """Predicted and true outputs of each query, and their rank correlation: what a scatter shows.

    Args:
        entry: Has the LDS of each query.
        scores: `[Q, N]`.
        counterfactuals: Outputs of retrained models.
        num_queries: The first so many queries are shown.

    Returns:
        JSON: `measurement`; `lds`, `predicted` and `true`, a list each for every query. An LDS that is not defined
        is None.
    """
    predicted, true = scores.predict(counterfactuals.subsets), counterfactuals.mean()
    return {
        "measurement": str(entry.report.protocol.get("measurement", "output")),
        "lds": [short(value) for value in entry.report.lds_per_query[:num_queries]],
        "predicted": [[short(value) for value in row] for row in predicted[:num_queries]],
        "true": [[short(value) for value in row] for row in true[:num_queries]],
    }


def agreement(scores: Scores, rows: Rows, k: int) -> dict[str, float] | None:
    """How often the examples at the ends are of their query's group, over all queries.

    Args:
        scores: `[Q, N]`.
        rows: The datasets.
        k: How many helpful and harmful examples of each query.

    Returns:
        Shares `helpful` and `harmful`, and `chance`, that of a training example drawn at random. None without groups
        in both datasets.
    """
    column = rows.group_column
    if column is None or column not in rows.query.column_names or column not in rows.train.column_names:
        return None
    train, query = (_group_names(dataset, column) for dataset in (rows.train, rows.query))
    names, counts = np.unique(train, return_counts=True)
    frequency = dict(zip(names.tolist(), (counts / len(train)).tolist(), strict=True))
    shares = {"helpful": 0.0, "harmful": 0.0}
    for number, group in enumerate(query):
        for name, end in zip(shares, ranked(scores, number, k), strict=True):
            shares[name] += float(np.mean([train[row] == group for row, _ in end])) / len(query)
    return {**shares, "chance": float(np.mean([frequency.get(str(group), 0.0) for group in query]))}


def short(value: float) -> float | None:
    """A number of five digits, or None where it is none: JSON has no NaN."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _rankings(scores: Scores, self_influence: np.ndarray | None) -> list[dict[str, Any]]:
    """Training examples by what they are to themselves, and to all queries on average."""
    num_examples = scores.values.shape[1]
    found: list[tuple[str, str, np.ndarray, int]] = []
    if self_influence is not None:
        own = np.asarray(self_influence, dtype=np.float64).reshape(-1)
        if len(own) != num_examples:
            raise MismatchError(
                f"self_influence has {len(own)} values and there are {num_examples} training examples: pass that of "
                "the same training set."
            )
        note = "The model says their label because they are there: rare, hard or mislabelled examples come first."
        found.append(("Self-influence", note, own, 1))
    mean = scores.values.mean(axis=0, dtype=np.float64)
    found += [
        ("Most helpful on average", "The highest mean scores over all queries.", mean, 1),
        ("Most harmful on average", "The lowest mean scores over all queries.", mean, -1),
    ]
    rankings = []
    for title, note, values, sign in found:
        order = largest(sign * values, min(NUM_RANKED, num_examples))
        rankings.append({"title": title, "note": note, "rows": [[int(row), short(values[row])] for row in order]})
    return rankings


def _group_names(dataset: datasets.Dataset, column: str) -> np.ndarray:
    feature, values = dataset.features[column], dataset.with_format(None)[column][:]
    names = {value: group_name(feature, value) for value in set(values)}
    return np.array([names[value] for value in values])


def _check_fingerprint(provenance: Mapping[str, Any], dataset: datasets.Dataset, name: str) -> bool:
    """Whether the rows are those of the scores; False where that cannot be told."""
    expected = provenance.get("fingerprints", {}).get(name)
    columns = provenance.get("columns", {}).get(name)
    if expected is None or columns is None or not set(columns) <= set(dataset.column_names):
        return False
    kept = dataset if dataset.format["type"] == "custom" else dataset.select_columns(columns)
    found = Split(kept, default_data_collator, name=name).fingerprint
    if found != expected:
        raise MismatchError(
            f"The {name} dataset is not the one that was attributed (fingerprint {found}, expected {expected}): pass "
            "the same rows, in the same order, preprocessed alike."
        )
    return True


def _short_pairs(pairs: Sequence[tuple[int, float]]) -> list[list[Any]]:
    return [[row, short(value)] for row, value in pairs]
