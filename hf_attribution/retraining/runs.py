"""Retraining on subsets: every run is a training by the user's own Trainer, written down when it is finished."""

import contextlib
import gc
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging

from hf_attribution.counterfactuals import Counterfactuals
from hf_attribution.data import select_rows
from hf_attribution.retraining.arguments import run_arguments
from hf_attribution.retraining.measuring import measured
from hf_attribution.retraining.plan import Plan
from hf_attribution.retraining.weighted import carry_examples, give_weights, weighted_class
from hf_attribution.retraining.worklist import Run
from hf_attribution.seeds import derive_seed, seeded

logger = logging.get_logger(__name__)

_POLL_SECONDS = 1.0


def run_plan(plan: Plan) -> Counterfactuals:
    """Do the runs that are not finished, together with whoever else works on the folder, and collect all outputs.

    Args:
        plan: The plan.

    Returns:
        The outputs of all runs.
    """
    worklist = plan.worklist
    total = len(worklist)
    finished = {run: worklist.read(run) for run in worklist.runs() if worklist.is_finished(run)}
    size = f"{len(worklist.keys)} subsets x {worklist.num_seeds} seeds = {total} trainings"
    logger.info(
        f"Retraining ({plan.request.protocol}): {size}, {len(finished)} of them finished, in {worklist.folder}"
    )
    quiet = plan.trainer.args.disable_tqdm
    with (
        _old_objects_left_alone(),
        _warned_already(),
        tqdm(total=total, initial=len(finished), desc="Retraining", unit="run", disable=quiet) as bar,
    ):
        while todo := worklist.missing():
            bar.update(total - len(todo) - bar.n)  # what other workers have finished
            worked = False
            for run in todo:
                with worklist.claim(run) as mine:
                    if mine:
                        finished[run] = _do(plan, run)
                        bar.update()
                        worked = True
            if not worked:
                time.sleep(_POLL_SECONDS)
    for run in worklist.runs():
        if run not in finished:
            finished[run] = worklist.read(run)
    return _collect(plan, finished)


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


@contextlib.contextmanager
def _warned_already() -> Iterator[None]:
    """Keep transformers from giving its warnings about model and tokenizer once more for every training."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def train_and_measure(plan: Plan, run: Run) -> tuple[np.ndarray, Trainer]:
    """Train on one subset with one seed and measure all queries.

    Args:
        plan: The plan.
        run: Which subset and seed.

    Returns:
        The outputs, float32 `[Q]`, and the trainer with the trained model.
    """
    seed = plan.seed(run)
    args = run_arguments(plan.trainer.args, plan.worklist.scratch(run) / "trainer", seed)
    # Whatever the trainer draws, and where it seeds the generators, the user's go on as if nothing had been.
    with seeded(seed):
        trainer = _build(plan, run, args)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        when = f"after training on subset {run.subset} with seed {run.seed}"
        return measured(cast(nn.Module, trainer.model), plan.request.task, plan.queries, when), trainer


def _build(plan: Plan, run: Run, args: TrainingArguments) -> Trainer:
    subsets, dataset = plan.request.subsets, plan.trainer.train_dataset
    if plan.request.protocol == "resampled":
        return plan.recipe.build(args, select_rows(dataset, subsets.indices(run.subset)))
    trainer: Any = plan.recipe.build(args, dataset, weighted_class(plan.recipe.trainer_class))
    if plan.request.follow_up is not None:
        trainer.recording_dir = plan.worklist.scratch(run) / "recording"
    mask, task = subsets.masks[run.subset], plan.request.task
    if plan.request.protocol == "fixed":
        give_weights(trainer, torch.from_numpy(mask.astype(np.float32)), task)
    else:
        carry_examples(trainer, mask, task, derive_seed(plan.seed(run), "passengers"))
    return trainer


def _do(plan: Plan, run: Run) -> tuple[np.ndarray, float]:
    """One run from the first step to the file with its outputs."""
    worklist, scratch = plan.worklist, plan.worklist.scratch(run)
    shutil.rmtree(scratch, ignore_errors=True)
    started = time.perf_counter()
    try:
        outputs, trainer = train_and_measure(plan, run)
        _warn_of_absent_callbacks(plan, trainer)
        seconds = time.perf_counter() - started
        try:
            if worklist.keep_checkpoints:
                _keep(plan, run, trainer)
            if plan.request.follow_up is not None:
                plan.request.follow_up.act(trainer, scratch / "recording", worklist.found(run))
            worklist.write(run, outputs, seconds)
        except OSError as error:
            message = f"{error.strerror or error}; {_progress(plan)} Make room and call retrain again"
            raise OSError(error.errno, message, error.filename or str(worklist.folder)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return outputs, seconds


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
    quiet = (ProgressCallback, PrinterCallback, *get_reporting_integration_callbacks(plan.trainer.args.report_to))
    there = {type(callback) for callback in trainer.callback_handler.callbacks}
    absent = [
        type(callback).__name__
        for callback in plan.trainer.callback_handler.callbacks
        if type(callback) not in there and not isinstance(callback, quiet)
    ]
    if absent:
        logger.warning_once(
            f"{', '.join(absent)} was added after the trainer was built and takes no part in retrainings: if it "
            "changes the training, pass it as callbacks=[...] to the constructor."
        )


def _collect(plan: Plan, finished: dict[Run, tuple[np.ndarray, float]]) -> Counterfactuals:
    request, worklist = plan.request, plan.worklist
    outputs = np.stack(
        [[finished[Run(m, r)][0] for r in range(worklist.num_seeds)] for m in range(len(worklist.keys))]
    )
    provenance = {
        "fingerprints": plan.fingerprints,
        "seconds": sum(seconds for _, seconds in finished.values()),
        "versions": {name: version(name) for name in ("torch", "transformers", "datasets", "accelerate")},
    }
    return Counterfactuals(request.subsets, outputs, plan.description, provenance)
