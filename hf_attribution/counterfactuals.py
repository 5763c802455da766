"""What the model says when it is trained on other subsets, and how far that is signal and how far noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hf_attribution.artefacts import first_non_finite, freeze
from hf_attribution.errors import MismatchError, NonFiniteError
from hf_attribution.notebook import html_view
from hf_attribution.provenance import merge_provenance
from hf_attribution.reliability import seed_agreement, spearman_brown
from hf_attribution.rows import TabularArtefact, from_rows, to_rows
from hf_attribution.seals import fingerprint, plain_json
from hf_attribution.subsets import Subsets

if TYPE_CHECKING:
    import datasets

    from hf_attribution.hub.card import AttributionCardData

__all__ = ["Counterfactuals", "Subsets"]


@dataclass(frozen=True, eq=False, repr=False)
class Counterfactuals(TabularArtefact):
    """The measured output of every query after training on every subset with every seed: the ground truth.

    The array is not copied if it is float32, but seen through a read-only view: do not write to it
    afterwards. Compare artefacts by `fingerprint`.

    Attributes:
        subsets: The M subsets that were trained on.
        outputs: float32 `[M, R, Q]`: R training seeds for each subset, Q queries.
        protocol: How the numbers came about, without which they mean little: `name` ("resampled" or "fixed"),
            `fraction`, `num_subsets`, `seeds`, `measurement`, `initial_weights`, `order`, `task`, `training`;
            JSON.
        provenance: What they came from: `fingerprints` of model, train, query and task, `seconds`; JSON.

    Raises:
        ValueError: `outputs` is not `[M, R, Q]` or holds nothing.
        MismatchError: There are not as many outputs as subsets.
        NonFiniteError: An output is NaN or infinite.

    Example:
        >>> import numpy as np
        >>> subsets = Subsets.random(num_examples=100, num_subsets=50)
        >>> signal, noise = subsets.masks[:, :4].sum(1), np.random.default_rng(0).normal(size=(50, 2, 3))
        >>> truth = Counterfactuals(subsets, signal[:, None, None] + noise)
        >>> truth
        Counterfactuals(50 subsets x 2 seeds x 3 queries)
        >>> truth.mean().shape
        (3, 50)
    """

    kind: ClassVar[str] = "counterfactuals"

    subsets: Subsets
    outputs: np.ndarray
    protocol: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        outputs = np.asarray(self.outputs)
        if outputs.ndim != 3 or not outputs.size:
            raise ValueError(
                f"Counterfactuals.outputs must be [subsets, seeds, queries]; its shape is {outputs.shape}."
            )
        if len(outputs) != len(self.subsets):
            raise MismatchError(
                f"There are outputs of {len(outputs)} subsets but {len(self.subsets)} subsets: "
                "give the subsets that were trained on, in their order."
            )
        outputs = freeze(outputs, np.float32)
        where = first_non_finite(outputs)
        if where is not None:
            subset, seed, query = where
            raise NonFiniteError(
                f"The output of query {query} is {outputs[where]} after training on subset {subset} with "
                f"seed {seed}: did that training diverge? Lower the learning rate, or leave the subset out."
            )
        object.__setattr__(self, "outputs", outputs)
        object.__setattr__(self, "protocol", plain_json(self.protocol, "Counterfactuals.protocol"))
        object.__setattr__(self, "provenance", plain_json(self.provenance, "Counterfactuals.provenance"))

    def __len__(self) -> int:
        return len(self.outputs)

    def __repr__(self) -> str:
        num_subsets, num_seeds, num_queries = self.outputs.shape
        name = f", {self.protocol['name']}" if "name" in self.protocol else ""
        return f"Counterfactuals({num_subsets} subsets x {num_seeds} seeds x {num_queries} queries{name})"

    def _repr_html_(self) -> str:
        outputs = self.mean()
        rows = [
            [query, float(row.mean()), float(row.std()), float(row.min()), float(row.max())]
            for query, row in enumerate(outputs[:5])
        ]
        facts = {**self.protocol, "seconds": self.provenance.get("seconds")}
        return html_view(repr(self), facts, ["query", "mean output", "std over subsets", "least", "most"], rows)

    def mean(self) -> np.ndarray:
        """Return the mean over the seeds: float64 `[Q, M]`, what the metric takes as references."""
        return np.ascontiguousarray(self.outputs.mean(axis=1, dtype=np.float64).T)

    def reliability(self, covariates: np.ndarray | None = None) -> np.ndarray:
        """How well the seed-averaged outputs would agree with those of as many other seeds, for each query.

        The Spearman correlation over the subsets, averaged over the pairs of seeds, and stepped up from one
        seed to the mean of R by the Spearman-Brown formula `R r / (1 + (R - 1) r)` (Spearman 1910, Brown
        1910). Estimated from few subsets it is itself noisy, and negative where the seeds contradict each
        other.

        Args:
            covariates: `[M, K]`, for example `subsets.counts(labels)`; regressed out of the outputs
                beforehand, with an intercept.

        Returns:
            float64 `[Q]`. NaN for a query whose outputs do not vary over the subsets (or only as the
            covariates do).

        Raises:
            ValueError: There is one seed, there are fewer than 3 subsets, or too many covariates for them.
            MismatchError: `covariates` has not one row for each subset.

        Example:
            >>> import numpy as np
            >>> outputs = np.random.default_rng(0).normal(size=(200, 1, 4)).repeat(2, axis=1)  # equal seeds
            >>> Counterfactuals(Subsets.random(100, 200), outputs).reliability().round(6).tolist()
            [1.0, 1.0, 1.0, 1.0]
        """
        return spearman_brown(seed_agreement(self.outputs, covariates), self.outputs.shape[1])

    def ceiling(self, covariates: np.ndarray | None = None) -> np.ndarray:
        """What a perfect prediction is expected to score against noisy outputs: the root of the reliability.

        Clipped to [0, 1] for each query, so that the average over the queries is biased where the estimates
        are noisy: to sum up use `mean_ceiling`. Arguments and errors are those of `reliability`.

        Returns:
            float64 `[Q]`.
        """
        return np.sqrt(np.clip(self.reliability(covariates), 0.0, 1.0))

    def mean_ceiling(self, covariates: np.ndarray | None = None) -> float:
        """One ceiling for all queries, from their average agreement.

        Averaged first, then stepped up, clipped and rooted: the noise of single queries averages out before
        the steps that are not linear, which bias `ceiling` where there are few subsets or little signal.
        (Where queries truly differ, this is a little above the average of their ceilings.) Arguments are
        those of `reliability`.

        Returns:
            The ceiling, between 0 and 1.

        Raises:
            ValueError: As for `reliability`, or no query's outputs vary.
        """
        agreement = seed_agreement(self.outputs, covariates)
        defined = agreement[~np.isnan(agreement)]
        if not len(defined):
            raise ValueError("No query's outputs vary over the subsets, so that there is no ceiling.")
        stepped_up = spearman_brown(defined.mean(keepdims=True), self.outputs.shape[1])
        return float(np.sqrt(np.clip(stepped_up, 0.0, 1.0))[0])

    def select(self, subset_indices: Sequence[int] | np.ndarray) -> Counterfactuals:
        """Return the subsets at these positions with their outputs, in this order, and their share of the seconds."""
        subsets = self.subsets.select(subset_indices)
        protocol = {**self.protocol, "num_subsets": len(subsets)}
        provenance = dict(self.provenance)
        if "seconds" in provenance:
            kept = [np.count_nonzero(each.masks) for each in (subsets, self.subsets)]  # a training costs by its rows
            provenance["seconds"] *= kept[0] / kept[1]
        return Counterfactuals(subsets, self.outputs[np.asarray(subset_indices)], protocol, provenance)

    @classmethod
    def concatenate(cls, parts: Sequence[Counterfactuals]) -> Counterfactuals:
        """Join retrainings on different subsets of the same training set, under the same protocol.

        Args:
            parts: What to join; `seconds` are summed.

        Returns:
            All their subsets and outputs, in order.

        Raises:
            ValueError: There is nothing to join, or a retraining occurs twice (it would count as two).
            MismatchError: Protocol, seeds, queries, training set, or the fingerprints of model, data or task
                differ.
        """
        if not parts:
            raise ValueError("There are no counterfactuals to join.")
        for number, part in enumerate(parts[1:], start=1):
            _check_joinable(parts[0], part, number)
        provenance = merge_provenance([part.provenance for part in parts], shared=("model", "train", "query", "task"))
        masks = np.concatenate([part.subsets.masks for part in parts])
        outputs = np.concatenate([part.outputs for part in parts])
        retrainings = [fingerprint(*pair) for pair in zip(masks, outputs, strict=True)]
        if len(set(retrainings)) < len(retrainings):
            twice = next(i for i, name in enumerate(retrainings) if name in retrainings[:i])
            raise ValueError(
                f"Subset {twice} of the joined ones is an earlier one with the same outputs: a retraining "
                "that counts twice makes intervals too narrow. Join each part once."
            )
        descriptions = [part.subsets.description for part in parts]
        same = all(description == descriptions[0] for description in descriptions)
        subsets = Subsets(masks, descriptions[0] if same else {"name": "joined", "parts": descriptions})
        protocol = {**parts[0].protocol, "num_subsets": len(subsets)}
        return cls(subsets, outputs, protocol, provenance)

    def to_dataset(self) -> datasets.Dataset:
        """Return a row a retraining: `subset`, `seed`, `mask` (list of N), `outputs` (list of Q)."""
        num_subsets, num_seeds, num_queries = self.outputs.shape
        columns = {
            "subset": np.arange(num_subsets).repeat(num_seeds),
            "seed": np.tile(np.arange(num_seeds), num_subsets),
            "mask": self.subsets.masks.repeat(num_seeds, axis=0),
            "outputs": self.outputs.reshape(-1, num_queries),
        }
        return to_rows(self.kind, columns, self._pack()[1], title=repr(self))

    @classmethod
    def from_dataset(cls, dataset: datasets.Dataset) -> Counterfactuals:
        """Return what `to_dataset` was given, also after Parquet or the Hub, or raise `ArtefactError`."""
        columns, metadata = from_rows(dataset, cls.kind)
        num_seeds = int(columns["seed"][-1]) + 1
        outputs = columns["outputs"].reshape(-1, num_seeds, columns["outputs"].shape[1])
        return cls._unpack({"masks": columns["mask"][::num_seeds], "outputs": outputs}, metadata)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        card_data: AttributionCardData | None = None,
    ) -> str:
        """Push to a dataset repository on the Hub: tables that its viewer shows, and a card, in one commit or none.

        The next person measures against it: `evaluate_lds(scores, Counterfactuals.from_hub(repo_id))`. Configuration
        `queries` (the default) has a row a query, `counterfactuals` a row a retraining.

        Args:
            repo_id: `"user/name"`, or `"name"` for your own. It is made if it is missing.
            private: Whether a new repository is private; an existing one that is not as it is said is refused.
            revision: The branch, by default the main one. It is made if it is missing.
            token: A token that may write; by default that of `hf auth login` or HF_TOKEN.
            card_data: What only you know: licence, models and datasets that are not from the Hub.

        Returns:
            The URL of the commit.

        Raises:
            HubError: No token, a repository that holds something else or is public and should be private, no network.
            ArtefactError: The card was edited so that it cannot be read, or the repository is of a newer schema.
        """
        from hf_attribution.hub.access import Place
        from hf_attribution.hub.push import push_counterfactuals

        return push_counterfactuals(self, Place(repo_id, revision, token), private, card_data)

    def _pack(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        description = {"description": self.subsets.description}
        metadata = {**description, "protocol": self.protocol, "provenance": self.provenance}
        return {"masks": self.subsets.masks, "outputs": self.outputs}, metadata

    @classmethod
    def _unpack(cls, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> Counterfactuals:
        subsets = Subsets(arrays["masks"], metadata["description"])
        return cls(subsets, arrays["outputs"], metadata["protocol"], metadata["provenance"])


def _check_joinable(first: Counterfactuals, part: Counterfactuals, number: int) -> None:
    protocols = [{**each.protocol, "num_subsets": None} for each in (first, part)]
    differing = [key for key in {**protocols[0], **protocols[1]} if protocols[0].get(key) != protocols[1].get(key)]
    sizes = [(each.subsets.num_examples, *each.outputs.shape[1:]) for each in (first, part)]
    if differing:
        key = differing[0]
        values = [protocol.get(key) for protocol in protocols]
        raise MismatchError(
            f"Parts 0 and {number} have different protocols: '{key}' is {values[0]!r} in one and "
            f"{values[1]!r} in the other. Only outputs under one protocol can be joined."
        )
    if sizes[0] != sizes[1]:
        raise MismatchError(
            f"Parts 0 and {number} differ in (training examples, seeds, queries): {sizes[0]} and {sizes[1]}. "
            "Only outputs for the same data and number of seeds can be joined."
        )
