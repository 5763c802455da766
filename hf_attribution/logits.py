"""Functions of logits and targets, for targets of which some are to be ignored."""

import torch
from torch import Tensor

from hf_attribution.errors import MismatchError
from hf_attribution.seeds import generator

IGNORE_INDEX = -100


def refuse_unknown_classes(targets: Tensor, num_classes: int) -> None:
    """Refuse targets outside the classes.

    Args:
        targets: Classes, of any shape; -100 is ignored.
        num_classes: How many the model has.

    Raises:
        MismatchError: If there are any.
    """
    unknown = targets[(targets != IGNORE_INDEX) & ((targets < 0) | (targets >= num_classes))]
    if len(unknown):
        raise MismatchError(
            f"A label is {int(unknown[0])} but the model has {num_classes} classes, 0 to {num_classes - 1}: "
            f"set `num_labels`, or leave out rows without a label ({IGNORE_INDEX} on a token ignores it)."
        )


def token_sum(values: Tensor, targets: Tensor) -> Tensor:
    """Sum over the last dimension, without the positions whose target is ignored."""
    return values.masked_fill(targets == IGNORE_INDEX, 0.0).sum(-1)


def picked(scores: Tensor, targets: Tensor) -> Tensor:
    """The entry of each target: `[..., C]` and `[...]` give `[...]`."""
    return scores.gather(-1, targets.clamp(min=0)[..., None])[..., 0]


def margins(logits: Tensor, targets: Tensor) -> Tensor:
    """The log-odds of the target against all other classes: `log p / (1 - p)`, without forming `1 - p`."""
    index = targets.clamp(min=0)[..., None]
    others = logits.scatter(-1, index, float("-inf")).logsumexp(-1)
    return logits.gather(-1, index)[..., 0] - others


def sampled_classes(logits: Tensor, targets: Tensor, seeds: Tensor) -> Tensor:
    """Classes drawn from the model's distribution, the same for an example whatever it is padded with.

    Args:
        logits: `[B, T, C]`.
        targets: `[B, T]`; the ignored ones are ignored in the draw, too.
        seeds: A seed for each example, `[B]`.

    Returns:
        `[B, T]`.
    """
    kept = targets != IGNORE_INDEX
    draws = [
        torch.rand(count, generator=generator(seed), dtype=torch.float64)
        for seed, count in zip(seeds.tolist(), kept.sum(1).tolist(), strict=True)
    ]
    distribution = logits[kept].softmax(-1).cumsum(-1)
    thresholds = torch.cat(draws).to(distribution) * distribution[:, -1]
    drawn = torch.searchsorted(distribution, thresholds[:, None], right=True)[:, 0]
    return targets.masked_scatter(kept, drawn.clamp(max=logits.shape[-1] - 1))
