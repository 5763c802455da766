# ruff: noqa: TID252 - evaluate copies the files that a metric imports relatively, and no others, into its cache.
"""Leave-one-out correlation: how well a data attribution predicts the effect of leaving out one example."""

from typing import Any

import datasets
import evaluate

from .loo_correlation_core import compute_loo_correlation

_DESCRIPTION = """\
How well a data attribution predicts what leaving one example out of the training data does: for each query, the
correlation (Pearson's and Spearman's) over examples between the predicted effects, which are the scores, and the
true ones, from models retrained without each of the examples; then the mean over queries, with an interval for new
queries and new examples.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of list of float): a row per query, a column per example that was left out: the predicted
        effect of the example on the query, its score.
    references (list of list of float): the same shape: the true effect, what the models trained with the example
        say about the query minus what those trained without it say, averaged over seeds.
    confidence_level (float): of the intervals. Defaults to 0.95.

Returns:
    pearson (float): mean over the queries whose correlation is defined; nan if there is none.
    pearson_per_query (list of float): nan where one of the two rows is constant.
    pearson_confidence_interval (tuple of two floats): for new queries and new examples.
    spearman, spearman_per_query, spearman_confidence_interval: the same of ranks.
    num_undefined (int): queries left out of the means.

Examples:
    >>> import evaluate
    >>> loo = evaluate.load("loo_correlation")
    >>> predictions = [[0.1, 0.4, 0.2, 0.9, 0.7], [0.3, 0.1, 0.5, 0.2, 0.4]]
    >>> references = [[1.0, 2.5, 2.0, 4.0, 3.0], [2.0, 1.0, 1.5, 3.0, 2.5]]
    >>> results = loo.compute(predictions=predictions, references=references)
    >>> round(results["pearson"], 3), round(results["spearman"], 3)
    (0.532, 0.55)
"""

_CITATION = """\
@inproceedings{koh2017understanding,
  title = {Understanding Black-box Predictions via Influence Functions},
  author = {Koh, Pang Wei and Liang, Percy},
  booktitle = {International Conference on Machine Learning},
  year = {2017}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class LOOCorrelation(evaluate.Metric):
    """Correlation of predicted with true leave-one-out effects, mean over queries."""

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": row, "references": row}),
            license="Apache-2.0",
            reference_urls=["https://arxiv.org/abs/1703.04730"],
        )

    def _compute(
        self, predictions: list[list[float]], references: list[list[float]], confidence_level: float = 0.95
    ) -> dict[str, Any]:
        """Compute the correlations; see the description of the inputs.

        Args:
            predictions: `[Q, L]`.
            references: `[Q, L]`.
            confidence_level: of the intervals.

        Returns:
            The numbers listed in the description.
        """
        return compute_loo_correlation(predictions, references, confidence_level)
