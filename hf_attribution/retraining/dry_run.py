"""What a call of `retrain` would do and cost, found out by a few steps of one training."""

import dataclasses
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from hf_attribution.retraining.arguments import run_arguments
from hf_attribution.retraining.manifest import check_manifest
from hf_attribution.retraining.measuring import measured
from hf_attribution.retraining.on_ray import places
from hf_attribution.retraining.plan import Plan, Workers
from hf_attribution.retraining.runs import build_trainer
from hf_attribution.retraining.worklist import Run
from hf_attribution.seeds import seeded

_STEPS = 5


@dataclasses.dataclass(frozen=True)
class RetrainingDryRun:
    """What retraining will take. `print` it.

    Attributes:
        folder: Where the results will be.
        num_trainings: How many trainings there are (in this shard).
        num_finished: How many of them are finished already.
        steps_per_training: Optimiser steps of one, on a subset of the mean size.
        seconds_per_training: Of one, from a few steps.
        seconds: Of all that are missing, with these workers.
        disk_bytes: What the missing ones will write and leave there.
        memory_bytes: Weights, gradients and optimiser states of one training; on a GPU the peak with activations.
    """

    folder: Path
    num_trainings: int
    num_finished: int
    steps_per_training: int
    seconds_per_training: float
    seconds: float
    disk_bytes: int
    memory_bytes: int

    def __str__(self) -> str:
        missing = self.num_trainings - self.num_finished
        return (
            f"{self.num_trainings} trainings in {self.folder}, {self.num_finished} of them finished. "
            f"The other {missing}: about {self.steps_per_training} steps and {duration(self.seconds_per_training)} "
            f"each, {duration(self.seconds)} together; {size(self.disk_bytes)} of disk, "
            f"{size(self.memory_bytes)} of memory for each that is trained at a time."
        )


def try_out(plan: Plan, workers: Workers = 1, shard: str | None = None) -> RetrainingDryRun:
    """Train a few steps in a temporary folder, and say what all of it will take. Nothing is kept.

    Args:
        plan: The plan.
        workers: How many trainings at a time, as for `run_plan`.
        shard: Which share of the runs.

    Returns:
        What it will take.

    Raises:
        MismatchError: If the folder holds other retrainings.
    """
    worklist = plan.worklist
    check_manifest(worklist.folder, plan.manifest, write=False)
    runs = worklist.share(shard)
    missing = worklist.missing(runs)
    with tempfile.TemporaryDirectory(prefix="hf_attribution-") as folder:
        elsewhere = dataclasses.replace(worklist, folder=Path(folder))
        tried = _few_steps(dataclasses.replace(plan, worklist=elsewhere), (missing or runs)[0])
    subsets = plan.request.subsets
    longer = 1.0
    if plan.request.protocol == "resampled" and plan.args.max_steps <= 0:
        longer = subsets.masks.mean() * subsets.num_examples / subsets.masks[(missing or runs)[0].subset].sum()
    steps = max(1, round(tried.steps * longer))
    seconds = tried.around + steps * tried.seconds_per_step
    at_a_time = max(1, min(places(plan.args) if workers == "ray" else workers, len(missing)))
    num_queries = sum(len(batch.indices) for batch in plan.queries)
    kept = 4 * num_queries + 1024
    kept += tried.model_bytes if worklist.keep_checkpoints else 0
    kept += 4 * num_queries * subsets.num_examples if plan.request.follow_up is not None else 0
    return RetrainingDryRun(
        folder=worklist.folder,
        num_trainings=len(runs),
        num_finished=len(runs) - len(missing),
        steps_per_training=steps,
        seconds_per_training=seconds,
        seconds=seconds * len(missing) / at_a_time,
        disk_bytes=kept * len(missing),
        memory_bytes=tried.memory_bytes,
    )


@dataclasses.dataclass(frozen=True)
class _Tried:
    steps: int
    seconds_per_step: float
    around: float  # seconds of building the trainer and measuring
    model_bytes: int
    memory_bytes: int


class _Stopwatch(TrainerCallback):
    """Notes when steps end, and stops the training after a few."""

    def __init__(self) -> None:
        self.steps, self.times = 0, list[float]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.max_steps
        self.times = [time.perf_counter()]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())
        control.should_training_stop = len(self.times) > _STEPS


def _few_steps(plan: Plan, run: Run) -> _Tried:
    on_gpu = plan.args.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started, watch = time.perf_counter(), _Stopwatch()
    args = run_arguments(plan.args, plan.worklist.scratch(run), plan.seed(run))
    with seeded(args.seed):
        trainer = build_trainer(plan, run, args)
        if plan.request.follow_up is not None:
            cast(Any, trainer).recording_dir = None
        trainer.add_callback(watch)
        built = time.perf_counter() - started
        trainer.train()
        model, started = cast(nn.Module, trainer.model), time.perf_counter()
        measured(model, plan.task, plan.queries, "after a few steps")
    durations = np.diff(watch.times)
    model_bytes = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    states = getattr(trainer.optimizer, "state", {}).values()
    optimizer_bytes = sum(v.nbytes for state in states for v in state.values() if isinstance(v, torch.Tensor))
    gradients = sum(each.nbytes for each in model.parameters() if each.requires_grad)
    return _Tried(
        steps=watch.steps,
        seconds_per_step=statistics.median(durations[1:] if len(durations) > 1 else durations),
        around=built + time.perf_counter() - started,
        model_bytes=model_bytes,
        memory_bytes=torch.cuda.max_memory_allocated() if on_gpu else model_bytes + gradients + optimizer_bytes,
    )


def duration(seconds: float) -> str:
    """Seconds as they are read: `12.3 s`, `1:02:03`."""
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def size(number: float) -> str:
    """Bytes as they are read: `1.2 GiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            break
        number /= 1024
    return f"{number:.3g} {unit}"
