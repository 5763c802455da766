"""What an attribution method is: a frozen dataclass of settings with one method, `score`."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import numpy as np

from hf_attribution.problem import Problem


class Scored(NamedTuple):
    """What a method returns: float32 values `[Q, N]`, and what its automatic settings chose."""

    values: np.ndarray
    choices: dict[str, Any] = {}  # noqa: RUF012 (an empty default that nobody writes to)


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of all methods. A method's fields are its settings; they travel with the scores.

    To add a method, write one file with a subclass that defines `name` and `score`, and name it in
    `hf_attribution.methods.METHODS`. Scores are positive where including the example raises the measured output.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    needs_checkpoints: ClassVar[bool] = False

    def score(self, problem: Problem) -> Scored:
        """Score all training examples for all queries.

        Args:
            problem: Model, task, data.

        Returns:
            Values `[Q, N]` and what was chosen automatically.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no score.")

    @property
    def settings(self) -> dict[str, Any]:
        """The settings by name, as JSON."""
        return dataclasses.asdict(self)
