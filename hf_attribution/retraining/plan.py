"""What a call of `retrain` will do: made, checked and tried out before the first training."""

import copy
import dataclasses
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from hf_attribution.artefacts import fingerprint
from hf_attribution.columns import check_same_columns, used_columns
from hf_attribution.counterfactuals import Subsets
from hf_attribution.data import Batch, Split
from hf_attribution.errors import MismatchError, UnsupportedError
from hf_attribution.inputs import unwrap, weights_fingerprint
from hf_attribution.provenance import hub_sources
from hf_attribution.retraining.arguments import described_arguments, material_arguments
from hf_attribution.retraining.checks import check_optimizers, check_trainer, check_weighted, check_writable
from hf_attribution.retraining.manifest import check_manifest, folder_name
from hf_attribution.retraining.measuring import measured
from hf_attribution.retraining.recipe import Recipe
from hf_attribution.retraining.worklist import Run, WorkList, keep_subsets
from hf_attribution.seeds import derive_seed, seeded
from hf_attribution.tasks import Task, infer_task

# How many trainings at a time on this machine, or as many as Ray's cluster has room for.
Workers = int | Literal["ray"]

PROTOCOLS = ("resampled", "fixed", "masked")

# Where a configuration came from, and by whom it was written, changes no training. Its `dtype` is set when a model is
# saved, in every model that shares the configuration; the fingerprint of the weights says what theirs is.
_IMMATERIAL_CONFIG = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "_attn_implementation_autoset",
    "dtype",
)


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for.

    Args:
        query_dataset: The queries, preprocessed: Q rows.
        subsets: What to train on.
        task: What is measured, and with `"fixed"` trained on; `None` where the model's class tells.
        seeds: R, trainings per subset.
        protocol: `"resampled"`, `"fixed"`, or `"masked"`: as `"resampled"`, the other examples along at weight 0.
        seed: Base of all seeds.
        output_dir: Where results are kept, or `None` for a folder in the trainer's own.
        keep_checkpoints: Whether the final weights of every run are kept.
        follow_up: What is done with every recorded training, for which trainings are recorded.
    """

    query_dataset: Any
    subsets: Subsets
    task: Task | None = None
    seeds: int = 1
    protocol: str = "resampled"
    seed: int = 0
    output_dir: str | Path | None = None
    keep_checkpoints: bool = False
    follow_up: "FollowUp | None" = None


@dataclasses.dataclass(frozen=True)
class FollowUp:
    """What is done with a recorded training before its recording is deleted and the run counts as finished.

    Args:
        act: Takes the trained trainer, the folder of its recording, and a path for what is found.
        settings: What decides the outcome besides the training; JSON.
    """

    act: Callable[[Trainer, Path, Path], None]
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A request that has been checked, with all that its trainings take. The user's trainer is no part of it.

    Args:
        request: The request.
        task: What is measured.
        recipe: Builds trainers like the user's.
        args: The user's training arguments.
        train_dataset: The training data.
        callbacks: Classes of the callbacks that the user's trainer has.
        queries: The query batches, collated once for all runs.
        worklist: The runs, in their folder.
        manifest: What the folder belongs to; JSON.
        origin: `fingerprints` of initial model, training data, queries and task; the data's `columns`; the `sources`
            of model and data on the Hub; JSON.
        fresh_weights: Whether runs start from weights of their own.
    """

    request: Request
    task: Task
    recipe: Recipe
    args: TrainingArguments
    train_dataset: Any
    callbacks: list[type]
    queries: list[Batch]
    worklist: WorkList
    manifest: dict[str, Any]
    origin: dict[str, Any]
    fresh_weights: bool

    @property
    def apart(self) -> bool:
        """Whether processes of a launch do not train together: a training that is recorded is of one process."""
        return self.args.world_size > 1 and self.request.follow_up is not None

    def open_folder(self) -> None:
        """Write down what the folder belongs to, or compare with what is written there.

        Raises:
            OSError: If the folder cannot be written to.
            MismatchError: If it holds other retrainings; the message lists what differs.
        """
        check_writable(self.worklist.folder)
        check_manifest(self.worklist.folder, self.manifest)
        keep_subsets(self.worklist.folder, self.request.subsets)

    def portable(self) -> "Plan":
        """The plan for another process: it finds its own device, and trains with the batches of this one."""
        args = copy.copy(self.args)
        args.per_device_train_batch_size = self.args.train_batch_size  # that of all GPUs which are seen here
        for name in ("distributed_state", "_setup_devices"):
            vars(args).pop(name, None)
        request = dataclasses.replace(self.request, query_dataset=None)
        worklist = dataclasses.replace(self.worklist, folder=self.worklist.folder.absolute())
        recipe = self.recipe.portable()
        return dataclasses.replace(self, args=args, request=request, recipe=recipe, worklist=worklist)

    def seed(self, run: Run) -> int:
        """The seed of a run: of its own, or with `"fixed"` the same for every subset."""
        parts = (run.seed,) if self.request.protocol == "fixed" else (run.subset, run.seed)
        return derive_seed(self.request.seed, "run", *parts)

    @property
    def description(self) -> dict[str, Any]:
        """The protocol, without which the outputs mean little; JSON."""
        request, fixed = self.request, self.request.protocol == "fixed"
        return {
            "name": request.protocol,
            "fraction": request.subsets.description.get("fraction", request.subsets.fraction),
            "subsets": request.subsets.description,
            "num_subsets": len(request.subsets),
            "seeds": request.seeds,
            "seed": request.seed,
            "measurement": self.task.measurement_name,
            "task": self.task.description,
            "initial_weights": "fresh" if self.fresh_weights else "shared",
            "order": "fixed" if fixed else "fresh",
            "training": described_arguments(self.args),
        }


