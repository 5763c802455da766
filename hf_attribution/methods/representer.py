"""Representer points: logits as a sum over training examples, exact for a last layer with an L2 penalty."""

import dataclasses
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from hf_attribution.errors import ConvergenceError, UnsupportedError
from hf_attribution.methods.base import Method, Scored
from hf_attribution.methods.representations import representations
from hf_attribution.problem import Problem

MAX_ITERATIONS = 2000


@dataclasses.dataclass(frozen=True)
class Representer(Method):
    """`g(query) · α(example) ⟨f(query), f(example)⟩` with hidden states f and the representer values α.

    The last layer is fitted anew, to the labels, from the hidden states that go into it, by mean cross-entropy plus
    `l2 |θ|²`: only at that minimum are the logits `Σ_i α_i ⟨f_i, f⟩`, with `α_i = (y_i - p_i) / (2 l2 N)`. The bias is
    the weight of a constant 1 among the states, and has the penalty too. g is the direction in the logits that raises
    the margin `log p / (1 - p)` of the query's label: the label's logit against the other classes' by their share.
    (Yeh et al. show the label's logit alone.) The model's own last layer is not looked at.

    Args:
        l2: Weight of the penalty. The paper's, for states of a convolutional network.
    """

    l2: float = 3e-3

    name: ClassVar[str] = "representer"
    paper: ClassVar[str] = "Yeh et al. 2018, Representer point selection for explaining deep neural networks"

    def __post_init__(self) -> None:
        if not self.l2 > 0:
            raise ValueError(f"l2 must be positive (without penalty there are no representer points), not {self.l2}.")

    def score(self, problem: Problem) -> Scored:
        """Fit the last layer, and take its sum apart."""
        query_labels, train_labels = (
            problem.task.labels(dataset) for dataset in (problem.query_dataset, problem.train_dataset)
        )
        if query_labels is None or train_labels is None:
            raise UnsupportedError(
                f"representer needs classes, and {problem.task.name} has none, or their column is not named "
                "'label' or 'labels': use another method."
            )
        targets, asked = torch.from_numpy(train_labels), torch.from_numpy(query_labels)
        num_classes = int(max(targets.max(), asked.max())) + 1

        def one_model(model: nn.Module, number: int) -> np.ndarray:
            query, train = (
                nn.functional.pad(
                    representations(model, problem.task, split, None, "mean").double(), (0, 1), value=1.0
                )
                for split in (problem.query, problem.train)
            )
            weights = fit_last_layer(train, targets, num_classes, self.l2)
            alphas = representer_values(train, targets, weights, self.l2)
            direction = _margin_direction(query @ weights, asked)
            return ((direction @ alphas.T) * (query @ train.T)).numpy()

        return Scored(problem.average(one_model))


def fit_last_layer(states: Tensor, targets: Tensor, num_classes: int, l2: float) -> Tensor:
    """Minimise `mean cross-entropy + l2 |θ|²`.

    Args:
        states: float64 `[N, d]`.
        targets: int64 `[N]`.
        num_classes: C.
        l2: Weight of the penalty.

    Returns:
        θ, `[d, C]`.

    Raises:
        ConvergenceError: If the minimum was not reached.
    """
    weights = torch.zeros(states.shape[1], num_classes, dtype=states.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=MAX_ITERATIONS, history_size=20, tolerance_grad=1e-9, tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(states @ weights, targets) + l2 * weights.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
        loss()
    residual = float(weights.grad.abs().max())  # type: ignore[union-attr]
    if not residual < 1e-6:
        raise ConvergenceError(
            f"The last layer's fit stopped at a gradient of {residual:.1e} after up to {MAX_ITERATIONS} iterations: "
            "raise l2."
        )
    return weights.detach()


def representer_values(states: Tensor, targets: Tensor, weights: Tensor, l2: float) -> Tensor:
    """What each example adds to the logits of a state like its own.

    Args:
        states: `[N, d]`.
        targets: int64 `[N]`.
        weights: `[d, C]`, the minimum of `fit_last_layer`.
        l2: Weight of the penalty.

    Returns:
        α, `[N, C]` (Yeh et al. 2018, theorem 3.1).
    """
    probabilities = (states @ weights).softmax(1)
    labels = nn.functional.one_hot(targets, weights.shape[1])
    return (labels - probabilities) / (2 * l2 * len(states))


def _margin_direction(logits: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the labels' margin in the logits, `[Q, C]`."""
    own = nn.functional.one_hot(labels, logits.shape[1])
    if logits.shape[1] == 1:  # one class and nothing against it
        return own.to(logits.dtype)
    return own - logits.masked_fill(own.bool(), -torch.inf).softmax(1)
