"""Shapley values from sampled permutations: what an example adds to those before it in a random order."""

import dataclasses
import itertools
from typing import Any, ClassVar

import numpy as np

from hf_attribution.counterfactuals import Counterfactuals
from hf_attribution.estimation.base import Context, Estimated, Estimator, constant_queries, note_constant


@dataclasses.dataclass(frozen=True)
class Shapley(Estimator):
    """The mean marginal contribution of an example to those before it, over permutations that were trained along.

    From `Subsets.permutations(N, num_permutations, step)`: each training adds the next `step` examples of the order,
    which share their contribution equally. Two ends need a convention:

    - Nothing can be trained on no examples. With `empty_outputs` the first step of a permutation counts against
      them; without, the first steps are left out, and the value is over orders where others come before.
    - A permutation that stops early (`truncation`) is taken to gain nothing after that (Ghorbani & Zou 2019).

    Args:
        empty_outputs: `[Q]`, outputs of the untrained model.
    """

    empty_outputs: tuple[float, ...] | None = None

    name: ClassVar[str] = "shapley"
    paper: ClassVar[str] = "Ghorbani & Zou 2019, Data Shapley: Equitable valuation of data for machine learning"

    def estimate(self, counterfactuals: Counterfactuals, context: Context) -> Estimated:
        """Average the contributions.

        Args:
            counterfactuals: Outputs of models retrained along permutations.
            context: Not used.

        Returns:
            Values `[Q, N]`; in the choices `num_permutations`, `truncated` (whether they stop early), `first_step`
            ("left out" or "against empty_outputs"), and `constant_queries`, where there are any.

        Raises:
            ValueError: The subsets are not along permutations, `empty_outputs` are not one a query, or an example's
                contribution was never seen.
        """
        masks, outputs = counterfactuals.subsets.masks, counterfactuals.mean()
        empty = None if self.empty_outputs is None else np.asarray(self.empty_outputs, dtype=np.float64)
        if empty is not None and empty.shape != (len(outputs),):
            raise ValueError(
                f"empty_outputs must be one for each of the {len(outputs)} queries; there are {empty.size}."
            )
        chains = _chains(masks)
        whole = masks.all(axis=1)
        full = outputs[:, whole].mean(axis=1) if whole.any() else None
        total, times = np.zeros((len(outputs), masks.shape[1])), np.zeros(masks.shape[1])
        for chain in chains:
            steps = [(masks[row], outputs[:, row]) for row in chain]
            if full is not None:
                steps.append((np.ones(masks.shape[1], dtype=bool), full))
            if empty is not None:
                steps.insert(0, (np.zeros(masks.shape[1], dtype=bool), empty))
            for (before, low), (after, high) in itertools.pairwise(steps):
                added = after & ~before
                total[:, added] += (high - low)[:, None] / np.count_nonzero(added)
                times += added
            if full is None:
                times += ~steps[-1][0]
        if not times.all():
            raise ValueError(
                f"Training example {int(np.argmin(times))} is in the first step of every permutation, where nothing "
                "comes before it: retrain along more permutations, or give empty_outputs."
            )
        constant = constant_queries(outputs)
        choices: dict[str, Any] = {
            "num_permutations": len(chains),
            "truncated": full is None,
            "first_step": "left out" if empty is None else "against empty_outputs",
        }
        return Estimated(total / times, note_constant(choices, constant, self.name))


def _chains(masks: np.ndarray) -> list[list[int]]:
    """The rows of each permutation: each contains the one before. The whole set stands for itself.

    Returns:
        A list of rows for each permutation.

    Raises:
        ValueError: There are no such rows.
    """
    chains: list[list[int]] = []
    for row, mask in enumerate(masks):
        if mask.all():
            continue
        if chains and row == chains[-1][-1] + 1:
            before = masks[row - 1]
            if (before <= mask).all() and (before != mask).any():
                chains[-1].append(row)
                continue
        chains.append([row])
    lengths = [len(chain) for chain in chains]
    sizes = {np.count_nonzero(masks[chain[0]]) for chain in chains}
    if not chains or len(sizes) > 1 or (max(lengths) == 1 and not masks.all(axis=1).any()):
        raise ValueError(
            "Shapley values need subsets along permutations, each containing the one before: retrain on "
            "Subsets.permutations(N, num_permutations, step)."
        )
    return chains
