# ruff: noqa: TID252 - evaluate copies the files that a metric imports relatively, and no others, into its cache.
"""Brittleness: how few examples must be removed from the training data to flip predictions."""

from typing import Any

import datasets
import evaluate

from .brittleness_core import compute_brittleness

_DESCRIPTION = """\
How few training examples must be removed, and the model retrained, until a prediction flips, if a data attribution
names them, against random removal: the share of predictions that a removed set of a size flips, the median size of
the smallest such set, and how often it is smaller than by chance.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of float): for each query the size of the smallest set of examples, as the attribution orders
        them, whose removal flips its prediction; nan where none of up to `max_size` examples does.
    references (list of float): the same, where the order is random.
    max_size (int): the largest size that was tried.
    sizes (list of int, optional): where the share of flipped predictions is read off. Defaults to powers of two.
    confidence_level (float): of the intervals. Defaults to 0.95.

Returns:
    sizes (list of int): where the shares are read off.
    share_flipped (list of float): share of the queries that are flipped by removing so many examples, or fewer.
    confidence_intervals (list of tuples of two floats): of these, for new queries.
    random_share_flipped (list of float): the same by random removal.
    median_size (float): removing so many flips at least half of the queries; nan if no size up to `max_size` does.
    random_median_size (float): the same by random removal.
    share_smaller (float): share of the queries whose set is smaller than the random one, ties counting half.
    share_smaller_confidence_interval (tuple of two floats): of it, for new queries; by chance it is about 0.5.
    num_flipped, random_num_flipped (int): queries flipped at all.

Examples:
    >>> import evaluate
    >>> brittleness = evaluate.load("brittleness")
    >>> nan = float("nan")
    >>> results = brittleness.compute(predictions=[3, 1, 8, nan], references=[nan, 5, nan, nan], max_size=8)
    >>> results["share_flipped"], results["median_size"], results["share_smaller"]
    ([0.25, 0.25, 0.5, 0.75], 3.0, 0.875)
"""

_CITATION = """\
@inproceedings{ilyas2022datamodels,
  title = {Datamodels: Predicting Predictions from Training Data},
  author = {Ilyas, Andrew and Park, Sung Min and Engstrom, Logan and Leclerc, Guillaume and
    Madry, Aleksander},
  booktitle = {International Conference on Machine Learning},
  year = {2022}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Brittleness(evaluate.Metric):
    """Share of predictions flipped as a function of the size of the removed set, against random removal."""

    def _info(self) -> evaluate.MetricInfo:
        size = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": size, "references": size}),
            license="Apache-2.0",
            reference_urls=["https://arxiv.org/abs/2202.00622"],
        )

    def _compute(
        self,
        predictions: list[float],
        references: list[float],
        max_size: int,
        sizes: Any = None,
        confidence_level: float = 0.95,
    ) -> dict[str, Any]:
        """Compute the shares; see the description of the inputs.

        Args:
            predictions: `[Q]`.
            references: `[Q]`.
            max_size: the largest size that was tried.
            sizes: where the shares are read off.
            confidence_level: of the intervals.

        Returns:
            The numbers listed in the description.
        """
        return compute_brittleness(predictions, references, max_size, sizes, confidence_level)
