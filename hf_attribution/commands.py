"""What the commands of `hf-attribution` do, given their options. Heavy imports wait inside."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attribution.arguments import (
    AttributeArguments,
    DataArguments,
    DemoArguments,
    EstimateArguments,
    EvaluateArguments,
    ModelArguments,
    PullArguments,
    PushArguments,
    ReportArguments,
    RetrainArguments,
)

if TYPE_CHECKING:
    from transformers import TrainingArguments


def attribute(model_args: ModelArguments, data_args: DataArguments, args: AttributeArguments) -> None:
    """Score every training example for every query, and write the scores."""
    from hf_attribution.attribution import attribute as compute_scores
    from hf_attribution.dry_run import attribute_dry_run
    from hf_attribution.methods import get_method
    from hf_attribution.team import state
    from hf_attribution.workspace import checkpoints_for, load_workspace

    method = _chosen(get_method, args)
    checkpoints = checkpoints_for(method, args.checkpoints)
    workspace = load_workspace(model_args, data_args)
    data = (workspace.trained_model(checkpoints), workspace.train, workspace.query)
    settings: dict[str, Any] = {
        "method": method,
        "task": workspace.task,
        "data_collator": workspace.data_collator,
        "checkpoints": checkpoints,
        "batch_size": args.batch_size,
        "batch_tokens": args.batch_tokens,
        "cache_dir": args.cache_dir,
        "store_dtype": args.store_dtype,
    }
    if args.dry_run:
        expected = attribute_dry_run(*data, **settings)
        if state().is_main_process:
            _say(str(expected))
        return
    scores = compute_scores(*data, **settings)
    if state().is_main_process:  # of a launch; all have the same scores
        scores.save(args.output_file)
        _say(f"{scores!r}: {args.output_file}")


def retrain(
    model_args: ModelArguments, data_args: DataArguments, args: RetrainArguments, training_args: TrainingArguments
) -> None:
    """Train on random subsets, and write what each trained model says about the queries."""
    from hf_attribution.errors import UnfinishedError
    from hf_attribution.trainer import AttributionTrainer
    from hf_attribution.workspace import load_workspace

    workspace = load_workspace(model_args, data_args)
    trainer = AttributionTrainer(
        model=workspace.model,
        model_init=workspace.model_init,
        args=training_args,
        train_dataset=workspace.train,
        eval_dataset=workspace.query,
        data_collator=workspace.data_collator,
        processing_class=workspace.processing_class,
    )
    settings: dict[str, Any] = {
        "num_subsets": args.num_subsets,
        "fraction": args.fraction,
        "seeds": args.seeds,
        "protocol": args.protocol,
        "task": dataclasses.replace(workspace.task, label_smoothing=training_args.label_smoothing_factor),
        "seed": training_args.seed,
        "keep_checkpoints": args.keep_checkpoints,
        "workers": args.crew,
        "shard": args.shard,
    }
    if args.dry_run:
        _say(str(trainer.retrain(**settings, dry_run=True)))
        return
    try:
        truth = trainer.retrain(**settings)
    except UnfinishedError as rest:  # this job has done its share
        _say(str(rest))
        return
    if trainer.is_world_process_zero():
        truth.save(args.output_file)
        _say(f"{truth!r}: {args.output_file}")


def estimate(args: EstimateArguments, data_args: DataArguments) -> None:
    """Estimate scores from the outputs of retrained models: datamodels and their relatives."""
    from hf_attribution.counterfactuals import Counterfactuals
    from hf_attribution.estimation import estimate as estimate_scores
    from hf_attribution.estimation import get_estimator
    from hf_attribution.scores import Scores

    estimator = _chosen(get_estimator, args)
    if args.group_column is not None and data_args.dataset_name is None:
        raise ValueError(f"--group_column {args.group_column} is a column of the training data: name --dataset_name.")
    truth = Counterfactuals.load(args.counterfactuals)
    previous = Scores.load(args.previous) if args.previous is not None else None
    scores = estimate_scores(truth, estimator, train_dataset=_train_if_named(data_args), previous=previous)
    scores.save(args.output_file)
    _say(f"{scores!r}: {args.output_file}")


def evaluate(args: EvaluateArguments, data_args: DataArguments) -> None:
    """Judge scores by retrained models: the linear datamodeling score, its interval and its ceiling."""
    from hf_attribution.counterfactuals import Counterfactuals
    from hf_attribution.report.comparison import compare, comparison_table
    from hf_attribution.scores import Scores

    truth = Counterfactuals.load(args.counterfactuals)
    scores = {path: Scores.load(path) for path in args.scores}
    train = _train_if_named(data_args)
    group_column = args.group_column or data_args.label_column_name
    entries = compare(_labels(scores), truth, train, group_column, args.confidence_level)
    if args.json:
        rows = [{"scores": path, **entry.report.to_dict()} for path, entry in zip(scores, entries, strict=True)]
        sys.stdout.write(json.dumps(_plain(rows), indent=2) + "\n")
        return
    for entry in entries:
        _say(str(entry.report))
    if len(entries) > 1:
        _say(comparison_table(entries, title="Linear datamodeling scores"))


def push(args: PushArguments, data_args: DataArguments) -> None:
    """Put scores, retrainings, subsets or a feature store into a dataset repository on the Hub, with a card.

    With --dataset_name (and the options that were given to attribute) the rows of the training examples are published
    beside their scores, with --query_split or --query_dataset_name also those of the queries. Log in before:
    `hf auth login`, or HF_TOKEN.
    """
    from hf_attribution.counterfactuals import Counterfactuals
    from hf_attribution.hub.card import AttributionCardData
    from hf_attribution.hub.files import load
    from hf_attribution.scores import Scores
    from hf_attribution.store import FeatureStore
    from hf_attribution.top_scores import TopScores

    known = {each.name for each in dataclasses.fields(AttributionCardData)}
    said = AttributionCardData(**{name: value for name, value in vars(args).items() if name in known})
    options: dict[str, Any] = {"private": args.private or None, "revision": args.revision, "card_data": said}
    artefact = FeatureStore(Path(args.artefact)) if Path(args.artefact).is_dir() else load(args.artefact)
    if isinstance(artefact, (Scores, TopScores)):
        options |= {"top_k": args.top_k, **_shown(data_args, args.columns)}
    if isinstance(artefact, Scores) and args.counterfactuals is not None:
        options["counterfactuals"] = Counterfactuals.load(args.counterfactuals)
    _say(f"{artefact!r}: {artefact.push_to_hub(args.repo_id, **options)}")


def pull(args: PullArguments) -> None:
    """Fetch scores, retrainings, subsets or a feature store from the Hub, check them, and write them down."""
    from hf_attribution.hub.access import Place
    from hf_attribution.hub.files import KINDS, kind_at
    from hf_attribution.store import FeatureStore

    kind = kind_at(Place(args.repo_id, args.revision))
    if kind in KINDS:
        artefact = KINDS[kind].from_hub(args.repo_id, revision=args.revision)
        artefact.save(args.output_file)
        _say(f"{artefact!r}: {args.output_file}")
    else:
        _say(repr(FeatureStore.from_hub(args.repo_id, args.output_file, revision=args.revision)))


def report(model_args: ModelArguments, data_args: DataArguments, args: ReportArguments) -> None:
    """Write a page of scores beside the data. Model and data are given as they were to `attribute`."""
    from hf_attribution.counterfactuals import Counterfactuals
    from hf_attribution.part_scores import PartScores
    from hf_attribution.report.page import write_report
    from hf_attribution.scores import Scores
    from hf_attribution.workspace import load_data

    found = {path: Scores.load(path) for path in args.scores}
    first, *others = _labels(found).items()
    truth = Counterfactuals.load(args.counterfactuals) if args.counterfactuals else None
    tokens = PartScores.load(args.tokens) if args.tokens else None
    own = Scores.load(args.self_influence).values if args.self_influence else None
    data = load_data(model_args, data_args)
    path = write_report(
        first[1],
        args.output_file,
        data.train,
        data.query,
        counterfactuals=truth,
        others=dict(others),
        self_influence=own,
        tokens=tokens,
        tokenizer=data.processing_class,
        columns=args.show_columns,
        group_column=args.group_column,
        k=args.k,
        max_queries=args.max_queries,
        title=args.title,
    )
    _say(f"{first[1]!r}: {path}")


def methods() -> None:
    """List the attribution methods, their settings and where they come from."""
    from rich.table import Table

    from hf_attribution.methods import METHODS

    table = Table("method", "settings", "paper", title="Attribution methods", title_justify="left")
    for name, kind in METHODS.items():
        settings = [f"{field.name}={json.dumps(field.default)}" for field in dataclasses.fields(kind)]
        table.add_row(name, "\n".join(settings), kind.paper or "a baseline")
    _say(table)


def demo(args: DemoArguments) -> None:
    """Train, attribute, retrain and evaluate on images, film reviews and Shakespeare, with nothing downloaded."""
    from hf_attribution.demo import run_demo

    run_demo(
        acts=args.acts, full=args.full, every_method=args.every_method, output_dir=args.output_dir, seed=args.seed
    )


def _chosen(get: Callable[..., Any], args: AttributeArguments | EstimateArguments) -> Any:
    """The method or estimator that is named, with its settings."""
    try:
        return get(args.method, **args.settings)
    except (KeyError, TypeError) as error:
        raise ValueError(error.args[0]) from error


def _shown(args: DataArguments, columns: list[str] | None) -> dict[str, Any]:
    """The rows to publish beside scores."""
    from hf_attribution.splits import load_query, load_train

    shown: dict[str, Any] = {}
    if args.dataset_name is not None or columns:
        shown["train_dataset"] = load_train(args)
        if args.query_split or args.query_dataset_name:
            shown["query_dataset"] = load_query(args)
    if columns:
        shown = {name: dataset.select_columns(columns) for name, dataset in shown.items()}
    return shown


def _train_if_named(data_args: DataArguments) -> Any:
    """The training data, if there is a dataset."""
    if data_args.dataset_name is None:
        return None
    from hf_attribution.splits import load_train

    return load_train(data_args)


def _say(what: Any) -> None:
    from rich.console import Console

    Console(soft_wrap=isinstance(what, str)).print(what, markup=False, highlight=False)


def _labels(scores: dict[str, Any]) -> dict[str, Any]:
    """Scores by their method, and by their file, too, where a method occurs twice."""
    methods = [each.method for each in scores.values()]
    return {
        each.method if methods.count(each.method) == 1 else f"{each.method} ({path})": each
        for path, each in scores.items()
    }


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
