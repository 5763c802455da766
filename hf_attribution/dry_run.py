"""What attributing would take, found out by attributing a few of the training examples to a few of the queries."""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn
from typing_extensions import Unpack

from hf_attribution.columns import select_rows
from hf_attribution.data import Batch, Split
from hf_attribution.errors import UnsupportedError
from hf_attribution.methods import Method, get_method
from hf_attribution.posing import Setup, posed, working_folder
from hf_attribution.problem import Problem
from hf_attribution.processes import from_main, gather, sharing
from hf_attribution.retraining.dry_run import duration, size

# Batches of training examples and of queries that are tried: what grows with either is told from what does not.
_FEW, _MORE = 2, 8

# What takes less than so many seconds is tried again, and the quickest try counts.
_ENOUGH_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class AttributionDryRun:
    """What attributing will take, with nothing in `cache_dir` yet. `print` it.

    Attributes:
        method: The name of the method.
        shape: The numbers of queries and of training examples.
        train_passes: How often all training examples pass through the model.
        query_passes: How often all queries do.
        num_batches: The batches of these passes.
        seconds: All of it, roughly.
        disk_bytes: What is kept in `cache_dir`, or in a temporary folder as long as it lasts.
        memory_bytes: Of weights and scores, without what a batch takes; on a GPU at least the peak of what was tried.
    """

    method: str
    shape: tuple[int, int]
    train_passes: float
    query_passes: float
    num_batches: int
    seconds: float
    disk_bytes: int
    memory_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.method}: {self.shape[0]:,} queries x {self.shape[1]:,} training examples. About "
            f"{self.train_passes:.3g} passes over the training examples and {self.query_passes:.3g} over the queries, "
            f"{self.num_batches:,} batches; {duration(self.seconds)}, {size(self.disk_bytes)} of disk, "
            f"{size(self.memory_bytes)} of memory or more."
        )


def attribute_dry_run(
    model: nn.Module,
    train_dataset: Any,
    query_dataset: Any,
    *,
    method: str | Method = "trak",
    **setup: Unpack[Setup],
) -> AttributionDryRun:
    """Say what `attribute` would do and cost. A few batches are attributed in a temporary folder; nothing is kept.

    What is tried grows, and what it takes is carried on in proportion. What grows with all pairs of training examples
    (exact `influence`) is underrated, and so are passes over data that queries which do not fit in memory take.

    Args:
        model: As for `attribute`, like all else.
        train_dataset: The training examples.
        query_dataset: The queries.
        method: The method.
        **setup: As for `attribute`.

    Returns:
        What it would take.

    Raises:
        UnsupportedError: If the method follows whole trainings, or the training data are a stream.

    Example:
        >>> print(attribute_dry_run(model, train, test, method="ekfac"))  # doctest: +SKIP
    """
    chosen = get_method(method)
    if chosen.needs_run or chosen.needs_trainings:
        raise UnsupportedError(
            f"{chosen.name} follows whole trainings, and takes some multiple of their time: see the README, and "
            "`retrain(dry_run=True)` for what a training takes."
        )
    with sharing("attribute_dry_run"), posed(model, train_dataset, query_dataset, **setup) as (problem, _):
        if problem.train.streamed:
            raise UnsupportedError("A stream has no rows to try and no length: give some of it as a datasets.Dataset.")
        chosen = chosen.settled(problem)
        few, more = ([min(n * s.batch_size, len(s)) for s in (problem.query, problem.train)] for n in (_FEW, _MORE))
        _try(chosen, problem, *few)  # what happens once in a process
        sizes = [sorted({*each}) for each in zip(few, more, strict=True)]
        tried = [_quickest(chosen, problem, *shape) for shape in itertools.product(*sizes)]
    num_queries, num_train = problem.shape
    weights = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    from_folders = any(isinstance(each.source, Path) for each in problem.checkpoints)
    most = max(tried, key=lambda each: each.shape)
    passes = most.seen[0] / most.shape[0], most.seen[1] / most.shape[1]
    return AttributionDryRun(
        method=chosen.name,
        shape=problem.shape,
        query_passes=passes[0],
        train_passes=passes[1],
        num_batches=math.ceil(
            passes[0] * num_queries / problem.query.batch_size + passes[1] * num_train / problem.train.batch_size
        ),
        seconds=_carried_on(tried, [each.seconds for each in tried], problem.shape),
        disk_bytes=round(_carried_on(tried, [each.disk_bytes for each in tried], problem.shape)),
        memory_bytes=max(weights * (1 + from_folders) + 4 * num_queries * num_train, most.gpu_bytes),
    )


@dataclasses.dataclass(frozen=True)
class _Tried:
    shape: tuple[int, int]
    seen: tuple[int, int]
    seconds: float
    disk_bytes: int
    gpu_bytes: int


class _Counted(Split):
    """Some rows of a split, and how many have been read."""

    def __init__(self, split: Split, rows: np.ndarray) -> None:
        super().__init__(
            select_rows(split.dataset, rows), split.collator, split.batch_size, split.name, split.seed,
            split.batch_tokens,
        )  # fmt: skip
        self.seen = 0

    def batches(self, *args: Any, **kwargs: Any) -> Iterator[Batch]:
        for batch in super().batches(*args, **kwargs):
            self.seen += len(batch.indices)
            yield batch


def _quickest(method: Method, problem: Problem, num_queries: int, num_train: int) -> _Tried:
    tries: list[_Tried] = []
    while from_main(lambda: sum(each.seconds for each in tries) < _ENOUGH_SECONDS):
        tries.append(_try(method, problem, num_queries, num_train))
    return min(tries, key=lambda each: each.seconds)


def _try(method: Method, problem: Problem, num_queries: int, num_train: int) -> _Tried:
    """Attribute some of the rows."""
    queries, examples = _spread(len(problem.query), num_queries), _spread(len(problem.train), num_train)
    query, train = _Counted(problem.query, queries), _Counted(problem.train, examples)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with working_folder(None) as folder:
        part = dataclasses.replace(
            problem,
            train=train,
            query=query,
            train_dataset=select_rows(problem.train_dataset, examples),
            query_dataset=select_rows(problem.query_dataset, queries),
            cache_dir=folder,
            progress=False,
        )
        started = time.perf_counter()
        method.score(part)
        seconds = time.perf_counter() - started
        disk_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return _Tried(
        shape=(num_queries, num_train),
        seen=(sum(gather(query.seen)), sum(gather(train.seen))),
        seconds=seconds,
        disk_bytes=disk_bytes,
        gpu_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    )


def _spread(number: int, few: int) -> np.ndarray:
    """A few positions at equal distances."""
    return np.linspace(0, number - 1, few).astype(int)


def _carried_on(tried: list[_Tried], costs: list[float], shape: tuple[int, int]) -> float:
    """Fit a + b Q + c N + d Q N, none of them negative, to what was tried."""

    def terms(queries: int, train: int) -> list[float]:
        return [1, queries / shape[0], train / shape[1], queries * train / (shape[0] * shape[1])]

    found, _ = nnls(np.array([terms(*each.shape) for each in tried]), np.array(costs))
    return float(found.sum())
