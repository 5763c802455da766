"""What each kind of artefact becomes on the Hub: its tables, and what its card says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_attribution.counterfactuals import Counterfactuals
from hf_attribution.errors import MismatchError
from hf_attribution.hub.access import Place
from hf_attribution.hub.card import AttributionCardData, Page, link, write_card
from hf_attribution.hub.commits import Upload, commit
from hf_attribution.hub.tables import is_sealed, parquet_files, parquet_paths
from hf_attribution.scores import Scores
from hf_attribution.subsets import Subsets
from hf_attribution.top_scores import TopScores

if TYPE_CHECKING:
    import datasets

    from hf_attribution.evaluation import LDSReport

_SUMMARY = (
    "A score says what *including* a training example in the training adds to the measured output of a query. `query` "
    "and `train_index` are row numbers of the datasets that were attributed."
)


def push_scores(
    scores: Scores,
    place: Place,
    private: bool | None,
    card_data: AttributionCardData | None,
    top_k: int,
    train_dataset: datasets.Dataset | None,
    query_dataset: datasets.Dataset | None,
    report: LDSReport | None,
) -> str:
    """Push scores: the top and bottom of each query in long form, and the matrix. See `Scores.push_to_hub`.

    Returns:
        The URL of the commit.

    Raises:
        MismatchError: A dataset has not as many rows as the scores say.
    """
    num_queries, num_examples = scores.values.shape
    top, bottom = (
        _with_queries(each(top_k, train_dataset), query_dataset, num_queries) for each in (scores.top, scores.bottom)
    )
    said = _completed(card_data, scores.provenance, train_dataset)
    page = Page(
        title=f"{scores.method} attributions of {num_queries} queries to {num_examples:,} training examples",
        summary=_SUMMARY,
        facts=_facts(scores, said),
        tables={
            "top": _top_row(top_k, train_dataset),
            "bottom": "the same for those that lower it most",
            "scores": f"a query: `query`, and `scores`, a list of {num_examples:,} numbers",
        },
        usage="from hf_attribution import Scores\n\n"
        'scores = Scores.from_hub("{repo_id}")\n'
        'first = Scores.from_hub("{repo_id}", queries=slice(0, 10))  # reads these rows only',
        details={"settings": scores.settings, "provenance": _short(scores.provenance)},
        report=report,
        tags=_tags(scores),
    )
    return _push(
        scores.kind, {"top": top, "bottom": bottom, "scores": scores.to_dataset()}, page, said, place, private
    )


def push_top_scores(
    scores: TopScores,
    place: Place,
    private: bool | None,
    card_data: AttributionCardData | None,
    top_k: int,
    train_dataset: datasets.Dataset | None,
    query_dataset: datasets.Dataset | None,
) -> str:
    """Push the largest scores of each query: in long form, and a row a query. See `TopScores.push_to_hub`.

    Returns:
        The URL of the commit.
    """
    num_queries, k = scores.values.shape
    shown = min(top_k, k)
    top = _with_queries(scores.top(shown, train_dataset), query_dataset, num_queries)
    said = _completed(card_data, scores.provenance, train_dataset)
    page = Page(
        title=f"{scores.method} attributions of {num_queries} queries: "
        f"the top {k} of {scores.num_examples:,} training examples",
        summary=f"{_SUMMARY} Of each query only the {k} largest scores were kept.",
        facts=_facts(scores, said),
        tables={
            "top": _top_row(shown, train_dataset),
            scores.kind: f"a query: `query`, `train_indices` and `scores`, lists of {k:,}, the largest first",
        },
        usage='from hf_attribution import TopScores\n\nscores = TopScores.from_hub("{repo_id}")',
        details={"settings": scores.settings, "provenance": _short(scores.provenance)},
        tags=_tags(scores),
    )
    return _push(scores.kind, {"top": top, scores.kind: scores.to_dataset()}, page, said, place, private)


def push_counterfactuals(
    truth: Counterfactuals, place: Place, private: bool | None, card_data: AttributionCardData | None
) -> str:
    """Push ground truth: a row a query to look at, and a row a retraining. See `Counterfactuals.push_to_hub`.

    Returns:
        The URL of the commit.
    """
    num_subsets, num_seeds, num_queries = truth.outputs.shape
    num_examples = truth.subsets.num_examples
    said = _completed(card_data, truth.provenance, None)
    page = Page(
        title=f"{num_subsets * num_seeds:,} retrainings on subsets of {num_examples:,} examples: ground truth for "
        "attributions",
        summary="What models trained on subsets of a training set say about each query: what the linear "
        "datamodeling score (LDS) of a training data attribution is measured against.",
        facts={
            **_origin(said),
            "subsets": num_subsets,
            "seeds for each": num_seeds,
            "queries": num_queries,
            "noise ceiling": _ceiling(truth),
            **{name: value for name, value in truth.protocol.items() if name not in ("num_subsets", "seeds")},
            "seconds": truth.provenance.get("seconds") and round(truth.provenance["seconds"], 1),
            "fingerprint": truth.fingerprint,
        },
        tables={
            "queries": "a query: mean of its outputs, their standard deviation over the subsets (seeds averaged)"
            + (", and how reliable they are" if num_seeds > 1 else ""),
            "counterfactuals": f"a training: `subset`, `seed`, `mask` (which of the {num_examples:,} examples it saw) "
            f"and `outputs` (of the {num_queries:,} queries)",
        },
        usage="from hf_attribution import Counterfactuals, evaluate_lds\n\n"
        'truth = Counterfactuals.from_hub("{repo_id}")\n'
        "print(evaluate_lds(scores, truth))  # scores: what you attribute to the same data",
        details={"subsets": truth.subsets.description, "provenance": _short(truth.provenance)},
        tags=["ground-truth"],
    )
    return _push(truth.kind, {"queries": _by_query(truth), truth.kind: truth.to_dataset()}, page, said, place, private)


def push_subsets(subsets: Subsets, place: Place, private: bool | None, card_data: AttributionCardData | None) -> str:
    """Push subsets: a row each. See `Subsets.push_to_hub`.

    Returns:
        The URL of the commit.
    """
    said = card_data or AttributionCardData()
    page = Page(
        title=f"{len(subsets):,} subsets of {subsets.num_examples:,} training examples",
        summary="Which examples each model is to be trained on, so that several people measure attributions alike.",
        facts={
            **_origin(said),
            "fraction kept": round(float(subsets.fraction), 4),
            "fingerprint": subsets.fingerprint,
        },
        tables={subsets.kind: f"a subset: `subset`, and `mask`, a list of {subsets.num_examples:,} booleans"},
        usage='from hf_attribution.subsets import Subsets\n\nsubsets = Subsets.from_hub("{repo_id}")',
        details={"subsets": subsets.description},
    )
    return _push(subsets.kind, {subsets.kind: subsets.to_dataset()}, page, said, place, private)


def _push(
    kind: str,
    tables: Mapping[str, datasets.Dataset],
    page: Page,
    said: AttributionCardData,
    place: Place,
    private: bool | None,
) -> str:
    upload = Upload(
        kind=kind,
        files=lambda: parquet_files(tables),
        owned=parquet_paths("|".join(tables)),
        is_ours=lambda where, present: is_sealed(where, kind, present),
        card=lambda repo_id, present: write_card(page, said, repo_id, present),
    )
    return commit(place, private, upload)


def _with_queries(
    rows: datasets.Dataset, query_dataset: datasets.Dataset | None, num_queries: int
) -> datasets.Dataset:
    """Join the query's own columns to long-form rows, as `query_...`."""
    import datasets

    if query_dataset is None:
        return rows
    if len(query_dataset) != num_queries:
        raise MismatchError(
            f"The scores are for {num_queries} queries and query_dataset has {len(query_dataset)}: pass the queries "
            "that were attributed."
        )
    queries = query_dataset.with_format(None).select(rows["query"][:])
    taken = {name: f"query_{name}" for name in query_dataset.column_names}
    while set(taken.values()) & set(rows.column_names):
        taken = {name: f"query_{new}" for name, new in taken.items()}
    return datasets.concatenate_datasets([rows, queries.rename_columns(taken)], axis=1)


