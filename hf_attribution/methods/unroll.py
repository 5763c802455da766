"""Exact unrolled differentiation: the derivative of queries' measurements through the training that was recorded."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_attribution.artefacts import fingerprint
from hf_attribution.bookmark import Bookmark
from hf_attribution.copies import own_copy
from hf_attribution.curvature.operators import stacked
from hf_attribution.evaluation import read_groups
from hf_attribution.gradients.held import Source
from hf_attribution.inputs import evaluating
from hf_attribution.methods.base import Method, Scored
from hf_attribution.problem import Problem
from hf_attribution.replay.diagnostics import adam_is_rough, linearity, random_removal
from hf_attribution.replay.recording import Recording
from hf_attribution.replay.storage import STORAGES
from hf_attribution.replay.sweep import Differentiable
from hf_attribution.replay.unfinished import Unfinished


@dataclasses.dataclass(frozen=True)
class Unroll(Method):
    """`∂m_q(θ_T(w)) / ∂w_i`: what a little more weight of an example in every step does to a query's measurement.

    One sweep back through the recorded training (`record=True`) for all queries at once; exact to rounding. It
    predicts small removals from *this* run best; for random halves see `SmoothedUnroll`. With a `cache_dir` a sweep
    that is killed goes on from where it stood a minute before, or so, to the same bits.

    For few groups of examples and many queries there is the way forward: with `groups=` a column of the training
    dataset, one tangent for each group is carried through the training, whatever the number of queries. The scores are
    then `[Q, G]`: what a little more weight of all examples of a group does, the sum of their scores. Column g is the
    group `scores.provenance["choices"]["groups"][g]`.

    Args:
        at: Where the derivative is taken. `"full"`: at the recorded training. `"mean"`: at a training in which every
            example has the weight `fraction`, the mean over the subsets that are asked about.
        fraction: That fraction.
        last: The share of the steps that is gone back through, from the end; less than 1 is cheaper and approximate.
        curvature: `"exact"`, or `"gauss_newton"` for classifiers and regressions, which cannot blow up by negative
            curvature.
        queries: `"each"` scores every query; `"sum"` the sum of their measurements, in one sweep for all.
        storage: `"sqrt"`, `"tree"` or `"full"`: states between the recorded checkpoints, see `backward_in_time`. The
            scores are the same, bit for bit. Nothing is stored for groups.
        chunk: Products with the curvature that are taken at once; `"auto"` tries what is fastest.
        radius: The share of examples of a random removal at which the linear prediction is checked, by 2 more
            trainings; `None` for no check.
        seed: Of that removal.
        groups: A column of the training dataset: score its groups instead of single examples. The removal at which
            the prediction is checked is then of random groups, the last one in part.
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
    groups: str | None = None

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
        """One row per query, or one in all; one column per example, or per group."""
        rows = 1 if self.queries == "sum" else len(problem.query)
        return rows, len(problem.train) if self.groups is None else len(self._groups(problem)[0])

    def score(self, problem: Problem) -> Scored:
        """Sweep back, a block of queries at a time; or forward, a block of groups at a time.

        Args:
            problem: Model, task, data, and the recorded run.

        Returns:
            Values `[Q, N]`, or `[Q, G]` for groups; what was chosen, and the diagnostics.

        Raises:
            ValueError: If there is no recorded run, it lacks the steps that are asked for, or there is no such column.
        """
        if problem.run is None:
            raise ValueError(
                f"{self.name} differentiates through a recorded training: train an AttributionTrainer(..., "
                f"record=True), then call trainer.attribute(queries, method={self.name!r})."
            )
        self._groups(problem)
        self._first_step(problem.run.recording)
        prepared = Differentiable.prepare(problem.run, problem.task, self.curvature)
        values, choices = self.differentiate(problem, prepared)
        return Scored(values.numpy(), choices)

    def differentiate(self, problem: Problem, prepared: Differentiable) -> tuple[Tensor, dict[str, Any]]:
        """The scores of a run that is ready for it.

        Args:
            problem: The task and the queries.
            prepared: The run.

        Returns:
            Values `[Q, N]` or `[Q, G]`, float32 on the CPU, and what was chosen and found.

        Raises:
            ValueError: If the recording lacks the steps that are asked for.
        """
        recording = prepared.run.recording
        weights = None if self.at == "full" else self.fraction * prepared.replay().example_weights
        first = self._first_step(recording)
        model = prepared.load(own_copy(problem.model), prepared.final(weights))
        names, columns = self._groups(problem)
        sweep = self._backward if self.groups is None else self._forward
        with tqdm(desc=self.name, unit="step", disable=not problem.progress) as bar:
            values, choices = sweep(problem, model, prepared, weights, first, bar)
            if self.radius is not None:
                measure = _measurement(problem, model, prepared, self.queries == "sum")
                change = random_removal(prepared.replay(weights).example_weights, columns, self.radius, self.seed)
                found = linearity(prepared, measure, values, weights, *change)
                bar.set_postfix({key: value for key, value in found.items() if value is not None})
                choices["linearity"] = {"radius": self.radius, **found}
        choices |= {
            "product": prepared.product_name,
            "loss_divided_by": prepared.rule,
            "steps": len(recording) - first,
        }
        if self.groups is not None:
            choices["groups"] = names
        if adam_is_rough(recording.optimizer):
            choices["adam_epsilon"] = min(group.settings["eps"] for group in recording.optimizer.groups)
        return values, choices

    def _first_step(self, recording: Recording) -> int:
        """The step to go back to."""
        first = math.floor((1 - self.last) * len(recording))
        if first < recording.first:
            share = 1 - recording.first / len(recording)
            raise ValueError(
                f"The recording begins at step {recording.first} of {len(recording)}: use last={share:.3f} or less."
            )
        return first

    def _groups(self, problem: Problem) -> tuple[list[Any], Tensor]:
        """The groups, and the number of each example's own, `[N]`; without `groups=` each example is its own."""
        if self.groups is None:
            return [], torch.arange(len(problem.train))
        if not hasattr(problem.train_dataset, "column_names"):
            raise ValueError(f"groups={self.groups!r} is a column: train on a datasets.Dataset that has it.")
        found = read_groups(problem.train_dataset, self.groups, len(problem.train))
        names, numbers = np.unique(np.asarray(found), return_inverse=True)
        return names.tolist(), torch.from_numpy(numbers.reshape(-1))

    def _backward(
        self,
        problem: Problem,
        model: nn.Module,
        prepared: Differentiable,
        weights: Tensor | None,
        first: int,
        bar: tqdm,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Scores `[Q, N]`, by cotangents of the queries."""
        rows, end = self.shape(problem)[0], len(prepared.run.recording)
        storage = prepared.fitting_storage(weights) if self.storage == "auto" else self.storage
        bookmark = Bookmark(self._bookmark_path(problem), "unfinished sweep")
        if found := bookmark.read():
            work = Unfinished.unpack(*found, like=prepared.final())
        else:
            block = min(rows, prepared.fitting_block())
            chunk = prepared.fastest_chunk(block) if self.chunk == "auto" else int(self.chunk)
            work = Unfinished(block, chunk, torch.zeros(rows, len(problem.train)))
        bar.reset((end - first) * math.ceil(rows / work.block))
        bar.update((end - first) * len(work.growth) + (end - work.standing.step if work.standing else 0))
        for number, (where, targets) in enumerate(self._targets(problem, model, prepared, work.block)):
            if number < len(work.growth):
                continue
            work.standing = standing = work.standing or prepared.start(targets)
            for _ in prepared.go_back(standing, weights, first, storage, work.chunk):
                bar.update()
                bookmark.put(work.pack)
            work.values[where] = standing.scores.float().cpu()
            work.growth.append(_growth(standing.lengths))
            work.standing = None
        bookmark.remove()
        growth = float(np.median(work.growth))
        choices = {"storage": storage, "chunk": work.chunk, "block": work.block, "cotangent_growth": growth}
        return work.values, choices

    def _bookmark_path(self, problem: Problem) -> Path | None:
        """The file that says how far the sweep has come, where there is a folder that outlasts this call."""
        if not problem.outlasting or problem.run is None:
            return None
        inputs = [split.inputs_fingerprint for split in (problem.train, problem.query)]
        key = fingerprint(self.settings, problem.fingerprints, inputs, problem.run.recording.header)
        return problem.cache_dir / "unfinished" / f"{self.name}-{key}.safetensors"

    def _forward(
        self,
        problem: Problem,
        model: nn.Module,
        prepared: Differentiable,
        weights: Tensor | None,
        first: int,
        bar: tqdm,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Scores `[Q, G]`, by tangents of the groups."""
        (rows, count), numbers = self.shape(problem), self._groups(problem)[1]
        block = min(count, prepared.fitting_block())
        chunk = prepared.fastest_chunk(block) if self.chunk == "auto" else int(self.chunk)
        steps, tangents, growth = len(prepared.run.recording) - first, [], []
        bar.reset(steps * math.ceil(count / block))
        for some in torch.arange(count).split(block):
            of_group = (numbers[None] == some[:, None]).double()
            found, lengths = prepared.push(of_group, weights, first, chunk, bar.update)
            tangents.append(found)
            growth.append(_growth(lengths))
        moved, values = torch.cat(tangents).T, torch.empty(rows, count)
        for where, targets in self._targets(problem, model, prepared, block=64):
            values[where] = (targets @ moved).float().cpu()
        return values, {"chunk": chunk, "block": block, "tangent_growth": float(np.median(growth))}

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
    """How much longer cotangents, or tangents, became on their way, at most: the median over queries, or groups."""
    joined = torch.stack(lengths)
    return float((joined.max(0).values / joined[0].clamp(min=1e-30)).median())


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
