"""The card of a repository: a template, filled; what people wrote into a card themselves is kept."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from hf_attribution.errors import ArtefactError
from hf_attribution.seals import plain_json

if TYPE_CHECKING:
    from hf_attribution.evaluation import LDSReport

TEMPLATE = Path(__file__).with_name("card_template.md")
BEGIN, END = "<!-- hf_attribution: begin -->", "<!-- hf_attribution: end -->"
TAGS = ("hf_attribution", "training-data-attribution", "data-attribution")


@dataclass(frozen=True)
class AttributionCardData:
    """What only you can say about an artefact, for its card on the Hub.

    Model and dataset are found by themselves if they were loaded from the Hub: say here what was not found.

    Attributes:
        model_id: The model on the Hub that was attributed, or that it was fine-tuned from.
        model_revision: Its commit.
        dataset_id: The training dataset on the Hub.
        dataset_revision: Its commit.
        license: An identifier of the Hub, such as `"cc-by-4.0"`. The rows of a dataset keep their own licence.
        language: Of the texts, such as `"en"`.
        tags: More tags.
        citation: BibTeX of your own work.
    """

    model_id: str | None = None
    model_revision: str | None = None
    dataset_id: str | None = None
    dataset_revision: str | None = None
    license: str | None = None
    language: str | Sequence[str] | None = None
    tags: Sequence[str] = ()
    citation: str | None = None


class Markdown(str):
    """Text that is Markdown already, and not escaped."""


@dataclass(frozen=True)
class Page:
    """What a card says about one artefact.

    Attributes:
        title: Its first line.
        summary: What it is, and how to read it; Markdown.
        facts: Name to value, for the table; what is empty is left out.
        tables: Folder to what a row is; the first is the one that the viewer opens with.
        usage: Python that loads it, with `{repo_id}` for the repository.
        details: What else is known; JSON.
        report: How well it predicts retraining, if that was asked for.
        tags: Tags of its own.
        pattern: The files of a table in its folder.
    """

    title: str
    summary: str
    facts: Mapping[str, Any]
    tables: Mapping[str, str]
    usage: str
    details: Mapping[str, Any]
    report: LDSReport | None = None
    tags: Sequence[str] = ()
    pattern: str = "train-*.parquet"


def write_card(page: Page, said: AttributionCardData, repo_id: str, present: str | None) -> str:
    """Fill the template, and put it into the card that is there.

    Only what stands between our two marks is replaced, and of the metadata only our own fields: a licence, tags or a
    text that somebody wrote stay.

    Args:
        page: What is told about the artefact.
        said: What its owner says about it.
        repo_id: The repository.
        present: Its README, if it has one.

    Returns:
        The new README.

    Raises:
        ArtefactError: The metadata at the top of the present README cannot be read, or one of our marks is missing.
    """
    old = _parse(present, repo_id) if present else None
    metadata = _metadata(page, said, repo_id, old.data.to_dict() if old else {})
    filled = DatasetCard.from_template(
        DatasetCardData(**metadata),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        begin=BEGIN,
        end=END,
        page=page,
        title=cell(page.title),
        facts=_table(page.facts),
        scores=_scores(page.report),
        protocol=_table(page.report.protocol) if page.report else {},
        group_column=cell(page.report.group_column) if page.report else None,
        details=_json(page.details),
        usage=page.usage.format(repo_id=repo_id),
        citation=said.citation,
        repo_id=repo_id,
    )
    block = filled.text.strip()
    body = _replaced(old.text, block, repo_id) if old else f"\n{block}\n"
    card = f"---\n{filled.data.to_yaml()}\n---\n{body}"
    return card.encode("utf-8", "replace").decode()  # half a surrogate pair is no text


def link(repo_id: str | None, revision: str | None, folder: str = "") -> str | None:
    """Return a link to a repository of the Hub at a revision; `folder` is "datasets/" for a dataset."""
    if repo_id is None or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id):
        return repo_id
    at = f"/tree/{revision}" if revision else ""
    said = f" at `{revision[:12]}`" if revision else ""
    return Markdown(f"[{repo_id}](https://huggingface.co/{folder}{repo_id}{at}){said}")


def cell(value: Any) -> str:
    """Return a value as text of one line that is neither HTML nor ends a table's cell."""
    if isinstance(value, Markdown):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=lambda each: each.item())
    for sign, escaped in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "\\`")):
        text = text.replace(sign, escaped)
    return " ".join(text.split())


