"""Trainer classes that record their trainings."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_attribution.columns import used_columns
from hf_attribution.data import Split
from hf_attribution.numbered import ROW, STATE, NumberedCollator, NumberedRows
from hf_attribution.replay.checks import check_recordable
from hf_attribution.replay.recorder import Recorder

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class RecordedTraining(_Base):
    """A mixin for any Trainer class: with a `recording_dir`, `train` records what it does. It does the same."""

    recording_dir: Path | None = None
    _recorder: Recorder | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does.

        Args:
            *args: For `Trainer.train`.
            **kwargs: For `Trainer.train`.

        Returns:
            What `Trainer.train` returns.
        """
        if self.recording_dir is None:
            return super().train(*args, **kwargs)
        split = training_split(self)
        check_recordable(self, split)
        self._recorder = Recorder(self.recording_dir, split, getattr(self, "weights", None))
        self.add_callback(self._recorder)
        try:
            return super().train(*args, **kwargs)
        finally:
            self._recorder.break_off(self.state.global_step)
            self.remove_callback(self._recorder)
            self._recorder = None

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's data loader; while a training is recorded its rows carry their numbers."""
        if self._recorder is None or isinstance(self.train_dataset, NumberedRows):
            return super().get_train_dataloader()
        dataset, collator = self.train_dataset, self.data_collator
        rows: Any = dataset
        if hasattr(dataset, "column_names"):
            # Here, because the Trainer knows columns of `datasets.Dataset` only.
            rows = self._remove_unused_columns(rows, description="training")
        self._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns += [name for name in (ROW, STATE) if name not in columns]
        self.train_dataset = NumberedRows(rows, self._recorder.train.draws_random_numbers)
        self.data_collator = NumberedCollator(collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = dataset, collator

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The Trainer's sampler, made from the user's own dataset: it may ask for a column of lengths."""
        if self._recorder is not None and isinstance(train_dataset, NumberedRows):
            train_dataset = train_dataset.sampled
        return super()._get_train_sampler(train_dataset)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's training step.

        Args:
            model: The model.
            inputs: A micro-batch.
            num_items_in_batch: What the Trainer counted in all micro-batches of the step.

        Returns:
            The loss.
        """
        if self._recorder is not None:
            self._recorder.saw(inputs[ROW], inputs.get(STATE), num_items_in_batch)
            # A trainer that numbers its rows itself needs the numbers.
            left_out = (STATE,) if isinstance(self.train_dataset, NumberedRows) else (ROW, STATE)
            inputs = {key: value for key, value in inputs.items() if key not in left_out}
        return super().training_step(model, inputs, num_items_in_batch)


def training_split(trainer: Any) -> Split:
    """A trainer's training data as its model sees them."""
    dataset, collator = trainer.train_dataset, trainer.data_collator
    if isinstance(dataset, NumberedRows):
        dataset, collator = dataset.dataset, collator.collator
    if trainer.args.remove_unused_columns:
        dataset = used_columns(dataset, trainer.model)
    return Split(dataset, collator, trainer.args.per_device_eval_batch_size)
