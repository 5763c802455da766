"""A recorded run that is repeated: by the Trainer's own step, bit for bit, or with other weights of the examples."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_attribution.copies import own_copy
from hf_attribution.data import Split
from hf_attribution.errors import MismatchError, UnsupportedError
from hf_attribution.numbered import ROW, STATE
from hf_attribution.replay.optimizers import OPTIMIZERS, State
from hf_attribution.replay.parameters import checksum, flat, flat_moments, frozen_checksum, put_flat, trainable
from hf_attribution.replay.recording import Recording, Step
from hf_attribution.replay.training import training_split
from hf_attribution.seeds import RandomState, random_state_kept
from hf_attribution.tasks import Task

Denominator = Callable[[Step, Task, Mapping[str, Any]], float]

# What the sum of a micro-batch's losses is divided by. Models that do not take the Trainer's count take the mean over
# the micro-batch, which the Trainer divides by their number or (for some) does not.
DENOMINATORS: dict[str, Denominator] = {
    "num_items_in_batch": lambda step, task, inputs: float(step.num_items or "nan"),
    "micro_batch": lambda step, task, inputs: float(task.num_items(inputs)),
    "micro_batch * accumulation": lambda step, task, inputs: float(task.num_items(inputs) * len(step.batches)),
}


class Part(NamedTuple):
    """A micro-batch, ready to be differentiated: `Σ_i losses_i / denominator` is its part of the step's loss.

    Args:
        rows: The rows' positions in the training dataset, `[B]`.
        inputs: What the data collator returned, on the device.
        denominator: What the recorded training divided the sum of losses by.
        random: The random state before its forward pass.
    """

    rows: Tensor
    inputs: dict[str, Any]
    denominator: float
    random: RandomState


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """A recording, and a trainer like the one that made it.

    Args:
        recording: The recording.
        trainer: A trainer with the same model, arguments, data and collator. It need not have trained.

    Example:
        >>> run = RecordedRun.open("outputs/recording", trainer)  # doctest: +SKIP
    """

    recording: Recording
    trainer: Trainer

    @classmethod
    def open(cls, folder: str | Path, trainer: Trainer) -> "RecordedRun":
        """The run that was recorded in a folder.

        Args:
            folder: The folder.
            trainer: A trainer like the one that made it.

        Returns:
            The run.

        Raises:
            FileNotFoundError: If nothing is recorded there.
            ArtefactError: If the recording is damaged or not finished.
            MismatchError: If model or training data are others.
        """
        run = cls(Recording(folder), trainer)
        recorded, model = run.recording.header, run.model_copy()
        run.recording.check_finished()
        shapes = {name: list(p.shape) for name, p in trainable(model).items()}
        if shapes != recorded["shapes"]:
            names = shapes.keys() | recorded["shapes"].keys()
            changed = sorted(name for name in names if shapes.get(name) != recorded["shapes"].get(name))
            raise MismatchError(
                f"The recording in {folder} is of another model ({recorded['model']}): trainable parameters differ in "
                f"{', '.join(changed[:3])}. Give the trainer the model that was trained."
            )
        if frozen_checksum(model, run.recording.names) != recorded["frozen"]:
            raise MismatchError(
                f"The recording in {folder} is of a model with other frozen parameters or buffers: give the trainer "
                "the model that training started from."
            )
        if run.split.fingerprint != recorded["train"]:
            raise MismatchError(
                f"The recording in {folder} is of other training data ({recorded['num_examples']} rows): give the "
                "trainer the dataset of the recorded training, preprocessed and ordered as it was."
            )
        return run

    def model_copy(self) -> nn.Module:
        """A copy of the trainer's model, in `train()` mode."""
        return own_copy(cast(nn.Module, self.trainer.model)).train()

    def final_model(self) -> nn.Module:
        """The model at the end of the recorded run."""
        model = self.model_copy()
        put_flat(model, self.recording.names, self.recording.state(len(self.recording))[0])
        return model

    @property
    def split(self) -> Split:
        """The training data as the model sees them."""
        return training_split(self.trainer)


