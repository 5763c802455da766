"""One retraining: a training by the user's own Trainer on a subset, written down when it is finished."""

import contextlib
import gc
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging

from hf_attribution.columns import select_rows
from hf_attribution.retraining.arguments import run_arguments
from hf_attribution.retraining.measuring import measured
from hf_attribution.retraining.plan import Plan
from hf_attribution.retraining.together import agreed
from hf_attribution.retraining.weighted import carry_examples, give_weights, weighted_class
from hf_attribution.retraining.worklist import Run
from hf_attribution.seeds import derive_seed, seeded
from hf_attribution.weights import quiet_transformers

logger = logging.get_logger(__name__)

_POLL_SECONDS = 0.5


def work(plan: Plan, missing: Callable[[], list[Run]], between: Callable[[], None] | None = None) -> None:
    """Do runs, together with whoever else works on the folder, until none is missing.

    Processes of one launch train together, each run by all of them; the main process decides and writes.

    Args:
        plan: The plan, with its folder open.
        missing: Says which runs are not finished.
        between: Called after every run.
    """
    with _old_objects_left_alone(), quiet_transformers():  # once is enough for their warnings
        while todo := agreed(plan.args, missing):
            worked = False
            for run in todo:
                with contextlib.ExitStack() as claims:
                    if agreed(plan.args, lambda: claims.enter_context(plan.worklist.claim(run))):  # noqa: B023
                        do_run(plan, run)
                        worked = True
                if worked and between is not None:
                    between()
            if not worked:
                time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """Keep objects that are there already out of garbage collections for a while.

    The Trainer collects garbage at the start of every training, and Python then walks through all objects of all
    imported modules: a third of a second each time, longer than many a training.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def train_and_measure(plan: Plan, run: Run) -> tuple[np.ndarray, Trainer]:
    """Train on one subset with one seed and measure all queries.

    Args:
        plan: The plan.
        run: Which subset and seed.

    Returns:
        The outputs, float32 `[Q]`, and the trainer with the trained model.
    """
    seed = plan.seed(run)
    args = run_arguments(plan.args, plan.worklist.scratch(run) / "trainer", seed)
    # Whatever the trainer draws, and where it seeds the generators, the user's go on as if nothing had been.
    with seeded(seed):
        trainer = build_trainer(plan, run, args)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        when = f"after training on subset {run.subset} with seed {run.seed}"
        return measured(cast(nn.Module, trainer.model), plan.task, plan.queries, when), trainer


def build_trainer(plan: Plan, run: Run, args: TrainingArguments) -> Trainer:
    """The trainer of a run, not trained yet.

    Args:
        plan: The plan.
        run: Which subset.
        args: Its arguments.

    Returns:
        The trainer.
    """
    subsets, dataset = plan.request.subsets, plan.train_dataset
    if plan.request.protocol == "resampled":
        return plan.recipe.build(args, select_rows(dataset, subsets.indices(run.subset)))
    trainer: Any = plan.recipe.build(args, dataset, weighted_class(plan.recipe.trainer_class))
    if plan.request.follow_up is not None:
        trainer.recording_dir = plan.worklist.scratch(run) / "recording"
    mask, task = subsets.masks[run.subset], plan.task
    if plan.request.protocol == "fixed":
        give_weights(trainer, torch.from_numpy(mask.astype(np.float32)), task)
    else:
        carry_examples(trainer, mask, task, derive_seed(plan.seed(run), "passengers"))
    return trainer


def do_run(plan: Plan, run: Run) -> None:
    """One run from the first step to the file with its outputs.

    Args:
        plan: The plan.
        run: Which subset and seed; claimed.

    Raises:
        OSError: If its results cannot be written.
    """
    scratch = plan.worklist.scratch(run)
    agreed(plan.args, lambda: shutil.rmtree(scratch, ignore_errors=True))
    started = time.perf_counter()
    try:
        outputs, trainer = train_and_measure(plan, run)
        _warn_of_absent_callbacks(plan, trainer)
        seconds = time.perf_counter() - started
        agreed(plan.args, lambda: _write_down(plan, run, trainer, outputs, seconds))
    finally:
        if plan.args.process_index == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def _write_down(plan: Plan, run: Run, trainer: Trainer, outputs: np.ndarray, seconds: float) -> None:
    """What is found of a run, and its outputs last: by them it counts as finished."""
    worklist = plan.worklist
    try:
        if worklist.keep_checkpoints:
            _keep(plan, run, trainer)
        if plan.request.follow_up is not None:
            plan.request.follow_up.act(trainer, worklist.scratch(run) / "recording", worklist.found(run))
        worklist.write(run, outputs, seconds)
    except OSError as error:
        message = f"{error.strerror or error}; {_progress(plan)} Make room and call retrain again"
        raise OSError(error.errno, message, error.filename or str(worklist.folder)) from error


def _keep(plan: Plan, run: Run, trainer: Trainer) -> None:
    """Save the final weights: wholly or not at all."""
    temporary, target = plan.worklist.scratch(run) / "model", plan.worklist.checkpoint(run)
    cast(PreTrainedModel, trainer.model).save_pretrained(temporary)
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    temporary.replace(target)


def _progress(plan: Plan) -> str:
    total, missing = len(plan.worklist), len(plan.worklist.missing())
    return f"{total - missing} of {total} retrainings are finished and stay in {plan.worklist.folder}."


def _warn_of_absent_callbacks(plan: Plan, trainer: Trainer) -> None:
    """Say it once if callbacks that the user added after construction are missing in the retrainings."""
    there = {type(callback) for callback in trainer.callback_handler.callbacks}
    absent = [kind.__name__ for kind in plan.callbacks if kind not in there]
    if absent:
        logger.warning_once(
            f"{', '.join(absent)} was added after the trainer was built and takes no part in retrainings: if it "
            "changes the training, pass it as callbacks=[...] to the constructor."
        )
