"""Recording the queries' losses and the batches while a Trainer trains."""

from typing import Any, cast

import numpy as np
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_attribution.columns import used_columns
from hf_attribution.data import Batch, Collator, Split
from hf_attribution.errors import UnsupportedError
from hf_attribution.retraining.measuring import measured
from hf_attribution.simfluence.curves import LossCurves, LossRun
from hf_attribution.tasks import Task, infer_task


def record_losses(
    trainer: Trainer,
    query_dataset: Any,
    every: int = 1,
    examples: np.ndarray | None = None,
    num_examples: int | None = None,
    task: Task | None = None,
) -> LossCurves:
    """Train, and record the queries' losses every few steps, with the examples of each batch.

    The training is what `trainer.train()` does; the trainer's dataset and collator are put back afterwards.

    Args:
        trainer: A trainer that has not trained yet.
        query_dataset: Q rows, preprocessed as for training.
        every: Steps between two measurements. The first is before training and the last after it.
        examples: Positions of the trainer's training examples in the whole training dataset, where it has a subset.
        num_examples: N, how many examples that dataset has.
        task: What is learned; by default told from the model's class.

    Returns:
        The curves of one training; `LossCurves.concatenate` joins several.

    Raises:
        UnsupportedError: If batches are collated in other processes.
        ValueError: If `every` is not positive, or there are not as many positions as training examples.

    Example:
        >>> halves = Subsets.random(len(train), 20, fraction=0.5)  # doctest: +SKIP
        >>> rows = [mask.nonzero()[0] for mask in halves.masks]  # doctest: +SKIP
        >>> curves = LossCurves.concatenate([  # doctest: +SKIP
        ...     record_losses(make_trainer(train.select(each)), test, 5, each, len(train)) for each in rows
        ... ])
    """
    dataset: Any = trainer.train_dataset
    positions = np.arange(len(dataset)) if examples is None else np.asarray(examples, dtype=np.int64)
    if every < 1:
        raise ValueError(f"every must be at least 1, not {every}.")
    if len(positions) != len(dataset):
        raise ValueError(f"There are {len(positions)} examples= for {len(dataset)} rows of the trainer's dataset.")
    if trainer.args.dataloader_num_workers or trainer.args.world_size > 1:
        raise UnsupportedError("Batches are recorded in one process: set dataloader_num_workers=0, and train in one.")
    model, collator = cast(nn.Module, trainer.model), cast(Collator, trainer.data_collator)
    kept = trainer.args.remove_unused_columns
    queries = Split(used_columns(query_dataset, model) if kept else query_dataset, collator, name="query")
    found_task = task if task is not None else infer_task(model, label_smoothing=trainer.args.label_smoothing_factor)
    recorder = _Recorder(found_task.with_measure("loss"), list(queries.batches()), every)
    trainer.train_dataset = _Numbered(Split(used_columns(dataset, model) if kept else dataset, collator))
    trainer.data_collator = _Noting(collator, recorder)
    trainer.add_callback(recorder)
    try:
        trainer.train()
    finally:
        trainer.train_dataset, trainer.data_collator = dataset, cast(Any, collator)
        trainer.remove_callback(recorder)
    run = LossRun(
        np.stack(recorder.losses),
        np.array(recorder.measured),
        tuple(positions[batch] for batch in recorder.batches),
        np.array(recorder.rates),
    )
    size = num_examples if num_examples is not None else len(dataset)
    return LossCurves((run,), size, {"fingerprints": {"query": queries.fingerprint}})


class _Recorder(TrainerCallback):
    def __init__(self, task: Task, queries: list[Batch], every: int) -> None:
        self.task, self.queries, self.every = task, queries, every
        self.losses: list[np.ndarray] = []
        self.measured: list[int] = []
        self.batches: list[np.ndarray] = []
        self.rates: list[float] = []
        self._collated: list[np.ndarray] = []

    def saw(self, rows: list[int]) -> None:
        """Note a micro-batch when it is collated, which may be some steps before it is used."""
        self._collated.append(np.array(rows, dtype=np.int64))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._measure(kwargs["model"], state.global_step)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._collated = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.rates.append(float(kwargs["lr_scheduler"].get_last_lr()[0]))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every == 0:
            self._measure(kwargs["model"], state.global_step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A batch may have been collated and not used, where training ended within the epoch.
        steps = len(self.rates) - len(self.batches)
        size = args.gradient_accumulation_steps
        self.batches += [np.concatenate(self._collated[size * k : size * (k + 1)]) for k in range(steps)]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step != self.measured[-1]:
            self._measure(kwargs["model"], state.global_step)

    def _measure(self, model: nn.Module, step: int) -> None:
        self.losses.append(measured(model, self.task, self.queries, f"after {step} steps"))
        self.measured.append(step)


class _Numbered(Dataset[tuple[int, Any]]):
    """Rows with their positions."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.split.rows([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Any]]:
        return list(zip(indices, self.split.rows(indices), strict=True))


class _Noting:
    """The user's collator, after the positions have been noted."""

    def __init__(self, collator: Collator, recorder: _Recorder) -> None:
        self.collator, self.recorder = collator, recorder

    def __call__(self, rows: list[tuple[int, Any]]) -> Any:
        self.recorder.saw([index for index, _ in rows])
        return self.collator([row for _, row in rows])
