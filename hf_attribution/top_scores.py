"""The largest scores of each query alone: what remains of attribution where all scores are too many to keep."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hf_attribution.artefacts import first_non_finite, freeze
from hf_attribution.errors import MismatchError, NonFiniteError
from hf_attribution.rows import TabularArtefact, from_rows, ranked_rows, to_rows
from hf_attribution.seals import plain_json

if TYPE_CHECKING:
    import datasets

    from hf_attribution.hub.card import AttributionCardData


@dataclass(frozen=True, eq=False, repr=False)
class TopScores(TabularArtefact):
    """For each query the k training examples that raise its output most, with their scores.

    Attributes:
        indices: int64 `[Q, k]`, positions in the training set, the largest score first; of equal scores the lower
            position.
        values: float32 `[Q, k]`, their scores.
        num_examples: N, how many training examples were scored.
        method: The name of the method.
        settings: The method's settings; JSON.
        provenance: What the scores came from, as in `Scores`.

    Raises:
        ValueError: The arrays are not `[Q, k]`, or an index is not of a training example.
        NonFiniteError: A score is NaN or infinite.

    Example:
        >>> import numpy as np
        >>> top = TopScores(np.array([[7, 2]]), np.array([[3.0, 1.5]]), num_examples=10, method="trak")
        >>> top
        TopScores(trak, 1 query, the top 2 of 10 training examples)
        >>> top.top(k=1)[:]
        {'query': [0], 'rank': [1], 'train_index': [7], 'score': [3.0]}
    """

    kind: ClassVar[str] = "top_scores"

    indices: np.ndarray
    values: np.ndarray
    num_examples: int
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        indices, values = freeze(np.asarray(self.indices), np.int64), freeze(np.asarray(self.values), np.float32)
        if values.ndim != 2 or not values.size or indices.shape != values.shape:
            raise ValueError(f"TopScores are [queries, k] indices and values, not {indices.shape} and {values.shape}.")
        if indices.min() < 0 or indices.max() >= self.num_examples:
            raise ValueError(f"TopScores.indices must be of the {self.num_examples} training examples, from 0.")
        where = first_non_finite(values)
        if where is not None:
            raise NonFiniteError(f"The score of query row {where[0]} and rank {where[1] + 1} is {values[where]}.")
        object.__setattr__(self, "indices", indices)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "settings", plain_json(self.settings, "TopScores.settings"))
        object.__setattr__(self, "provenance", plain_json(self.provenance, "TopScores.provenance"))

    def __repr__(self) -> str:
        num_queries, k = self.values.shape
        queries = "1 query" if num_queries == 1 else f"{num_queries} queries"
        return f"TopScores({self.method}, {queries}, the top {k} of {self.num_examples} training examples)"

    def top(self, k: int = 10, train_dataset: datasets.Dataset | None = None) -> datasets.Dataset:
        """The training examples that raise each query's output most, as `Scores.top` gives them.

        Args:
            k: How many for each query, at most as many as were kept.
            train_dataset: The training set; its columns are joined to the rows.

        Returns:
            A row for each query and rank: `query`, `rank` (from 1), `train_index`, `score`, and the columns of
            `train_dataset`.

        Raises:
            ValueError: `k` is less than 1, or more than were kept.
            MismatchError: `train_dataset` has not N rows.
        """
        if not 1 <= k <= self.values.shape[1]:
            raise ValueError(f"k={k}: the top {self.values.shape[1]} of each query were kept.")
        if train_dataset is not None and len(train_dataset) != self.num_examples:
            raise MismatchError(
                f"The scores are for {self.num_examples} training examples and train_dataset has "
                f"{len(train_dataset)}: pass the dataset that was attributed."
            )
        return ranked_rows(self.indices[:, :k], self.values[:, :k], train_dataset)

    def to_dataset(self) -> datasets.Dataset:
        """Return a row a query: `query`, `train_indices` and `scores` (lists of k)."""
        columns = {"query": np.arange(len(self.values)), "train_indices": self.indices, "scores": self.values}
        return to_rows(self.kind, columns, self._pack()[1], title=repr(self))

    @classmethod
    def from_dataset(cls, dataset: datasets.Dataset) -> TopScores:
        """Return what `to_dataset` was given, also after Parquet or the Hub, or raise `ArtefactError`."""
        columns, metadata = from_rows(dataset, cls.kind)
        return cls._unpack({"indices": columns["train_indices"], "values": columns["scores"]}, metadata)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        top_k: int = 10,
        train_dataset: datasets.Dataset | None = None,
        query_dataset: datasets.Dataset | None = None,
        card_data: AttributionCardData | None = None,
    ) -> str:
        """Push to a dataset repository on the Hub: tables that its viewer shows, and a card, in one commit or none.

        Configuration `top` (the default) has a row for each query and rank, `top_scores` a row a query.

        Args:
            repo_id: `"user/name"`, or `"name"` for your own. It is made if it is missing.
            private: Whether a new repository is private; an existing one that is not as it is said is refused.
            revision: The branch, by default the main one. It is made if it is missing.
            token: A token that may write; by default that of `hf auth login` or HF_TOKEN.
            top_k: How many training examples of each query `top` shows, of those that were kept.
            train_dataset: The training set. The columns of these examples are published; `select_columns` chooses.
            query_dataset: The queries, likewise, as columns `query_...`.
            card_data: What only you know: licence, language, models and datasets that are not from the Hub.

        Returns:
            The URL of the commit.

        Raises:
            HubError: No token, a repository that holds something else or is public and should be private, no network.
            ArtefactError: The card was edited so that it cannot be read, or the repository is of a newer schema.
            MismatchError: A dataset has another number of rows.
        """
        from hf_attribution.hub.access import Place
        from hf_attribution.hub.push import push_top_scores

        place = Place(repo_id, revision, token)
        return push_top_scores(self, place, private, card_data, top_k, train_dataset, query_dataset)

    def _pack(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        metadata = {
            "num_examples": self.num_examples,
            "method": self.method,
            "settings": self.settings,
            "provenance": self.provenance,
        }
        return {"indices": self.indices, "values": self.values}, metadata

    @classmethod
    def _unpack(cls, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> TopScores:
        return cls(arrays["indices"], arrays["values"], **metadata)
