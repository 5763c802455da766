"""The list of retrainings in a folder: which are finished, and who is at work on which.

Every retraining has one result file, written in one step, so the folder is the whole state. Any number of workers,
here or on other machines that see the folder, take retrainings from the list by creating a claim file, which only one
of them can, and keep it fresh while they work. The claim of a worker that died goes stale and is taken over. At worst
(two workers find a claim stale at the same moment) a retraining is done twice, with the same result.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_attribution.artefacts import read_artefact, write_artefact
from hf_attribution.errors import ArtefactError, MismatchError
from hf_attribution.subsets import Subsets

_KIND = "retraining"
_SUBSETS = "subsets.safetensors"
STALE_AFTER = 60.0  # seconds without a heartbeat


class Run(NamedTuple):
    """One retraining: on which subset, with which of the seeds."""

    subset: int
    seed: int

    @property
    def name(self) -> str:
        """How its files are called."""
        return f"{self.subset:05d}-{self.seed}"


@dataclasses.dataclass(frozen=True)
class WorkList:
    """The retrainings of M subsets with R seeds each, in a folder.

    Args:
        folder: The folder.
        keys: One key per subset, as `Subsets.keys()` gives.
        num_seeds: R.
        keep_checkpoints: Whether a run is finished only when its final weights are there, too.
    """

    folder: Path
    keys: list[str]
    num_seeds: int
    keep_checkpoints: bool

    def __len__(self) -> int:
        return len(self.keys) * self.num_seeds

    def runs(self) -> Iterator[Run]:
        """All runs, a first seed for every subset before a second."""
        return (Run(m, r) for r, m in itertools.product(range(self.num_seeds), range(len(self.keys))))

    def share(self, shard: str | None) -> list[Run]:
        """The runs of one of several shares of about equal size.

        Args:
            shard: `"3/16"` is the third of sixteen; `None` for all runs.

        Returns:
            The runs.

        Raises:
            ValueError: If it is no such share.
        """
        runs = list(self.runs())
        if shard is None:
            return runs
        number, _, count = shard.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise ValueError(
                f"shard must be '1/16', ..., '16/16', not {shard!r}: with Slurm, sbatch --array=1-16 and "
                "--shard $SLURM_ARRAY_TASK_ID/16."
            )
        return runs[int(number) - 1 :: int(count)]

    def missing(self, runs: Iterable[Run] | None = None) -> list[Run]:
        """The runs that are not finished, of all or of some."""
        return [run for run in (self.runs() if runs is None else runs) if not self.is_finished(run)]

    def is_finished(self, run: Run) -> bool:
        """Whether a run's result is there."""
        return self.result(run).exists() and (not self.keep_checkpoints or self.checkpoint(run).exists())

    def result(self, run: Run) -> Path:
        """The file with a run's outputs."""
        return self.folder / "runs" / f"{run.name}.safetensors"

    def checkpoint(self, run: Run) -> Path:
        """The folder with a run's final weights."""
        return self.folder / "runs" / run.name

    def found(self, run: Run) -> Path:
        """The file for what is found out from a run's recording."""
        return self.folder / "found" / f"{run.name}.safetensors"

    def scratch(self, run: Run) -> Path:
        """Where a run may write while it lasts."""
        return self.folder / "work" / run.name

    def write(self, run: Run, outputs: np.ndarray, seconds: float) -> None:
        """Write the outputs `[Q]` of a finished run, wholly or not at all."""
        metadata = {"subset": self.keys[run.subset], "seed": run.seed, "seconds": seconds}
        write_artefact(self.result(run), _KIND, {"outputs": outputs}, metadata)

    def read(self, run: Run) -> tuple[np.ndarray, float]:
        """Read what `write` wrote.

        Args:
            run: A finished run.

        Returns:
            Its outputs, float32 `[Q]`, and the seconds it took.

        Raises:
            ArtefactError: If the file is damaged; the message says what to do.
            MismatchError: If it is of another subset.
        """
        path = self.result(run)
        remedy = f"Delete {path} and call retrain again: this one run is trained anew and no other."
        try:
            arrays, metadata = read_artefact(path, _KIND)
        except ArtefactError as error:
            raise ArtefactError(f"{error} {remedy}") from error
        if metadata["subset"] != self.keys[run.subset]:
            raise MismatchError(f"{path} holds the outputs of another subset. {remedy}")
        return arrays["outputs"], metadata["seconds"]

    @contextlib.contextmanager
    def claim(self, run: Run) -> Iterator[bool]:
        """Claim a run for as long as the block lasts.

        Args:
            run: The run.

        Yields:
            Whether it is this worker's to do: no one else is at it, and no one has finished it.
        """
        path = self._claim(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _acquired(path):
            yield False
            return
        over = threading.Event()
        heart = threading.Thread(target=_beat, args=(path, over), daemon=True)
        heart.start()
        try:
            yield not self.is_finished(run)
        finally:
            over.set()
            heart.join()
            path.unlink(missing_ok=True)

    def release(self, pid: int) -> list[Run]:
        """Take away the claims of a worker of this machine that is known to be dead, and say on which runs."""
        released = []
        for run in self.runs():
            path = self._claim(run)
            if path.exists() and _owner(path) == (socket.gethostname(), pid):
                path.unlink(missing_ok=True)
                released.append(run)
        return released

    def _claim(self, run: Run) -> Path:
        return self.folder / "work" / f"{run.name}.claim"


def keep_subsets(folder: Path, subsets: Subsets) -> None:
    """Write down what is trained on, where there is nothing yet or subsets have been added."""
    path = folder / _SUBSETS
    if not path.exists() or len(Subsets.load(path)) < len(subsets):
        subsets.save(path)


def read_subsets(folder: Path) -> Subsets:
    """The subsets that the runs of a folder are trained on."""
    return Subsets.load(folder / _SUBSETS)


def kept_runs(folder: Path) -> list[Run]:
    """The finished runs of a folder whose final weights are there, a first seed for every subset before a second."""
    names = [path.stem for path in (folder / "runs").glob("*.safetensors") if path.with_suffix("").is_dir()]
    runs = [Run(*(int(number) for number in name.split("-"))) for name in names]
    return sorted(runs, key=lambda run: (run.seed, run.subset))


def _acquired(path: Path) -> bool:
    for _ in range(2):
        try:
            with path.open("x") as file:
                json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
        except FileExistsError:
            if not _abandoned(path):
                return False
            path.unlink(missing_ok=True)
        else:
            return True
    return False


def _abandoned(path: Path) -> bool:
    """Whether the worker that made a claim is dead: of this machine's we know, of others' we see no heartbeat."""
    try:
        if time.time() - path.stat().st_mtime > STALE_AFTER:
            return True
    except FileNotFoundError:
        return False  # just released
    owner = _owner(path)
    if owner is None or owner[0] != socket.gethostname() or os.name != "posix":
        return False
    try:
        os.kill(owner[1], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _owner(path: Path) -> tuple[str, int] | None:
    """Host and process of a claim; `None` where it was just released, or is just being written."""
    try:
        owner: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return owner["host"], owner["pid"]


def _beat(path: Path, over: threading.Event) -> None:
    while not over.wait(STALE_AFTER / 6):
        with contextlib.suppress(OSError):
            os.utime(path)
