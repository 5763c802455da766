# ruff: noqa: TID252 - evaluate copies the files that a metric imports relatively, and no others, into its cache.
"""Recall at k and mean reciprocal rank: how well a data attribution finds the known sources of queries."""

from typing import Any

import datasets
import evaluate

from .recall_at_k_core import compute_recall_at_k

_DESCRIPTION = """\
How well a data attribution finds the training examples that a query is known to come from (a duplicate, a paraphrase,
the document that states a fact): the share of them among its k highest scores, and the mean reciprocal rank (MRR) of
the first, with intervals for new queries.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of list of int): a row per query: positions of training examples, highest score first. The
        first so many are enough, at least the largest k.
    references (list of list of int): a row per query: positions of the examples that are its sources, at least one.
    k (int or list of int): how many of the highest scores are looked at. Defaults to 1, 5 and 10.
    confidence_level (float): of the intervals. Defaults to 0.95.

Returns:
    recall_at_k (dict of int to float): mean over queries of the share of the sources that is among the first k.
    recall_confidence_intervals (dict of int to tuple of two floats): of these, for new queries.
    mrr (float): mean over queries of 1 / the rank of the first source, 0 where none is among the examples given.
    mrr_confidence_interval (tuple of two floats): of it.
    reciprocal_rank_per_query (list of float): one for each query.

Examples:
    >>> import evaluate
    >>> recall = evaluate.load("recall_at_k")
    >>> results = recall.compute(predictions=[[4, 2, 7], [1, 0, 5]], references=[[2], [1, 9]], k=[1, 3])
    >>> results["recall_at_k"], results["mrr"]
    ({1: 0.25, 3: 0.75}, 0.75)
"""

_CITATION = """\
@inproceedings{akyurek2022tracing,
  title = {Towards Tracing Knowledge in Language Models Back to the Training Data},
  author = {Aky{\\"u}rek, Ekin and Bolukbasi, Tolga and Liu, Frederick and Xiong, Binbin and Tenney, Ian and
    Andreas, Jacob and Guu, Kelvin},
  booktitle = {Findings of the Association for Computational Linguistics: EMNLP},
  year = {2022}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RecallAtK(evaluate.Metric):
    """Recall at k and mean reciprocal rank of known sources, mean over queries."""

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": row, "references": row}),
            license="Apache-2.0",
            reference_urls=["https://arxiv.org/abs/2205.11482"],
        )

    def _compute(
        self,
        predictions: list[list[int]],
        references: list[list[int]],
        k: Any = (1, 5, 10),
        confidence_level: float = 0.95,
    ) -> dict[str, Any]:
        """Compute the scores; see the description of the inputs.

        Args:
            predictions: Q rankings.
            references: Q lists of sources.
            k: a number, or several.
            confidence_level: of the intervals.

        Returns:
            The numbers listed in the description.
        """
        return compute_recall_at_k(predictions, references, k, confidence_level)
