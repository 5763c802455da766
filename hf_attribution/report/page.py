"""One HTML file that shows an attribution: what shaped each query, and how far to believe it.

    scores.report("report.html", train, queries, counterfactuals=truth, others={"trak": trak})

The file is complete: it fetches nothing, and its content security policy keeps it so. Of the scores only the ends of
each query are in it, so that 200 queries x 50,000 examples make a page of some megabytes. What comes from datasets
(texts, labels, names of columns) is data to it and never markup: it is embedded as JSON without `<`, `>` and `&`, put
on the page as text, and only the two scripts whose hashes the policy names can run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attribution.errors import MismatchError
from hf_attribution.report import charts
from hf_attribution.report.comparison import compare
from hf_attribution.report.content import clean
from hf_attribution.report.page_data import agreement, check_datasets, page_data, truth_data
from hf_attribution.report.summary import facts, headline, table_rows

if TYPE_CHECKING:
    import datasets
    import numpy as np

    from hf_attribution.counterfactuals import Counterfactuals
    from hf_attribution.part_scores import PartScores
    from hf_attribution.scores import Scores

TEMPLATES = Path(__file__).parent / "templates"
_IN_SCRIPTS = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def write_report(
    scores: Scores,
    path: str | os.PathLike[str],
    train_dataset: datasets.Dataset,
    query_dataset: datasets.Dataset,
    *,
    counterfactuals: Counterfactuals | None = None,
    others: Mapping[str, Scores] | None = None,
    self_influence: np.ndarray | None = None,
    tokens: PartScores | None = None,
    tokenizer: Any = None,
    columns: Sequence[str] | None = None,
    group_column: str | None = None,
    k: int = 10,
    max_queries: int = 200,
    title: str | None = None,
) -> Path:
    """Write a page that shows scores beside the data, and what retrained models say of them.

    Args:
        scores: `[Q, N]`.
        path: The `.html` file to write, wholly or not at all.
        train_dataset: The N training rows, with the columns that people read.
        query_dataset: The Q query rows, likewise.
        counterfactuals: Outputs of retrained models: the page then shows LDS, interval, ceiling, and the predicted
            against the true outputs of each query. Without them it says that the scores are not verified.
        others: Scores of other methods by name, to be compared.
        self_influence: `[N]`, from `self_influence`: ranks what may be mislabelled.
        tokens: From `attribute_parts(..., "token")`: colours the tokens of the training examples.
        tokenizer: That made the rows' `input_ids`; needed with `tokens`.
        columns: What is shown of a row; by default its images and texts.
        group_column: The class, source or author of a row, whose agreement is shown and whose counts give the partial
            LDS; by default a column of class labels.
        k: How many helpful and harmful examples of each query.
        max_queries: The first so many queries are shown.
        title: What stands above the page.

    Returns:
        The file.

    Raises:
        MismatchError: A dataset, the counterfactuals or other scores are of other rows.
        ValueError: A column is not there, a number is too small, or `others` come without counterfactuals.
        ImportError: What draws the page is not installed.
        IsADirectoryError: `path` is a folder.
        OSError: The file cannot be written.

    Example:
        >>> write_report(scores, "report.html", train, test, counterfactuals=truth)  # doctest: +SKIP
    """
    if k < 1 or max_queries < 1:
        raise ValueError(f"k={k} and max_queries={max_queries}: show at least one example of one query.")
    if others and counterfactuals is None:
        raise ValueError("others= are compared by retrained models: pass counterfactuals=, too.")
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder: give the name of a file, such as {target / 'report.html'}.")
    template = _template()
    rows = check_datasets(scores, train_dataset, query_dataset, columns, group_column)
    data = page_data(scores, rows, k, max_queries, self_influence, tokens, tokenizer)
    entries = []
    if counterfactuals is not None:
        compared = _compared(scores, others or {})
        entries = compare(compared, counterfactuals, train_dataset, group_column)
        data["truth"] = truth_data(entries[0], scores, counterfactuals, len(data["queries"]))
        data["charts"] = {"scatter": charts.scatter(data["truth"]["measurement"]), "cost": charts.cost(entries)}
    css, script = (_packaged(name) for name in ("page.css", "page.js"))
    vega = charts.vega_scripts() if entries else None
    page = template.render(
        title=clean(title or f"What shaped the queries, by {scores.method}"),
        headline=headline(scores, len(data["queries"]), k),
        report=entries[0].report if entries else None,
        comparison=table_rows(entries),
        agreement=agreement(scores, rows, k),
        group_column=clean(rows.group_column or ""),
        facts=facts(scores, counterfactuals, rows.checked, tokens),
        has_colours=tokens is not None,
        has_chart=bool(entries) and data["charts"]["cost"] is not None,
        css=css,
        script=script,
        vega=vega,
        policy=_policy([text for text in (vega, script) if text], css),
        data=script_json(data),
    )
    _write(target, page)
    return target


def script_json(data: Any) -> str:
    r"""JSON that is safe inside of a `<script>`: no tag can begin or end in it.

    Args:
        data: What JSON can hold.

    Returns:
        The text.

    Example:
        >>> print(script_json({"text": "</script><b>&\u2028"}))
        {"text":"\u003c/script\u003e\u003cb\u003e\u0026\u2028"}
    """
    text = clean(json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
    for character, escaped in _IN_SCRIPTS.items():
        text = text.replace(character, escaped)
    return text


def _compared(scores: Scores, others: Mapping[str, Scores]) -> dict[str, Scores]:
    """All scores by name, those of the page first."""
    for name, other in others.items():
        if other.values.shape != scores.values.shape:
            raise MismatchError(
                f"others['{name}'] are {list(other.values.shape)} and the page's scores {list(scores.values.shape)}: "
                "compare scores for the same queries and training examples."
            )
    name = scores.method if scores.method not in others else f"{scores.method} (this page)"
    return {name: scores, **others}


def _template() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("A page needs jinja2: pip install hf-attribution[report].") from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_packaged("page.html.jinja"))


def _packaged(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str], css: str) -> str:
    def hashed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    allowed = " ".join(hashed(text) for text in scripts)
    return (
        f"default-src 'none'; script-src {allowed}; style-src {hashed(css)}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


def _write(target: Path, page: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8", newline="\n")
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
