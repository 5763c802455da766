"""Exact unrolled differentiation: the derivative of queries' measurements through the training that was recorded."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_attribution.curvature.operators import stacked
from hf_attribution.gradients.held import Source
from hf_attribution.inputs import evaluating
from hf_attribution.methods.base import Method, Scored
from hf_attribution.problem import Problem
from hf_attribution.replay.diagnostics import adam_is_rough, linearity
from hf_attribution.replay.storage import STORAGES
from hf_attribution.replay.sweep import Differentiable


@dataclasses.dataclass(frozen=True)
class Unroll(Method):
    """`∂m_q(θ_T(w)) / ∂w_i`: what a little more weight of an example in every step does to a query's measurement.

    One sweep back through the recorded training (`record=True`) for all queries at once; exact to rounding. It
    predicts small removals from *this* run best; for random halves see `SmoothedUnroll`.

    Args:
        at: Where the derivative is taken. `"full"`: at the recorded training. `"mean"`: at a training in which every
            example has the weight `fraction`, the mean over the subsets that are asked about.
        fraction: That fraction.
        last: The share of the steps that is gone back through, from the end; less than 1 is cheaper and approximate.
        curvature: `"exact"`, or `"gauss_newton"` for classifiers and regressions, which cannot blow up by negative
            curvature.
        queries: `"each"` scores every query; `"sum"` the sum of their measurements, in one sweep for all.
        storage: `"sqrt"`, `"tree"` or `"full"`: states between the recorded checkpoints, see `backward_in_time`. The
            scores are the same, bit for bit.
        chunk: Products with the curvature that are taken at once; `"auto"` tries what is fastest.
        radius: The share of examples of a random removal at which the linear prediction is checked, by 2 more
            trainings; `None` for no check.
        seed: Of that removal.
    """

    at: str = "full"
    fraction: float = 0.5
    last: float = 1.0
    curvature: str = "exact"
    queries: str = "each"
    storage: str = "auto"
    chunk: int | str = "auto"
    radius: float | None = 0.05
    seed: int = 0

    name: ClassVar[str] = "unroll"
    paper: ClassVar[str] = "Ilyas & Engstrom 2025, MAGIC: near-optimal data attribution for deep learning"
    needs_run: ClassVar[bool] = True

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str, ...]] = {
            "at": ("full", "mean"),
            "curvature": ("exact", "gauss_newton"),
            "queries": ("each", "sum"),
            "storage": ("auto", *STORAGES),
        }
        for setting, known in choices.items():
            if getattr(self, setting) not in known:
                raise ValueError(f"{setting} must be one of {', '.join(known)}, not {getattr(self, setting)!r}.")
        for setting in ("fraction", "last", "radius"):
            value = getattr(self, setting)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{setting} must be in (0, 1], not {value}.")
        if self.chunk != "auto" and not (isinstance(self.chunk, int) and self.chunk >= 1):
            raise ValueError(f"chunk must be 'auto' or a positive number, not {self.chunk!r}.")

    def shape(self, problem: Problem) -> tuple[int, int]:
        """One row per query, or one in all."""
        return (1 if self.queries == "sum" else len(problem.query)), len(problem.train)

    def score(self, problem: Problem) -> Scored:
        """Sweep back, a block of queries at a time.

        Args:
            problem: Model, task, data, and the recorded run.

        Returns:
            Values `[Q, N]`; what was chosen, and the diagnostics.

        Raises:
            ValueError: If there is no recorded run, or it lacks the steps that are asked for.
        """
        if problem.run is None:
            raise ValueError(
                f"{self.name} differentiates through a recorded training: train an AttributionTrainer(..., "
                f"record=True), then call trainer.attribute(queries, method={self.name!r})."
            )
        prepared = Differentiable.prepare(problem.run, problem.task, self.curvature)
        values, choices = self.differentiate(problem, prepared)
        return Scored(values.numpy(), choices)

    def differentiate(self, problem: Problem, prepared: Differentiable) -> tuple[Tensor, dict[str, Any]]:
        """The scores of a run that is ready for it.

        Args:
            problem: The task and the queries.
            prepared: The run.

        Returns:
            Values `[Q, N]`, float32 on the CPU, and what was chosen and found.

        Raises:
            ValueError: If the recording lacks the steps that are asked for.
        """
        recording = prepared.run.recording
        weights = None if self.at == "full" else self.fraction * prepared.replay().example_weights
        first = math.floor((1 - self.last) * len(recording))
        if first < recording.first:
            share = 1 - recording.first / len(recording)
            raise ValueError(
                f"The recording begins at step {recording.first} of {len(recording)}: use last={share:.3f} or less."
            )
        parameters = prepared.final(weights)
        model = prepared.load(copy.deepcopy(problem.model), parameters)
        rows = self.shape(problem)[0]
        block = min(rows, prepared.fitting_block())
        storage = prepared.fitting_storage(weights) if self.storage == "auto" else self.storage
        chunk = prepared.fastest_chunk(block) if self.chunk == "auto" else int(self.chunk)
        steps = len(recording) - first
        values, growth = torch.empty(rows, len(problem.train)), []
        with tqdm(
            total=steps * math.ceil(rows / block), desc=self.name, unit="step", disable=not problem.progress
        ) as bar:
            for where, targets in self._targets(problem, model, prepared, block):
                scores, lengths = prepared.sweep(targets, weights, first, storage, chunk, bar.update)
                values[where] = scores.float().cpu()
                growth.append(_growth(lengths))
        choices: dict[str, Any] = {
            "product": prepared.product_name,
            "loss_divided_by": prepared.rule,
            "storage": storage,
            "chunk": chunk,
            "block": block,
            "steps": steps,
            "cotangent_growth": float(np.median(growth)),
        }
        if adam_is_rough(recording.optimizer):
            choices["adam_epsilon"] = min(group.settings["eps"] for group in recording.optimizer.groups)
        if self.radius is not None:
            measure = _measurement(problem, model, prepared, self.queries == "sum")
            choices["linearity"] = linearity(prepared, measure, values, weights, self.radius, self.seed)
        return values, choices

    def _targets(
        self, problem: Problem, model: nn.Module, prepared: Differentiable, block: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Gradients of the measurements by the last parameters: query rows, and `[M, P]` for a block of them."""
        with evaluating(model):
            source = Source(problem.gradients(model, problem.task.measurement, problem.query), problem.query)
            named = {name: source.gradients.parameters[name] for name in prepared.flat.names}
            parts = ((held.indices, held.flat(named)) for held in source.batches())
            if self.queries == "sum":
                yield torch.tensor([0]), torch.stack([rows.sum(0) for _, rows in parts]).sum(0, keepdim=True)
            else:
                yield from _blocks(parts, block)


