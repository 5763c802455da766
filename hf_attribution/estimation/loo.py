"""Leave-one-out: what the output loses when one example is not trained on."""

import dataclasses
from typing import ClassVar

import numpy as np

from hf_attribution.counterfactuals import Counterfactuals
from hf_attribution.estimation.base import Context, Estimated, Estimator, constant_queries, note_constant


@dataclasses.dataclass(frozen=True)
class LOO(Estimator):
    """`m(all examples) - m(all but example i)`, means over the seeds.

    From `Subsets.leave_one_out(N, include_whole=True)`. Single examples change a model little: with fresh seeds most
    of a difference is noise of the training, and many seeds are needed.
    """

    name: ClassVar[str] = "loo"
    paper: ClassVar[str] = "Koh & Liang 2017, Understanding black-box predictions via influence functions"

    def estimate(self, counterfactuals: Counterfactuals, context: Context) -> Estimated:
        """Subtract the outputs without an example from those with all.

        Args:
            counterfactuals: Outputs of models retrained without each example, and on all of them.
            context: Not used.

        Returns:
            Values `[Q, N]`; in the choices `constant_queries`, where there are any.

        Raises:
            ValueError: An example is never left out alone, the whole training set was not trained on, or a subset
                leaves out several.
        """
        masks, outputs = counterfactuals.subsets.masks, counterfactuals.mean()
        left_out = np.count_nonzero(~masks, axis=1)
        draw = "retrain on Subsets.leave_one_out(N, include_whole=True)."
        if (left_out > 1).any():
            subset = int(np.argmax(left_out > 1))
            raise ValueError(f"Subset {subset} leaves out {left_out[subset]} examples, not one: {draw}")
        if not (left_out == 0).any():
            raise ValueError(f"What the model says when it is trained on all of the data is not there: {draw}")
        single = left_out == 1
        times = np.count_nonzero(~masks[single], axis=0)
        if not times.all():
            raise ValueError(f"Training example {int(np.argmin(times))} is in every subset, never left out: {draw}")
        whole = outputs[:, ~single].mean(axis=1, keepdims=True)
        constant = constant_queries(outputs)
        # An example that was left out several times counts with the mean.
        values = whole - outputs[:, single] @ (~masks[single] / times)
        values[constant] = 0
        return Estimated(values, note_constant({}, constant, self.name))
