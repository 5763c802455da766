"""Training with a weight for every example, so that examples of weight 0 have derivatives without being trained on.

The weights reach the loss by the row number that each example carries through the data collator. Rows are numbered
and collated in the trainer that is built for the run; the user's dataset, collator and trainer are left alone.
"""

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_attribution.columns import select_rows
from hf_attribution.numbered import ROW, STATE, NumberedCollator, NumberedRows
from hf_attribution.replay.training import training_split
from hf_attribution.tasks import Task, TokenPrediction

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object  # to be combined with the user's class, see `weighted_class`


class SubsetWithPassengers(NumberedRows):
    """The rows of a subset, each of which brings along its share of the rows outside it.

    A sampler draws from the subset alone, so batches hold the rows that a training on the subset would see, in its
    order, and passengers behind them: every row outside the subset once an epoch.

    Args:
        dataset: The whole dataset, of dicts.
        mask: Which rows are in the subset, `[N]` bool.
        seed: Of which row travels with which.
        note_random_state: As for `NumberedRows`.
    """

    def __init__(self, dataset: Any, mask: np.ndarray, seed: int, note_random_state: bool = False) -> None:
        super().__init__(dataset, note_random_state)
        self.kept = np.flatnonzero(mask)
        outside = np.random.default_rng(seed).permutation(np.flatnonzero(~mask))
        self.passengers = [outside[number :: len(self.kept)] for number in range(len(self.kept))]
        self._subset = select_rows(dataset, self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        indices = list(indices)
        return self.numbered(np.concatenate([self.kept[indices], *(self.passengers[i] for i in indices)]).tolist())

    @property
    def sampled(self) -> Any:
        """The subset."""
        return self._subset


class _WeightedTraining(_Base):
    """Trains on the weighted sum of losses over n, the number of items in the accumulated batch."""

    loss_is_scaled_for_ga = True
    weights: Tensor
    task: Task
    counts_removed: bool

    def numbered_rows(self) -> tuple[Any, bool]:
        """The training data as their rows are numbered, and whether reading them draws random numbers."""
        draws = self.recording_dir is not None and training_split(self).draws_random_numbers  # type: ignore[attr-defined]
        dataset = self.train_dataset
        if hasattr(dataset, "column_names"):
            # Here, because the Trainer knows columns of `datasets.Dataset` only.
            dataset = self._remove_unused_columns(dataset, description="training")
        return dataset, draws

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns += [name for name in (ROW, STATE) if name not in columns]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """How many items the micro-batches of one optimiser step hold."""
        samples = batch_samples if self.counts_removed else [self._kept(sample) for sample in batch_samples]
        counted = super()._get_num_items_in_batch(samples, device)
        # The Trainer's own count of tokens where the model divides by it, right or (GPT-2's last one) wrong: what is
        # repeated here is the user's training.
        if counted is None or not isinstance(self.task, TokenPrediction):
            counted = sum(self.task.num_items(sample) for sample in samples)
        return counted

    def _kept(self, sample: dict[str, Any]) -> dict[str, Any]:
        """The rows of a micro-batch that have weight."""
        kept = self.weights[sample[ROW].cpu()] > 0
        return {
            name: value[kept.to(value.device)] if isinstance(value, Tensor) and len(value) == len(kept) else value
            for name, value in sample.items()
        }

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
        # Where tokens are counted over all processes, the mean that these take of their gradients is made a sum.
        everywhere = isinstance(self.task, TokenPrediction) and self.args.average_tokens_across_devices
        processes = self.args.world_size if everywhere else 1
        return processes * (weights.to(losses) * losses).sum() / cast(Tensor, num_items_in_batch)


def weighted_class(trainer_class: type[Trainer]) -> type[Trainer]:
    """A subclass of a trainer's class that trains with weights."""
    return type(f"Weighted{trainer_class.__name__}", (_WeightedTraining, trainer_class), {})


def give_weights(trainer: Any, weights: Tensor, task: Task) -> None:
    """Let every example count by its weight in the loss; the mean is over all examples, those of weight 0 included.

    Args:
        trainer: A trainer of a `weighted_class`, which is not the user's.
        weights: One per training example, `[N]`.
        task: Defines the loss.
    """
    rows, draws = trainer.numbered_rows()
    _train_on(trainer, NumberedRows(rows, draws), weights, task, counts_removed=True)


def carry_examples(trainer: Any, mask: np.ndarray, task: Task, seed: int) -> None:
    """Train on a subset, step by step as a trainer that has no other data does, with the other examples in tow.

    Args:
        trainer: A trainer of a `weighted_class`, which is not the user's.
        mask: Which examples are in the subset, `[N]` bool.
        task: Defines the loss.
        seed: Of which of the other examples is in which batch.
    """
    rows, draws = trainer.numbered_rows()
    weights = torch.from_numpy(mask.astype(np.float32))
    _train_on(trainer, SubsetWithPassengers(rows, mask, seed, draws), weights, task, counts_removed=False)


def _train_on(trainer: Any, rows: NumberedRows, weights: Tensor, task: Task, counts_removed: bool) -> None:
    trainer.weights, trainer.task, trainer.counts_removed = weights, task, counts_removed
    trainer.train_dataset, trainer.data_collator = rows, NumberedCollator(trainer.data_collator)