def make_plan(trainer: Trainer, recipe: Recipe, request: Request) -> Plan:
    """Check a request as far as that can be done without training. Nothing is written.

    Args:
        trainer: The user's trainer.
        recipe: Builds trainers like it.
        request: What is asked for.

    Returns:
        The plan.

    Raises:
        ValueError: If a setting is out of its range.
        MismatchError: If queries, subsets and training data do not belong together.
        UnsupportedError: If this training cannot be repeated, or its weights not be saved.
    """
    if request.protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, not {request.protocol!r}.")
    if request.seeds < 1:
        raise ValueError(f"seeds must be at least 1, not {request.seeds}.")
    check_trainer(trainer)
    check_optimizers(recipe.given("optimizers"))
    recipe.check()
    train, query = _splits(trainer, request)
    if request.subsets.num_examples != len(train):
        raise MismatchError(
            f"The subsets are of {request.subsets.num_examples} examples and the training dataset has {len(train)}: "
            "draw them for this dataset."
        )
    initial = _initial_model(trainer, recipe)
    task = request.task if request.task is not None else default_task(trainer)
    fingerprints = {
        "model": weights_fingerprint(initial),
        "train": train.fingerprint,
        "query": query.fingerprint,
        "task": fingerprint(json.dumps(task.description, sort_keys=True)),
    }
    manifest = _manifest(trainer, recipe, request, task, initial, fingerprints) | {"collated": _collated(train)}
    if request.keep_checkpoints and not hasattr(initial, "save_pretrained"):
        raise UnsupportedError(
            f"keep_checkpoints needs a model with save_pretrained; {type(initial).__name__} has none."
        )
    if request.protocol != "resampled":
        check_weighted(trainer, initial, train.dataset, request.task is not None)
    queries = list(query.batches())
    measured(cast(nn.Module, trainer.model), task, queries, "with the model as it is now")
    folder = Path(request.output_dir or Path(str(trainer.args.output_dir), folder_name(manifest)))
    worklist = WorkList(folder, request.subsets.keys(), request.seeds, request.keep_checkpoints)
    fresh = request.protocol != "fixed" and _draws_weights(trainer, recipe, fingerprints["model"])
    origin = {
        "fingerprints": fingerprints,
        "columns": {split.name: split.columns for split in (train, query)},
        "sources": hub_sources(initial, trainer.train_dataset),
    }
    return Plan(
        request, task, recipe, trainer.args, trainer.train_dataset, _callbacks(trainer), queries, worklist, manifest,
        origin, fresh,
    )  # fmt: skip


