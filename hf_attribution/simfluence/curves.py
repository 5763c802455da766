"""Losses of the queries along trainings whose batches are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from hf_attribution.artefacts import Artefact, first_non_finite, freeze
from hf_attribution.errors import MismatchError, NonFiniteError
from hf_attribution.seals import plain_json


class LossRun(NamedTuple):
    """One training.

    Args:
        losses: The queries' losses where they were measured, float32 `[points, Q]`.
        measured: After how many steps each time, ascending from 0, int64 `[points]`.
        batches: The training examples of each step, as positions in the whole training dataset.
        rates: The learning rate of each step, float64 `[steps]`.
    """

    losses: np.ndarray
    measured: np.ndarray
    batches: tuple[np.ndarray, ...]
    rates: np.ndarray


@dataclass(frozen=True, eq=False, repr=False)
class LossCurves(Artefact):
    """Losses of Q queries along some trainings on parts of N examples.

    Attributes:
        runs: The trainings.
        num_examples: N.
        provenance: What they came from: `fingerprints` of the queries; JSON.

    Raises:
        ValueError: There is no training, or one was measured less than twice.
        MismatchError: Trainings measured different queries, or hold examples beyond N.
        NonFiniteError: A loss is NaN or infinite.
    """

    kind: ClassVar[str] = "loss curves"

    runs: tuple[LossRun, ...]
    num_examples: int
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.runs or min(len(run.measured) for run in self.runs) < 2:
            raise ValueError("LossCurves need a training, with losses measured at its start and end at least.")
        for number, run in enumerate(self.runs):
            if run.losses.shape != (len(run.measured), self.num_queries) or len(run.batches) != len(run.rates):
                raise MismatchError(
                    f"Training {number} has losses {run.losses.shape} at {len(run.measured)} steps, "
                    f"{len(run.batches)} batches and {len(run.rates)} learning rates, and the first training has "
                    f"{self.num_queries} queries."
                )
            where = first_non_finite(run.losses)
            if where is not None:
                raise NonFiniteError(
                    f"The loss of query {where[1]} in training {number} is {run.losses[where]} after "
                    f"{run.measured[where[0]]} steps: did that training diverge?"
                )
            highest = max(int(batch.max()) for batch in run.batches)
            if highest >= self.num_examples:
                raise MismatchError(
                    f"Training {number} saw example {highest}, and there are {self.num_examples}: where it was on a "
                    "subset, say record_losses(..., examples=the subset's positions, num_examples=N)."
                )
        object.__setattr__(self, "provenance", plain_json(self.provenance, "LossCurves.provenance"))

    def __len__(self) -> int:
        return len(self.runs)

    def __repr__(self) -> str:
        return f"LossCurves({len(self)} trainings, {self.num_queries} queries, {self.num_examples} training examples)"

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.runs[0].losses.shape[1]

    @classmethod
    def concatenate(cls, parts: Sequence[LossCurves]) -> LossCurves:
        """Join the trainings of several.

        Args:
            parts: Curves of the same queries and training data.

        Returns:
            All trainings, in order.

        Raises:
            MismatchError: They are of other queries or training data.
        """
        first = parts[0]
        for part in parts[1:]:
            if (part.num_examples, part.provenance) != (first.num_examples, first.provenance):
                raise MismatchError(
                    "Loss curves of other queries or training data cannot be joined: record them anew."
                )
        return cls(tuple(run for part in parts for run in part.runs), first.num_examples, first.provenance)

    def select(self, runs: Sequence[int]) -> LossCurves:
        """Some of the trainings."""
        return LossCurves(tuple(self.runs[number] for number in runs), self.num_examples, self.provenance)

    def _pack(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        batches = [batch for run in self.runs for batch in run.batches]
        arrays: dict[str, np.ndarray] = {
            "losses": np.concatenate([run.losses for run in self.runs]).astype(np.float32),
            "measured": np.concatenate([run.measured for run in self.runs]).astype(np.int64),
            "num_points": np.array([len(run.measured) for run in self.runs], np.int64),
            "rows": np.concatenate(batches).astype(np.int64),
            "batch_sizes": np.array([len(batch) for batch in batches], np.int64),
            "num_steps": np.array([len(run.batches) for run in self.runs], np.int64),
            "rates": np.concatenate([run.rates for run in self.runs]).astype(np.float64),
        }
        return arrays, {"num_examples": self.num_examples, "provenance": self.provenance}

    @classmethod
    def _unpack(cls, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> LossCurves:
        points, steps = np.cumsum(arrays["num_points"])[:-1], np.cumsum(arrays["num_steps"])[:-1]
        batches = np.split(arrays["rows"], np.cumsum(arrays["batch_sizes"])[:-1])
        runs = zip(
            np.split(arrays["losses"], points),
            np.split(arrays["measured"], points),
            np.split(np.arange(len(batches)), steps),
            np.split(arrays["rates"], steps),
            strict=True,
        )
        found = tuple(
            LossRun(freeze(losses, np.float32), measured, tuple(batches[step] for step in numbers), rates)
            for losses, measured, numbers, rates in runs
        )
        return cls(found, metadata["num_examples"], metadata["provenance"])
