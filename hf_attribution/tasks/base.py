"""The two vectors that every task gives: losses and a measurement of each example."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from hf_attribution.adapters import refuse_prompt_learning
from hf_attribution.errors import MismatchError, UnsupportedError
from hf_attribution.inputs import accepts, with_positions
from hf_attribution.logits import margins, picked, refuse_unknown_classes, sampled_classes, token_sum

Batch = Mapping[str, Any]
Measure = str | Callable[[nn.Module, Batch], Tensor]


@dataclasses.dataclass(frozen=True)
class Task:
    """Per-example losses and measurements of one kind of model.

    Use a subclass, or `infer_task(model)`. To attribute a loss of your own, subclass and override `losses`; to
    measure something of your own, pass a function as `measure`.

    Args:
        measure: What scores explain. A name (`"margin"`, `"log_probability"`, `"loss"`, `"negative_loss"`,
            `"logit"` for the label's logit, `"logit:3"` for class 3's), a function
            `(model, batch) -> Tensor [B]`, or `None` for the task's default.
        label_smoothing: The `label_smoothing_factor` of training, in `[0, 1)`. It enters `losses` only.

    Example:
        >>> task = infer_task(model)  # doctest: +SKIP
        >>> task.losses(model, batch).shape  # doctest: +SKIP
        torch.Size([8])
    """

    measure: Measure | None = None
    label_smoothing: float = 0.0

    name: ClassVar[str] = "task"
    default_measure: ClassVar[str] = "negative_loss"
    measures: ClassVar[tuple[str, ...]] = ("loss", "negative_loss")

    def __post_init__(self) -> None:
        if isinstance(self.measure, str) and not self._knows(self.measure):
            raise ValueError(
                f"{self.name} has no measurement {self.measure!r}: choose one of {', '.join(self.measures)} "
                "or pass a function (model, batch) -> Tensor of shape [B]."
            )
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), not {self.label_smoothing}.")

    def _knows(self, measure: str) -> bool:
        kind, colon, which = measure.partition(":")
        return kind in self.measures and (not colon or (kind == "logit" and which.isdecimal()))

    @property
    def measurement_name(self) -> str:
        """The name under which the measured output is recorded beside every score."""
        measure = self.measure or self.default_measure
        return measure if isinstance(measure, str) else getattr(measure, "__qualname__", repr(measure))

    @property
    def description(self) -> dict[str, Any]:
        """The task as JSON: its name, the measured output and the label smoothing."""
        return {
            "name": self.name,
            "measurement": self.measurement_name,
            "label_smoothing": self.label_smoothing,
        }

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss of each example, summed over its target tokens. Shape `[B]`."""
        return self._losses(self._logits(model, batch), self._targets(batch))

    def gains(self, model: nn.Module, batch: Batch) -> Tensor:
        """What training on an example raises: minus its loss. Shape `[B]`."""
        return -self.losses(model, batch)

    def measurement(self, model: nn.Module, batch: Batch) -> Tensor:
        """The measured output of each example.

        Args:
            model: The model, in whatever mode it is.
            batch: What the data collator returned.

        Returns:
            One number per example, `[B]`.

        Raises:
            ValueError: If a measurement function of the user's returns another shape.
        """
        measure = self.measure or self.default_measure
        if measure in ("loss", "negative_loss"):
            return self.losses(model, batch) if measure == "loss" else self.gains(model, batch)
        if callable(measure):
            values = measure(model, batch)
            if values.ndim != 1:
                raise ValueError(
                    f"The measurement {self.measurement_name} returned shape {tuple(values.shape)}: "
                    "it must return one number per example, shape [B]."
                )
            return values
        logits, targets = self._logits(model, batch), self._targets(batch)
        return self._measure(measure, logits, targets)

    def num_items(self, batch: Batch) -> int:
        """What the mean loss of a batch is a mean over: its examples, or its target tokens."""
        return next(len(value) for value in batch.values() if isinstance(value, Tensor))

    def with_measure(self, measure: Measure | None) -> "Task":
        """The same task measuring something else."""
        return dataclasses.replace(self, measure=measure)

    def margins(self) -> "Task | None":
        """This task measuring the correct-class margin, where an example is one prediction; else `None`."""
        return None

    def curvature_rows(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Values whose gradients r make up the Gauss-Newton matrix of the losses, `Σ_ik r_ik r_ikᵀ`.

        Args:
            model: The model.
            batch: What the data collator returned.

        Returns:
            The K values of each example, `[B, K]`, and the coefficients `[B, K]` with which their gradients add up to
            the gradient of its gain.

        Raises:
            UnsupportedError: If the task has none in closed form.
        """
        raise UnsupportedError(
            f"There is no closed form of the Gauss-Newton matrix for {self.name} (an example has too many outputs, or "
            "the task is your own): use curvature='fisher'."
        )

    def sampled_losses(self, model: nn.Module, batch: Batch, seeds: Tensor) -> Tensor:
        """The loss of each example on targets drawn from the model: its gradients make up the true Fisher matrix.

        Args:
            model: The model.
            batch: What the data collator returned.
            seeds: A seed for each example's targets, `[B]`.

        Returns:
            Minus the log-probability of the drawn targets, up to a constant, `[B]`.

        Raises:
            UnsupportedError: If the task does not say how its targets are distributed.
        """
        raise UnsupportedError(
            f"{type(self).__name__} says nothing of the distribution of its targets: use curvature='fisher', or "
            "override `sampled_losses`."
        )

    def labels(self, dataset: Any) -> np.ndarray | None:
        """The class of each row of a dataset, `[N]` integers, or `None` where rows have no class."""
        return None

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """The model's outputs on a batch, without its own loss: labels stay here."""
        refuse_prompt_learning(model)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if accepts(model, "use_cache"):
            inputs["use_cache"] = False
        return model(**with_positions(model, inputs))

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        outputs = self.forward(model, batch)
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        # Half-precision losses lose the differences between examples: sum in float32 at least.
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def _targets(self, batch: Batch) -> Tensor:
        labels = batch.get("labels")
        if labels is None:
            raise ValueError(
                f"A {self.name} batch has no 'labels' (it has {', '.join(batch)}). {self._how_to_get_labels()}"
            )
        return labels

    def _how_to_get_labels(self) -> str:
        return "Give the dataset a 'label' or 'labels' column that the data collator passes on."

    def _losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        raise UnsupportedError(f"{type(self).__name__} defines no loss: override `losses`.")

    def _measure(self, measure: str, logits: Tensor, targets: Tensor) -> Tensor:
        raise UnsupportedError(f"{type(self).__name__} does not measure {measure!r}: override `measurement`.")


@dataclasses.dataclass(frozen=True)
class PredictionTask(Task):
    """Tasks whose targets are classes: one per example, or one per target token."""

    measures: ClassVar[tuple[str, ...]] = ("margin", "log_probability", "loss", "negative_loss", "logit")

    def sampled_losses(self, model: nn.Module, batch: Batch, seeds: Tensor) -> Tensor:
        """Cross-entropy on classes drawn from the model, one for each target; without label smoothing."""
        if type(self).losses is not Task.losses or type(self)._losses is not PredictionTask._losses:
            # A loss of the user's own need not be cross-entropy.
            return super().sampled_losses(model, batch, seeds)
        logits, targets = self._aligned(self._logits(model, batch), self._targets(batch))
        refuse_unknown_classes(targets, logits.shape[-1])
        drawn = sampled_classes(logits.detach(), targets, seeds)
        return token_sum(-picked(logits.log_softmax(-1), drawn), targets)

    def _aligned(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[B, T, C]` and targets `[B, T]` that belong together."""
        return logits, targets

    def _losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits, targets = self._aligned(logits, targets)
        refuse_unknown_classes(targets, logits.shape[-1])
        losses = token_sum(-picked(logits.log_softmax(-1), targets), targets)
        if self.label_smoothing:
            uniform = token_sum(-logits.log_softmax(-1).mean(-1), targets)
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * uniform
        return losses

    def _measure(self, measure: str, logits: Tensor, targets: Tensor) -> Tensor:
        kind, _, which = measure.partition(":")
        logits, targets = self._aligned(logits, targets)
        refuse_unknown_classes(targets, logits.shape[-1])
        if which and int(which) >= logits.shape[-1]:
            raise MismatchError(f"The measurement is {measure} but the model has {logits.shape[-1]} classes.")
        if kind == "logit":
            values = logits[..., int(which)] if which else picked(logits, targets)
        elif kind == "log_probability":
            values = picked(logits.log_softmax(-1), targets)
        else:
            values = margins(logits, targets)
        return token_sum(values, targets)
