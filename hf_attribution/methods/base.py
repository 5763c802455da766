"""What an attribution method is: a frozen dataclass of settings with one method, `score`."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import nn

from hf_attribution.curvature.parts import Layout
from hf_attribution.errors import UnsupportedError
from hf_attribution.gradients.layers import last_linear
from hf_attribution.gradients.stored import StoredScores
from hf_attribution.problem import Problem


class Scored(NamedTuple):
    """What a method returns.

    Args:
        values: float32 `[Q, N]`.
        choices: What its automatic settings chose, and what it found out on the way; JSON.
        used_subsets: Keys of the subsets whose trainings fed it, which `evaluate_lds` refuses to score it on.
    """

    values: np.ndarray
    choices: dict[str, Any] = {}  # noqa: RUF012 (an empty default that nobody writes to)
    used_subsets: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of all methods. A method's fields are its settings; they travel with the scores.

    To add a method, write one file with a subclass that defines `name` and `score`, and name it in
    `hf_attribution.methods.METHODS`. Scores are positive where including the example raises the measured output.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    needs_checkpoints: ClassVar[bool] = False
    needs_run: ClassVar[bool] = False
    needs_trainings: ClassVar[bool] = False

    def score(self, problem: Problem) -> Scored:
        """Score all training examples for all queries.

        Args:
            problem: Model, task, data.

        Returns:
            Values `[Q, N]` and what was chosen automatically.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no score.")

    def stored_scores(self, problem: Problem) -> StoredScores:
        """The scores as products with stored features, for `attribute_top`.

        Args:
            problem: Model, task, data.

        Returns:
            What gives the scores in blocks.

        Raises:
            UnsupportedError: If the scores are no such products.
        """
        raise UnsupportedError(
            f"The scores of {self.name} with these settings are no products with stored gradients: use 'trak', "
            "'logra', 'trackstar', or 'grad_dot', 'grad_cos', 'tracin' or 'influence' with a dim, or take all scores "
            "with `attribute(...).top(k)`."
        )

    def self_influence(self, problem: Problem) -> np.ndarray:
        """What every training example does for itself: its score for its own gain, minus its own loss.

        Args:
            problem: Model, task, training data; the queries are left alone.

        Returns:
            float32 `[N]`: the diagonal of the scores of the training examples as queries, without the others.

        Raises:
            UnsupportedError: If the method compares no gradients.
        """
        raise UnsupportedError(
            f"{self.name} gives no example an influence on itself: use a method that compares gradients, for example "
            "'influence', 'trak' or 'grad_dot'."
        )

    def part_scores(self, problem: Problem, granularity: str) -> tuple[Layout, Scored]:
        """Score parts of all training examples for all queries.

        Args:
            problem: Model, task, data.
            granularity: `"module"` or `"token"`.

        Returns:
            What the K parts are, and values `[Q, K]` that add up to the examples' scores.

        Raises:
            UnsupportedError: If the scores are no sums over modules and tokens.
        """
        raise UnsupportedError(
            f"The scores of {self.name} with these settings are no sums over {granularity}s: use a method that "
            "multiplies whole gradients, such as 'ekfac' or 'grad_dot' with dim=None, or score examples."
        )

    def settled(self, problem: Problem) -> "Method":
        """The method with those automatic settings fixed that depend on how much data there is."""
        return self

    def shape(self, problem: Problem) -> tuple[int, int]:
        """The shape of the scores, `[Q, N]`; a method that scores the sum of all queries has one row."""
        return problem.shape

    @property
    def settings(self) -> dict[str, Any]:
        """The settings by name, as JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class GradientMethod(Method):
    """Base of the methods that compare gradients: of all parameters, or of some.

    Args:
        modules: Patterns (`fnmatch`) of the modules whose parameters count; all by default.
        last_layer: Only the parameters of the last linear layer count.
    """

    modules: tuple[str, ...] | None = dataclasses.field(default=None, kw_only=True)
    last_layer: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.last_layer and self.modules is not None:
            raise ValueError("Give either last_layer=True or modules=[...].")

    def modules_of(self, model: nn.Module) -> Sequence[str] | None:
        """Patterns of the modules of a model whose parameters count; `None` for all."""
        return (last_linear(model),) if self.last_layer else self.modules


@dataclasses.dataclass(frozen=True)
class ProductMethod(GradientMethod):
    """Base of the methods whose scores are inner products of gradients, exact or projected.

    Args:
        dim: Project the gradients to this dimension; exact by default.
        seed: Seed of the projection.
        modules: Patterns (`fnmatch`) of the modules whose parameters count; all by default.
        last_layer: Only the parameters of the last linear layer count.
    """

    dim: int | None = None
    seed: int = 0

    def products(self, problem: Problem, model: nn.Module, normalize: bool = False) -> np.ndarray:
        """Inner products, or cosines, of the gradients of queries and training examples for one model: `[Q, N]`."""
        return problem.products(model, self.modules_of(model), self.dim, self.seed, normalize)

    def squared_lengths(self, problem: Problem, model: nn.Module) -> np.ndarray:
        """Squared lengths of the training examples' gradients for one model: `[N]`."""
        return problem.squared_lengths(model, self.modules_of(model), self.dim, self.seed)


def positive_damping(damping: float | str, auto: float) -> float:
    """A damping as a number.

    Args:
        damping: The number, or `"auto"`.
        auto: What `"auto"` stands for.

    Returns:
        The number.

    Raises:
        ValueError: If it is not positive.
    """
    if damping == "auto":
        return auto
    if not float(damping) > 0:
        raise ValueError(f"damping must be positive (the curvature can be singular), not {damping}.")
    return float(damping)
