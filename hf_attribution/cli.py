"""The command `hf-attribution`: attribute, retrain and evaluate, for models and datasets on the Hub or on disk.

Options are the fields of the dataclasses in `hf_attribution.arguments`; what is done with them is in
`hf_attribution.commands`. Heavy imports wait.
"""

import argparse
import copy
import dataclasses
import difflib
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
from hf_attribution.commands import attribute, demo, estimate, evaluate, methods, pull, push, report, retrain


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand: what runs it with which options, what it is for, and an example of them."""

    run: Callable[..., None]
    options: tuple[type, ...]
    summary: str
    example: str = ""
    trains: bool = False  # takes the options of `TrainingArguments`, too


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
        command = _command(args.command)
        command.run(*_parse(args.command, command, args.options))
    except KeyboardInterrupt:
        resumes = " Finished trainings are kept: the same command goes on from there." * (args.command == "retrain")
        sys.stderr.write(f"\nhf-attribution: interrupted.{resumes}\n")
        return 130
    except told as error:
        sys.stderr.write(f"hf-attribution: error: {error}\n")
        return 2
    return 0


COMMANDS = {
    "demo": Command(demo, (DemoArguments,), "the whole story on three small models, on a laptop", "--acts digits"),
    "attribute": Command(
        attribute,
        (ModelArguments, DataArguments, AttributeArguments),
        "score training examples for queries",
        "--model_name_or_path me/my-sst2-model --dataset_name nyu-mll/glue --dataset_config_name sst2 "
        "--max_query_examples 100 --method trak --output_file trak.safetensors",
    ),
    "retrain": Command(
        retrain,
        (ModelArguments, DataArguments, RetrainArguments),
        "retrain on subsets: the ground truth",
        "--model_name_or_path google-bert/bert-base-uncased --task text-classification --dataset_name nyu-mll/glue "
        "--dataset_config_name sst2 --max_train_examples 2000 --max_query_examples 100 --num_subsets 50 --seeds 2 "
        "--num_train_epochs 3 --learning_rate 5e-5 --output_dir retrained --output_file truth.safetensors",
        trains=True,
    ),
    "estimate": Command(
        estimate,
        (EstimateArguments, DataArguments),
        "scores from retrained models",
        """--counterfactuals fit.safetensors --method datamodel --method_settings '{"penalty": "ridge"}'""",
    ),
    "evaluate": Command(
        evaluate,
        (EvaluateArguments, DataArguments),
        "judge scores by retrained models",
        "--scores trak.safetensors grad_cos.safetensors --counterfactuals truth.safetensors "
        "--dataset_name nyu-mll/glue --dataset_config_name sst2 --max_train_examples 2000",
    ),
    "push": Command(
        push,
        (PushArguments, DataArguments),
        "put scores, retrainings or gradients on the Hub",
        "--artefact trak.safetensors --repo_id me/sst2-trak --counterfactuals truth.safetensors --license cc-by-4.0 "
        "--dataset_name nyu-mll/glue --dataset_config_name sst2 --columns sentence label",
    ),
    "pull": Command(
        pull,
        (PullArguments,),
        "fetch them from the Hub",
        "--repo_id me/sst2-trak --output_file trak.safetensors",
    ),
    "report": Command(
        report,
        (ModelArguments, DataArguments, ReportArguments),
        "a page of scores beside the data",
        "--scores trak.safetensors grad_cos.safetensors --counterfactuals truth.safetensors "
        "--model_name_or_path me/my-sst2-model --dataset_name nyu-mll/glue --dataset_config_name sst2 "
        "--max_query_examples 100 --output_file report.html",
    ),
    "methods": Command(methods, (), "list attribution methods and their settings"),
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


def _parse(name: str, command: Command, argv: Sequence[str]) -> tuple[Any, ...]:
    """The options of a command as instances of its dataclasses."""
    from transformers import HfArgumentParser

    options: tuple[Any, ...] = command.options
    if command.trains:
        from transformers import TrainingArguments

        options = (*options, TrainingArguments)
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


def _nearest(word: str, words: Any) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return f" Did you mean {close[0]}?" if close else f" There are {', '.join(words)}." if len(words) < 10 else ""


if __name__ == "__main__":
    sys.exit(main())
