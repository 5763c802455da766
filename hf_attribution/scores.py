"""Attribution scores: what each training example does to each query, and what follows for any subset."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hf_attribution.artefacts import first_non_finite, freeze
from hf_attribution.counterfactuals import Subsets
from hf_attribution.errors import MismatchError, NonFiniteError
from hf_attribution.notebook import html_view
from hf_attribution.provenance import merge_provenance
from hf_attribution.rows import TabularArtefact, from_rows, ranked_rows, to_rows
from hf_attribution.seals import plain_json

if TYPE_CHECKING:
    from pathlib import Path

    import datasets

    from hf_attribution.counterfactuals import Counterfactuals
    from hf_attribution.hub.card import AttributionCardData


@dataclass(frozen=True, eq=False, repr=False)
class Scores(TabularArtefact):
    """One score for each query and training example: what *including* it adds to the measured output.

    Rows and columns are positions in the datasets that were passed in. The array is not copied if it is
    float32, but seen through a read-only view: do not write to it afterwards. Compare artefacts by
    `fingerprint`.

    Attributes:
        values: float32 `[Q, N]`.
        method: The name of the method, as in `METHODS`.
        settings: The method's settings; JSON.
        provenance: What the scores came from: `fingerprints` of model, train, query and task; `seconds`;
            `used_subsets`, the keys of the subsets whose retrainings fed the method; `choices`, what
            automatic settings chose; JSON.

    Raises:
        TypeError: `values` are not real numbers, or settings or provenance are not JSON.
        ValueError: `values` is not `[Q, N]` or holds nothing.
        NonFiniteError: A score is NaN or infinite.

    Example:
        >>> import numpy as np
        >>> scores = Scores(np.array([[3.0, -1.0, 2.0]]), method="grad_dot")
        >>> scores
        Scores(grad_dot, 1 query x 3 training examples)
        >>> scores.top(k=2)[:]
        {'query': [0, 0], 'rank': [1, 2], 'train_index': [0, 2], 'score': [3.0, 2.0]}
        >>> scores.predict(Subsets.leave_one_out(3)).tolist()
        [[1.0, 5.0, 2.0]]
    """

    kind: ClassVar[str] = "scores"

    values: np.ndarray
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = np.asarray(self.values)
        if values.dtype.kind not in "fiu":
            raise TypeError(f"Scores.values must be real numbers; their type is {values.dtype}.")
        if values.ndim != 2 or not values.size:
            raise ValueError(f"Scores.values must be [queries, training examples]; their shape is {values.shape}.")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is named below
            values = freeze(values, np.float32)
        where = first_non_finite(values)
        if where is not None:
            raise NonFiniteError(
                f"The score of query row {where[0]} and train column {where[1]} is {values[where]}. "
                "Look for a gradient that is not finite in one of the two examples, or raise the damping."
            )
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "settings", plain_json(self.settings, "Scores.settings"))
        object.__setattr__(self, "provenance", plain_json(self.provenance, "Scores.provenance"))

    def __repr__(self) -> str:
        num_queries, num_examples = self.values.shape
        queries = "1 query" if num_queries == 1 else f"{num_queries} queries"
        return f"Scores({self.method}, {queries} x {num_examples} training examples)"

    def _repr_html_(self) -> str:
        shown = min(3, self.values.shape[1])
        rows = [
            [query, *(f"{i} ({row[i]:+.3g})" for end in (row, -row) for i in largest(end, shown).tolist())]
            for query, row in enumerate(self.values[:5])
        ]
        names = [f"{kind} {rank + 1}" for kind in ("helpful", "harmful") for rank in range(shown)]
        facts = {
            "settings": self.settings,
            "measured": self.provenance.get("measurement"),
            "seconds": self.provenance.get("seconds"),
            "scores": f"{self.values.min():.4g} to {self.values.max():.4g}",
        }
        return html_view(repr(self), facts, ["query", *names], rows)

    def predict(self, subsets: Subsets) -> np.ndarray:
        """Predict the output of each query after training on each subset: the sum of the subset's scores.

        Up to a constant for each query. Summed in float64, in blocks: the values are never copied whole.

        Args:
            subsets: M subsets of the N training examples.

        Returns:
            float64 `[Q, M]`, what the metric takes as predictions.

        Raises:
            MismatchError: The subsets are of another number of training examples.
        """
        num_queries, num_examples = self.values.shape
        if subsets.num_examples != num_examples:
            raise MismatchError(
                f"The scores are for {num_examples} training examples and the subsets are of "
                f"{subsets.num_examples}: use subsets of the training set that was attributed."
            )
        predictions = np.zeros((num_queries, len(subsets)))
        for queries in _blocks(num_queries, 1024):
            for examples in _blocks(num_examples, 4096):
                values = self.values[queries, examples].astype(np.float64)
                for rows in _blocks(len(subsets), 1024):
                    predictions[queries, rows] += values @ subsets.masks[rows, examples].astype(np.float64).T
        return predictions

    def top(self, k: int = 10, train_dataset: datasets.Dataset | None = None) -> datasets.Dataset:
        """The training examples that raise each query's output most.

        Args:
            k: How many for each query; all of them where there are fewer.
            train_dataset: The training set; its columns are joined to the rows, as they are (images stay
                images). A column that bears one of our names gets the prefix `train_`.

        Returns:
            A row for each query and rank: `query`, `rank` (from 1), `train_index`, `score`, and the columns
            of `train_dataset`. Of equal scores the lower train index comes first.

        Raises:
            ValueError: `k` is less than 1.
            MismatchError: `train_dataset` has not N rows.
        """
        return self._extremes(k, train_dataset, sign=1)

    def bottom(self, k: int = 10, train_dataset: datasets.Dataset | None = None) -> datasets.Dataset:
        """Return the training examples that lower each query's output most, lowest first; else as `top`."""
        return self._extremes(k, train_dataset, sign=-1)

    def report(
        self,
        path: str | os.PathLike[str],
        train_dataset: datasets.Dataset,
        query_dataset: datasets.Dataset,
        **options: Any,
    ) -> Path:
        """Write one HTML page that shows the scores beside the data, and what retrained models say of them.

        Args:
            path: The `.html` file to write.
            train_dataset: The N training rows.
            query_dataset: The Q query rows.
            **options: As for `hf_attribution.write_report`: `counterfactuals`, `others`, `self_influence`, `tokens`,
                `k` and more.

        Returns:
            The file.
        """
        # The page stands above the artefacts, and is reached as users reach it: by the package's face.
        face = importlib.import_module("hf_attribution")
        return face.write_report(self, path, train_dataset, query_dataset, **options)

    def _extremes(self, k: int, train_dataset: datasets.Dataset | None, sign: int) -> datasets.Dataset:
        num_examples = self.values.shape[1]
        if k < 1:
            raise ValueError(f"k={k}: ask for at least 1 training example a query.")
        if train_dataset is not None and len(train_dataset) != num_examples:
            raise MismatchError(
                f"The scores are for {num_examples} training examples and train_dataset has "
                f"{len(train_dataset)}: pass the dataset that was attributed."
            )
        k = min(k, num_examples)
        chosen = np.stack([largest(sign * row, k) for row in self.values])
        return ranked_rows(chosen, np.take_along_axis(self.values, chosen, axis=1), train_dataset)

    @classmethod
    def mean(cls, members: Sequence[Scores]) -> Scores:
        """Average the scores of several models, checkpoints or methods: an ensemble.

        Args:
            members: Scores of the same shape for the same data and task.

        Returns:
            Their mean, with the members' methods and settings in `settings["mean_of"]`, the sum of their
            `seconds` and the union of their `used_subsets`.

        Raises:
            ValueError: There are no members.
            MismatchError: Shapes differ, or the fingerprints of train, query or task.

        Example:
            >>> import numpy as np
            >>> one, two = (Scores(np.full((1, 2), value), method="trak") for value in (1.0, 2.0))
            >>> Scores.mean([one, two]).values.tolist()
            [[1.5, 1.5]]
        """
        if not members:
            raise ValueError("There are no scores to average.")
        shape = members[0].values.shape
        for number, member in enumerate(members):
            if member.values.shape != shape:
                raise MismatchError(
                    f"Scores 0 are [queries, training examples] = {list(shape)} and scores {number} are "
                    f"{list(member.values.shape)}: average only scores for the same data."
                )
        provenance = merge_provenance([member.provenance for member in members], shared=("train", "query", "task"))
        values = np.empty(shape, dtype=np.float32)
        for row in range(len(values)):  # one row at a time: no second copy in float64
            values[row] = np.mean([member.values[row] for member in members], axis=0, dtype=np.float64)
        methods = list(dict.fromkeys(member.method for member in members))
        mean_of = [
            {"method": member.method, "settings": member.settings, "fingerprint": member.fingerprint}
            for member in members
        ]
        return cls(values, methods[0] if len(methods) == 1 else "mean", {"mean_of": mean_of}, provenance)

    def to_dataset(self) -> datasets.Dataset:
        """Return a row a query: `query`, `scores` (a list of N float32)."""
        columns = {"query": np.arange(len(self.values)), "scores": self.values}
        return to_rows(self.kind, columns, self._pack()[1], title=repr(self))

    @classmethod
    def from_dataset(cls, dataset: datasets.Dataset) -> Scores:
        """Return what `to_dataset` was given, also after Parquet or the Hub, or raise `ArtefactError`."""
        columns, metadata = from_rows(dataset, cls.kind)
        return cls._unpack({"values": columns["scores"]}, metadata)

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
        counterfactuals: Counterfactuals | None = None,
        card_data: AttributionCardData | None = None,
    ) -> str:
        """Push to a dataset repository on the Hub: tables that its viewer shows, and a card, in one commit or none.

        Configuration `top` (the default) has a row for each query and rank, `bottom` likewise, `scores` a row a query.
        To push again is to go on where an upload was cut, to replace other scores, or to do nothing; what was written
        into the card by hand stays.

        Args:
            repo_id: `"user/name"`, or `"name"` for your own. It is made if it is missing.
            private: Whether a new repository is private; an existing one that is not as it is said is refused.
            revision: The branch, by default the main one. It is made if it is missing.
            token: A token that may write; by default that of `hf auth login` or HF_TOKEN.
            top_k: How many training examples of each query `top` and `bottom` show.
            train_dataset: The training set. The columns of these examples are published; `select_columns` chooses.
            query_dataset: The queries, likewise, as columns `query_...`.
            counterfactuals: Retrainings to measure the LDS by, which the card tells with its protocol.
            card_data: What only you know: licence, language, models and datasets that are not from the Hub.

        Returns:
            The URL of the commit.

        Raises:
            HubError: No token, a repository that holds something else or is public and should be private, no network.
            ArtefactError: The card was edited so that it cannot be read, or the repository is of a newer schema.
            MismatchError: A dataset has another number of rows, or the counterfactuals are of other data.
        """
        from hf_attribution.evaluation import evaluate_lds
        from hf_attribution.hub.access import Place
        from hf_attribution.hub.push import push_scores

        report = None if counterfactuals is None else evaluate_lds(self, counterfactuals, train_dataset)
        place = Place(repo_id, revision, token)
        return push_scores(self, place, private, card_data, top_k, train_dataset, query_dataset, report)

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        queries: slice | None = None,
    ) -> Scores:
        """Fetch what `push_to_hub` pushed, or only the rows of some queries.

        Args:
            repo_id: The dataset repository, `"user/name"`.
            revision: Branch, tag or commit; by default the main branch.
            token: A token for private repositories; by default that of `hf auth login` or HF_TOKEN.
            queries: Which queries, by position: their rows alone are read, over the network. Damage is noticed by
                checksums; the fingerprint of the whole cannot be compared. Their numbers are kept in the provenance,
                and the fingerprint of the query dataset, which they are not, is left out.

        Returns:
            The scores.

        Raises:
            HubError: There is no such repository, or it is not for you, or the Hub could not be reached.
            ArtefactError: It holds something else, of a newer schema, or not what was pushed.
            IndexError: `queries` holds none.
        """
        if queries is None:
            return super().from_hub(repo_id, revision=revision, token=token)
        from hf_attribution.hub.access import Place
        from hf_attribution.hub.tables import read_rows

        columns, metadata, rows = read_rows(Place(repo_id, revision, token), cls.kind, "query", queries)
        fingerprints = dict(metadata["provenance"].get("fingerprints", {}))
        fingerprints.pop("query", None)
        provenance = {**metadata["provenance"], "fingerprints": fingerprints}
        provenance["queries"] = [rows.start, rows.stop, rows.step]
        return cls._unpack({"values": columns["scores"]}, {**metadata, "provenance": provenance})

    def _pack(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        metadata = {"method": self.method, "settings": self.settings, "provenance": self.provenance}
        return {"values": self.values}, metadata

    @classmethod
    def _unpack(cls, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> Scores:
        return cls(arrays["values"], metadata["method"], metadata["settings"], metadata["provenance"])


def _blocks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


def largest(row: np.ndarray, k: int) -> np.ndarray:
    """Return the positions of the k largest of `[N]`, largest first, of equals the lower position first."""
    smallest = np.partition(row, len(row) - k)[len(row) - k]
    above, equal = np.flatnonzero(row > smallest), np.flatnonzero(row == smallest)
    chosen = np.concatenate([above, equal[: k - len(above)]])
    return chosen[np.argsort(-row[chosen], kind="stable")] if k > 1 else chosen