def _top_row(top_k: int, train_dataset: datasets.Dataset | None) -> str:
    return (
        f"a query and one of the {top_k} training examples that raise its output most: `query`, `rank`, "
        "`train_index`, `score`" + ", and the example" * (train_dataset is not None)
    )


def _facts(scores: Scores | TopScores, said: AttributionCardData) -> dict[str, Any]:
    return {
        **_origin(said),
        "method": scores.method,
        "paper": scores.provenance.get("paper"),
        "measured output": scores.provenance.get("measurement"),
        "models": len(scores.provenance.get("checkpoints", ())) or None,
        "seconds": scores.provenance.get("seconds") and round(scores.provenance["seconds"], 1),
        "fingerprint": scores.fingerprint,
    }


def _tags(scores: Scores | TopScores) -> list[str]:
    return [scores.method] if scores.method.isidentifier() else []


def _by_query(truth: Counterfactuals) -> datasets.Dataset:
    import datasets

    outputs = truth.mean()  # [Q, M]
    columns = {"query": np.arange(len(outputs)), "mean": outputs.mean(axis=1), "std": outputs.std(axis=1)}
    reliability = _reliability(truth)
    if reliability is not None:
        columns["reliability"] = reliability
    return datasets.Dataset.from_dict(columns)


def _reliability(truth: Counterfactuals) -> np.ndarray | None:
    num_subsets, num_seeds, _ = truth.outputs.shape
    return truth.reliability() if num_seeds > 1 and num_subsets > 2 else None


def _ceiling(truth: Counterfactuals) -> float | None:
    reliability = _reliability(truth)
    return None if reliability is None or np.isnan(reliability).all() else round(truth.mean_ceiling(), 3)


def _completed(
    said: AttributionCardData | None, provenance: Mapping[str, Any], train_dataset: datasets.Dataset | None
) -> AttributionCardData:
    """Add what the provenance knows of model and dataset to what was said."""
    said = said or AttributionCardData()
    found: dict[str, Any] = {}
    for name in ("model", "dataset"):
        source = provenance.get("sources", {}).get(name)
        if source and getattr(said, f"{name}_id") is None:
            found |= {f"{name}_id": source["id"], f"{name}_revision": source.get("revision")}
    return dataclasses.replace(said, **found)


def _origin(said: AttributionCardData) -> dict[str, Any]:
    return {
        "model": link(said.model_id, said.model_revision),
        "training data": link(said.dataset_id, said.dataset_revision, "datasets/"),
    }


def _short(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance for the card; the subsets that a method used may be thousands, and stand in the table."""
    used = provenance.get("used_subsets")
    return {**provenance, **({"used_subsets": len(used)} if used else {})}
