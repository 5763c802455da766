"""Whether a training is near enough to linear in its examples' weights for its derivative to predict anything."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from hf_attribution.replay.optimizers import Optimizer
from hf_attribution.replay.sweep import Differentiable

logger = logging.get_logger(__name__)

# Above this share of second differences in first ones, linear predictions at that radius are poor.
ROUGH = 0.3

# Adam divides by √v + ε: with a smaller ε its steps turn with the sign of rounding errors where gradients vanish.
ROUGH_EPSILON = 1e-6


def random_removal(weights: Tensor, columns: Tensor, radius: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draw groups of examples to remove, at random, until they make up a share of all examples.

    Args:
        weights: The weights of the examples, `[N]`.
        columns: The number of each example's group, `[N]`; each may be its own.
        radius: The share of examples to remove. Of the last group only as much of its weight goes as is missing.
        seed: Of the choice.

    Returns:
        Changes of the weights, of each group `[G]` and of each example `[N]`.
    """
    sizes = columns.bincount()
    means = columns.bincount(weights.double()) / sizes
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(sizes)))
    before = sizes[order].cumsum(0) - sizes[order]
    share = torch.empty_like(means)
    share[order] = ((max(1, round(radius * len(weights))) - before) / sizes[order]).clamp(0, 1).double()
    of_groups = -share * means
    return of_groups, of_groups[columns]


def linearity(
    prepared: Differentiable,
    measure: Callable[[Tensor], Tensor],
    scores: Tensor,
    weights: Tensor | None,
    change: Tensor,
    of_examples: Tensor,
) -> dict[str, Any]:
    """Compare the linear prediction with 2 trainings: one with a change of the weights, and one with its opposite.

    Args:
        prepared: The run.
        measure: The queries' measurements as a function of the last parameters, `[Q]`.
        scores: The derivatives, `[Q, G]`.
        weights: Where they were taken; `None` for the recorded run.
        change: The change of each group's weight, `[G]`; see `random_removal`.
        of_examples: The same of each example's weight, `[N]`.

    Returns:
        `slope` and `correlation` of actual on predicted changes over queries; `second_difference`:
        `|m₊ + m₋ - 2m| / |m₊ - m₋|`. `None` where the changes have no variance.
    """
    base = prepared.replay(weights).example_weights.double()
    middle = measure(prepared.final(weights))
    without, more = (measure(prepared.final(base + sign * of_examples)) for sign in (1, -1))
    predicted, actual = scores.double() @ change, without - middle
    found: dict[str, Any] = {"slope": None, "correlation": None, "second_difference": None}
    if float(predicted.norm()) > 0:
        found["slope"] = float(predicted @ actual / predicted.square().sum())
    if len(predicted) > 1 and float(predicted.std()) > 0 and float(actual.std()) > 0:
        found["correlation"] = float(torch.corrcoef(torch.stack([predicted, actual]))[0, 1])
    if float((more - without).norm()) > 0:
        found["second_difference"] = float((more + without - 2 * middle).norm() / (more - without).norm())
    shown = ", ".join(f"{key} {value:.3g}" for key, value in found.items() if value is not None)
    share = float(-of_examples.sum() / base.sum())
    logger.info(f"The derivative against trainings without a random {share:.1%} of the examples: {shown}.")
    if found["second_difference"] is not None and found["second_difference"] > ROUGH:
        logger.warning(
            f"Removing {share:.1%} of the examples is not a small change to this training (second difference "
            f"{found['second_difference']:.2f} of the first): its derivative predicts little there. Average over "
            "masked runs with method='smoothed_unroll'."
        )
    return found


def adam_is_rough(optimizer: Optimizer) -> bool:
    """Whether Adam's ε is so small that derivatives are rough; a warning says so."""
    rough = optimizer.name != "SGD" and any(group.settings["eps"] < ROUGH_EPSILON for group in optimizer.groups)
    if rough:
        logger.warning(
            f"{optimizer.name} with an epsilon below {ROUGH_EPSILON:g} is rough where gradients nearly vanish: its "
            "derivative is right in a small neighbourhood only. adam_epsilon=1e-3 predicts much better, but trains "
            "otherwise."
        )
    return rough
