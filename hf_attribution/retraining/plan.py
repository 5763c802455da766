"""What a call of `retrain` will do: made, checked and tried out before the first training."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn
from transformers import Trainer

from hf_attribution.artefacts import fingerprint
from hf_attribution.counterfactuals import Subsets
from hf_attribution.data import Batch, Split, check_same_columns, used_columns
from hf_attribution.errors import MismatchError, UnsupportedError
from hf_attribution.inputs import unwrap, weights_fingerprint
from hf_attribution.retraining.arguments import described_arguments, material_arguments
from hf_attribution.retraining.checks import check_optimizers, check_trainer, check_weighted, check_writable
from hf_attribution.retraining.manifest import check_manifest, folder_name
from hf_attribution.retraining.measuring import measured
from hf_attribution.retraining.recipe import Recipe
from hf_attribution.retraining.worklist import Run, WorkList, keep_subsets
from hf_attribution.seeds import derive_seed, seeded
from hf_attribution.tasks import Task

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
        seeds: R, trainings per subset.
        protocol: `"resampled"`, `"fixed"`, or `"masked"`: as `"resampled"`, the other examples along at weight 0.
        task: What is measured, and with `"fixed"` trained on.
        task_given: Whether the user named the task.
        seed: Base of all seeds.
        output_dir: Where results are kept, or `None` for a folder in the trainer's own.
        keep_checkpoints: Whether the final weights of every run are kept.
        follow_up: What is done with every recorded training, for which trainings are recorded.
    """

    query_dataset: Any
    subsets: Subsets
    seeds: int
    protocol: str
    task: Task
    task_given: bool
    seed: int
    output_dir: str | Path | None
    keep_checkpoints: bool
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
    """A request that has been checked.

    Args:
        request: The request.
        trainer: The user's trainer, to read from.
        recipe: Builds trainers like it.
        queries: The query batches, collated once for all runs.
        worklist: The runs, in their folder.
        fingerprints: Of initial model, training data, queries and task.
        fresh_weights: Whether runs start from weights of their own.
    """

    request: Request
    trainer: Trainer
    recipe: Recipe
    queries: list[Batch]
    worklist: WorkList
    fingerprints: dict[str, str]
    fresh_weights: bool

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
            "measurement": request.task.measurement_name,
            "task": request.task.description,
            "initial_weights": "fresh" if self.fresh_weights else "shared",
            "order": "fixed" if fixed else "fresh",
            "training": described_arguments(self.trainer.args),
        }


def make_plan(trainer: Trainer, recipe: Recipe, request: Request) -> Plan:
    """Check a request as far as that can be done without training, and open its folder.

    Args:
        trainer: The user's trainer.
        recipe: Builds trainers like it.
        request: What is asked for.

    Returns:
        The plan.

    Raises:
        ValueError: If a setting is out of its range.
        MismatchError: If queries and training data, or the folder and this training, do not belong together.
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
    fingerprints = {
        "model": weights_fingerprint(initial),
        "train": train.fingerprint,
        "query": query.fingerprint,
        "task": fingerprint(json.dumps(request.task.description, sort_keys=True)),
    }
    manifest = _manifest(trainer, recipe, request, initial, fingerprints) | {"collated": _collated(train)}
    if request.keep_checkpoints and not hasattr(initial, "save_pretrained"):
        raise UnsupportedError(
            f"keep_checkpoints needs a model with save_pretrained; {type(initial).__name__} has none."
        )
    if request.protocol != "resampled":
        check_weighted(trainer, initial, train.dataset, request.task_given)
    queries = list(query.batches())
    measured(cast(nn.Module, trainer.model), request.task, queries, "with the model as it is now")
    folder = Path(request.output_dir or Path(str(trainer.args.output_dir), folder_name(manifest)))
    check_writable(folder)
    check_manifest(folder, manifest)
    keep_subsets(folder, request.subsets)
    worklist = WorkList(folder, request.subsets.keys(), request.seeds, request.keep_checkpoints)
    fresh = request.protocol != "fixed" and _draws_weights(trainer, recipe, fingerprints["model"])
    return Plan(request, trainer, recipe, queries, worklist, fingerprints, fresh)


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
    trainer: Trainer, recipe: Recipe, request: Request, initial: nn.Module, fingerprints: dict[str, str]
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
        "task": request.task.description,
        "callbacks": [_qualified(c if isinstance(c, type) else type(c)) for c in recipe.given("callbacks") or ()],
        "compute_loss_func": None if trainer.compute_loss_func is None else _qualified(trainer.compute_loss_func),
        "optimizer": None if optimizer is None else [_qualified(optimizer[0]), repr(optimizer[1])],
        "arguments": material_arguments(trainer.args),
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
