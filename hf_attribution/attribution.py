"""`attribute`: scores of training examples for queries, with or without a Trainer."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers.utils import logging
from typing_extensions import Unpack

from hf_attribution.ensemble import Ensemble
from hf_attribution.errors import MismatchError, NonFiniteError
from hf_attribution.gradients.indexed import approximate_top
from hf_attribution.methods import Method, Scored, get_method
from hf_attribution.part_scores import PartScores
from hf_attribution.posing import Setup, posed
from hf_attribution.problem import Checkpoint, Problem
from hf_attribution.processes import from_main, sharing
from hf_attribution.provenance import hub_sources
from hf_attribution.replay.run import RecordedRun
from hf_attribution.scores import Scores
from hf_attribution.tasks import Task
from hf_attribution.top_scores import TopScores

logger = logging.get_logger(__name__)


def attribute(
    model: nn.Module,
    train_dataset: Any,
    query_dataset: Any,
    *,
    method: str | Method = "trak",
    task: Task | None = None,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    checkpoints: Ensemble | Sequence[str | Path | nn.Module | Checkpoint] | None = None,
    batch_size: int = 32,
    batch_tokens: int | None = None,
    cache_dir: str | Path | None = None,
    remove_unused_columns: bool = True,
    progress: bool = True,
    store_dtype: str = "float32",
    run: RecordedRun | None = None,
    train_masked: Callable[..., Any] | None = None,
) -> Scores:
    """Attribute a model's outputs on queries to its training examples.

    The model is left as it was: its mode, its weights, its gradients.

    Args:
        model: The trained model, on the device to compute on.
        train_dataset: What it was trained on, preprocessed: N rows. A stream (`datasets.IterableDataset`) is read in
            passes, which must bring the same rows in the same order; columns are their numbers.
        query_dataset: What to explain, preprocessed alike: Q rows.
        method: A name in `METHODS`, or a method with settings, `Trak(dim=4096)`.
        task: What is learned and measured; by default told from the model's class, see `infer_task`.
        data_collator: The collator of training; by default transformers' `default_data_collator`.
        checkpoints: Weights to attribute with, as an ensemble, folders or models, instead of the model's own: several
            independently trained models, or the checkpoints of a run. A method averages over them.
        batch_size: Rows in a batch. It does not change the scores. Where memory runs out, halves are tried.
        batch_tokens: Tokens in a batch, padding included, instead of `batch_size`: for texts of different lengths.
        cache_dir: Where projected gradients and fitted curvature are kept and found again, and from where a call that
            was killed goes on; by default they are deleted at the end.
        remove_unused_columns: Drop columns that the model's `forward` does not take, as the Trainer does.
        progress: Whether to show progress bars.
        store_dtype: The number format that projected gradients are kept in: `"float32"`, `"float16"`, `"bfloat16"` or
            `"int8"` (with a scale for each example). Methods that keep none take no notice.
        run: The recorded training, for methods that differentiate through it (`"unroll"`).
        train_masked: What trains on subsets and records it, for methods that differentiate through such trainings
            (`"smoothed_unroll"`): an `AttributionTrainer` gives it.

    Returns:
        `Scores` with values `[Q, N]`, positive where including the example raises the measured output.

    Raises:
        MismatchError: If the query dataset lacks columns, a checkpoint is of another architecture, or an ensemble was
            trained on other data.
        NonFiniteError: If a loss, gradient or score is NaN or infinite; the message names the row.
        ValueError: If a batch has no labels, or a method or setting is unknown.

    Example:
        >>> scores = attribute(model, train, test, method="trak")  # doctest: +SKIP
        >>> scores.top(k=5)  # doctest: +SKIP
    """
    chosen = get_method(method)
    started = time.perf_counter()
    with sharing("attribute"), posed(
        model, train_dataset, query_dataset, task, data_collator, checkpoints, batch_size, cache_dir,
        remove_unused_columns, progress, store_dtype, batch_tokens,
    ) as (problem, used_subsets):  # fmt: skip
        problem = dataclasses.replace(problem, run=run, train_masked=train_masked)
        scored = _score(chosen, problem)
        if scored.choices:
            logger.info(f"{chosen.name} chose {json.dumps(scored.choices, default=str)}")
        values = np.asarray(scored.values, dtype=np.float32)
        _check_values(values, chosen.shape(problem), chosen.name)
        provenance = _provenance(problem, chosen, used_subsets, scored, started)
    return Scores(values=values, method=chosen.name, settings=chosen.settings, provenance=provenance)


def attribute_top(
    model: nn.Module,
    train_dataset: Any,
    query_dataset: Any,
    *,
    k: int = 100,
    method: str | Method = "trak",
    index: str | None = None,
    **setup: Unpack[Setup],
) -> TopScores:
    """Attribute as `attribute` does, and keep only the k training examples that raise each query's output most.

    The matrix of all scores is never formed: stored gradients are read once for each block of queries, in bounded
    memory.

    Args:
        model: The trained model, on the device to compute on.
        train_dataset: What it was trained on, preprocessed: N rows.
        query_dataset: What to explain, preprocessed alike: Q rows.
        k: How many training examples for each query; all of them where there are fewer.
        method: A method whose scores are products with stored gradients: `"trak"`, `"logra"`, `"trackstar"`, or
            `"grad_dot"`, `"grad_cos"`, `"tracin"` or `"influence"` with a `dim`.
        index: Search an approximate index instead of all examples: a FAISS factory string, such as `"IVF4096,Flat"`.
            What it found of the true k largest of a hundred queries is logged, and kept as `recall` in the choices of
            the provenance. It pays for many queries.
        **setup: As for `attribute`: `task`, `data_collator`, `checkpoints`, `batch_size`, `cache_dir`,
            `remove_unused_columns`, `progress`, `store_dtype`.

    Returns:
        `TopScores`, the same that `attribute` would rank first.

    Raises:
        UnsupportedError: If the method's scores are no such products.
        NonFiniteError: If a score is NaN or infinite.
        ValueError: If k is less than 1, or as for `attribute`.

    Example:
        >>> top = attribute_top(model, train, test, k=100, method=Trak(dim=512))  # doctest: +SKIP
        >>> top.top(k=5, train_dataset=train)  # doctest: +SKIP
    """
    if k < 1:
        raise ValueError(f"k={k}: ask for at least 1 training example a query.")
    chosen, started = get_method(method), time.perf_counter()
    with sharing("attribute_top"), posed(model, train_dataset, query_dataset, **setup) as (problem, used_subsets):
        stored = chosen.stored_scores(problem)
        choices = dict(stored.choices)
        if index is None:
            indices, values = from_main(lambda: stored.top(k, problem.progress))
        else:
            indices, values, recall = from_main(lambda: approximate_top(stored, k, index, problem.progress))
            choices |= {"index": index, "recall": recall}
            logger.info(f"The index {index} found {recall:.1%} of the largest scores.")
        provenance = _provenance(problem, chosen, used_subsets, Scored(values, choices), started)
    return TopScores(indices, values, stored.shape[1], chosen.name, chosen.settings, provenance)


def attribute_parts(
    model: nn.Module,
    train_dataset: Any,
    query_dataset: Any,
    *,
    granularity: str = "token",
    method: str | Method = "grad_dot",
    **setup: Unpack[Setup],
) -> PartScores:
    """Attribute as `attribute` does, to the tokens of the training examples or to the model's modules.

    Args:
        model: The trained model, on the device to compute on.
        train_dataset: What it was trained on, preprocessed: N rows.
        query_dataset: What to explain, preprocessed alike: Q rows.
        granularity: `"token"`: what each token of a training example adds to its score. `"module"`: what each module
            of the model does.
        method: A method whose scores are such sums: `"grad_dot"`, `"tracin"`, `"diagonal"`, `"kfac"`, `"ekfac"` or
            `"datainf"`, by name or with settings.
        **setup: As for `attribute`: `task`, `data_collator`, `checkpoints`, `batch_size`, `batch_tokens`, `cache_dir`,
            `remove_unused_columns`, `progress`, `store_dtype`.

    Returns:
        `PartScores`; their `sum()` is what `attribute` returns.

    Raises:
        UnsupportedError: If the method's scores are no such sums, or the data have no tokens.
        ValueError: If the granularity is unknown, or as for `attribute`.

    Example:
        >>> parts = attribute_parts(model, train, test, granularity="token", method="ekfac")  # doctest: +SKIP
        >>> parts.of(query=0, example=7)  # doctest: +SKIP
    """
    if granularity not in ("module", "token"):
        raise ValueError(f"granularity must be 'module' or 'token', not {granularity!r}; `attribute` scores examples.")
    chosen = get_method(method)
    started = time.perf_counter()
    with sharing("attribute_parts"), posed(model, train_dataset, query_dataset, **setup) as (problem, used_subsets):
        layout, scored = chosen.part_scores(problem, granularity)
        provenance = _provenance(problem, chosen, used_subsets, scored, started)
    return PartScores(
        scored.values, layout.examples, layout.parts, granularity, layout.names, chosen.name, chosen.settings,
        provenance,
    )  # fmt: skip


def self_influence(
    model: nn.Module,
    train_dataset: Any,
    *,
    method: str | Method = "influence",
    **setup: Unpack[Setup],
) -> np.ndarray:
    """What every training example does for the model's fit to itself, without all the other pairs.

    High for examples that the model would get wrong without them: rare, hard or mislabelled ones (Feldman & Zhang
    2020; Pruthi et al. 2020 find wrong labels by it).

    Args:
        model: The trained model, on the device to compute on.
        train_dataset: What it was trained on, preprocessed: N rows.
        method: A name in `METHODS` of a method that compares gradients, or such a method with settings.
        **setup: As for `attribute`: `task`, `data_collator`, `checkpoints`, `batch_size`, `batch_tokens`, `cache_dir`,
            `remove_unused_columns`, `progress`, `store_dtype`.

    Returns:
        float32 `[N]`: each example's score for minus its own loss.

    Raises:
        UnsupportedError: If the method gives no example an influence on itself.
        MismatchError: If a checkpoint is of another architecture, or an ensemble was trained on other data.
        NonFiniteError: If a loss, gradient or score is NaN or infinite; the message names the row.
        ValueError: If a batch has no labels, or a method or setting is unknown.

    Example:
        >>> own = self_influence(model, train, method="influence")  # doctest: +SKIP
        >>> train.select(own.argsort()[::-1][:20])  # look at these first  # doctest: +SKIP
    """
    chosen = get_method(method)
    with sharing("self_influence"), posed(model, train_dataset, train_dataset, **setup) as (problem, _):
        values = np.asarray(chosen.self_influence(problem), dtype=np.float32)
        _check_values(values[None], (1, problem.shape[1]), f"{chosen.name} (self-influence)")
    return values


def _score(method: Method, problem: Problem) -> Scored:
    """The scores, of passes that the processes of a launch share; a recorded training is swept by one of them."""
    return from_main(lambda: method.score(problem)) if method.needs_run else method.score(problem)


def _provenance(
    problem: Problem, chosen: Method, used_subsets: dict[str, Any], scored: Scored, started: float
) -> dict[str, Any]:
    """What scores came from."""
    return {
        "fingerprints": problem.fingerprints,
        "columns": {split.name: split.columns for split in (problem.train, problem.query)},
        "measurement": problem.task.measurement_name,
        "task": problem.task.description,
        "sources": hub_sources(problem.model, problem.train_dataset),
        "paper": getattr(chosen, "paper", None),  # a method of one's own may have none
        "checkpoints": [checkpoint.name for checkpoint in problem.checkpoints],
        "weights": problem.weights,
        "store_dtype": problem.store_dtype,
        **used_subsets,
        **({"used_subsets": list(scored.used_subsets)} if scored.used_subsets else {}),
        "choices": scored.choices,
        "seconds": time.perf_counter() - started,
    }


def _check_values(values: np.ndarray, shape: tuple[int, int], method: str) -> None:
    if values.shape != shape:
        raise MismatchError(f"{method} returned scores {values.shape}, not [Q, N] = {shape}.")
    finite = np.isfinite(values)
    if not finite.all():
        query, row = (int(index) for index in np.argwhere(~finite)[0])
        raise NonFiniteError(f"{method} scored query {query}, train row {row} as {values[query, row]}.")
