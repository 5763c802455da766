"""A Trainer that attributes its model's outputs to its training examples, and retrains to see whether that is true."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn
from transformers import Trainer
from typing_extensions import Unpack

from hf_attribution.attribution import attribute, attribute_parts, attribute_top, self_influence
from hf_attribution.checkpoints import trainer_checkpoints
from hf_attribution.dry_run import AttributionDryRun, attribute_dry_run
from hf_attribution.ensemble import Ensemble
from hf_attribution.methods import Method, get_method
from hf_attribution.part_scores import PartScores
from hf_attribution.posing import Passes
from hf_attribution.replay.run import RecordedRun
from hf_attribution.retrainable import RECORDING_DIR, Retrainable
from hf_attribution.retraining.plan import Workers
from hf_attribution.scores import Scores
from hf_attribution.tasks import Task
from hf_attribution.top_scores import TopScores


class AttributionMixin(Retrainable):
    """Adds `attribute`, `retrain` and `train_ensemble` to any Trainer class. Training itself is untouched.

    Put it first: `class MyAttributionTrainer(AttributionMixin, MyTrainer)`.

    With `record=True`, or a folder, `train` writes down what defines every step (batches, learning rates, random
    states) and checkpoints of parameters and optimiser, by default in `args.output_dir/recording`, so that methods
    like `"unroll"` can repeat and differentiate the training. The training comes out the same, bit for bit.

    The latter two build fresh trainers of the same class. For this the mixin remembers the constructor's arguments,
    copies of the callbacks among them, and, where there is no `model_init`, a copy of the model before training. The
    copy costs the model's size in CPU memory once more (45 MB for 11 million float32 parameters); pass `model_init`
    instead of `model` to save it.

    Example:
        >>> class MyAttributionTrainer(AttributionMixin, Trainer):
        ...     pass
    """

    def attribute(
        self,
        query_dataset: Any = None,
        method: str | Method = "trak",
        train_dataset: Any = None,
        checkpoints: Ensemble | Sequence[str | Path | nn.Module] | None = None,
        task: Task | None = None,
        recording: str | Path | None = None,
        workers: Workers = 1,
        **passes: Unpack[Passes],
    ) -> Scores:
        """Attribute the model's outputs on queries to its training examples.

        Args:
            query_dataset: What to explain: Q rows, preprocessed as for training. By default the `eval_dataset`.
            method: A name in `METHODS`, or a method with settings, `Trak(dim=4096)`.
            train_dataset: The examples to score: N rows. By default the trainer's own.
            checkpoints: Weights to attribute with: an ensemble (see `train_ensemble`), folders or models. By default
                the model as it is, or, for methods that follow a training (`"tracin"`), the `checkpoint-*` folders in
                `args.output_dir`.
            task: What is learned and measured; by default told from the model's class.
            recording: For methods that differentiate through a training (`"unroll"`), the folder it was recorded in;
                by default this trainer's own. For `"smoothed_unroll"` the folder of its trainings.
            workers: For `"smoothed_unroll"`, how many of its trainings at a time, as for `retrain`.
            **passes: As for `hf_attribution.attribute`: `batch_size` (by default `args.per_device_eval_batch_size`),
                `batch_tokens`, `cache_dir`, `store_dtype`.

        Returns:
            Scores `[Q, N]`, positive where including the example raises the measured output.

        Raises:
            ValueError: If there are no queries, no training data, or no checkpoints for a method that needs them.

        Example:
            >>> scores = trainer.attribute(test, method="trak")  # doctest: +SKIP
            >>> scores.top(k=5)  # doctest: +SKIP
        """
        settings = self._attribution_settings(method, checkpoints, task, passes)
        if settings["method"].needs_run:
            own = self.recording_dir or Path(str(self.args.output_dir), RECORDING_DIR)
            settings["run"] = RecordedRun.open(recording if recording is not None else own, self)
            settings["checkpoints"] = [settings["run"].final_model()]
        query = self._query_rows(query_dataset)
        if settings["method"].needs_trainings:
            settings["train_masked"] = functools.partial(self._train_masked, query, task, recording, workers)
        return attribute(
            cast(nn.Module, self.model),
            self._train_rows(train_dataset),
            query,
            **settings,
        )

    def attribute_dry_run(
        self,
        query_dataset: Any = None,
        method: str | Method = "trak",
        train_dataset: Any = None,
        checkpoints: Ensemble | Sequence[str | Path | nn.Module] | None = None,
        task: Task | None = None,
        **passes: Unpack[Passes],
    ) -> AttributionDryRun:
        """Say what `attribute` would do and cost, found out by a few batches; see `hf_attribution.attribute_dry_run`.

        Args:
            query_dataset: As for `attribute`.
            method: As for `attribute`.
            train_dataset: As for `attribute`.
            checkpoints: As for `attribute`.
            task: As for `attribute`.
            **passes: As for `attribute`.

        Returns:
            An `AttributionDryRun`, to be printed.

        Example:
            >>> print(trainer.attribute_dry_run(test, method="ekfac"))  # doctest: +SKIP
        """
        return attribute_dry_run(
            cast(nn.Module, self.model),
            self._train_rows(train_dataset),
            self._query_rows(query_dataset),
            **self._attribution_settings(method, checkpoints, task, passes),
        )

    def attribute_top(
        self,
        query_dataset: Any = None,
        k: int = 100,
        method: str | Method = "trak",
        train_dataset: Any = None,
        checkpoints: Ensemble | Sequence[str | Path | nn.Module] | None = None,
        task: Task | None = None,
        index: str | None = None,
        **passes: Unpack[Passes],
    ) -> TopScores:
        """Attribute as `attribute` does, and keep only the k training examples that raise each query's output most.

        Args:
            query_dataset: As for `attribute`.
            k: How many training examples for each query.
            method: A method whose scores are products with stored gradients: `"trak"`, `"logra"`, `"trackstar"`, or
                `"grad_dot"`, `"grad_cos"`, `"tracin"` or `"influence"` with a `dim`.
            train_dataset: As for `attribute`.
            checkpoints: As for `attribute`.
            task: As for `attribute`.
            index: A FAISS factory string, to search approximately; by default exactly.
            **passes: As for `attribute`.

        Returns:
            `TopScores`; all N x Q scores are never in memory.

        Example:
            >>> trainer.attribute_top(test, k=100).top(k=5, train_dataset=train)  # doctest: +SKIP
        """
        return attribute_top(
            cast(nn.Module, self.model),
            self._train_rows(train_dataset),
            self._query_rows(query_dataset),
            k=k,
            index=index,
            **self._attribution_settings(method, checkpoints, task, passes),
        )

    def attribute_parts(
        self,
        query_dataset: Any = None,
        granularity: str = "token",
        method: str | Method = "grad_dot",
        train_dataset: Any = None,
        checkpoints: Ensemble | Sequence[str | Path | nn.Module] | None = None,
        task: Task | None = None,
        **passes: Unpack[Passes],
    ) -> PartScores:
        """Attribute as `attribute` does, to the tokens of the training examples or to the model's modules.

        Args:
            query_dataset: As for `attribute`.
            granularity: `"token"` or `"module"`.
            method: A method whose scores are sums over them: `"grad_dot"`, `"tracin"`, `"diagonal"`, `"kfac"`,
                `"ekfac"` or `"datainf"`, by name or with settings.
            train_dataset: As for `attribute`.
            checkpoints: As for `attribute`.
            task: As for `attribute`.
            **passes: As for `attribute`.

        Returns:
            `PartScores`; their `sum()` is what `attribute` returns.

        Example:
            >>> trainer.attribute_parts(test, "token", method="ekfac").of(query=0, example=7)  # doctest: +SKIP
        """
        return attribute_parts(
            cast(nn.Module, self.model),
            self._train_rows(train_dataset),
            self._query_rows(query_dataset),
            granularity=granularity,
            **self._attribution_settings(method, checkpoints, task, passes),
        )

    def self_influence(
        self,
        method: str | Method = "influence",
        train_dataset: Any = None,
        checkpoints: Ensemble | Sequence[str | Path | nn.Module] | None = None,
        task: Task | None = None,
        **passes: Unpack[Passes],
    ) -> np.ndarray:
        """What every training example does for the model's fit to itself: high for rare, hard and mislabelled ones.

        Args:
            method: A name in `METHODS` of a method that compares gradients, or such a method with settings.
            train_dataset: The examples: N rows. By default the trainer's own.
            checkpoints: Weights to attribute with, as for `attribute`.
            task: What is learned; by default told from the model's class.
            **passes: As for `attribute`.

        Returns:
            float32 `[N]`.

        Raises:
            UnsupportedError: If the method gives no example an influence on itself.
            ValueError: If there is no training data, or no checkpoints for a method that needs them.

        Example:
            >>> own = trainer.self_influence(method="influence")  # doctest: +SKIP
            >>> train.select(own.argsort()[::-1][:20])  # look at these first  # doctest: +SKIP
        """
        return self_influence(
            cast(nn.Module, self.model),
            self._train_rows(train_dataset),
            **self._attribution_settings(method, checkpoints, task, passes),
        )

    def _attribution_settings(
        self,
        method: str | Method,
        checkpoints: Ensemble | Sequence[str | Path | nn.Module] | None,
        task: Task | None,
        passes: Passes,
    ) -> dict[str, Any]:
        chosen = get_method(method)
        sources: Ensemble | Sequence[Any] | None = checkpoints
        if sources is None and chosen.needs_checkpoints:
            sources = trainer_checkpoints(str(self.args.output_dir))
        return {
            "method": chosen,
            "task": task if task is not None else self._task(),
            "data_collator": self.data_collator,
            "checkpoints": sources,
            "batch_size": self.args.per_device_eval_batch_size,
            "remove_unused_columns": self.args.remove_unused_columns,
            "progress": not self.args.disable_tqdm,
            **passes,
        }


class AttributionTrainer(AttributionMixin, Trainer):
    """The `transformers.Trainer` with `attribute`, `retrain` and `train_ensemble`. It takes the same arguments.

    Example:
        >>> trainer = AttributionTrainer(model=model, args=args, train_dataset=train)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> scores = trainer.attribute(test, method="trak")  # doctest: +SKIP
        >>> truth = trainer.retrain(test, num_subsets=100, seeds=2)  # doctest: +SKIP
    """
