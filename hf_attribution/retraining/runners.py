"""Doing the runs of a plan: in this process, in several, on a cluster, or by shards; then all are collected.

Whoever works takes runs from one list in one folder and leaves the same files there, so that the runners can be
interrupted, repeated, mixed and changed from call to call, and the artefact is the same.
"""

import time
from importlib.metadata import version

import numpy as np
from transformers.utils import logging

from hf_attribution.counterfactuals import Counterfactuals
from hf_attribution.errors import UnfinishedError, UnsupportedError
from hf_attribution.retraining.on_ray import RayCrew
from hf_attribution.retraining.plan import Plan, Workers
from hf_attribution.retraining.progress import Progress, Tracker
from hf_attribution.retraining.runs import work
from hf_attribution.retraining.together import agreed, check_alike
from hf_attribution.retraining.workers import Crew
from hf_attribution.retraining.worklist import Run

logger = logging.get_logger(__name__)

_POLL_SECONDS = 0.2


def run_plan(
    plan: Plan, workers: Workers = 1, shard: str | None = None, tracker: Tracker | None = None
) -> Counterfactuals:
    """Do the runs that are not finished, together with whoever else works on the folder, and collect all outputs.

    Args:
        plan: The plan.
        workers: How many trainings at a time on this machine, or `"ray"` for as many as a cluster has room for.
        shard: Which share of the runs to do, `"3/16"`.
        tracker: Told of the progress.

    Returns:
        The outputs of all runs.

    Raises:
        UnfinishedError: If this share is done and others are not.
    """
    args, worklist = plan.args, plan.worklist
    _check_workers(plan, workers)
    runs = worklist.share(shard)
    check_alike(args, plan.manifest)
    agreed(args, plan.open_folder)
    main = args.process_index == 0
    with Progress(worklist, runs, main and not args.disable_tqdm, tracker if main else None) as progress:
        if main:
            size = f"{len(worklist.keys)} subsets x {worklist.num_seeds} seeds = {len(worklist)} trainings"
            share = f" ({len(runs)} in shard {shard})" if shard is not None else ""
            logger.info(
                f"Retraining ({plan.request.protocol}): {size}{share}, {progress.found} of them finished, in "
                f"{worklist.folder}"
            )
        missing = agreed(args, progress.missing)
        if missing and (workers != 1 or plan.apart):
            with RayCrew(plan, missing) if workers == "ray" else Crew(plan, workers, missing) as crew:
                _work_with(crew, plan, progress)
        elif missing:
            work(plan, progress.missing, progress.glance if main else None)
        return _collect(plan, progress, shard)


def _check_workers(plan: Plan, workers: Workers) -> None:
    processes = plan.args.world_size
    if workers != "ray" and (not isinstance(workers, int) or workers < 1):
        raise ValueError(f"workers must be a number of at least 1, or 'ray', not {workers!r}.")
    if processes > 1 and workers != 1:
        raise UnsupportedError(
            f"This process is one of {processes} of a launch, which do every training together: leave workers out, or "
            "start with python instead of accelerate launch or torchrun."
        )


def _work_with(crew: Crew | RayCrew, plan: Plan, progress: Progress) -> None:
    """Work beside the workers, or wait for them."""

    def missing() -> list[Run]:
        crew.check()
        return progress.missing()

    def between() -> None:
        crew.check()
        progress.glance()

    if crew.takes_part:
        work(plan, missing, between)
    while missing():
        time.sleep(_POLL_SECONDS)


def _collect(plan: Plan, progress: Progress, shard: str | None) -> Counterfactuals:
    request, worklist = plan.request, plan.worklist
    others = [run for run in worklist.runs() if run not in progress.finished]
    missing = worklist.missing(others)
    if missing:
        raise UnfinishedError(
            f"The trainings of shard {shard} are done; {len(missing)} of {len(worklist)} of other shards are not yet "
            f"in {worklist.folder}. When they are, call this once more, with any shard or without one, to collect "
            "all outputs."
        )
    finished = {**progress.finished, **{run: worklist.read(run) for run in others}}
    outputs = np.stack(
        [[finished[Run(m, r)][0] for r in range(worklist.num_seeds)] for m in range(len(worklist.keys))]
    )
    provenance = {
        **plan.origin,
        "seconds": sum(seconds for _, seconds in finished.values()),
        "versions": {name: version(name) for name in ("torch", "transformers", "datasets", "accelerate")},
    }
    return Counterfactuals(request.subsets, outputs, plan.description, provenance)
