"""What removing the examples that scores name does to the outputs, for real: remove them, and train again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hf_attribution.artefacts import Artefact, freeze
from hf_attribution.errors import MismatchError
from hf_attribution.scores import Scores
from hf_attribution.seals import fingerprint
from hf_attribution.seeds import derive_seed
from hf_attribution.subsets import Subsets
from hf_attribution.tasks import Task
from hf_attribution.trainer import AttributionMixin

if TYPE_CHECKING:
    import datasets

# Random sets of each size; all queries share them.
RANDOM_DRAWS = 3
ORDERS = ("top", "random", "bottom")


class RemovalRuns:
    """Retrainings without sets of examples, asked for in rounds. Each set is trained without once.

    All go through one `retrain` work list, which each round adds to: an interrupted study, repeated, asks the same
    questions in the same order, and finds the answers that were already paid for.

    Args:
        trainer: The trainer.
        query_dataset: The queries, or `None` for the trainer's `eval_dataset`.
        output_dir: The folder of the retrainings.
        seeds: R, trainings for each set.
        seed: Base of their seeds.
        task: What is measured; the trainer's own by default.
    """

    def __init__(
        self,
        trainer: AttributionMixin,
        query_dataset: Any,
        output_dir: Path,
        seeds: int,
        seed: int,
        task: Task | None = None,
    ) -> None:
        self._trainer = trainer
        self._settings = {"query_dataset": query_dataset, "seeds": seeds, "seed": seed, "task": task}
        self._folder = output_dir
        self._num_examples = len(trainer.train_dataset)  # type: ignore[arg-type]  # a Sized dataset
        self._rows: dict[str, int] = {}
        self._masks: list[np.ndarray] = []

    def whole(self) -> tuple[np.ndarray, dict[str, str]]:
        """Train on everything.

        Returns:
            Outputs `[R, Q]`, and the fingerprints of the data.
        """
        subsets = Subsets.whole(self._num_examples)
        truth = self._trainer.retrain(subsets=subsets, output_dir=self._folder / "whole", **self._settings)
        return truth.outputs[0], truth.provenance["fingerprints"]

    def without(self, removed: Sequence[np.ndarray]) -> np.ndarray:
        """Train without each of some sets.

        Args:
            removed: The sets, each of train indices.

        Returns:
            Outputs `[sets, R, Q]`.
        """
        rows = [self._row(indices) for indices in removed]
        subsets = Subsets(np.stack(self._masks), {"name": "removal"})
        truth = self._trainer.retrain(subsets=subsets, output_dir=self._folder / "without", **self._settings)
        return truth.outputs[rows]

    def _row(self, removed: np.ndarray) -> int:
        mask = np.ones(self._num_examples, dtype=bool)
        mask[removed] = False
        key = fingerprint(mask)
        if key not in self._rows:
            self._rows[key] = len(self._masks)
            self._masks.append(mask)
        return self._rows[key]


@dataclass(frozen=True, eq=False)
class RemovalCurve(Artefact):
    """Outputs of models retrained without the examples that scores name.

    Attributes:
        method: Whose scores.
        sizes: int64 `[S]`, how many examples were removed.
        whole: float32 `[Q]`, outputs with nothing removed, mean over the seeds.
        outputs: float32 `[3, S, Q]`: without the examples of highest score for the query, without random ones, without
            those of lowest score; mean over the seeds (and over several random sets).
    """

    kind: ClassVar[str] = "removal_curve"

    method: str
    sizes: np.ndarray
    whole: np.ndarray
    outputs: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", freeze(self.sizes, np.int64))
        object.__setattr__(self, "whole", freeze(self.whole, np.float32))
        object.__setattr__(self, "outputs", freeze(self.outputs, np.float32))

    def mean_change(self) -> dict[str, list[float]]:
        """Return for `"top"`, `"random"` and `"bottom"` the mean change of the output, one a size."""
        changes = (self.outputs - self.whole).mean(axis=2)
        return {order: change.tolist() for order, change in zip(ORDERS, changes, strict=True)}

    def to_dataset(self) -> datasets.Dataset:
        """Return a row for each order, size and query: `removed`, `size`, `query`, `output`, `change`."""
        import datasets

        grid = np.indices(self.outputs.shape).reshape(3, -1)
        return datasets.Dataset.from_dict(
            {
                "removed": [ORDERS[order] for order in grid[0]],
                "size": self.sizes[grid[1]],
                "query": grid[2],
                "output": self.outputs.reshape(-1),
                "change": (self.outputs - self.whole).reshape(-1),
            }
        )

    def __str__(self) -> str:
        changes = self.mean_change()
        lines = [f"Mean change of {self.outputs.shape[2]} outputs, by removing the examples that {self.method} names"]
        lines.append("  removed   " + "".join(f"{order:>10}" for order in ORDERS))
        for position, size in enumerate(self.sizes):
            lines.append(f"  {size:>7}   " + "".join(f"{changes[order][position]:>10.3f}" for order in ORDERS))
        return "\n".join(lines)

    def _pack(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return {"sizes": self.sizes, "whole": self.whole, "outputs": self.outputs}, {"method": self.method}

    @classmethod
    def _unpack(cls, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> RemovalCurve:
        return cls(method=metadata["method"], **arrays)


def removal_curve(
    scores: Scores,
    trainer: AttributionMixin,
    query_dataset: Any = None,
    sizes: Sequence[int] | None = None,
    seeds: int = 2,
    seed: int = 0,
    output_dir: str | Path | None = None,
) -> RemovalCurve:
    """Retrain without the top-scored examples of each query, without the lowest, and without random ones.

    Costs `(2 Q + 3) S R` trainings and R on everything: take few queries. Resumes where it stopped.

    Args:
        scores: Scores `[Q, N]`.
        trainer: Trains.
        query_dataset: The Q queries; by default the trainer's `eval_dataset`.
        sizes: How many examples to remove; by default 1, 2, 5 and 10 percent.
        seeds: R, trainings for each set.
        seed: Base of all random seeds.
        output_dir: Where retrainings are kept; by default in `args.output_dir`, named after scores and settings.

    Returns:
        The curve.

    Raises:
        ValueError: A size is not between 1 and N - 1.
        MismatchError: The scores are not for these queries and this training data.

    Example:
        >>> curve = removal_curve(scores, trainer, test.select(range(10)))  # doctest: +SKIP
        >>> print(curve)  # a line for each size: mean change without top, random and bottom  # doctest: +SKIP
    """
    num_queries, num_examples = scores.values.shape
    if sizes is None:
        sizes = sorted({max(1, round(share * num_examples)) for share in (0.01, 0.02, 0.05, 0.1)})
    if not len(sizes) or min(sizes) < 1 or max(sizes) >= num_examples:
        raise ValueError(f"sizes={list(sizes)}: remove at least 1 and at most {num_examples - 1} examples.")
    folder = study_folder("removal", trainer, scores, output_dir, seeds, seed)
    runs = RemovalRuns(trainer, query_dataset, folder, seeds, seed)
    check_shape(scores, trainer, query_dataset)
    whole, fingerprints = runs.whole()
    check_same_data(scores, fingerprints)

    order = np.argsort(-scores.values, axis=1, kind="stable")
    draws = [
        np.random.default_rng(derive_seed(seed, "removal", draw)).permutation(num_examples)
        for draw in range(RANDOM_DRAWS)
    ]
    top = [row[:size] for size in sizes for row in order]
    bottom = [row[-size:] for size in sizes for row in order]
    random = [draw[:size] for size in sizes for draw in draws]
    means = runs.without([*top, *bottom, *random]).mean(axis=1)  # [sets, Q]
    named = means[: 2 * len(top)].reshape(2, len(sizes), num_queries, num_queries)
    # A set that was named for one query says nothing of the others.
    own_top, own_bottom = np.diagonal(named, axis1=2, axis2=3)
    by_chance = means[2 * len(top) :].reshape(len(sizes), RANDOM_DRAWS, num_queries).mean(axis=1)
    return RemovalCurve(
        scores.method, np.asarray(sizes), whole.mean(axis=0), np.stack([own_top, by_chance, own_bottom])
    )


def study_folder(
    name: str, trainer: AttributionMixin, scores: Scores, output_dir: str | Path | None, *settings: Any
) -> Path:
    """Return where a study keeps its retrainings: in the trainer's folder, under a name of its own, if not told."""
    if output_dir is not None:
        return Path(output_dir)
    return Path(str(trainer.args.output_dir)) / f"{name}-{fingerprint(scores.fingerprint, repr(settings))[:12]}"


