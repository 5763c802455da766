"""What an estimator is: a frozen dataclass of settings that makes scores of masks and outputs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from transformers.utils import logging

from hf_attribution.counterfactuals import Counterfactuals
from hf_attribution.scores import Scores
from hf_attribution.subsets import Subsets

if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)


class Estimated(NamedTuple):
    """What an estimator returns: values `[Q, N]`, and what was chosen or had to be left out; JSON."""

    values: np.ndarray
    choices: dict[str, Any] = {}  # noqa: RUF012 (an empty default that nobody writes to)


class Context(NamedTuple):
    """What an estimator may use beside masks and outputs.

    Args:
        train_dataset: The N training examples.
        previous: Scores that the same estimator made of fewer subsets.
    """

    train_dataset: datasets.Dataset | None = None
    previous: Scores | None = None


@dataclasses.dataclass(frozen=True)
class Estimator:
    """Base of all estimators. An estimator's fields are its settings; they travel with the scores.

    To add one, write one file with a subclass that defines `name` and `estimate`, and name it in
    `hf_attribution.estimation.ESTIMATORS`. Scores are positive where including the example raises the measured output.
    """

    name: ClassVar[str]
    paper: ClassVar[str]

    def estimate(self, counterfactuals: Counterfactuals, context: Context) -> Estimated:
        """Estimate the score of every training example for every query.

        Args:
            counterfactuals: Outputs of models retrained on M subsets, which are averaged over their seeds.
            context: What else there is.

        Returns:
            Values `[Q, N]` and what was chosen automatically.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no estimate.")

    @property
    def settings(self) -> dict[str, Any]:
        """The settings by name, as JSON."""
        return dataclasses.asdict(self)


def check_memberships(subsets: Subsets, estimator: str) -> None:
    """Refuse masks that hold nothing about some example.

    Args:
        subsets: The subsets of the fit.
        estimator: Its name, for the message.

    Raises:
        ValueError: An example is in all of the subsets, or in none; the message names the first.
    """
    kept = np.count_nonzero(subsets.masks, axis=0)
    for count, where in ((0, "in none"), (len(subsets), "in all")):
        examples = np.flatnonzero(kept == count)
        if len(examples):
            raise ValueError(
                f"Training example {examples[0]} is {where} of the {len(subsets)} subsets ({len(examples)} examples "
                f"are), so that {estimator} can tell nothing about it: retrain on more subsets, or on others."
            )


def constant_queries(outputs: np.ndarray) -> np.ndarray:
    """Which queries' outputs do not vary over the subsets.

    Args:
        outputs: `[Q, M]`.

    Returns:
        bool `[Q]`.
    """
    return np.ptp(outputs, axis=1) <= 1e-12 * np.abs(outputs).max(axis=1)


def note_constant(choices: dict[str, Any], constant: np.ndarray, estimator: str) -> dict[str, Any]:
    """Say in choices and log which queries got zeros because their outputs do not vary.

    Args:
        choices: What was chosen so far.
        constant: bool `[Q]`.
        estimator: Its name, for the message.

    Returns:
        The choices, with `constant_queries` where there are any.
    """
    rows = np.flatnonzero(constant).tolist()
    if not rows:
        return choices
    logger.warning(
        f"{estimator}: the outputs of {len(rows)} queries (the first is {rows[0]}) are the same after every "
        "retraining, so that no example has an effect on them: their scores are 0."
    )
    return {**choices, "constant_queries": rows}
