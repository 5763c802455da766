"""The command `hf-attribution`: attribute, retrain and evaluate, for models and datasets on the Hub or on disk.

Options are the fields of the dataclasses in `hf_attribution.arguments`. Heavy imports wait inside the commands.
"""

import argparse
import copy
import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import hf_attribution
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


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand: what runs it, what it is for, and an example of its options."""

    run: Callable[[Sequence[str]], None]
    summary: str
    example: str = ""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows one spelling of each option, and defaults that say something."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [name for name in action.option_strings if "-" not in name[2:]]
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.required or action.default in (None, False, argparse.SUPPRESS)
        return f"{action.help or ''}{' (required)' * action.required}{'' if told else ' (default: %(default)s)'}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The command and its options, by default those of the process.

    Returns:
        The exit code: 0, or 2 after an error, 130 after an interruption.
    """
    parser = _top_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    # Errors of our own are ValueErrors and ArithmeticErrors.
    told = () if args.debug else (ValueError, ArithmeticError, OSError, ImportError)
    try:
        _command(args.command).run(args.options)
    except KeyboardInterrupt:
        resumes = " Finished trainings are kept: the same command goes on from there." * (args.command == "retrain")
        sys.stderr.write(f"\nhf-attribution: interrupted.{resumes}\n")
        return 130
    except told as error:
        sys.stderr.write(f"hf-attribution: error: {error}\n")
        return 2
    return 0


def attribute_command(argv: Sequence[str]) -> None:
    """Score every training example for every query, and write the scores."""
    options = (ModelArguments, DataArguments, AttributeArguments)
    model_args, data_args, args = _parse("attribute", options, argv)
    from hf_attribution.attribution import attribute
    from hf_attribution.methods import get_method
    from hf_attribution.processes import state
    from hf_attribution.workspace import checkpoints_for, load_workspace

    method = _chosen(get_method, args)
    checkpoints = checkpoints_for(method, args.checkpoints)
    workspace = load_workspace(model_args, data_args)
    scores = attribute(
        workspace.trained_model(checkpoints),
        workspace.train,
        workspace.query,
        method=method,
        task=workspace.task,
        data_collator=workspace.data_collator,
        checkpoints=checkpoints,
        batch_size=args.batch_size,
        batch_tokens=args.batch_tokens,
        cache_dir=args.cache_dir,
        store_dtype=args.store_dtype,
    )
    if state().is_main_process:  # of a launch; all have the same scores
        scores.save(args.output_file)
        _say(f"{scores!r}: {args.output_file}")


