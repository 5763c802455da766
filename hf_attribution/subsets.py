"""Subsets of a training set: drawn at random, by class, along permutations, or leaving one out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hf_attribution.artefacts import freeze
from hf_attribution.errors import MismatchError
from hf_attribution.notebook import html_view
from hf_attribution.rows import TabularArtefact, from_rows, to_rows
from hf_attribution.seals import fingerprint, plain_json

if TYPE_CHECKING:
    import datasets

    from hf_attribution.hub.card import AttributionCardData


# Drawn to be compared with the whole training set, which elsewhere is a row that nobody meant.
_WITH_WHOLE = ("whole", "leave_one_out", "permutations", "joined")


@dataclass(frozen=True, eq=False, repr=False)
class Subsets(TabularArtefact):
    """Subsets of a training set, one a row: which examples are trained on.

    The mask array is not copied (memory matters at 1,000 x 1,000,000) but seen through a read-only view: do
    not write to it afterwards. Compare artefacts by `fingerprint`.

    Attributes:
        masks: bool `[M, N]`, True where an example is kept.
        description: How they were drawn; JSON.

    Raises:
        TypeError: `masks` is not boolean.
        ValueError: It is not `[M, N]` with N of at least 2, or a subset is empty, or the whole set where it was
            not asked for.

    Example:
        >>> subsets = Subsets.random(num_examples=100, num_subsets=20, fraction=0.5, seed=0)
        >>> subsets
        Subsets(20 of 100 examples, fraction 0.5, random)
        >>> len(subsets.indices(3))
        50
    """

    kind: ClassVar[str] = "subsets"

    masks: np.ndarray
    description: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        masks = np.asarray(self.masks)
        if masks.dtype != np.bool_:
            raise TypeError(f"Subsets.masks must be bool, True where an example is kept; it is {masks.dtype}.")
        if masks.ndim != 2 or len(masks) < 1 or masks.shape[1] < 2:
            raise ValueError(
                f"Subsets.masks must be [subsets, examples] with at least 2 examples; its shape is {masks.shape}."
            )
        kept = np.count_nonzero(masks, axis=1)
        wrong = {0: "empty: nothing is left to train on"}
        if self.description.get("name") not in _WITH_WHOLE:
            wrong[masks.shape[1]] = "the whole training set"
        for count, name in wrong.items():
            if (kept == count).any():
                raise ValueError(f"Subset {int(np.argmax(kept == count))} is {name}. Leave it out.")
        object.__setattr__(self, "masks", freeze(masks, np.bool_))
        object.__setattr__(self, "description", plain_json(self.description, "Subsets.description"))

    @classmethod
    def random(cls, num_examples: int, num_subsets: int, fraction: float = 0.5, seed: int = 0) -> Subsets:
        """Draw subsets of exactly `round(fraction * num_examples)` examples, uniformly and independently.

        With the same seed the first subsets stay the same when `num_subsets` grows, so more can be added
        later.

        Args:
            num_examples: N, the length of the training set.
            num_subsets: M.
            fraction: The fraction kept.
            seed: Of the random numbers.

        Returns:
            The subsets.

        Raises:
            ValueError: The fraction keeps no example or all of them, or a number is too small.

        Example:
            >>> few, many = (Subsets.random(100, num_subsets) for num_subsets in (5, 50))
            >>> bool((few.masks == many.masks[:5]).all())
            True
        """
        size = _subset_size(num_examples, num_subsets, fraction)
        generator = np.random.default_rng(seed)
        masks = np.zeros((num_subsets, num_examples), dtype=bool)
        for mask in masks:
            mask[_smallest(generator.random(num_examples), size)] = True
        return cls(masks, {"name": "random", "fraction": fraction, "seed": seed})

    @classmethod
    def stratified(
        cls, labels: Sequence[Any] | np.ndarray, num_subsets: int, fraction: float = 0.5, seed: int = 0
    ) -> Subsets:
        """Draw subsets of exactly `round(fraction * N)` examples that keep the same fraction of every class.

        Where a class's share is no whole number it is rounded up or down by systematic sampling over the
        classes in
        random order: every class is within one of its share, the sizes add up, and on average each class, and
        each example, is kept equally often. As with `random`, the first subsets stay when `num_subsets`
        grows.

        Args:
            labels: `[N]`, the class of each training example; numbers or strings.
            num_subsets: M.
            fraction: The fraction kept.
            seed: Of the random numbers.

        Returns:
            The subsets.

        Raises:
            ValueError: As for `random`, or `labels` is not one-dimensional.

        Example:
            >>> labels = ["a"] * 60 + ["b"] * 40
            >>> Subsets.stratified(labels, num_subsets=3).counts(labels).tolist()
            [[30, 20], [30, 20], [30, 20]]
        """
        codes = _codes(labels)
        size = _subset_size(len(codes), num_subsets, fraction)
        members = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
        shares = np.array([len(rows) for rows in members]) * size  # in units of 1 / N, so that all is exact
        generator = np.random.default_rng(seed)
        masks = np.zeros((num_subsets, len(codes)), dtype=bool)
        for mask in masks:
            order, offset = generator.permutation(len(members)), generator.integers(len(codes))
            ends = (np.cumsum(shares[order]) + offset) // len(codes)
            keys = generator.random(len(codes))
            for group, count in zip(order, np.diff(ends, prepend=0), strict=True):
                rows = members[group]
                mask[rows[_smallest(keys[rows], count)]] = True
        return cls(masks, {"name": "stratified", "fraction": fraction, "seed": seed})

    @classmethod
    def independent(
        cls, num_examples: int, num_subsets: int, fractions: float | Sequence[float] = 0.5, seed: int = 0
    ) -> Subsets:
        """Draw subsets that hold each example independently: what Banzhaf values and AME are defined over.

        With several fractions each subset is drawn with one of them, at random, and drawn again while its size is
        nearer to another one's, so that the size tells the fraction. The first subsets stay when `num_subsets` grows.

        Args:
            num_examples: N, the length of the training set.
            num_subsets: M.
            fractions: The probability that a subset holds an example, or several to draw from.
            seed: Of the random numbers.

        Returns:
            The subsets.

        Raises:
            ValueError: A fraction is not between 0 and 1, or a number is too small.

        Example:
            >>> Subsets.independent(1000, 3, fractions=(0.2, 0.8), seed=1).masks.mean(axis=1).round(1).tolist()
            [0.2, 0.8, 0.2]
        """
        choices = np.atleast_1d(np.asarray(fractions, dtype=np.float64))
        for fraction in choices:
            _subset_size(num_examples, num_subsets, float(fraction))
        generator = np.random.default_rng(seed)
        masks = np.zeros((num_subsets, num_examples), dtype=bool)
        for mask in masks:
            fraction = generator.choice(choices)
            while not 0 < np.count_nonzero(mask) < num_examples or fraction != _nearest(choices, mask.mean()):
                mask[:] = generator.random(num_examples) < fraction
        description = {"name": "independent", "fraction": float(choices.mean()), "seed": seed}
        return cls(masks, description | {"fractions": choices.tolist()})

    @classmethod
    def permutations(
        cls, num_examples: int, num_permutations: int, step: int = 1, truncation: float = 1.0, seed: int = 0
    ) -> Subsets:
        """Draw random orders and take the first `step`, `2 step`, ... examples of each: for Shapley values.

        Args:
            num_examples: N, the length of the training set.
            num_permutations: Orders. The first ones stay when their number grows.
            step: Examples added at a time. `ceil(N / step) - 1` models are trained for each order.
            truncation: Stop an order at this share of the examples. At 1 the first row of all is the whole training
                set, where every order ends.
            seed: Of the random numbers.

        Returns:
            The subsets, order by order, each containing the one before.

        Raises:
            ValueError: A number is out of its range.

        Example:
            >>> Subsets.permutations(3, num_permutations=1).masks.astype(int).tolist()
            [[1, 1, 1], [0, 1, 0], [0, 1, 1]]
        """
        ends = np.arange(step, num_examples, step) if 0 < step < num_examples else np.array([], dtype=int)
        ends = ends[ends <= round(truncation * num_examples)]
        if num_permutations < 1 or not len(ends) or truncation > 1:
            raise ValueError(
                f"{num_permutations} permutations of {num_examples} examples by steps of {step} up to {truncation} of "
                "them hold no subset: give at least 1 permutation, and a step below N and the truncation, at most 1."
            )
        generator = np.random.default_rng(seed)
        ranks = np.stack([generator.permutation(num_examples) for _ in range(num_permutations)])
        masks = (ranks[:, None] < ends[:, None]).reshape(-1, num_examples)
        if truncation == 1:
            masks = np.concatenate([np.ones((1, num_examples), dtype=bool), masks])
        fraction = float(ends.mean() / num_examples)
        description = {"name": "permutations", "fraction": fraction, "seed": seed, "step": step}
        return cls(masks, description | {"truncation": truncation})

    @classmethod
    def whole(cls, num_examples: int) -> Subsets:
        """Leave nothing out: one "subset", the whole training set, to train on it again with other seeds.

        Args:
            num_examples: N, the length of the training set.

        Returns:
            The whole training set.

        Example:
            >>> Subsets.whole(3).masks.astype(int).tolist()
            [[1, 1, 1]]
        """
        return cls(np.ones((1, num_examples), dtype=bool), {"name": "whole", "fraction": 1.0})

    @classmethod
    def leave_one_out(
        cls, num_examples: int, indices: Sequence[int] | np.ndarray | None = None, include_whole: bool = False
    ) -> Subsets:
        """Leave out one example at a time.

        Args:
            num_examples: N, the length of the training set.
            indices: The examples to leave out, one subset for each; by default all.
            include_whole: Add the whole training set as the last row, to compare with.

        Returns:
            The subsets, in the order of `indices`.

        Raises:
            IndexError: An index is not a position in the training set.

        Example:
            >>> Subsets.leave_one_out(3).masks.astype(int).tolist()
            [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
        """
        left_out = np.arange(num_examples) if indices is None else np.asarray(indices, dtype=np.int64)
        outside = left_out[(left_out < 0) | (left_out >= num_examples)]
        if len(outside):
            raise IndexError(f"Example {outside[0]} is not in a training set of {num_examples}.")
        masks = np.ones((len(left_out) + include_whole, num_examples), dtype=bool)
        masks[np.arange(len(left_out)), left_out] = False
        return cls(masks, {"name": "leave_one_out"})

    def __len__(self) -> int:
        return len(self.masks)

    def __repr__(self) -> str:
        name = f", {self.description['name']}" if "name" in self.description else ""
        return f"Subsets({len(self)} of {self.num_examples} examples, fraction {self.fraction:.3g}{name})"

    def _repr_html_(self) -> str:
        kept = np.count_nonzero(self.masks, axis=1)
        sizes = f"{kept.min()} to {kept.max()} of {self.num_examples} examples"
        return html_view(repr(self), {**self.description, "sizes": sizes})

    @property
    def num_examples(self) -> int:
        """N, the length of the training set."""
        return self.masks.shape[1]

    @property
    def fraction(self) -> float:
        """The fraction of the training set that a subset keeps, on average over the subsets."""
        return np.count_nonzero(self.masks) / self.masks.size

    def indices(self, subset: int) -> np.ndarray:
        """Return the examples that one subset keeps, ascending; int64."""
        return np.flatnonzero(self.masks[subset]).astype(np.int64, copy=False)

    def keys(self) -> list[str]:
        """Return one name for each subset, by its content: the `fingerprint` of its mask."""
        return [fingerprint(mask) for mask in self.masks]

    def counts(self, groups: Sequence[Any] | np.ndarray) -> np.ndarray:
        """How many examples of each group (class, source, ...) each subset holds.

        Args:
            groups: `[N]`, the group of each training example; numbers or strings.

        Returns:
            int64 `[M, K]`, the groups in sorted order.

        Raises:
            MismatchError: There are not N of them.
        """
        codes = _codes(groups)
        if len(codes) != self.num_examples:
            raise MismatchError(f"There are {len(codes)} groups and {self.num_examples} examples: give one for each.")
        members = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
        return np.stack([np.count_nonzero(self.masks[:, rows], axis=1) for rows in members], axis=1)

    def select(self, subset_indices: Sequence[int] | np.ndarray) -> Subsets:
        """Return the subsets at these positions, in this order."""
        return Subsets(self.masks[np.asarray(subset_indices)], self.description)

    def to_dataset(self) -> datasets.Dataset:
        """Return a row a subset: `subset`, `mask` (a list of N booleans)."""
        arrays, metadata = self._pack()
        columns = {"subset": np.arange(len(self)), "mask": arrays["masks"]}
        return to_rows(self.kind, columns, metadata, title=repr(self))

    @classmethod
    def from_dataset(cls, dataset: datasets.Dataset) -> Subsets:
        """Return what `to_dataset` was given, also after Parquet or the Hub, or raise `ArtefactError`."""
        columns, metadata = from_rows(dataset, cls.kind)
        return cls._unpack({"masks": columns["mask"]}, metadata)

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

        Whoever retrains on the same subsets has outputs that can be compared.

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
        from hf_attribution.hub.push import push_subsets

        return push_subsets(self, Place(repo_id, revision, token), private, card_data)

    def _pack(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return {"masks": self.masks}, {"description": self.description}

    @classmethod
    def _unpack(cls, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> Subsets:
        return cls(arrays["masks"], metadata["description"])


def _codes(labels: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Return the number of each label in the sorted order of the classes: int64 `[N]`.

    Raises:
        ValueError: The labels are not one-dimensional.
    """
    values = np.asarray(labels)
    if values.ndim != 1:
        raise ValueError(f"Labels or groups must be one for each training example; their shape is {values.shape}.")
    return np.unique(values, return_inverse=True)[1]


def _subset_size(num_examples: int, num_subsets: int, fraction: float) -> int:
    if num_examples < 2 or num_subsets < 1:
        raise ValueError(f"{num_subsets} subsets of {num_examples} examples: at least 1 of at least 2 are needed.")
    size = round(fraction * num_examples)
    if not 0 < size < num_examples:
        raise ValueError(
            f"fraction={fraction} keeps {size} of {num_examples} examples; give one between "
            f"{1 / num_examples:.3g} and {1 - 1 / num_examples:.3g}, so that each subset "
            "keeps some examples and leaves some out."
        )
    return size


def _nearest(values: np.ndarray, value: float) -> float:
    return values[np.abs(values - value).argmin()]


def _smallest(keys: np.ndarray, count: int) -> np.ndarray:
    return np.argpartition(keys, count - 1)[:count]
