"""Unrolled differentiation averaged over trainings on random subsets: linear where it is evaluated."""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn
from transformers import Trainer

from hf_attribution.artefacts import read_artefact, write_artefact
from hf_attribution.errors import UnsupportedError
from hf_attribution.methods.base import Method, Scored
from hf_attribution.methods.influence import Influence
from hf_attribution.methods.unroll import Unroll
from hf_attribution.problem import Checkpoint, Problem
from hf_attribution.replay.run import RecordedRun
from hf_attribution.replay.sweep import Differentiable
from hf_attribution.retraining import FollowUp
from hf_attribution.seeds import derive_seed
from hf_attribution.subsets import Subsets

VARY = {"masks": "fixed", "masks+seeds": "masked"}
_KIND = "derivatives of a run"


@dataclasses.dataclass(frozen=True)
class SmoothedUnroll(Method):
    """`E_S[∂m_q(θ_T(w)) / ∂w_i at w = 1_S]`: exact derivatives, averaged over trainings on random subsets S.

    A derivative at the full training says little of random halves, since training is not linear that far. The mean of
    derivatives at random subsets is, by Stein's lemma, (for Gaussian weights) the best linear predictor over them.
    Examples outside a subset are in the batches with weight 0, and have derivatives like all others.

    The mean weighs a run by the inverse of its derivatives' length: the steeper a run, the noisier it is. With
    `shrink`, the mean is drawn towards the influence function at the runs' final models, query by query, and the more
    so the more of what sets them apart is noise between runs (empirical Bayes, after James & Stein 1961).

    Every run is recorded, swept back through for all queries, and written down, like the retrainings of
    `trainer.retrain`: an interrupted call goes on where it stopped, more `runs` add to those that are there, and
    several processes may share the work. Cost: per run, a training and about 1.5 to 2 per query.

    How far the mean has come is `reliability` in the scores' `choices`. Where training is rough, as that of small
    transformers from scratch, it stays low, and `Influence` over `trainer.train_ensemble(k, fraction=0.5)` does as
    well for a tenth of the price.

    Args:
        runs: How many trainings.
        fraction: The fraction of the examples in each: that of the subsets which are asked about.
        vary: `"masks+seeds"`: every run has weights (given `model_init`), order and dropout of its own, for questions
            about trainings in general. `"masks"`: all share those of `trainer.retrain(protocol="fixed", seed=seed)`,
            for questions about that one training.
        masks: How subsets are drawn: `"random"`; `"antithetic"`: every second one is the complement of the one
            before (fraction ½); `"stratified"`: with the same fraction of every class.
        last: The share of the steps that is gone back through, as for `Unroll`.
        curvature: `"exact"` or `"gauss_newton"`, as for `Unroll`.
        shrink: Whether to draw the mean of two or more runs towards the influence function; that costs about half a
            training a run.
        seed: Of the subsets and the runs.
    """

    runs: int = 6
    fraction: float = 0.5
    vary: str = "masks+seeds"
    masks: str = "random"
    last: float = 1.0
    curvature: str = "exact"
    shrink: bool = True
    seed: int = 0

    name: ClassVar[str] = "smoothed_unroll"
    paper: ClassVar[str] = "after Ilyas & Engstrom 2025, MAGIC, averaged over random subsets"
    needs_trainings: ClassVar[bool] = True

    def __post_init__(self) -> None:
        known = {"vary": tuple(VARY), "masks": ("random", "antithetic", "stratified")}
        for setting, choices in known.items():
            if getattr(self, setting) not in choices:
                raise ValueError(f"{setting} must be one of {', '.join(choices)}, not {getattr(self, setting)!r}.")
        if self.runs < 1:
            raise ValueError(f"runs must be at least 1, not {self.runs}.")
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction must be in (0, 1), not {self.fraction}: for 1 there is Unroll.")
        if self.masks == "antithetic" and self.fraction != 0.5:
            raise ValueError(f"masks='antithetic' needs fraction=0.5, not {self.fraction}.")
        _ = self._unroll  # checks the settings that it shares

    def score(self, problem: Problem) -> Scored:
        """Train, sweep, average.

        Args:
            problem: Model, task, data, and what trains.

        Returns:
            Values `[Q, N]`; how far the average has come; the subsets that were trained on.

        Raises:
            ValueError: If there is no trainer to train with.
        """
        if problem.train_masked is None:
            raise ValueError(
                "smoothed_unroll trains: call trainer.attribute(queries, method='smoothed_unroll') of an "
                "AttributionTrainer."
            )
        subsets = self._subsets(problem)
        # What each training is followed by may go to another process, so it takes no model and no trainer along.
        blank = dataclasses.replace(
            problem, model=nn.Identity(), checkpoints=(), train_masked=None, progress=False, outlasting=False
        )
        settings = {"method": self.name, "last": self.last, "curvature": self.curvature, "shrink": self.shrink}
        _, files = problem.train_masked(
            subsets=subsets,
            protocol=VARY[self.vary],
            # With masks alone the run is that of `retrain(protocol="fixed")` under the same seed.
            seed=self.seed if self.vary == "masks" else derive_seed(self.seed, self.name),
            follow_up=FollowUp(functools.partial(_sweep, self._unroll, self.shrink, blank), settings),
        )
        values, choices = _averaged(files, self.shrink)
        return Scored(
            values,
            {**choices, "counterfactuals": str(files[0].parents[1] / "counterfactuals.safetensors")},
            subsets.keys(),
        )

    @property
    def _unroll(self) -> Unroll:
        return Unroll(last=self.last, curvature=self.curvature, radius=None)

    def _subsets(self, problem: Problem) -> Subsets:
        """One subset a run; those of fewer runs are the first of those of more."""
        seed, size = derive_seed(self.seed, self.name, "subsets"), len(problem.train)
        if self.masks == "antithetic":
            half = Subsets.random(size, (self.runs + 1) // 2, self.fraction, seed)
            masks = np.stack([half.masks, ~half.masks], axis=1).reshape(-1, size)[: self.runs]
            return Subsets(masks, {**half.description, "name": "antithetic"})
        if self.masks == "stratified":
            labels = problem.task.labels(problem.train_dataset)
            if labels is None:
                raise UnsupportedError("masks='stratified' needs classes, and these examples have none.")
            return Subsets.stratified(labels, self.runs, self.fraction, seed)
        return Subsets.random(size, self.runs, self.fraction, seed)


def _sweep(unroll: Unroll, shrink: bool, problem: Problem, trainer: Trainer, recording: Path, found: Path) -> None:
    """Differentiate the queries' measurements through a recorded training, and write the derivatives down."""
    run = RecordedRun.open(recording, trainer)
    prepared = Differentiable.prepare(run, problem.task, unroll.curvature)
    model = run.final_model()
    of_run = dataclasses.replace(problem, model=model, checkpoints=[Checkpoint(model)], run=run)
    values, choices = unroll.differentiate(of_run, prepared)
    arrays = {"values": values.numpy()}
    if shrink:
        arrays["influence"] = Influence().score(of_run).values
    write_artefact(found, _KIND, arrays, choices)


def _averaged(files: list[Path], shrink: bool) -> tuple[np.ndarray, dict[str, Any]]:
    """The mean over runs, and how reliable it is: the share of its variance over examples that is not noise."""
    runs = len(files)
    lengths = [float(np.linalg.norm(_read(file, "values"), axis=1).mean()) or 1.0 for file in files]
    scales = runs / sum(1 / length for length in lengths) / np.array(lengths)
    mean, noise = _mean_and_noise(scale * _read(file, "values") for file, scale in zip(files, scales, strict=True))
    choices: dict[str, Any] = {"runs": runs, "standard_error": None, "reliability": None, "shrinkage": None}
    if runs > 1:
        signal = mean.var(axis=1)
        choices["standard_error"] = float(np.sqrt(noise.mean()))
        if signal.all():
            choices["reliability"] = float(np.median(1 - noise / signal))
    if runs > 1 and shrink:
        towards, _ = _mean_and_noise(_read(file, "influence") for file in files)
        mean, choices["shrinkage"] = _shrunk(mean, noise, towards)
    return mean.astype(np.float32), choices


def _read(file: Path, name: str) -> np.ndarray:
    return read_artefact(file, _KIND)[0][name].astype(np.float64)


def _mean_and_noise(runs: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The mean of runs `[Q, N]`, and for each query its squared standard error, the mean over examples `[Q]`."""
    total: Any = 0.0
    squares: Any = 0.0
    count = 0
    for values in runs:
        total, squares, count = total + values, squares + values**2, count + 1
    mean = total / count
    return mean, np.maximum(squares / count - mean**2, 0).mean(axis=1) / max(count - 1, 1)


def _shrunk(mean: np.ndarray, noise: np.ndarray, towards: np.ndarray) -> tuple[np.ndarray, float]:
    """Shrink the rows of a noisy mean towards multiples of other rows.

    Args:
        mean: `[Q, N]`.
        noise: The variance of its noise, `[Q]`.
        towards: What it is shrunk towards, in units of its own, `[Q, N]`.

    Returns:
        The shrunk rows, and the share of the difference that was taken away: the median over queries.
    """
    target = towards * ((mean * towards).sum(1) / np.maximum((towards**2).sum(1), 1e-300))[:, None]
    apart = ((mean - target) ** 2).mean(axis=1)
    kept = np.maximum(apart - noise, 0) / np.maximum(apart, 1e-300)
    return target + kept[:, None] * (mean - target), float(np.median(1 - kept))