def retrain_command(argv: Sequence[str]) -> None:
    """Train on random subsets, and write what each trained model says about the queries."""
    from transformers import TrainingArguments

    options = (ModelArguments, DataArguments, RetrainArguments, TrainingArguments)
    model_args, data_args, args, training_args = _parse("retrain", options, argv)
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
    settings = {
        "num_subsets": args.num_subsets,
        "fraction": args.fraction,
        "seeds": args.seeds,
        "protocol": args.protocol,
        "task": dataclasses.replace(workspace.task, label_smoothing=training_args.label_smoothing_factor),
        "seed": training_args.seed,
        "keep_checkpoints": args.keep_checkpoints,
        "workers": args.workers,
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


def estimate_command(argv: Sequence[str]) -> None:
    """Estimate scores from the outputs of retrained models: datamodels and their relatives."""
    args, data_args = _parse("estimate", (EstimateArguments, DataArguments), argv)
    from hf_attribution.counterfactuals import Counterfactuals
    from hf_attribution.estimation import estimate, get_estimator
    from hf_attribution.scores import Scores

    estimator = _chosen(get_estimator, args)
    if args.group_column is not None and data_args.dataset_name is None:
        raise ValueError(f"--group_column {args.group_column} is a column of the training data: name --dataset_name.")
    truth = Counterfactuals.load(args.counterfactuals)
    previous = Scores.load(args.previous) if args.previous is not None else None
    scores = estimate(truth, estimator, train_dataset=_train_if_named(data_args), previous=previous)
    scores.save(args.output_file)
    _say(f"{scores!r}: {args.output_file}")


def evaluate_command(argv: Sequence[str]) -> None:
    """Judge scores by retrained models: the linear datamodeling score, its interval and its ceiling."""
    args, data_args = _parse("evaluate", (EvaluateArguments, DataArguments), argv)
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


def push_command(argv: Sequence[str]) -> None:
    """Put scores, retrainings or subsets into a dataset repository on the Hub: tables, and a card that explains them.

    With --dataset_name (and the options that were given to attribute) the rows of the training examples are published
    beside their scores, with --query_split or --query_dataset_name also those of the queries. Log in before:
    `hf auth login`, or HF_TOKEN.
    """
    args, data_args = _parse("push", (PushArguments, DataArguments), argv)
    from hf_attribution.counterfactuals import Counterfactuals
    from hf_attribution.hub.card import AttributionCardData
    from hf_attribution.hub.files import load
    from hf_attribution.scores import Scores

    known = {each.name for each in dataclasses.fields(AttributionCardData)}
    said = AttributionCardData(**{name: value for name, value in vars(args).items() if name in known})
    options = {"private": args.private or None, "revision": args.revision, "card_data": said}
    artefact = load(args.artefact)
    if isinstance(artefact, Scores):
        options |= {"top_k": args.top_k, **_shown(data_args, args.columns)}
        if args.counterfactuals is not None:
            options["counterfactuals"] = Counterfactuals.load(args.counterfactuals)
    _say(f"{artefact!r}: {artefact.push_to_hub(args.repo_id, **options)}")


def pull_command(argv: Sequence[str]) -> None:
    """Fetch scores, retrainings or subsets from the Hub, check them, and write them to a file."""
    (args,) = _parse("pull", (PullArguments,), argv)
    from hf_attribution.hub.access import Place
    from hf_attribution.hub.files import fetch

    artefact = fetch(Place(args.repo_id, args.revision))
    artefact.save(args.output_file)
    _say(f"{artefact!r}: {args.output_file}")


def report_command(argv: Sequence[str]) -> None:
    """Write a page of scores beside the data. Model and data are given as they were to `attribute`."""
    model_args, data_args, args = _parse("report", (ModelArguments, DataArguments, ReportArguments), argv)
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


def methods_command(argv: Sequence[str]) -> None:
    """List the attribution methods, their settings and where they come from."""
    _parse("methods", (), argv)
    from rich.table import Table

    from hf_attribution.methods import METHODS

    table = Table("method", "settings", "paper", title="Attribution methods", title_justify="left")
    for name, kind in METHODS.items():
        settings = [f"{field.name}={json.dumps(field.default)}" for field in dataclasses.fields(kind)]
        table.add_row(name, "\n".join(settings), kind.paper or "a baseline")
    _say(table)


def demo_command(argv: Sequence[str]) -> None:
    """Train, attribute, retrain and evaluate on images, film reviews and Shakespeare, with nothing downloaded."""
    (args,) = _parse("demo", (DemoArguments,), argv)
    from hf_attribution.demo import run_demo

    run_demo(
        acts=args.acts, full=args.full, every_method=args.every_method, output_dir=args.output_dir, seed=args.seed
    )


COMMANDS = {
    "demo": Command(demo_command, "the whole story on three small models, on a laptop", "--acts digits"),
    "attribute": Command(
        attribute_command,
        "score training examples for queries",
        "--model_name_or_path me/my-sst2-model --dataset_name nyu-mll/glue --dataset_config_name sst2 "
        "--max_query_examples 100 --method trak --output_file trak.safetensors",
    ),
    "retrain": Command(
        retrain_command,
        "retrain on subsets: the ground truth",
        "--model_name_or_path google-bert/bert-base-uncased --task text-classification --dataset_name nyu-mll/glue "
        "--dataset_config_name sst2 --max_train_examples 2000 --max_query_examples 100 --num_subsets 50 --seeds 2 "
        "--num_train_epochs 3 --learning_rate 5e-5 --output_dir retrained --output_file truth.safetensors",
    ),
    "estimate": Command(
        estimate_command,
        "scores from retrained models",
        """--counterfactuals fit.safetensors --method datamodel --method_settings '{"penalty": "ridge"}'""",
    ),
    "evaluate": Command(
        evaluate_command,
        "judge scores by retrained models",
        "--scores trak.safetensors grad_cos.safetensors --counterfactuals truth.safetensors "
        "--dataset_name nyu-mll/glue --dataset_config_name sst2 --max_train_examples 2000",
    ),
    "push": Command(
        push_command,
        "put scores or retrainings on the Hub",
        "--artefact trak.safetensors --repo_id me/sst2-trak --counterfactuals truth.safetensors --license cc-by-4.0 "
        "--dataset_name nyu-mll/glue --dataset_config_name sst2 --columns sentence label",
    ),
    "pull": Command(pull_command, "fetch them from the Hub", "--repo_id me/sst2-trak --output_file trak.safetensors"),
    "report": Command(
        report_command,
        "a page of scores beside the data",
        "--scores trak.safetensors grad_cos.safetensors --counterfactuals truth.safetensors "
        "--model_name_or_path me/my-sst2-model --dataset_name nyu-mll/glue --dataset_config_name sst2 "
        "--max_query_examples 100 --output_file report.html",
    ),
    "methods": Command(methods_command, "list attribution methods and their settings"),
}


def _top_parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:<10} {command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="hf-attribution",
        usage="hf-attribution [--version] [--debug] <command> [options]",
        description="Training data attribution for Hugging Face models, measured by retraining.",
        epilog=f"commands:\n{commands}\n\nhf-attribution <command> --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf-attribution {hf_attribution.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _command(name: str) -> Command:
    if name not in COMMANDS:
        raise ValueError(f"There is no command {name!r}.{_nearest(name, COMMANDS)}")
    return COMMANDS[name]


def _parse(name: str, options: Sequence[Any], argv: Sequence[str]) -> tuple[Any, ...]:
    """The options of a command as instances of its dataclasses."""
    from transformers import HfArgumentParser

    command = COMMANDS[name]
    parser = HfArgumentParser(
        options,
        prog=f"hf-attribution {name}",
        usage=f"hf-attribution {name} [options]",
        description=command.run.__doc__,
        epilog=f"example:\n  hf-attribution {name} {command.example}".replace(" --", " \\\n      --"),
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    *parsed, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        known = [f"--{field.name}" for each in options for field in dataclasses.fields(each)]
        raise ValueError(f"{name} has no option {unknown[0]}.{_nearest(unknown[0], known)}")
    return tuple(parsed)


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


def _nearest(word: str, words: Any) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return f" Did you mean {close[0]}?" if close else f" There are {', '.join(words)}." if len(words) < 10 else ""


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


if __name__ == "__main__":
    sys.exit(main())
