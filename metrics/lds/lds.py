# ruff: noqa: TID252 - evaluate copies the files that a metric imports relatively, and no others, into its cache.
"""Linear datamodeling score (LDS): how well a data attribution predicts retraining."""

from typing import Any

import datasets
import evaluate

from .lds_core import compute_lds

_DESCRIPTION = """\
The linear datamodeling score (LDS) says how well a data attribution predicts what models retrained on other
subsets of the training data would say: for each query, Spearman's rank correlation over subsets between the
predicted outputs (sums of attribution scores over the subset) and the outputs of the retrained models; then
the mean over queries. With covariates of the subsets, such as how many examples of each class a subset holds,
the partial LDS is the same correlation of what is left of both sides when the covariates are regressed out.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of list of float): a row per query, a column per subset: the outputs that the
        attribution predicts, `scores @ masks.T`.
    references (list of list of float): the same shape: the outputs of the models retrained on the subsets,
        averaged over their seeds.
    covariates (list of list of float, optional): a row per subset, a column per covariate. An intercept is
        always added; collinear and constant columns are fine. Needs 3 subsets more than columns.
    confidence_level (float): of the intervals. Defaults to 0.95.
    num_resamples (int): bootstrap resamples of the subsets. Defaults to 1000.
    seed (int): of the bootstrap. Defaults to 0.

Returns:
    lds (float): mean over the queries whose correlation is defined; nan if there is none.
    lds_per_query (list of float): nan where one of the two rows is constant.
    confidence_interval (tuple of two floats): for the LDS over new queries and new subsets.
    p_values (list of float): per query, two-sided, of no rank correlation.
    share_significant (float): share of the defined queries with p < 0.05.
    num_undefined (int): queries left out of the mean.
    partial_lds, partial_lds_per_query, partial_confidence_interval, partial_num_undefined: the same of the
        residuals, with `covariates` only. Undefined too where the covariates explain a row exactly.

Examples:
    >>> import evaluate
    >>> lds = evaluate.load("lds")
    >>> predictions = [[0.1, 0.4, 0.2, 0.9, 0.7], [0.3, 0.1, 0.5, 0.2, 0.4]]
    >>> references = [[1.0, 2.5, 2.0, 4.0, 3.0], [2.0, 1.0, 1.5, 3.0, 2.5]]
    >>> results = lds.compute(predictions=predictions, references=references)
    >>> round(results["lds"], 3), [round(rho, 3) for rho in results["lds_per_query"]]
    (0.55, [1.0, 0.1])
    >>> flipped = [[-value for value in row] for row in references]
    >>> lds.compute(predictions=flipped, references=references)["lds"]
    -1.0
"""

_CITATION = """\
@inproceedings{park2023trak,
  title = {{TRAK}: Attributing Model Behavior at Scale},
  author = {Park, Sung Min and Georgiev, Kristian and Ilyas, Andrew and Leclerc, Guillaume and
    Madry, Aleksander},
  booktitle = {International Conference on Machine Learning},
  year = {2023}
}
@inproceedings{ilyas2022datamodels,
  title = {Datamodels: Predicting Predictions from Training Data},
  author = {Ilyas, Andrew and Park, Sung Min and Engstrom, Logan and Leclerc, Guillaume and
    Madry, Aleksander},
  booktitle = {International Conference on Machine Learning},
  year = {2022}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class LDS(evaluate.Metric):
    """Spearman's correlation of predicted with true outputs of retrained models, mean over queries."""

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": row, "references": row}),
            license="Apache-2.0",
            reference_urls=["https://arxiv.org/abs/2303.14186", "https://arxiv.org/abs/2202.00622"],
        )

    def _compute(
        self,
        predictions: list[list[float]],
        references: list[list[float]],
        covariates: Any = None,
        confidence_level: float = 0.95,
        num_resamples: int = 1000,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Compute the score; see the description of the inputs.

        Args:
            predictions: `[Q, M]`.
            references: `[Q, M]`.
            covariates: `[M, K]`, if any.
            confidence_level: of the intervals.
            num_resamples: bootstrap resamples of the subsets.
            seed: of the bootstrap.

        Returns:
            The numbers listed in the description.
        """
        return compute_lds(predictions, references, covariates, confidence_level, num_resamples, seed)
