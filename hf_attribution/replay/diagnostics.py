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


def linearity(
    prepared: Differentiable,
    measure: Callable[[Tensor], Tensor],
    scores: Tensor,
    weights: Tensor | None,
    radius: float,
    seed: int,
) -> dict[str, Any]:
    """Compare the linear prediction with 2 trainings: one without random examples, and one with twice their weight.

    Args:
        prepared: The run.
        measure: The queries' measurements as a function of the last parameters, `[Q]`.
        scores: The derivatives, `[Q, N]`.
        weights: Where they were taken; `None` for the recorded run.
        radius: The share of examples that is removed.
        seed: Of their choice.

    Returns:
        `radius`; `slope` and `correlation` of actual on predicted changes over queries, for the removal;
        `second_difference`: `|m₊ + m₋ - 2m| / |m₊ - m₋|`. `None` where the changes have no variance.
    """
    base = prepared.replay(weights).example_weights.double()
    generator = np.random.default_rng(seed)
    removed = torch.from_numpy(generator.permutation(len(base))[: max(1, round(radius * len(base)))])
    direction = torch.zeros_like(base)
    direction[removed] = -base[removed]
    middle = measure(prepared.final(weights))
    without, twice = (measure(prepared.final(base + sign * direction)) for sign in (1, -1))
    predicted, actual = scores.double() @ direction, without - middle
    found: dict[str, Any] = {"radius": radius, "slope": None, "correlation": None, "second_difference": None}
    if float(predicted.norm()) > 0:
        found["slope"] = float(predicted @ actual / predicted.square().sum())
    if len(predicted) > 1 and float(predicted.std()) > 0 and float(actual.std()) > 0:
        found["correlation"] = float(torch.corrcoef(torch.stack([predicted, actual]))[0, 1])
    if float((twice - without).norm()) > 0:
        found["second_difference"] = float((twice + without - 2 * middle).norm() / (twice - without).norm())
    shown = ", ".join(f"{key} {value:.3g}" for key, value in found.items() if value is not None)
    logger.info(f"The derivative against trainings without a random {len(removed)} examples: {shown}.")
    if found["second_difference"] is not None and found["second_difference"] > ROUGH:
        logger.warning(
            f"Removing {radius:.0%} of the examples is not a small change to this training (second difference "
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
