"""Several trainings at a time on one machine: worker processes with a device each, replaced when they die."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import logging

from hf_attribution.retraining.parcels import pack
from hf_attribution.retraining.plan import Plan
from hf_attribution.retraining.worklist import Run

logger = logging.get_logger(__name__)

RETRIES = 2
_PATIENCE_SECONDS = 10.0

# By these a Trainer would take itself for one of many and join their process group. What says how to compute
# (ACCELERATE_MIXED_PRECISION, ACCELERATE_DYNAMO_*) stays.
_LAUNCHED = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "ACCELERATE_TORCH_DEVICE", "ACCELERATE_CONFIG_FILE"),
}
_LAUNCHED_PREFIXES = (
    *("MASTER_", "TORCHELASTIC_", "TORCH_NCCL_", "OMPI_COMM_", "PMI_", "MV2_COMM_", "FSDP_", "MEGATRON_LM_"),
    *("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON", "ACCELERATE_DEEPSPEED_"),
    *("ACCELERATE_USE_PARALLELISM", "PARALLELISM_CONFIG_"),
)
_WORKER = "from hf_attribution.worker import main; main()"


class WorkerTraceback(Exception):
    """The traceback of an error in a worker, shown as the cause of the error."""


def clean_environment(environment: MutableMapping[str, str]) -> None:
    """Take out of an environment what would make a Trainer join the process group of a launch."""
    for name in list(environment):
        if name in _LAUNCHED or name.startswith(_LAUNCHED_PREFIXES):
            del environment[name]


class Crew:
    """Worker processes at work on a plan. A context: at its end none is left.

    On a CPU, or with one GPU, the process that starts them is one of them, so that the first training begins at once;
    threads are divided among them. With several GPUs each worker sees one, in turn, and the process waits; so does a
    process of a launch, whose own worker, on the same GPU, is of none.

    Args:
        plan: The plan, with its folder open.
        workers: How many trainings at a time.
        runs: Those that are to be done.

    Raises:
        UnsupportedError: If the plan cannot be sent to them.
    """

    def __init__(self, plan: Plan, workers: int, runs: list[Run]) -> None:
        if workers > len(runs):
            logger.warning(f"{len(runs)} trainings are left for {workers} workers: {len(runs)} of them start.")
            workers = len(runs)
        self._worklist = plan.worklist
        self._devices, self._place = _devices(plan.args), plan.args.local_process_index
        self.takes_part = len(self._devices) <= 1 and plan.args.world_size == 1
        self._threads_before = torch.get_num_threads()
        self.threads = max(1, self._threads_before // workers)
        self._parcel = pack(plan, runs, self.threads)
        self._runs = runs
        self._processes: list[subprocess.Popen[bytes]] = []
        self._deaths: Counter[Run | None] = Counter()
        self._errors: list[BaseException] = []
        self._over = False
        spawned = workers - self.takes_part
        self._threads = [threading.Thread(target=self._man, args=(slot,), daemon=True) for slot in range(spawned)]

    def __enter__(self) -> "Crew":
        torch.set_num_threads(self.threads)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._over = True
        torch.set_num_threads(self._threads_before)
        for process in list(self._processes):
            if error[0] is None:  # nothing is left, and they find out
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_PATIENCE_SECONDS)
            process.kill()
        for thread in self._threads:
            thread.join()

    def check(self) -> None:
        """Raise what has gone wrong in a worker.

        Raises:
            Exception: The worker's own error, with its traceback as the cause.
        """
        if self._errors:
            raise self._errors[0]

    def _man(self, slot: int) -> None:
        """See to it that a worker is there for as long as there is something to do."""
        try:
            while not self._over and self._worklist.missing(self._runs):
                self._employ(slot)
        except BaseException as error:
            self._errors.append(error)

    def _employ(self, slot: int) -> None:
        """One worker from its start to its end."""
        process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._environment(slot),
        )
        self._processes.append(process)
        # Its input stays open: when it is closed, however this process ends, the worker ends, too.
        with process, contextlib.suppress(BrokenPipeError):
            process.stdin.write(len(self._parcel).to_bytes(8, "little") + self._parcel)  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            message = process.stdout.read()  # type: ignore[union-attr]
            process.wait()
        self._processes.remove(process)
        if self._over:
            return
        if message:
            error, trace = pickle.loads(message)
            raise error from WorkerTraceback("\n\n" + trace)
        if process.returncode:
            self._note_death(process)

    def _note_death(self, process: "subprocess.Popen[bytes]") -> None:
        """A worker died without a word: its training is anyone's again, until it has cost too many workers."""
        code = process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        released: list[Run | None] = [*self._worklist.release(process.pid)]
        for run in released or [None]:
            self._deaths[run] += 1
            where = f"in training on subset {run.subset} with seed {run.seed}" if run else "before its first training"
            if self._deaths[run] > RETRIES:
                raise RuntimeError(
                    f"A worker {how} {where}, as {RETRIES} before it: that may be memory (start fewer workers), or a "
                    "crash in a library (its last words are above). Finished trainings are kept."
                )
            logger.warning(f"A worker {how} {where}: another one takes its place.")

    def _environment(self, slot: int) -> dict[str, str]:
        environment = dict(os.environ)
        clean_environment(environment)
        environment["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        environment["OMP_NUM_THREADS"] = str(self.threads)
        if self._devices:
            environment["CUDA_VISIBLE_DEVICES"] = self._devices[(self._place + slot) % len(self._devices)]
        return environment


def _devices(args: TrainingArguments) -> list[str]:
    """The names of the GPUs that this process sees, as CUDA_VISIBLE_DEVICES has them."""
    if args.use_cpu or not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name.strip() for name in named.split(",") if name.strip()] or [
        str(number) for number in range(torch.cuda.device_count())
    ]
