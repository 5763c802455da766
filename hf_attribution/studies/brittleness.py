"""Brittleness: the fewest examples, as scores order them, without which the model predicts something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from torch import Tensor, nn

from hf_attribution.artefacts import Artefact, freeze
from hf_attribution.errors import UnsupportedError
from hf_attribution.metric_cache import metric_core
from hf_attribution.scores import Scores
from hf_attribution.seeds import derive_seed
from hf_attribution.studies.bisection import smallest_flipping
from hf_attribution.studies.removal import RemovalRuns, check_same_data, check_shape, study_folder
from hf_attribution.tasks import Classification, infer_task
from hf_attribution.trainer import AttributionMixin

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, eq=False)
class Brittleness(Artefact):
    """How few examples flip each prediction, in the order of the scores and in a random one.

    Attributes:
        method: Whose scores.
        max_size: The largest set that was tried.
        correct: bool `[Q]`, whether the label is predicted when nothing is removed; of the others nothing is known.
        smallest: float64 `[Q]`, the size of the smallest set of top-scored examples that flips the prediction; NaN
            where none does, or the prediction is wrong from the start.
        random_smallest: float64 `[Q]`, the same of random sets.
        flip_rate: float64 `[Q]`, share of new training seeds under which the set found flips the prediction: what the
            sizes are worth. NaN where none was found.
        random_flip_rate: float64 `[Q]`, the same for as many random examples.
    """

    kind: ClassVar[str] = "brittleness"

    method: str
    max_size: int
    correct: np.ndarray
    smallest: np.ndarray
    random_smallest: np.ndarray
    flip_rate: np.ndarray
    random_flip_rate: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "correct", freeze(self.correct, np.bool_))
        for name in ("smallest", "random_smallest", "flip_rate", "random_flip_rate"):
            object.__setattr__(self, name, freeze(getattr(self, name), np.float64))

    def summary(self, sizes: Sequence[int] | None = None) -> dict[str, Any]:
        """Return the numbers of the metric `brittleness`, of the queries predicted correctly, at these sizes."""
        pair = self.smallest[self.correct], self.random_smallest[self.correct]
        return metric_core("brittleness").compute_brittleness(*pair, self.max_size, sizes)

    def to_dataset(self) -> datasets.Dataset:
        """Return a row for each query: `query`, `correct`, the two sizes and the two flip rates."""
        import datasets

        columns = {name: array for name, array in self._pack()[0].items() if name != "correct"}
        return datasets.Dataset.from_dict(
            {"query": np.arange(len(self.correct)), "correct": self.correct.tolist(), **columns}
        )

    def __str__(self) -> str:
        numbers = self.summary()
        found = np.isfinite(self.smallest)
        lines = [
            f"Brittleness by {self.method}: {int(self.correct.sum())} of {len(self.correct)} queries are predicted "
            f"correctly; at most {self.max_size} examples are removed"
        ]
        columns = zip(
            numbers["sizes"], numbers["share_flipped"], numbers["confidence_intervals"],
            numbers["random_share_flipped"], strict=True,
        )  # fmt: skip
        for size, share, (low, high), by_chance in columns:
            lines.append(f"  without {size:>5}: {share:.2f} [{low:.2f}, {high:.2f}] flip, random sets {by_chance:.2f}")
        if found.any():
            lines.append(
                f"  under new seeds the sets found flip {self.flip_rate[found].mean():.2f}, random sets of "
                f"their sizes {self.random_flip_rate[found].mean():.2f}"
            )
        return "\n".join(lines)

    def _pack(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        names = ("correct", "smallest", "random_smallest", "flip_rate", "random_flip_rate")
        return {name: getattr(self, name) for name in names}, {"method": self.method, "max_size": self.max_size}

    @classmethod
    def _unpack(cls, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> Brittleness:
        return cls(metadata["method"], metadata["max_size"], **arrays)


def brittleness(
    scores: Scores,
    trainer: AttributionMixin,
    query_dataset: Any = None,
    max_share: float = 0.1,
    seeds: int = 3,
    seed: int = 0,
    output_dir: str | Path | None = None,
) -> Brittleness:
    """Find for each query the smallest set of its top-scored examples whose removal flips its prediction.

    By bisection, all queries of a round together: a prediction is flipped where most of R retrainings without the set
    predict another class. Bisection picks sets that were lucky, so those it found are tried again under R new seeds,
    beside random sets of their sizes (Ilyas et al. 2022, Datamodels, section 4.2). Costs about `Q R log2(max_size)`
    trainings; random sets are shared by all queries. Resumes where it stopped.

    Args:
        scores: Scores `[Q, N]`.
        trainer: Trains a classifier.
        query_dataset: The Q queries; by default the trainer's `eval_dataset`.
        max_share: The largest share of the training data to remove.
        seeds: R, trainings for each set; an odd number has no ties.
        seed: Base of all random seeds.
        output_dir: Where retrainings are kept; by default in `args.output_dir`, named after scores and settings.

    Returns:
        The sizes found and how they held under new seeds.

    Raises:
        ValueError: `max_share` removes nothing or everything, or no query is predicted correctly.
        UnsupportedError: The model is no classifier.
        MismatchError: The scores are not for these queries and this training data.

    Example:
        >>> found = brittleness(scores, trainer, test.select(range(20)))  # doctest: +SKIP
        >>> print(found)  # doctest: +SKIP
    """
    num_queries, num_examples = scores.values.shape
    max_size = round(max_share * num_examples)
    if not 1 <= max_size < num_examples:
        raise ValueError(
            f"max_share={max_share} removes up to {max_size} of {num_examples} examples: allow at least one, not all."
        )
    check_shape(scores, trainer, query_dataset)
    task = infer_task(cast(nn.Module, trainer.model), decision_margin)
    if not isinstance(task, Classification):
        raise UnsupportedError(f"A prediction can flip where there are classes, and this is {task.name}.")
    folder = study_folder("brittleness", trainer, scores, output_dir, seeds, seed)
    runs = RemovalRuns(trainer, query_dataset, folder / "search", seeds, seed, task)
    again = RemovalRuns(trainer, query_dataset, folder / "verify", seeds, derive_seed(seed, "verify"), task)

    whole, fingerprints = runs.whole()
    check_same_data(scores, fingerprints)
    correct = ~_flipped(whole)
    queries = np.flatnonzero(correct).tolist()
    if not queries:
        raise ValueError(f"None of the {num_queries} queries is predicted correctly: there is nothing to flip.")
    order = np.argsort(-scores.values, axis=1, kind="stable")
    chance = np.random.default_rng(derive_seed(seed, "brittleness")).permutation(num_examples)

    def search(order_of: Any) -> dict[int, int]:
        def flips(pairs: Sequence[tuple[int, int]]) -> list[bool]:
            outputs = runs.without([order_of(query)[:size] for query, size in pairs])
            return [bool(_flipped(output[:, query])) for output, (query, _) in zip(outputs, pairs, strict=True)]

        return smallest_flipping(flips, queries, max_size)

    found, found_by_chance = search(lambda query: order[query]), search(lambda query: chance)
    rates = np.full((2, num_queries), np.nan)
    if found:
        sets = [named[:size] for query, size in found.items() for named in (order[query], chance)]
        outputs = again.without(sets).reshape(len(found), 2, seeds, num_queries)
        for query, output in zip(found, outputs, strict=True):
            rates[:, query] = (output[:, :, query] < 0).mean(axis=1)
    sizes = [_column(each, num_queries) for each in (found, found_by_chance)]
    return Brittleness(scores.method, max_size, correct, *sizes, *rates)


def decision_margin(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The label's logit minus the largest other one, `[B]`: negative where the model predicts another class."""
    outputs = Classification().forward(model, batch)
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    labels = batch["labels"][:, None]
    others = logits.scatter(1, labels, float("-inf")).amax(1)
    return logits.gather(1, labels)[:, 0] - others


def _flipped(margins: np.ndarray) -> np.ndarray:
    """Whether most seeds, the first axis, predict another class."""
    return (margins < 0).mean(axis=0) > 0.5


def _column(found: dict[int, int], num_queries: int) -> np.ndarray:
    return np.array([found.get(query, np.nan) for query in range(num_queries)])
