"""The words and tables of a page that hold for all queries: headline, comparison, protocol, provenance."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_attribution.counterfactuals import Counterfactuals
from hf_attribution.part_scores import PartScores
from hf_attribution.report.comparison import Entry, best_first
from hf_attribution.report.content import clean
from hf_attribution.scores import Scores

_LONGEST = 400


def headline(scores: Scores, num_shown: int, k: int) -> str:
    """What the page is about, in a line."""
    num_queries, num_examples = scores.values.shape
    queries = "1 query" if num_queries == 1 else f"{num_queries:,} queries"
    shown = "" if num_shown == num_queries else f" (the first {num_shown:,} are shown)"
    return clean(
        f"{scores.method}: {queries}{shown} × {num_examples:,} training examples, of which the page holds the "
        f"{k} at either end of each query"
    )


def table_rows(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """The comparison as text, best first, the noise ceiling last."""
    rows = []
    for entry in best_first(entries):
        report = entry.report
        rows.append(
            {
                "method": clean(entry.label),
                "lds": number(report.lds),
                "interval": interval(report.confidence_interval),
                "partial": number(report.partial_lds),
                "partial_interval": interval(report.partial_confidence_interval),
                "seconds": number(entry.seconds, ".1f"),
                "trainings": number(entry.trainings, ".2f"),
            }
        )
    return rows


def number(value: float | None, form: str = ".3f") -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None or math.isnan(value) else format(value, form)


def interval(bounds: tuple[float, float] | None) -> str:
    """An interval, empty where there is none."""
    return "" if bounds is None or math.isnan(bounds[0]) else f"[{bounds[0]:.2f}, {bounds[1]:.2f}]"


def facts(
    scores: Scores, counterfactuals: Counterfactuals | None, checked: Mapping[str, bool], tokens: PartScores | None
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Provenance and protocol, as tables of names and values.

    Args:
        scores: The scores.
        counterfactuals: Outputs of retrained models.
        checked: Whether the datasets' fingerprints were compared.
        tokens: Scores of tokens.

    Returns:
        Titles with their lines.
    """
    said = {
        name: "are those that were attributed (fingerprint compared)"
        if right
        else "have the right number; which columns the scores saw is not known here, so that no more was compared"
        for name, right in checked.items()
    }
    scored = {"method": scores.method, **scores.settings}
    found = [
        ("Method and settings", lines(scored)),
        ("Provenance of the scores", lines({**scores.provenance, "train rows": said["train"],
                                            "query rows": said["query"], "fingerprint": scores.fingerprint})),
    ]  # fmt: skip
    if tokens is not None:
        found.append(("Colours of tokens", lines({"method": tokens.method, **tokens.settings})))
    if counterfactuals is not None:
        found.append(("Protocol of the retrainings", lines(counterfactuals.protocol)))
        found.append(("Provenance of the retrainings", lines(counterfactuals.provenance)))
    return found


def lines(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as names and values, long ones cut.

    Args:
        record: JSON.
        prefix: What stands before the names.

    Returns:
        Pairs.

    Example:
        >>> lines({"seconds": 2.51, "fingerprints": {"train": "3f"}, "used_subsets": ["a", "b"]})
        [('seconds', '2.51'), ('fingerprints · train', '3f'), ('used_subsets', '2 values')]
    """
    found: list[tuple[str, str]] = []
    for name, value in record.items():
        if isinstance(value, Mapping) and value:
            found += lines(value, f"{prefix}{name} · ")
            continue
        if isinstance(value, float):
            text = f"{value:.6g}"
        elif name == "used_subsets" and isinstance(value, (list, tuple)):
            text = f"{len(value)} values"
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"
        found.append((clean(f"{prefix}{name}"), clean(shown)))
    return found
