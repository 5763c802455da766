"""Recording a training while the Trainer trains, without changing a bit of it."""

import contextlib
import errno
import math
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_attribution.data import Split
from hf_attribution.errors import MismatchError
from hf_attribution.replay.checks import refuse_batch_norm
from hf_attribution.replay.optimizers import describe_optimizer, group_settings, moments_of
from hf_attribution.replay.parameters import checksum, flat, flat_moments, frozen_checksum, trainable
from hf_attribution.replay.recording import (
    MicroBatch,
    Recording,
    Step,
    state_path,
    write_header,
    write_state,
    write_steps,
    write_weights,
)
from hf_attribution.seeds import RandomState

logger = logging.get_logger(__name__)

# The share of the free disk that checkpoints may take.
DISK_SHARE = 0.5


class Recorder(TrainerCallback):
    """Writes a training down while it goes on; `RecordedTraining` tells it of the batches.

    Args:
        folder: Where. A recording that is there is replaced or, where the training is resumed, continued.
        train: The training data.
        weights: The weight of every example in the loss, `[N]`, where the trainer weights them.
    """

    def __init__(self, folder: Path, train: Split, weights: Tensor | None = None) -> None:
        self.folder, self.train, self.weights = folder, train, weights
        self.ended: str | None = None
        self._header: dict[str, Any] = {}
        self._parameters: list[nn.Parameter] = []
        self._moments: tuple[str, ...] = ()
        self._steps: list[Step] = []
        # of the step that is under way
        self._batches: list[MicroBatch] = []
        self._num_items: float | None = None
        self._rates: tuple[float, ...] = ()

    def saw(self, rows: Tensor, drawn: Tensor | None, num_items: Any) -> None:
        """Note a micro-batch right before its forward pass."""
        state = None if drawn is None else drawn.cpu().numpy()
        self._batches.append(MicroBatch(rows.cpu().numpy(), RandomState.now(), state))
        self._num_items = None if num_items is None else float(num_items)

    def on_train_begin(  # noqa: D102 (as in TrainerCallback, here and below)
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, named = kwargs["model"], trainable(kwargs["model"])
        refuse_batch_norm(model)
        described = describe_optimizer(kwargs["optimizer"], {id(p): name for name, p in named.items()})
        names = [name for group in described["groups"] for name in group["parameters"]]
        self._parameters, self._moments = [named[name] for name in names], moments_of(described)
        self._header = {
            "first_step": state.global_step,
            "total_steps": state.max_steps,
            "finished": False,
            "ended": None,
            "optimizer": described,
            "max_grad_norm": float(args.max_grad_norm or 0.0),
            "shapes": {name: list(named[name].shape) for name in names},
            "initial_checksum": checksum(self._parameters),
            "frozen": frozen_checksum(model, names),
            "model": type(model).__name__,
            "train": self.train.fingerprint,
            "num_examples": len(self.train),
            "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
            "threads": torch.get_num_threads(),
        }
        try:
            self._begin(state, kwargs["optimizer"])
        except OSError as error:  # before hours are spent; later only the recording ends
            raise OSError(
                error.errno,
                f"The training cannot be recorded in {self.folder}: {error.strerror or error}. Make room, give "
                "record= another folder, or train without it",
            ) from error

    def on_pre_optimizer_step(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        groups = kwargs["optimizer"].param_groups
        self._rates = tuple(float(group["lr"]) for group in groups)
        recorded = [group["settings"] for group in self._header["optimizer"]["groups"]]
        if self.ended is None and [group_settings(group) for group in groups] != recorded:
            self._end(f"settings of the optimiser other than learning rates changed at step {state.global_step}")

    def on_step_end(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.ended is not None:
            return
        number = checksum(self._parameters)
        self._steps.append(Step(tuple(self._batches), self._num_items, self._rates, number))
        self._batches = []
        due = state.global_step % self._header["spacing"] == 0
        with self._unless_disk_is_full():
            if due:
                self._keep_state(state.global_step, kwargs["optimizer"])
            # What the Trainer saves can be resumed from: the steps up to there must not be lost.
            if due or control.should_save:
                self._flush(state.global_step)

    def on_epoch_end(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.ended is None and control.should_save:
            with self._unless_disk_is_full():
                self._flush(state.global_step)

    def on_train_end(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.ended is not None:
            return
        with self._unless_disk_is_full():
            self._keep_state(state.global_step, kwargs["optimizer"])
            self._flush(state.global_step)
            self._header |= {"finished": True, "total_steps": state.global_step}
            write_header(self.folder, self._header)

    def break_off(self, step: int) -> None:
        """Write down what there is when training was left by an error or interrupt."""
        if self.ended is None:
            with self._unless_disk_is_full():
                self._flush(step)

    def _begin(self, state: TrainerState, optimizer: torch.optim.Optimizer) -> None:
        start = state.global_step
        size = sum(p.nbytes for p in self._parameters) * (1 + len(self._moments))
        if start == 0 or not self._continues(start):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            self._header["spacing"] = self._spacing(state.max_steps - start, size)
            write_header(self.folder, self._header)
            if self.weights is not None:
                write_weights(self.folder, self.weights)
            self._keep_state(start, optimizer)
        spacing = self._header["spacing"]
        count = math.ceil((state.max_steps - start) / spacing) + 1
        logger.info(
            f"Recording the training in {self.folder}: a checkpoint every {spacing} of {state.max_steps} steps, "
            f"{count} of {size / 2**20:.3g} MiB each, {count * size / 2**30:.3g} GiB in all."
        )

    def _spacing(self, steps: int, size: int) -> int:
        """Steps between checkpoints: the root of their number, or more where the disk is too small for that."""
        spacing = max(1, math.isqrt(steps))
        fits = int(DISK_SHARE * shutil.disk_usage(self.folder).free // size) - 2
        if fits < 1:
            raise OSError(errno.ENOSPC, f"three checkpoints of {size / 2**20:.3g} MiB take more than half of the disk")
        return max(spacing, math.ceil(steps / fits))

    def _continues(self, start: int) -> bool:
        """Cut the recording in the folder to the step at which training resumes; whether there is one."""
        try:
            older = Recording(self.folder)
        except FileNotFoundError:
            older = None
        if older is None or not older.first <= start <= len(older):
            logger.warning(f"{self.folder} holds no recording up to step {start}, so a new one begins there.")
            return False
        known = older.header["initial_checksum"] if start == older.first else older.step(start - 1).checksum
        same = all(older.header[key] == self._header[key] for key in ("shapes", "train", "frozen", "optimizer"))
        if known != self._header["initial_checksum"] or not same:
            raise MismatchError(
                f"The recording in {self.folder} is of another run than the one that resumes at step {start}: give "
                "record= another folder, or resume from a checkpoint of the recorded run."
            )
        for step in older.checkpoints:
            if step > start:
                state_path(self.folder, step).unlink()
        kept = [older.step(number) for number in range(older.first, start)]
        shutil.rmtree(self.folder / "steps", ignore_errors=True)
        if kept:
            write_steps(self.folder, older.first, kept)
        self._header |= {key: older.header[key] for key in ("first_step", "initial_checksum", "spacing")}
        write_header(self.folder, self._header)
        return True

    def _keep_state(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        state = (flat(self._parameters), *flat_moments(optimizer, self._parameters, self._moments))
        write_state(self.folder, step, state, self._moments)

    def _flush(self, step: int) -> None:
        if self._steps:
            write_steps(self.folder, step - len(self._steps), self._steps)
            self._steps = []

    @contextlib.contextmanager
    def _unless_disk_is_full(self) -> Iterator[None]:
        """A training is worth more than its recording: where that cannot be written it ends, and no more."""
        try:
            yield
        except OSError as error:
            self._end(str(error.strerror or error))

    def _end(self, why: str) -> None:
        self.ended, self._steps = why, []
        logger.error(f"The recording in {self.folder} has ended: {why}. Training goes on.")
        with contextlib.suppress(OSError):
            write_header(self.folder, {**self._header, "ended": why})
