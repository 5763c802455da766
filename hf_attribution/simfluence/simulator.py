"""The simulator: how every training example in a batch changes the loss of every query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from hf_attribution.artefacts import Artefact, freeze
from hf_attribution.errors import MismatchError, UnsupportedError
from hf_attribution.scores import Scores
from hf_attribution.seals import plain_json
from hf_attribution.simfluence.curves import LossCurves, LossRun
from hf_attribution.subsets import Subsets

# Penalties that are tried, in units of the mean squared length of a row of the design.
PENALTIES = tuple(10.0**power for power in range(-3, 4))

# Measurements in all up to which the kernel of their design is solved.
MAX_POINTS = 20_000

# Bytes of kernels that are solved at once.
BLOCK_BYTES = 2**28


@dataclass(frozen=True, eq=False, repr=False)
class Simfluence(Artefact):
    """A simulator of the loss L of each query: `L ← L + η Σ_i x_i (A_i L + B_i)` for a step with rate η.

    x_i is the share of training example i in the batch, and η the step's learning rate in units of the recorded ones'
    mean.

    Attributes:
        multiplicative: A, float32 `[Q, N]`.
        additive: B, float32 `[Q, N]`.
        initial: The losses before training, float32 `[Q]`.
        rates: η of the steps of the first recorded training, float32 `[steps]`; other lengths are interpolated.
        recipe: `batch_size` (examples in a step), `epochs`, `penalty`, `num_runs`; JSON.
        provenance: That of the curves.

    Example:
        >>> simulator = fit_simfluence(curves)  # doctest: +SKIP
        >>> lds.compute(predictions=simulator.predict(truth.subsets), references=truth.mean())  # doctest: +SKIP
    """

    kind: ClassVar[str] = "simfluence"

    multiplicative: np.ndarray
    additive: np.ndarray
    initial: np.ndarray
    rates: np.ndarray
    recipe: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("multiplicative", "additive", "initial", "rates"):
            object.__setattr__(self, name, freeze(getattr(self, name), np.float32))
        object.__setattr__(self, "recipe", plain_json(self.recipe, "Simfluence.recipe"))
        object.__setattr__(self, "provenance", plain_json(self.provenance, "Simfluence.provenance"))

    def __repr__(self) -> str:
        num_queries, num_examples = self.multiplicative.shape
        return f"Simfluence({num_queries} queries x {num_examples} training examples, {self.recipe})"

    def simulate(self, batches: Sequence[np.ndarray], initial: np.ndarray | None = None) -> np.ndarray:
        """The queries' losses along a training.

        Args:
            batches: The examples of each step, as positions in the training dataset.
            initial: The losses before it, `[Q]`; by default the recorded ones' mean.

        Returns:
            float64 `[steps + 1, Q]`.
        """
        shares = _shares(batches, self._rates(len(batches)), self.multiplicative.shape[1])
        start = np.asarray(self.initial if initial is None else initial, dtype=np.float64)
        return _simulate(shares, self.multiplicative.astype(np.float64), self.additive.astype(np.float64), start)

    def predict(self, subsets: Subsets, seeds: int = 1, seed: int = 0) -> np.ndarray:
        """Minus the losses after trainings on subsets, with the recorded ones' batch size and number of epochs.

        Args:
            subsets: M subsets of the training data.
            seeds: Simulated trainings for each, in orders of their own, to average over.
            seed: Seed of the orders.

        Returns:
            float64 `[Q, M]`, what the metric takes as predictions.

        Raises:
            MismatchError: The subsets are of another number of training examples.
        """
        if subsets.num_examples != self.multiplicative.shape[1]:
            raise MismatchError(
                f"The simulator is of {self.multiplicative.shape[1]} training examples and the subsets are of "
                f"{subsets.num_examples}: use subsets of the training set that was recorded."
            )
        outputs = np.zeros((len(self.initial), len(subsets)))
        for column, mask in enumerate(subsets.masks):
            for number in range(seeds):
                batches = self._batches(np.flatnonzero(mask), np.random.default_rng([seed, number, column]))
                outputs[:, column] -= self.simulate(batches)[-1] / seeds
        return outputs

    def scores(self) -> Scores:
        """What each example changes, to first order, in minus the loss after training on all of them.

        Returns:
            Scores `[Q, N]`: derivatives with respect to the example's share in every batch, all batches being average
            ones.
        """
        a, b = self.multiplicative.astype(np.float64), self.additive.astype(np.float64)
        steps = len(self._batches(np.arange(a.shape[1]), np.random.default_rng(0)))
        rates = self._rates(steps)
        shares = np.repeat(rates[:, None] / a.shape[1], a.shape[1], axis=1)
        losses = _simulate(shares, a, b, self.initial.astype(np.float64))[:-1]
        factors = 1 + rates[:, None] * a.mean(1)
        # What a change of the loss after each step has become at the end.
        later = np.concatenate([np.cumprod(factors[:0:-1], axis=0)[::-1], np.ones((1, len(a)))]) * rates[:, None]
        centered_a, centered_b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
        values = (later * losses).sum(0)[:, None] * centered_a + later.sum(0)[:, None] * centered_b
        provenance = {**self.provenance, "measurement": "negative_loss"}
        return Scores(-values / a.shape[1], "simfluence", self.recipe, provenance)

    def _rates(self, steps: int) -> np.ndarray:
        """The recorded schedule at another number of steps."""
        known = (np.arange(len(self.rates)) + 0.5) / len(self.rates)
        return np.interp((np.arange(steps) + 0.5) / steps, known, self.rates)

    def _batches(self, examples: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
        size, batches = self.recipe["batch_size"], []
        for _ in range(self.recipe["epochs"]):
            order = generator.permutation(examples)
            batches += [order[start : start + size] for start in range(0, len(order), size)]
        return batches

    def _pack(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        names = ("multiplicative", "additive", "initial", "rates")
        return {name: getattr(self, name) for name in names}, {"recipe": self.recipe, "provenance": self.provenance}

    @classmethod
    def _unpack(cls, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> Simfluence:
        return cls(**arrays, recipe=metadata["recipe"], provenance=metadata["provenance"])


def fit_simfluence(curves: LossCurves, penalty: float | str = "auto") -> Simfluence:
    """Fit a simulator to recorded trainings, by ridge regression of the losses' changes (Guu et al. 2023, section 4).

    The design of all queries is that of the batches: one kernel of these serves all, and each query's is a product of
    it with that query's losses.

    Args:
        curves: The recorded trainings.
        penalty: Of the squares of A and B (of losses in units of their root mean square), in units of the mean squared
            length of a row of the design. `"auto"` chooses the one with which trainings left out, a quarter of them,
            are simulated best.

    Returns:
        The simulator.

    Raises:
        ValueError: If the penalty is not positive, or is to be chosen and there is one training.
        UnsupportedError: If there are too many measurements.
    """
    if penalty != "auto" and not float(penalty) > 0:
        raise ValueError(f"penalty must be positive, not {penalty}.")
    points = sum(len(run.measured) - 1 for run in curves.runs)
    if points > MAX_POINTS:
        raise UnsupportedError(
            f"There are {points} measurements, and at most {MAX_POINTS} are fitted: record with larger every=."
        )
    if penalty == "auto" and len(curves) < 2:
        raise ValueError("penalty='auto' leaves trainings out, and there is one: record another, or give a penalty.")
    unit = float(np.mean(np.concatenate([run.rates for run in curves.runs]))) or 1.0
    chosen = _choose(curves, unit) if penalty == "auto" else float(penalty)
    first = curves.runs[0]
    rows = np.concatenate(first.batches)
    (coefficients,) = _fit(curves, unit, [chosen])
    return Simfluence(
        *coefficients,
        np.mean([run.losses[0] for run in curves.runs], axis=0),
        first.rates / unit,
        {
            "batch_size": max(len(batch) for batch in first.batches),
            "epochs": max(1, round(len(rows) / len(np.unique(rows)))),
            "penalty": chosen,
            "num_runs": len(curves),
        },
        curves.provenance,
    )


def _choose(curves: LossCurves, unit: float) -> float:
    """The penalty with which the losses at the end of trainings left out are simulated best."""
    left_out = max(1, len(curves) // 4)
    kept = curves.select(range(len(curves) - left_out))
    errors = np.zeros(len(PENALTIES))
    for number, (a, b) in enumerate(_fit(kept, unit, PENALTIES)):
        for run in curves.runs[-left_out:]:
            shares = _shares(run.batches, run.rates / unit, curves.num_examples)
            with np.errstate(over="ignore", invalid="ignore"):  # a simulation may diverge, and is then not chosen
                end = _simulate(shares, a, b, run.losses[0].astype(np.float64))[-1]
                errors[number] += np.square(end - run.losses[-1]).sum()
    return PENALTIES[int(np.where(np.isfinite(errors), errors, np.inf).argmin())]


def _fit(curves: LossCurves, unit: float, penalties: Sequence[float]) -> list[tuple[np.ndarray, np.ndarray]]:
    """A and B, float64 `[Q, N]`, for each penalty: ridge regression in its dual form."""
    design = np.concatenate([_intervals(run, unit, curves.num_examples) for run in curves.runs])
    before = np.concatenate([run.losses[:-1] for run in curves.runs]).astype(np.float64)
    change = np.concatenate([np.diff(run.losses.astype(np.float64), axis=0) for run in curves.runs])
    scale = np.sqrt(np.square(before).mean(0))
    scale[scale == 0] = 1.0
    before, change = before / scale, change / scale
    gram = design @ design.T
    shape = (curves.num_queries, curves.num_examples)
    found = [(np.empty(shape), np.empty(shape)) for _ in penalties]
    block = max(1, BLOCK_BYTES // gram.nbytes)
    for start in range(0, curves.num_queries, block):
        where = slice(start, start + block)
        inputs = torch.from_numpy(before[:, where].T.copy())
        kernels = torch.from_numpy(gram) * (1 + inputs[:, :, None] * inputs[:, None, :])
        ridges = kernels.diagonal(dim1=1, dim2=2).mean(1)
        ridges[ridges == 0] = 1.0
        targets = torch.from_numpy(change[:, where].T.copy())[..., None]
        for (a, b), penalty in zip(found, penalties, strict=True):
            damped = kernels + torch.diag_embed((penalty * ridges)[:, None].expand(-1, len(gram)))
            dual = torch.cholesky_solve(targets, torch.linalg.cholesky(damped))[..., 0]
            a[where] = (dual * inputs).numpy() @ design
            b[where] = (dual.numpy() @ design) * scale[where, None]
    return found


def _intervals(run: LossRun, unit: float, num_examples: int) -> np.ndarray:
    """What was trained on between two measurements: float64 `[points - 1, N]`."""
    shares = _shares(run.batches, run.rates / unit, num_examples)
    return np.add.reduceat(shares, run.measured[:-1], axis=0)


def _shares(batches: Sequence[np.ndarray], rates: np.ndarray, num_examples: int) -> np.ndarray:
    """Each example's share in each step's batch, times the step's rate: float64 `[steps, N]`."""
    shares = np.zeros((len(batches), num_examples))
    for row, batch in enumerate(batches):
        np.add.at(shares[row], batch, rates[row] / len(batch))
    return shares


def _simulate(shares: np.ndarray, a: np.ndarray, b: np.ndarray, initial: np.ndarray) -> np.ndarray:
    factors, terms = 1 + shares @ a.T, shares @ b.T
    losses = np.empty((len(shares) + 1, len(initial)))
    losses[0] = initial
    for step in range(len(shares)):
        losses[step + 1] = factors[step] * losses[step] + terms[step]
    return losses
