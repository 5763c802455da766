"""Tasks with one target for each example: classification and regression."""

import dataclasses
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from hf_attribution.errors import UnsupportedError
from hf_attribution.seeds import generator
from hf_attribution.tasks.base import Batch, PredictionTask, Task


@dataclasses.dataclass(frozen=True)
class Classification(PredictionTask):
    """Image, sequence or audio classification: one class per example. Measures the correct-class margin.

    The margin is `log p / (1 - p)` of the label's probability (Park et al. 2023, section 3.2).
    """

    name: ClassVar[str] = "classification"
    default_measure: ClassVar[str] = "margin"

    def margins(self) -> Task:
        """This task measuring the correct-class margin."""
        return self.with_measure("margin")

    def labels(self, dataset: Any) -> np.ndarray | None:
        """The class of each row, from the column `labels` or `label`: `[N]` integers."""
        return label_column(dataset)

    def curvature_rows(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """`√p log p` of every class, p held fixed: cross-entropy has the curvature `diag(p) - p pᵀ` in the logits."""
        logits, targets = self._logits(model, batch), self._targets(batch)
        self._losses(logits.detach(), targets)  # refuses what is no classification
        log_p = logits.log_softmax(-1)
        # A class of probability e⁻³⁰ curves nothing, and its coefficient would be lost in rounding.
        roots = (log_p.detach().clamp(min=-30) / 2).exp()
        smoothed = torch.full_like(roots, self.label_smoothing / roots.shape[1])
        smoothed.scatter_add_(1, targets[:, None], torch.full_like(roots[:, :1], 1 - self.label_smoothing))
        return roots * log_p, smoothed / roots

    def _aligned(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if logits.ndim != 2 or targets.ndim != 1 or targets.is_floating_point():
            raise UnsupportedError(
                f"Classification needs logits [B, C] and integer labels [B], not {tuple(logits.shape)} and "
                f"{tuple(targets.shape)} {targets.dtype}. For several labels per example subclass Task."
            )
        return logits[:, None], targets[:, None]


@dataclasses.dataclass(frozen=True)
class Regression(Task):
    """Sequence or image regression: squared error, averaged over outputs. Measures minus the loss."""

    name: ClassVar[str] = "regression"
    measures: ClassVar[tuple[str, ...]] = ("loss", "negative_loss", "logit")

    def curvature_rows(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The outputs, times the root of the loss' second derivative."""
        outputs = self._logits(model, batch).flatten(1)
        targets = self._targets(batch).to(outputs.dtype).reshape(outputs.shape)
        root = (2 / outputs.shape[1]) ** 0.5
        return root * outputs, root * (targets - outputs.detach())

    def sampled_losses(self, model: nn.Module, batch: Batch, seeds: Tensor) -> Tensor:
        """Squared error against targets drawn around the outputs, of which it is the log-density."""
        if type(self).losses is not Task.losses or type(self)._losses is not Regression._losses:
            return super().sampled_losses(model, batch, seeds)
        outputs = self._logits(model, batch)
        noise = [torch.randn(outputs[0].numel(), generator=generator(seed)) for seed in seeds.tolist()]
        drawn = torch.stack(noise).to(outputs).reshape(outputs.shape) * (outputs[0].numel() / 2) ** 0.5
        return self._losses(outputs, outputs.detach() + drawn)

    def _losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        targets = targets.to(logits.dtype).reshape(logits.shape)
        return (logits - targets).square().flatten(1).mean(1)

    def _measure(self, measure: str, logits: Tensor, targets: Tensor) -> Tensor:
        return logits.reshape(len(logits), -1)[:, int(measure.partition(":")[2] or 0)]


def label_column(dataset: Any) -> np.ndarray | None:
    """The integer class of each row of a dataset from its `labels` or `label` column, `[N]`, or `None`."""
    for column in ("labels", "label"):
        if column in (getattr(dataset, "column_names", None) or ()):
            values = np.asarray(dataset.with_format(None)[column])
            if values.ndim == 1 and np.issubdtype(values.dtype, np.integer):
                return values
    return None
