"""Direct estimation: scores from the outputs of retrained models, `estimate(counterfactuals, "datamodel")`.

Every estimator is a function of masks and outputs, so that one set of retrained models serves them all. They need no
gradients, no model and no data, only trainings, many: what one estimator makes of how many is measured by
`evaluate_lds` on subsets that were not fitted on (it refuses others).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_attribution.catalogue import Catalogue
from hf_attribution.counterfactuals import Counterfactuals
from hf_attribution.errors import MismatchError
from hf_attribution.estimation.ame import AME
from hf_attribution.estimation.banzhaf import Banzhaf
from hf_attribution.estimation.base import Context, Estimated, Estimator
from hf_attribution.estimation.datamodel import Datamodel
from hf_attribution.estimation.loo import LOO
from hf_attribution.estimation.shapley import Shapley
from hf_attribution.estimation.subsampled_influence import SubsampledInfluence
from hf_attribution.scores import Scores

if TYPE_CHECKING:
    import datasets

ESTIMATORS: Catalogue[Estimator] = Catalogue("estimator", (Datamodel, SubsampledInfluence, Banzhaf, AME, Shapley, LOO))


def get_estimator(method: str | Estimator, **settings: Any) -> Estimator:
    """An estimator by name, with settings.

    Args:
        method: A name in `ESTIMATORS`, or an estimator, whose settings are replaced.
        **settings: Fields of the estimator.

    Returns:
        The estimator.

    Raises:
        KeyError: There is none of that name; the message suggests the nearest.
        TypeError: It has no such setting; the message lists those it has.

    Example:
        >>> get_estimator("datamodel", penalty="ridge").penalty
        'ridge'
    """
    return ESTIMATORS.make(method, settings)


def estimate(
    counterfactuals: Counterfactuals,
    method: str | Estimator = "datamodel",
    held_out: Counterfactuals | None = None,
    train_dataset: datasets.Dataset | None = None,
    previous: Scores | None = None,
    **settings: Any,
) -> Scores:
    """Estimate scores from the outputs of retrained models.

    To go on with more subsets, join them, `Counterfactuals.concatenate([first, more])`, and estimate again with the
    scores so far as `previous`: the same scores, in less time.

    Args:
        counterfactuals: Outputs after training on M subsets.
        method: A name in `ESTIMATORS`, or an estimator with settings, `Datamodel(penalty="ridge")`.
        held_out: The outputs that the scores will be judged by, to hear now if they share a subset. (Without it,
            `evaluate_lds` refuses later.)
        train_dataset: The N training examples, where the estimator asks for a column: `group_column="label"`.
        previous: Scores that the same estimator made of some of these subsets. The LASSO and the elastic net start
            from them; the others, in closed form, have nothing to start.
        **settings: Fields of the estimator.

    Returns:
        `Scores` with values `[Q, N]`. Their `seconds` are those of the retrainings and of the fit; `used_subsets` are
        the keys of the subsets.

    Raises:
        MismatchError: A subset is also held out; what is held out is of another protocol or measurement; or
            `previous` are of another estimator, or of other subsets, examples or queries.

    Example:
        >>> subsets = Subsets.random(num_examples=20, num_subsets=200)
        >>> truth = np.random.default_rng(0).normal(size=(3, 20))
        >>> outputs = Counterfactuals(subsets, (subsets.masks @ truth.T)[:, None])
        >>> scores = estimate(outputs.select(range(150)), "datamodel", held_out=outputs.select(range(150, 200)))
        >>> scores
        Scores(datamodel, 3 queries x 20 training examples)
        >>> round(evaluate_lds(scores, outputs.select(range(150, 200))).lds, 2)
        1.0
    """
    estimator = get_estimator(method, **settings)
    keys = counterfactuals.subsets.keys()
    if held_out is not None:
        shared = set(keys) & set(held_out.subsets.keys())
        if shared:
            raise MismatchError(
                f"{len(shared)} of the {len(keys)} subsets to fit are also held out: split them first, "
                "counterfactuals.select(rows)."
            )
        for key in ("name", "measurement"):
            fitted, judged = (each.protocol.get(key) for each in (counterfactuals, held_out))
            if fitted != judged:
                raise MismatchError(
                    f"The outputs to fit and those held out are of different protocols: '{key}' is {fitted!r} and "
                    f"{judged!r}. Retrain both alike."
                )
    if previous is not None:
        _check_previous(previous, estimator, counterfactuals)
    started = time.perf_counter()
    values, choices = estimator.estimate(counterfactuals, Context(train_dataset, previous))
    seconds = time.perf_counter() - started
    provenance, protocol = counterfactuals.provenance, counterfactuals.protocol
    known = {name: provenance.get(name) for name in ("fingerprints", "columns", "sources")}
    known["measurement"] = protocol.get("measurement")
    return Scores(
        np.asarray(values, dtype=np.float32),
        estimator.name,
        estimator.settings,
        {
            **{key: value for key, value in known.items() if value is not None},
            "protocol": protocol,
            "used_subsets": keys,
            "choices": choices,
            "seconds": provenance.get("seconds", 0.0) + seconds,
            "fit_seconds": seconds,
        },
    )


def _check_previous(previous: Scores, estimator: Estimator, counterfactuals: Counterfactuals) -> None:
    """Refuse scores that are of something else."""
    if (previous.method, previous.settings) != (estimator.name, estimator.settings):
        raise MismatchError(
            f"The previous scores are of {previous.method} with {previous.settings}, and these of {estimator.name} "
            f"with {estimator.settings}: estimate without previous=."
        )
    shape = (counterfactuals.outputs.shape[2], counterfactuals.subsets.num_examples)
    fingerprints = counterfactuals.provenance.get("fingerprints"), previous.provenance.get("fingerprints")
    if previous.values.shape != shape or fingerprints[0] != fingerprints[1]:
        raise MismatchError(
            f"The previous scores are of other queries, examples or a different model ({previous.values.shape} there, "
            f"{shape} now): estimate without previous=."
        )
    absent = set(previous.provenance.get("used_subsets", ())) - set(counterfactuals.subsets.keys())
    if absent:
        raise MismatchError(
            f"{len(absent)} subsets of the previous scores are not among these {len(counterfactuals.subsets)}: join "
            "all, Counterfactuals.concatenate([first, more])."
        )


__all__ = [
    "AME",
    "ESTIMATORS",
    "LOO",
    "Banzhaf",
    "Datamodel",
    "Estimated",
    "Estimator",
    "Shapley",
    "SubsampledInfluence",
    "estimate",
    "get_estimator",
]