def default_task(trainer: Trainer) -> Task:
    """What a trainer's model learns, as its class and the training arguments tell."""
    return infer_task(cast(nn.Module, trainer.model), label_smoothing=trainer.args.label_smoothing_factor)


def versions() -> dict[str, str]:
    """Of the libraries that decide what a training comes to."""
    return {name: version(name) for name in ("torch", "transformers", "accelerate")}


def _callbacks(trainer: Trainer) -> list[type]:
    """The classes of a trainer's callbacks, without those that only show or report."""
    shown = (ProgressCallback, PrinterCallback, *get_reporting_integration_callbacks(trainer.args.report_to))
    return [type(each) for each in trainer.callback_handler.callbacks if not isinstance(each, shown)]


def _splits(trainer: Trainer, request: Request) -> tuple[Split, Split]:
    datasets = {"train": trainer.train_dataset, "query": request.query_dataset}
    for name, dataset in datasets.items():
        if dataset is None:
            raise ValueError(f"There is no {name} dataset: give the trainer one, or pass it to retrain.")
    if trainer.args.remove_unused_columns:
        datasets = {name: used_columns(dataset, cast(nn.Module, trainer.model)) for name, dataset in datasets.items()}
    batch_size = trainer.args.per_device_eval_batch_size
    train, query = (Split(dataset, trainer.data_collator, batch_size, name) for name, dataset in datasets.items())
    check_same_columns(train.dataset, query.dataset)
    return train, query


def _initial_model(trainer: Trainer, recipe: Recipe, seed: int = 0) -> nn.Module:
    """The model before training; with `model_init` the one that it gives under a seed."""
    if isinstance(recipe.initial_model, nn.Module):
        return recipe.initial_model
    with seeded(seed):
        return trainer.call_model_init()


def _draws_weights(trainer: Trainer, recipe: Recipe, initial_weights: str) -> bool:
    """Whether runs start from weights of their own: a `model_init` may as well return a pretrained model."""
    return recipe.initial_model is None and (
        weights_fingerprint(_initial_model(trainer, recipe, seed=1)) != initial_weights
    )


def _manifest(
    trainer: Trainer, recipe: Recipe, request: Request, task: Task, initial: nn.Module, fingerprints: dict[str, str]
) -> dict[str, Any]:
    config = getattr(unwrap(initial), "config", None)
    settings = config.to_dict() if config is not None else {}
    optimizer = trainer.optimizer_cls_and_kwargs
    return {
        "protocol": request.protocol,
        "seed": request.seed,
        "trainer": _qualified(type(trainer)),
        "model": _qualified(type(initial)),
        "model_config": {k: v for k, v in settings.items() if k not in _IMMATERIAL_CONFIG},
        "model_init": trainer.model_init is not None,
        "initial_weights": fingerprints["model"],
        "train_dataset": fingerprints["train"],
        "query_dataset": fingerprints["query"],
        "task": task.description,
        "callbacks": [_qualified(c if isinstance(c, type) else type(c)) for c in recipe.given("callbacks") or ()],
        "compute_loss_func": None if trainer.compute_loss_func is None else _qualified(trainer.compute_loss_func),
        "optimizer": None if optimizer is None else [_qualified(optimizer[0]), repr(optimizer[1])],
        "arguments": material_arguments(trainer.args),
        "batch": {
            "rows": trainer.args.train_batch_size,
            "processes": trainer.args.world_size if request.follow_up is None else 1,
        },
        **({"trainer_arguments": own} if (own := recipe.own_arguments()) else {}),
        "versions": versions(),
        **({"follow_up": request.follow_up.settings} if request.follow_up is not None else {}),
        "subsets": request.subsets.description,
        "subset_keys": request.subsets.keys(),
    }


def _collated(split: Split) -> str:
    """A fingerprint of two rows after the data collator: its settings (padding, masking) cannot be read off it."""
    inputs = split.probe().inputs
    arrays = {key: np.asarray(value.float()) for key, value in inputs.items() if hasattr(value, "float")}
    return fingerprint(*(part for key in sorted(arrays) for part in (key, arrays[key])))


def _qualified(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}" if hasattr(thing, "__qualname__") else type(thing).__qualname__
