"""BM25: which training texts a search engine finds for the query. It has never seen the model."""

import dataclasses
import re
from typing import Any, ClassVar

import numpy as np

from hf_attribution.errors import UnsupportedError
from hf_attribution.methods.base import Method, Scored
from hf_attribution.problem import Problem


@dataclasses.dataclass(frozen=True)
class BM25(Method):
    """Okapi BM25 relevance of the training text to the query text, by `bm25s` (`pip install hf-attribution[text]`).

    Args:
        column: The column with the text, whose lower-cased words are the terms. By default `text`, or the one column
            of strings; where there is none, the tokens in `input_ids` are the terms.
        k1: Saturation of a term's count.
        b: How far long texts are discounted.
    """

    column: str | None = None
    k1: float = 1.5
    b: float = 0.75

    name: ClassVar[str] = "bm25"
    paper: ClassVar[str] = "Robertson & Zaragoza 2009, The probabilistic relevance framework: BM25 and beyond"

    def score(self, problem: Problem) -> Scored:
        """Index the training texts, and look up every query."""
        column = self.column if self.column is not None else text_column(problem.train_dataset)
        query, train = (_terms(dataset, column) for dataset in (problem.query_dataset, problem.train_dataset))
        try:
            import bm25s
        except ImportError as error:
            raise ImportError("bm25 needs the package bm25s: pip install hf-attribution[text].") from error
        values = np.zeros(problem.shape, dtype=np.float32)
        if any(train):
            index = bm25s.BM25(method="lucene", k1=self.k1, b=self.b)
            index.index(train, show_progress=False)
            known = {term for terms in train for term in terms}
            for row, terms in enumerate(query):
                found = [term for term in terms if term in known]
                if found:
                    values[row] = index.get_scores(found)
        return Scored(values, {"column": column})


def text_column(dataset: Any) -> str:
    """The column that holds a dataset's texts, or their tokens.

    Args:
        dataset: A `datasets.Dataset`.

    Returns:
        Its name.

    Raises:
        UnsupportedError: If there is none, or several and none of them is named `text`.
    """
    features = getattr(dataset, "features", None) or {}
    texts = [
        name for name, feature in features.items() if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    if "text" in texts:
        return "text"
    if len(texts) == 1:
        return texts[0]
    if not texts and "input_ids" in features:
        return "input_ids"
    which = f"the columns {', '.join(texts)} hold strings" if texts else "no column holds strings, or is 'input_ids'"
    remedy = "say which with BM25(column=...)" if texts else "use another method, or keep a column of texts"
    raise UnsupportedError(f"bm25 compares texts, and {which}: {remedy}.")


def _terms(dataset: Any, column: str) -> list[list[str]]:
    """The terms of each row.

    Returns:
        A list of terms for each row.

    Raises:
        ValueError: If there is no such column, or it holds neither texts nor tokens.
    """
    if column not in (getattr(dataset, "column_names", None) or ()):
        raise ValueError(f"bm25: there is no column {column!r} in a dataset.")
    terms = []
    for row, value in enumerate(dataset.with_format(None)[column]):
        if isinstance(value, str):
            terms.append(re.findall(r"\w+", value.lower()))
        elif isinstance(value, list) and all(isinstance(token, int) for token in value):
            terms.append([str(token) for token in value])
        else:
            raise ValueError(
                f"bm25: column {column!r} must hold texts or lists of token ids; row {row} holds {value!r}."
            )
    return terms