def check_shape(scores: Scores, trainer: AttributionMixin, query_dataset: Any) -> None:
    """Refuse scores of another shape than queries and training data.

    Args:
        scores: The scores.
        trainer: Has the training data.
        query_dataset: The queries, or `None` for the trainer's.

    Raises:
        ValueError: There is no training or query dataset.
        MismatchError: The shapes differ.
    """
    queries = query_dataset if query_dataset is not None else trainer.eval_dataset
    if queries is None or trainer.train_dataset is None:
        raise ValueError("There is no query or training dataset: give the trainer both, or pass query_dataset.")
    shape = (len(queries), len(trainer.train_dataset))  # type: ignore[arg-type]  # Sized datasets
    if scores.values.shape != shape:
        raise MismatchError(
            f"The scores are {list(scores.values.shape)} and there are {shape[0]} queries and {shape[1]} training "
            "examples: pass the queries that were attributed to the trainer's training data."
        )


def check_same_data(scores: Scores, fingerprints: dict[str, str]) -> None:
    """Refuse scores of other rows than those that were retrained on and measured.

    Args:
        scores: The scores.
        fingerprints: Of the retrainings' data.

    Raises:
        MismatchError: A fingerprint differs.
    """
    ours = scores.provenance.get("fingerprints", {})
    for name in ("train", "query"):
        if name in ours and ours[name] != fingerprints[name]:
            raise MismatchError(
                f"The scores are of another {name} dataset (fingerprint {ours[name]}) than was retrained "
                f"({fingerprints[name]}): pass the same rows, in the same order."
            )