class Replay:
    """Repeats steps of a run on a copy of its model.

    Args:
        run: The run.
        task: Defines the losses of single examples.
        weights: Weights of the examples, `[N]`, for another training than the recorded one; `None` for that.
        rule: How the recorded losses are divided, a key of `DENOMINATORS`; needed for parts and for weights.

    Attributes:
        step: The number of the step that it is before.
    """

    def __init__(self, run: RecordedRun, task: Task, weights: Tensor | None = None, rule: str | None = None) -> None:
        self.run, self.recording, self.task, self.weights, self.rule = run, run.recording, task, weights, rule
        self.optimizer = self.recording.optimizer
        self.model = run.model_copy()
        self._named = trainable(self.model)
        self.parameters = [self._named[name] for name in self.recording.names]
        self._torch_optimizer = self._build_optimizer()
        accelerator = run.trainer.accelerator
        loader = run.trainer.get_train_dataloader()
        accelerator._dataloaders = [each for each in accelerator._dataloaders if each is not loader]
        self._dataset, self._collate = loader.dataset, loader.collate_fn
        self.step = self._loaded = 0
        self._idle: list[str] | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.parameters[0].device

    @property
    def example_weights(self) -> Tensor:
        """The weight of every example in this training, `[N]`."""
        if self.weights is not None:
            return self.weights
        recorded = self.recording.weights
        return torch.ones(self.recording.header["num_examples"]) if recorded is None else recorded

    def load(self, step: int, state: State) -> None:
        """Go to the state before a step."""
        self.step = self._loaded = step
        for parameter, value in zip(self.parameters, self._split(state[0]), strict=True):
            parameter.data.copy_(value)
        self._torch_optimizer.state.clear()
        if step == 0:
            return  # torch makes the first moments itself
        for name, moment in zip(self.optimizer.moments, state[1:], strict=True):
            for parameter, value in zip(self.parameters, self._split(moment), strict=True):
                own = self._torch_optimizer.state[parameter]
                own[name] = value.to(parameter.device, copy=True)
                if self.optimizer.name != "SGD":
                    own["step"] = torch.tensor(float(step))

    def state(self) -> State:
        """The state that the replay has come to."""
        return (flat(self.parameters), *flat_moments(self._torch_optimizer, self.parameters, self.optimizer.moments))

    def advance(self) -> Tensor:
        """Take the next step.

        Returns:
            The gradient before clipping, `[P]`.

        Raises:
            MismatchError: If the step does not lead where the recorded one led.
            UnsupportedError: If parameters take part in some of the steps only.
        """
        number, step = self.step, self.recording.step(self.step)
        gradient = self.gradient()
        idle = [name for name, p in self._named.items() if p.grad is None]
        if self._idle not in (None, idle):
            raise UnsupportedError(
                f"{', '.join(sorted(set(idle) ^ set(self._idle or ()))[:3])} took part in some training steps and not "
                f"in step {number}, and the optimiser treats that apart: this training cannot be differentiated."
            )
        self._idle = idle
        self._update(step)
        self.step += 1
        if self.weights is None and checksum(self.parameters) != step.checksum:
            made = self.recording.header
            raise MismatchError(
                f"Step {number} of the recorded training comes out differently when it is repeated (the first to do "
                f"so from step {self._loaded} on), so it cannot be differentiated. The code of model, data collator, "
                "loss or callbacks has changed, or what it runs on: "
                f"recorded with torch {made['versions']['torch']}, transformers {made['versions']['transformers']} "
                f"and {made['threads']} threads (torch.set_num_threads), repeated with {torch.get_num_threads()}."
            )
        return gradient

    def gradient(self) -> Tensor:
        """The gradient of the step that the replay is at, before clipping, `[P]`; it stays in the parameters."""
        self.model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            if self.weights is None:
                self._backward_by_trainer()
            else:
                self._backward_weighted(self.weights)
        return flat([torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters])

    def parts(self, step: int) -> list[Part]:
        """The micro-batches of a step by its number."""
        recorded, parts = self.recording.step(step), []
        for batch, inputs in zip(recorded.batches, self._collated(step), strict=True):
            inputs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in inputs.items() if k != ROW}
            denominator = DENOMINATORS[str(self.rule)](recorded, self.task, inputs)
            parts.append(Part(torch.from_numpy(batch.rows), inputs, denominator, batch.random))
        return parts

    def _collated(self, step: int) -> list[dict[str, Any]]:
        """The micro-batches of a step as the Trainer got them."""
        batches = []
        many = getattr(self._dataset, "numbered", None) or getattr(self._dataset, "__getitems__", None)
        for batch in self.recording.step(step).batches:
            with random_state_kept():
                if batch.drawn is not None:
                    RandomState.unpacked(batch.drawn).restore()
                indices = batch.rows.tolist()
                inputs = self._collate(many(indices) if many else [self._dataset[index] for index in indices])
            batches.append({key: value for key, value in inputs.items() if key != STATE})
        return batches

    def _backward_by_trainer(self) -> None:
        trainer: Any = self.run.trainer
        step, batches = self.recording.step(self.step), self._collated(self.step)
        items = None if step.num_items is None else torch.tensor(int(step.num_items), device=self.device)
        with _within_step(trainer, self.model, len(batches)), random_state_kept():
            step.batches[0].random.restore()
            for inputs in batches:
                trainer.training_step(self.model, inputs, items)

    def _backward_weighted(self, weights: Tensor) -> None:
        for part in self.parts(self.step):
            with random_state_kept():
                part.random.restore()
                losses = self.task.losses(self.model, part.inputs)
                ((weights[part.rows].to(losses) * losses).sum() / part.denominator).backward()

    def _update(self, step: Step) -> None:
        if self.optimizer.max_norm > 0:
            self.run.trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.optimizer.max_norm)
        for group, rate in zip(self._torch_optimizer.param_groups, step.rates, strict=True):
            group["lr"] = rate
        self._torch_optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def _build_optimizer(self) -> torch.optim.Optimizer:
        groups = []
        for group in self.recording.header["optimizer"]["groups"]:
            settings = {k: tuple(v) if isinstance(v, list) else v for k, v in group["settings"].items()}
            groups.append({"params": [self._named[name] for name in group["parameters"]], "lr": 0.0, **settings})
        kind: Any = OPTIMIZERS[self.optimizer.name]
        return kind(groups)

    def _split(self, vector: Tensor) -> Iterator[Tensor]:
        parts = vector.split([p.numel() for p in self.parameters])
        return (part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True))


@contextlib.contextmanager
def _within_step(trainer: Any, model: nn.Module, num_batches: int) -> Iterator[None]:
    """The trainer in the middle of a step of so many micro-batches, with another model."""
    own = {
        name: vars(trainer)[name] for name in ("model", "current_gradient_accumulation_steps") if name in vars(trainer)
    }
    try:
        trainer.model, trainer.current_gradient_accumulation_steps = model, num_batches
        yield
    finally:
        del trainer.current_gradient_accumulation_steps
        vars(trainer).update(own)
