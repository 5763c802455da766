"""The mathematics of finding flagged examples by their scores, on plain arrays: numpy and scipy, nothing else.

Letters: N examples.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit, logit
from scipy.stats import norm, rankdata


def compute_mislabel_auc(
    predictions: np.ndarray | Sequence[float],
    references: np.ndarray | Sequence[Any],
    k: int | Sequence[int] | None = None,
    confidence_level: float = 0.95,
) -> dict[str, Any]:
    """How well scores rank the flagged examples above the others.

    Args:
        predictions: scores `[N]`, higher where the example is more suspicious.
        references: flags `[N]`, 1 where it is mislabelled in truth.
        k: numbers of top examples for `precision_at_k`; by default that of the flagged ones.
        confidence_level: of the interval, between 0 and 1.

    Returns:
        The numbers listed in the metric's description, as Python floats, ints, tuples and dictionaries.

    Raises:
        ValueError: scores are not finite, a flag is missing, or there are not both kinds of examples.
    """
    if not 0 < confidence_level < 1:
        raise ValueError(f"confidence_level must lie between 0 and 1, got {confidence_level}")
    scores, flags = _scores(predictions), _flags(references)
    if len(scores) != len(flags):
        raise ValueError(f"there are {len(scores)} predictions and {len(flags)} references: give one flag for each")
    num_flagged, num_examples = int(flags.sum()), len(flags)
    if num_flagged in (0, num_examples):
        which = "none" if num_flagged == 0 else "all"
        raise ValueError(f"{which} of the {num_examples} examples are flagged: there is nothing to tell apart")
    ks = [num_flagged] if k is None else [int(each) for each in np.atleast_1d(k)]
    for each in ks:
        if not 1 <= each <= num_examples:
            raise ValueError(f"k must lie between 1 and the {num_examples} examples, got {each}")
    auc, interval = roc_auc(scores, flags, confidence_level)
    return {
        "roc_auc": auc,
        "confidence_interval": interval,
        "average_precision": average_precision(scores, flags),
        "precision_at_k": {each: precision_at(scores, flags, each) for each in ks},
        "share_flagged": num_flagged / num_examples,
        "num_flagged": num_flagged,
    }


def roc_auc(scores: np.ndarray, flags: np.ndarray, confidence_level: float) -> tuple[float, tuple[float, float]]:
    """Return the area under the ROC curve and its interval, by DeLong, DeLong and Clarke-Pearson (1988).

    The area is the share of pairs of a flagged and another example that the scores order rightly, ties counting
    half. The interval is symmetric on the logit scale; of a perfect (or perfectly wrong) order it is a point.
    """
    flagged, others = scores[flags], scores[~flags]
    ranks = rankdata(scores)
    # For each flagged example the share of others below it, and for each other the share of flagged ones above.
    below = (ranks[flags] - rankdata(flagged)) / len(others)
    above = 1 - (ranks[~flags] - rankdata(others)) / len(flagged)
    auc = float(below.mean())
    if auc in (0.0, 1.0):
        return auc, (auc, auc)
    variance = sum(side.var(ddof=1) / len(side) for side in (below, above) if len(side) > 1)
    half = norm.ppf(0.5 + confidence_level / 2) * np.sqrt(variance) / (auc * (1 - auc))
    return auc, (float(expit(logit(auc) - half)), float(expit(logit(auc) + half)))


def average_precision(scores: np.ndarray, flags: np.ndarray) -> float:
    """Return the mean of the precision over the flagged examples, each at its own threshold; ties share one."""
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(flags[order])
    last_of_tie = np.append(np.diff(scores[order]) != 0, True)
    found, taken = found[last_of_tie], np.flatnonzero(last_of_tie) + 1
    return float(np.sum(np.diff(found, prepend=0) * found / taken) / flags.sum())


def precision_at(scores: np.ndarray, flags: np.ndarray, k: int) -> float:
    """Return the share of flagged examples among the k highest; of ties at the border what a random draw gives."""
    border = np.partition(scores, len(scores) - k)[len(scores) - k]
    above, tied = scores > border, scores == border
    drawn = (k - above.sum()) * flags[tied].mean()
    return float((flags[above].sum() + drawn) / k)


def _scores(values: np.ndarray | Sequence[float]) -> np.ndarray:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or not scores.size:
        raise ValueError(f"predictions must be one score for each example; their shape is {scores.shape}")
    if not np.isfinite(scores).all():
        row = int(np.argmin(np.isfinite(scores)))
        raise ValueError(f"predictions row {row} is not finite: {scores[row]}")
    return scores


def _flags(values: np.ndarray | Sequence[Any]) -> np.ndarray:
    """Return the flags as booleans.

    Raises:
        ValueError: one is missing or not 0 or 1; the message names the row.
    """
    flags = np.asarray(values, dtype=object)
    if flags.ndim != 1:
        raise ValueError(f"references must be one flag for each example; their shape is {flags.shape}")
    for row, flag in enumerate(flags):
        if flag is None or flag not in (0, 1):
            raise ValueError(
                f"references row {row} is {flag}: every example needs a flag, 1 where its label is wrong and 0 where "
                "it is right"
            )
    return flags.astype(bool)
