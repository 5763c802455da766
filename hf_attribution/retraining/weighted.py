"""Training with a weight for every example: removed examples stay in their batches and count nothing.

The weights reach the loss by the row number that each example carries through the data collator. Rows are numbered
and collated in the trainer that is built for the run; the user's dataset, collator and trainer are left alone.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_attribution.numbered import ROW, STATE, NumberedCollator, NumberedRows
from hf_attribution.tasks import Task, TokenPrediction

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object  # to be combined with the user's class, see `weighted`


class _WeightedTraining(_Base):
    """Trains on the weighted sum of losses over n, all items of the accumulated batch, those of weight 0 included."""

    loss_is_scaled_for_ga = True
    weights: Tensor
    task: Task

    def number_rows(self, note_random_state: bool = False) -> None:
        """Let the rows of the training data carry their numbers."""
        dataset = self.train_dataset
        if hasattr(dataset, "column_names"):
            # Here, because the Trainer knows columns of `datasets.Dataset` only.
            dataset = self._remove_unused_columns(dataset, description="training")
        self.train_dataset = NumberedRows(dataset, note_random_state)
        self.data_collator = NumberedCollator(self.data_collator)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns += [name for name in (ROW, STATE) if name not in columns]

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one optimiser step, and how many items they hold."""
        samples, counted = super().get_batch_samples(epoch_iterator, num_batches, device)
        # The Trainer's own count of tokens where the model divides by it, right or (GPT-2's last one) wrong: what is
        # repeated here is the user's training.
        if counted is None or not isinstance(self.task, TokenPrediction):
            counted = sum(self.task.num_items(sample) for sample in samples)
        return samples, counted

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted loss of a training batch; any other batch goes the user's way."""
        if ROW not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        weights = self.weights[inputs.pop(ROW).cpu()]
        losses = self.task.losses(model, inputs)
        return (weights.to(losses) * losses).sum() / cast(Tensor, num_items_in_batch)


def weighted_class(trainer_class: type[Trainer]) -> type[Trainer]:
    """A subclass of a trainer's class that trains with weights."""
    return type(f"Weighted{trainer_class.__name__}", (_WeightedTraining, trainer_class), {})


def give_weights(trainer: Any, weights: Tensor, task: Task) -> None:
    """Make a trainer of a `weighted_class` ready to train.

    Args:
        trainer: The trainer, which is not the user's.
        weights: One per training example, `[N]`.
        task: Defines the loss.
    """
    trainer.weights, trainer.task = weights, task
    trainer.number_rows()