def _blocks(parts: Iterable[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Row numbers and rows, joined to blocks of at most so many rows."""
    waiting: list[tuple[Tensor, Tensor]] = []
    for part in parts:
        for pair in zip(*(each.split(size) for each in part), strict=True):
            if sum(len(where) for where, _ in [*waiting, pair]) > size:
                yield stacked(waiting)
                waiting = []
            waiting.append(pair)
    yield stacked(waiting)


def _growth(lengths: list[Tensor]) -> float:
    """How much longer cotangents became on their way back, at most: the median over queries."""
    stacked = torch.stack(lengths)
    return float((stacked.max(0).values / stacked[0].clamp(min=1e-30)).median())


def _measurement(
    problem: Problem, model: nn.Module, prepared: Differentiable, total: bool
) -> Callable[[Tensor], Tensor]:
    """The queries' measurements as a function of the last parameters, `[Q]` float64."""

    def measure(parameters: Tensor) -> Tensor:
        values = torch.empty(len(problem.query), dtype=torch.float64)
        with torch.no_grad(), evaluating(prepared.load(model, parameters)):
            for batch in problem.query.batches():
                values[batch.indices] = problem.task.measurement(model, batch.to(problem.device).inputs).double().cpu()
        return values.sum(0, keepdim=True) if total else values

    return measure