def _table(facts: Mapping[str, Any]) -> dict[str, str]:
    return {cell(name): cell(value) for name, value in facts.items() if value is not None and value != ""}


def _json(details: Mapping[str, Any]) -> str:
    """Return JSON that ends neither its code block nor ours."""
    return json.dumps(details, indent=1, ensure_ascii=False).replace("<", "\\u003c").replace("`", "\\u0060")


def _scores(report: LDSReport | None) -> list[dict[str, Any]]:
    """The linear datamodeling scores of a report: the plain one and, if there are groups, the partial one."""
    if report is None:
        return []
    found = []
    for name, prefix in (("LDS", ""), ("partial LDS", "partial_")):
        value, interval = getattr(report, f"{prefix}lds"), getattr(report, f"{prefix}confidence_interval")
        if value is not None and not math.isnan(value):
            ceiling = getattr(report, f"{prefix}ceiling")
            found.append(
                {"name": name, "type": f"{prefix}lds", "value": value, "interval": interval, "ceiling": ceiling}
            )
    return found


def _metadata(page: Page, said: AttributionCardData, repo_id: str, old: Mapping[str, Any]) -> dict[str, Any]:
    """Ours over theirs, but theirs where it is a matter of taste."""
    configs: list[dict[str, Any]] = [
        {"config_name": folder, "data_files": [{"split": "train", "path": f"{folder}/{page.pattern}"}]}
        for folder in page.tables
    ]
    configs[0]["default"] = True
    kept = [each for each in old.get("configs") or [] if each.get("config_name") not in page.tables]
    metadata = {
        "pretty_name": " ".join(page.title.split()),
        **{key: value for key, value in old.items() if key not in ("model-index", "configs")},
        "tags": list(dict.fromkeys([*(old.get("tags") or []), *TAGS, *page.tags, *said.tags])),
        "configs": [*configs, *kept],
    }
    explicit = {"license": said.license, "language": said.language}
    metadata |= {key: value for key, value in explicit.items() if value is not None}
    if said.dataset_id is not None:
        metadata["source_datasets"] = [said.dataset_id]
    results = _eval_results(page, said)
    if results:
        metadata["model-index"] = eval_results_to_model_index(said.model_id or repo_id, results)
    return metadata


def _eval_results(page: Page, said: AttributionCardData) -> list[EvalResult]:
    dataset = said.dataset_id or "unknown"
    return [
        EvalResult(
            task_type="training-data-attribution",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_revision=said.dataset_revision,
            metric_type=score["type"],
            metric_name=score["name"],
            metric_value=round(float(score["value"]), 4),
            metric_args=plain_json(
                {
                    "confidence_interval": [round(bound, 4) for bound in score["interval"]],
                    "noise_ceiling": score["ceiling"] and round(score["ceiling"], 4),
                    **(page.report.protocol if page.report else {}),
                },
                "the protocol",
            ),
        )
        for score in _scores(page.report)
    ]


def _parse(present: str, repo_id: str) -> DatasetCard:
    try:
        return DatasetCard(present, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ArtefactError(
            f"The metadata between the --- lines of README.md in {repo_id} cannot be read ({error}): mend it on the "
            "Hub, or delete the file, and push again. Nothing was pushed."
        ) from error


def _replaced(text: str, block: str, repo_id: str) -> str:
    """Return the text with the block in the place of the old one, or below everything.

    Raises:
        ArtefactError: There is one mark without the other, or several.
    """
    starts, ends = text.count(BEGIN), text.count(END)
    if starts == ends == 0:
        return f"{text.rstrip()}\n\n{block}\n"
    if starts != 1 or ends != 1 or text.index(BEGIN) > text.index(END):
        raise ArtefactError(
            f"README.md in {repo_id} has {starts} marks '{BEGIN}' and {ends} marks '{END}', and should have one of "
            "each, in this order, around the part that hf_attribution writes: put them back, or remove them and the "
            "part, and push again. Nothing was pushed."
        )
    return text[: text.index(BEGIN)] + block + text[text.index(END) + len(END) :]
