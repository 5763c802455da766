"""Trainings on a cluster, by Ray: a task for each, wherever a GPU, or else a CPU, is free.

Tasks leave their results in the same folder as all other runners do, which every machine of the cluster must see.
"""

import contextlib
import functools
import gc
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

from transformers import TrainingArguments

from hf_attribution.errors import ArtefactError
from hf_attribution.retraining.parcels import pack, unpack
from hf_attribution.retraining.plan import Plan
from hf_attribution.retraining.runs import work
from hf_attribution.retraining.workers import RETRIES, WorkerTraceback, clean_environment
from hf_attribution.retraining.worklist import Run


class RayCrew:
    """Ray's tasks at work on a plan. A context: at its end none is left.

    A training whose worker or machine is lost is done anew by Ray, where there is room.

    Args:
        plan: The plan, with its folder open.
        runs: Those that are to be done.

    Raises:
        ImportError: If Ray is not installed.
        UnsupportedError: If the plan cannot be sent to them.
    """

    takes_part = False

    def __init__(self, plan: Plan, runs: list[Run]) -> None:
        self._plan, self._runs = plan, runs
        self._parcel = pack(plan, runs, threads=1)
        self._context = contextlib.ExitStack()
        self._tasks: dict[Any, Run] = {}

    def __enter__(self) -> "RayCrew":
        self._ray = ray = self._context.enter_context(connection())
        resource = "num_gpus" if _on_gpus(ray, self._plan.args) else "num_cpus"
        train = ray.remote(max_retries=RETRIES, **{resource: 1})(_train)
        parcel = ray.put(self._parcel)
        self._tasks = {train.remote(parcel, tuple(sys.path), run): run for run in self._runs}
        return self

    def __exit__(self, *error: Any) -> None:
        for task in self._tasks:
            self._ray.cancel(task, force=True)
        self._context.close()

    def check(self) -> None:
        """Raise what has gone wrong in a task.

        Raises:
            Exception: The task's own error, with its traceback as the cause.
            RuntimeError: If a training has cost too many workers.
        """
        ray, tasks = self._ray, list(self._tasks)
        ended = ray.wait(tasks, num_returns=len(tasks), timeout=0)[0] if tasks else []
        for task in ended:
            run = self._tasks.pop(task)
            try:
                ray.get(task)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from WorkerTraceback(f"\n\n{error}")
            except ray.exceptions.RayError as error:
                raise RuntimeError(
                    f"The training on subset {run.subset} with seed {run.seed} was tried {RETRIES + 1} times and each "
                    f"time lost its worker: {error} Finished trainings are kept."
                ) from error


@contextlib.contextmanager
def connection() -> Iterator[Any]:
    """Connect to Ray: as it is already, or to the cluster that RAY_ADDRESS names, or to one of this machine alone.

    Yields:
        The module `ray`.

    Raises:
        ImportError: If Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("workers='ray' needs Ray: pip install hf-attribution[ray].") from error
    if ray.is_initialized():
        yield ray
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init()
    else:
        with _settings_of_ours():
            ray.init(address="local", include_dashboard=False)
    try:
        yield ray
    finally:
        ray.shutdown()


def places(args: TrainingArguments) -> int:
    """How many trainings there is room for at a time.

    Args:
        args: The training arguments.

    Returns:
        The number of the cluster's GPUs, or else of its CPUs.
    """
    with connection() as ray:
        return max(1, int(ray.cluster_resources().get("GPU" if _on_gpus(ray, args) else "CPU", 1)))


def _on_gpus(ray: Any, args: TrainingArguments) -> bool:
    return not args.use_cpu and ray.cluster_resources().get("GPU", 0) >= 1


@contextlib.contextmanager
def _settings_of_ours() -> Iterator[None]:
    """Of a cluster of ours nobody is told over the network, and its tasks get as much of the processor as we do.

    Ray gives its tasks the lowest priority but four, and beside other work on the machine they stand all but still.
    """
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    added = [name for name in settings if name not in os.environ]
    os.environ.update({name: settings[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _train(parcel: bytes, paths: tuple[str, ...], run: Run) -> None:
    """What a task does: one run, or nothing where another worker has finished it."""
    plan = _opened(parcel, paths)
    folder = plan.worklist.folder
    if not (folder / "manifest.json").exists():
        raise ArtefactError(
            f"{folder} is not seen on {socket.gethostname()}: give an output_dir that all machines of the cluster "
            "share."
        )
    work(plan, lambda: plan.worklist.missing([run]))


@functools.lru_cache(maxsize=1)
def _opened(parcel: bytes, paths: tuple[str, ...]) -> Plan:
    """The plan, once for all tasks of a worker process."""
    # The user's modules are found where the user's process finds them.
    sys.path += [path for path in paths if path not in sys.path]
    clean_environment(os.environ)
    plan, _ = unpack(parcel)
    gc.collect()
    gc.freeze()  # so that the Trainer's collections need not walk through what was imported
    return plan
