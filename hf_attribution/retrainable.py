"""A Trainer that trains again, on subsets of its data: the truth that attributions are judged by, and ensembles."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, cast, overload

import numpy as np
from torch import nn

from hf_attribution.columns import select_rows
from hf_attribution.counterfactuals import Counterfactuals, Subsets
from hf_attribution.data import Split
from hf_attribution.ensemble import Ensemble
from hf_attribution.replay.training import RecordedTraining
from hf_attribution.retraining import FollowUp, Recipe, Request, make_plan, run_plan
from hf_attribution.retraining.dry_run import RetrainingDryRun, try_out
from hf_attribution.retraining.plan import Plan, Workers, default_task
from hf_attribution.retraining.progress import trainer_tracker
from hf_attribution.retraining.recipe import copied, copied_model, given
from hf_attribution.seeds import derive_seed
from hf_attribution.tasks import Task

RECORDING_DIR = "recording"


class Retrainable(RecordedTraining):
    """A mixin for any Trainer class: `retrain` and `train_ensemble` build fresh trainers of the same class.

    For this it remembers the constructor's arguments, copies of the callbacks among them, and, where there is no
    `model_init`, a copy of the model before training.
    """

    _remembers = True
    _given: tuple[tuple[Any, ...], dict[str, Any]]
    _recipe: Recipe

    def __new__(cls, *args: Any, **kwargs: Any) -> "Retrainable":  # noqa: D102
        # Here and not in __init__, which sees only what a subclass's __init__ hands on.
        trainer = super().__new__(cls)
        trainer._given = (args, kwargs)
        return trainer

    def __init__(self, *args: Any, record: bool | str | Path = False, **kwargs: Any) -> None:
        positional, named = self._given
        named = {name: value for name, value in named.items() if name != "record"}
        callbacks = None
        if self._remembers:
            callbacks = given(type(self), positional, named, "callbacks")
            if callbacks is not None:
                # Before the Trainer calls them for the first time.
                callbacks = copied(callbacks, "pass callbacks that can be copied, or add them with add_callback.")
        super().__init__(*args, **kwargs)
        if self._remembers:
            recipe = Recipe(type(self), positional, named, callbacks, None)
            initial, holders = copied_model(
                cast(nn.Module, self.model), recipe.arguments(), is_made=self.model_init is not None
            )
            self._recipe = dataclasses.replace(recipe, initial_model=initial, holders=holders)
        if record:
            folder = Path(str(self.args.output_dir), RECORDING_DIR) if record is True else Path(record)
            self.recording_dir = folder

    @overload
    def retrain(self, *args: Any, dry_run: Literal[True], **kwargs: Any) -> RetrainingDryRun: ...

    @overload
    def retrain(self, *args: Any, dry_run: Literal[False] = False, **kwargs: Any) -> Counterfactuals: ...

    @overload
    def retrain(self, *args: Any, dry_run: bool, **kwargs: Any) -> Counterfactuals | RetrainingDryRun: ...

    def retrain(  # type: ignore[misc]  # the overloads above abbreviate its arguments
        self,
        query_dataset: Any = None,
        num_subsets: int = 100,
        fraction: float = 0.5,
        seeds: int = 1,
        protocol: str = "resampled",
        output_dir: str | Path | None = None,
        subsets: Subsets | None = None,
        task: Task | None = None,
        seed: int = 0,
        keep_checkpoints: bool = False,
        workers: Workers = 1,
        shard: str | None = None,
        dry_run: bool = False,
    ) -> Counterfactuals | RetrainingDryRun:
        """Train again on subsets of the training data, and measure every query after each training.

        Each run is a training by a fresh trainer of this class, from the weights before training (or `model_init`),
        with this trainer's arguments, collator and callbacks; evaluation, saving and reporting are switched off.
        Model, arguments, trainer and random state are left as they are. A finished run is written to `output_dir` at
        once: an interrupted call, repeated, goes on where it stopped and gives the same result. With more subsets or
        seeds it adds to what is there, and several processes may share the work on one folder.

        Args:
            query_dataset: What to measure: Q rows, preprocessed as for training. By default the `eval_dataset`.
            num_subsets: M, how many subsets to draw.
            fraction: The fraction of the training data in each.
            seeds: R, trainings per subset.
            protocol: `"resampled"` trains on the subset alone, each run with weights (given `model_init`), order and
                dropout of its own. `"fixed"` repeats one and the same training per seed, in which the examples left
                out keep their place in the batches and get weight 0. `"masked"` trains as `"resampled"` does, with
                the examples left out in the same batches at weight 0, as `SmoothedUnroll` needs them.
            output_dir: Where results are kept. By default a folder in `args.output_dir` named after everything that
                decides the result.
            subsets: The subsets, for example `Subsets.stratified(...)`, instead of drawing them.
            task: What is measured (and, with `"fixed"`, learned); by default told from the model's class.
            seed: Base of all random seeds.
            keep_checkpoints: Keep the final weights of every run, as `output_dir/runs/<subset>-<seed>/`; see
                `Ensemble.from_retraining`.
            workers: How many trainings at a time on this machine: by this process and others, with a GPU each where
                there are several, or a share of the threads. A worker that is killed costs its training, and is
                replaced. However the work is shared, and whoever resumes it, the outputs are the same; their last
                bits only where a training has as many threads. Processes of one `accelerate launch` or torchrun
                do every training together, as `train` does. `"ray"` trains wherever a cluster of Ray has a GPU free,
                or else a processor: the cluster that RAY_ADDRESS names, by default this machine alone. All its
                machines must see `output_dir`.
            shard: Do this share alone, `"3/16"`, for arrays of jobs on a cluster with a common `output_dir`.
            dry_run: Only say what would be done, how long it would take and what disk and memory: a few steps are
                trained, and nothing is written.

        Returns:
            The outputs `[M, R, Q]` with subsets and protocol; for a dry run a `RetrainingDryRun`, to be printed.

        Raises:
            ValueError: If a setting is out of its range, or there are no queries.
            MismatchError: If the folder holds retrainings of other data, another model or other arguments; the message
                lists what differs.
            UnsupportedError: If this training cannot be repeated faithfully; the message names the setting.
            NonFiniteError: If an output is NaN or infinite; the message names subset, seed and query row.
            OSError: If the folder cannot be written to, or the disk is full; finished runs stay.
            UnfinishedError: If the trainings of this shard are done, and those of others are missing.

        Example:
            >>> truth = trainer.retrain(num_subsets=100, fraction=0.5, seeds=2)  # doctest: +SKIP
            >>> truth.mean().shape  # doctest: +SKIP
            (50, 100)
        """
        if subsets is None:
            subsets = Subsets.random(self._num_examples(), num_subsets, fraction, seed)
        request = Request(
            query_dataset=self._query_rows(query_dataset),
            subsets=subsets,
            task=task,
            seeds=seeds,
            protocol=protocol,
            seed=seed,
            output_dir=output_dir,
            keep_checkpoints=keep_checkpoints,
        )
        if dry_run:
            return try_out(make_plan(self, self._recipe, request), workers, shard)
        return self._run(request, workers, shard)[0]

    def train_ensemble(
        self,
        k: int = 5,
        fraction: float = 0.5,
        seed: int = 0,
        output_dir: str | Path | None = None,
        subsets: Subsets | None = None,
        task: Task | None = None,
        workers: Workers = 1,
        shard: str | None = None,
    ) -> Ensemble:
        """Train models to attribute with, each on a random subset of the training data or on all of it.

        A model that has not seen an example has an honest gradient for it (that of a memorised one has vanished), and
        models trained on subsets of the fraction that is asked about are where that question is put. An ensemble costs
        `k * fraction` trainings once, and serves all methods and queries.

        The trainings are those of `retrain(keep_checkpoints=True)`, under the same terms: quiet, resumable, and shared
        by several processes on one folder. A larger `k` adds to what is there. From one `seed` this draws other
        subsets than `retrain` does, since `evaluate_lds` refuses to score on the subsets that fed a method.

        Args:
            k: How many models.
            fraction: The fraction of the training data that each is trained on. With 1.0 they differ in their seeds:
                in order, dropout and (given `model_init`) initial weights.
            seed: Base of all random seeds.
            output_dir: Where the models are kept. By default a folder in `args.output_dir` named after everything that
                decides the result.
            subsets: What to train on, a model each, instead of `k` and `fraction`.
            task: What the model learns, where its class does not tell.
            workers: As for `retrain`.
            shard: As for `retrain`.

        Returns:
            The ensemble: pass it as `attribute(checkpoints=...)`.

        Raises:
            ValueError: If a setting is out of its range.
            MismatchError: If the folder holds models of other data or another training; the message lists what
                differs.
            UnsupportedError: If this training cannot be repeated faithfully, or its model not be saved.
            NonFiniteError: If a training diverges.
            OSError: If the folder cannot be written to, or the disk is full; finished models stay.

        Example:
            >>> ensemble = trainer.train_ensemble(k=5, fraction=0.5)  # doctest: +SKIP
            >>> scores = trainer.attribute(test, method="trak", checkpoints=ensemble)  # doctest: +SKIP
        """
        seed, seeds = derive_seed(seed, "ensemble"), 1
        if subsets is None and fraction == 1:
            subsets, seeds = Subsets.whole(self._num_examples()), k
        elif subsets is None:
            subsets = Subsets.random(self._num_examples(), k, fraction, seed)
        request = Request(
            # Nothing is to be measured; one row shows whether a training has diverged.
            query_dataset=select_rows(self.train_dataset, np.array([0])),
            subsets=subsets,
            task=task,
            seeds=seeds,
            seed=seed,
            output_dir=output_dir,
            keep_checkpoints=True,
        )
        _, plan = self._run(request, workers, shard)
        return Ensemble.from_retraining(plan.worklist.folder, len(subsets) * seeds)

    def _train_masked(
        self,
        query_dataset: Any,
        task: Task | None,
        output_dir: str | Path | None,
        workers: Workers,
        subsets: Subsets,
        protocol: str,
        seed: int,
        follow_up: FollowUp,
    ) -> tuple[Counterfactuals, list[Path]]:
        """Recorded trainings in which examples outside a subset weigh nothing: outputs, and a file from each run."""
        request = Request(
            query_dataset, subsets, task, protocol=protocol, seed=seed, output_dir=output_dir, follow_up=follow_up
        )
        counterfactuals, plan = self._run(request, workers)
        if self.is_world_process_zero():
            counterfactuals.save(plan.worklist.folder / "counterfactuals.safetensors")
        return counterfactuals, [plan.worklist.found(run) for run in plan.worklist.runs()]

    def _run(self, request: Request, workers: Workers, shard: str | None = None) -> tuple[Counterfactuals, Plan]:
        plan = make_plan(self, self._recipe, request)
        return run_plan(plan, workers, shard, trainer_tracker(self)), plan

    def _train_rows(self, train_dataset: Any = None) -> Any:
        """The training data that were passed, or the trainer's own."""
        return _one_dataset(train_dataset if train_dataset is not None else self.train_dataset, "train")

    def _query_rows(self, query_dataset: Any) -> Any:
        """The queries that were passed, or the trainer's `eval_dataset`."""
        return _one_dataset(query_dataset if query_dataset is not None else self.eval_dataset, "query")

    def _num_examples(self) -> int:
        return len(Split(self._train_rows(), self.data_collator))

    def _task(self) -> Task:
        return default_task(self)


def _one_dataset(dataset: Any, name: str) -> Any:
    """A dataset that is there.

    Args:
        dataset: What the user gave, or the trainer has.
        name: `"query"` or `"train"`.

    Returns:
        The dataset.

    Raises:
        ValueError: If there is none, or there are several.
    """
    remedy = "pass it, or give the trainer an eval_dataset" if name == "query" else "give the trainer a train_dataset"
    if dataset is None:
        raise ValueError(f"There is no {name} dataset: {remedy}.")
    if isinstance(dataset, dict):
        raise ValueError(f"The {name} dataset is a dict of several ({', '.join(dataset)}): pass one of them.")
    return dataset
