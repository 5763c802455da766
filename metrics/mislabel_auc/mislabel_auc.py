# ruff: noqa: TID252 - evaluate copies the files that a metric imports relatively, and no others, into its cache.
"""Mislabel detection: how well scores rank the examples whose labels are wrong above the others."""

from typing import Any

import datasets
import evaluate

from .mislabel_auc_core import compute_mislabel_auc

_DESCRIPTION = """\
How well scores, such as each training example's influence on itself, find the examples whose labels are known to be
wrong: the area under the ROC curve with its interval, average precision, and the precision among the k examples
that are looked at first.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of float): a score for each example, higher where it is more suspicious.
    references (list of int): 1 where the example's label is wrong in truth, 0 where it is right.
    k (int or list of int, optional): how many of the highest scores are looked at for the precision at k. Defaults
        to the number of wrong labels.
    confidence_level (float): of the interval. Defaults to 0.95.

Returns:
    roc_auc (float): share of the pairs of a wrongly and a rightly labelled example that are ordered rightly, ties
        counting half; 0.5 by chance.
    confidence_interval (tuple of two floats): of the area, for new examples.
    average_precision (float): `share_flagged` by chance.
    precision_at_k (dict of int to float): share of wrong labels among the k highest scores.
    share_flagged (float): share of wrong labels among all.
    num_flagged (int): their number.

Examples:
    >>> import evaluate
    >>> mislabel_auc = evaluate.load("mislabel_auc")
    >>> results = mislabel_auc.compute(predictions=[0.9, 0.1, 0.8, 0.3, 0.7], references=[1, 0, 0, 0, 1], k=[1, 3])
    >>> round(results["roc_auc"], 3), results["precision_at_k"][1]
    (0.833, 1.0)
"""

_CITATION = """\
@inproceedings{pruthi2020estimating,
  title = {Estimating Training Data Influence by Tracing Gradient Descent},
  author = {Pruthi, Garima and Liu, Frederick and Kale, Satyen and Sundararajan, Mukund},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2020}
}
@article{delong1988comparing,
  title = {Comparing the Areas under Two or More Correlated Receiver Operating Characteristic Curves: A
    Nonparametric Approach},
  author = {DeLong, Elizabeth R. and DeLong, David M. and Clarke-Pearson, Daniel L.},
  journal = {Biometrics},
  year = {1988}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class MislabelAUC(evaluate.Metric):
    """Area under the ROC curve, average precision and precision at k of finding wrong labels."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
            license="Apache-2.0",
            reference_urls=["https://arxiv.org/abs/2002.08484", "https://www.jstor.org/stable/2531595"],
        )

    def _compute(
        self,
        predictions: list[float],
        references: list[int],
        k: Any = None,
        confidence_level: float = 0.95,
    ) -> dict[str, Any]:
        """Compute the scores; see the description of the inputs.

        Args:
            predictions: `[N]`.
            references: `[N]`.
            k: a number, or several.
            confidence_level: of the interval.

        Returns:
            The numbers listed in the description.
        """
        return compute_mislabel_auc(predictions, references, k, confidence_level)
