"""Data debugging: rows to look at first. Wrong labels, duplicates, and subsets that are worth keeping.

Everything here ranks; what is wrong with a row is for a reader to see. Each function returns a `datasets.Dataset`
whose `train_index` maps back to the rows of the training data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import datasets
import numpy as np
from torch import nn

from hf_attribution.columns import used_columns
from hf_attribution.data import Split
from hf_attribution.errors import MismatchError
from hf_attribution.inputs import evaluating
from hf_attribution.methods import Method
from hf_attribution.methods.representations import check_choices, representations
from hf_attribution.scores import Scores
from hf_attribution.tasks import infer_task
from hf_attribution.trainer import AttributionMixin

if TYPE_CHECKING:
    from hf_attribution.ensemble import Ensemble

# Rows that are compared with all others at a time.
BLOCK_SIZE = 4096


def find_mislabeled(
    trainer: AttributionMixin,
    method: str | Method = "influence",
    k: int | None = None,
    checkpoints: Ensemble | Sequence[str | Path | nn.Module] | None = None,
) -> datasets.Dataset:
    """Rank the training examples by their influence on themselves: wrong labels first, if the score is good.

    An example whose label is right is supported by others like it; one whose label is wrong stands alone, so that the
    model says its label only because it is there (Koh & Liang 2017, section 5.4; Pruthi et al. 2020). Rare and hard
    examples rank high for the same reason: look before you drop.

    Args:
        trainer: Has trained a classifier on the data.
        method: A name in `METHODS` of a method that compares gradients, or such a method with settings.
        k: How many rows to return; all of them by default.
        checkpoints: Weights to judge by, instead of the model's own. An ensemble trained on random halves
            (`trainer.train_ensemble(5)`) has models that have not seen the example.

    Returns:
        A row for each example, most suspicious first: `rank`, `train_index`, `score`, and the columns of the training
        data.

    Raises:
        ValueError: The rows have no class labels, or `k` is less than 1.
        UnsupportedError: The method gives no example an influence on itself.

    Example:
        >>> suspects = find_mislabeled(trainer, k=50)  # doctest: +SKIP
        >>> suspects["text"][:5]  # look at these first  # doctest: +SKIP
    """
    train = cast(datasets.Dataset, trainer.train_dataset)
    task = infer_task(cast(nn.Module, trainer.model))
    if task.labels(train) is None:
        raise ValueError(
            f"There are no labels to be wrong: {task.name} on rows with the columns "
            f"{', '.join(getattr(train, 'column_names', None) or ['(none)'])}. Wrong labels are found where the model "
            "is a classifier and each row has a 'label' or 'labels'."
        )
    own = trainer.self_influence(method=method, checkpoints=checkpoints)
    ranked = Scores(own[None], method="self_influence").top(k if k is not None else len(own), train)
    return ranked.remove_columns("query")


def find_duplicates(
    trainer: AttributionMixin,
    threshold: float = 0.999,
    layer: str | None = None,
    pooling: str = "mean",
) -> datasets.Dataset:
    """Find training examples that are, to the model, copies of earlier ones.

    Two examples are as alike as their hidden states: their cosine. These are computed once, and each is compared with
    all earlier ones, exactly, 4,096 at a time.

    Args:
        trainer: Has the model and the data.
        threshold: The least similarity of a copy.
        layer: Name of the module whose output is the hidden state; by default what goes into the last linear layer.
        pooling: How the states of tokens or pixels become one: `"mean"`, `"max"`, `"first"`, `"last"`.

    Returns:
        A row for each copy, the most similar first: `train_index`, `duplicate_of` (the earlier row that is most like
        it), `similarity`.

    Raises:
        ValueError: `threshold` is not between -1 and 1.

    Example:
        >>> copies = find_duplicates(trainer)  # doctest: +SKIP
        >>> kept = sorted(set(range(len(train))) - set(copies["train_index"]))  # doctest: +SKIP
        >>> train = train.select(kept)  # doctest: +SKIP
    """
    if not -1 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: a cosine lies between -1 and 1; copies have nearly 1.")
    check_choices(pooling, "cosine")
    model, train, args = cast(nn.Module, trainer.model), cast(datasets.Dataset, trainer.train_dataset), trainer.args
    kept = used_columns(train, model) if args.remove_unused_columns else train
    split = Split(kept, trainer.data_collator, args.per_device_eval_batch_size, "train")
    with evaluating(model):
        states = nn.functional.normalize(representations(model, infer_task(model), split, layer, pooling))
    found: list[np.ndarray] = []
    for start in range(0, len(states), BLOCK_SIZE):
        stop = min(start + BLOCK_SIZE, len(states))
        cosines = (states[start:stop] @ states[:stop].T).numpy()
        # Row i of the block is example start + i: only what comes before it counts.
        cosines[np.arange(stop)[None, :] >= np.arange(start, stop)[:, None]] = -np.inf
        nearest = cosines.argmax(axis=1)
        best = cosines[np.arange(stop - start), nearest]
        # Of equal rows the cosine is 1 but for rounding.
        copies = np.flatnonzero(best >= threshold - 1e-6)
        found.append(np.stack([copies + start, nearest[copies], best[copies]], axis=1))
    rows = np.concatenate(found)
    rows = rows[np.argsort(-rows[:, 2], kind="stable")]
    return datasets.Dataset.from_dict(
        {
            "train_index": rows[:, 0].astype(np.int64),
            "duplicate_of": rows[:, 1].astype(np.int64),
            "similarity": rows[:, 2].astype(np.float32),
        }
    )


def select_subset(
    scores: Scores,
    budget: int | float,
    train_dataset: datasets.Dataset | None = None,
    groups: Sequence[Any] | np.ndarray | None = None,
) -> datasets.Dataset:
    """Choose the training examples that raise the outputs of all queries most, on average.

    Args:
        scores: Scores `[Q, N]` for queries that stand for what the model is for.
        budget: How many examples: a number, or a share below 1.
        train_dataset: The training set, whose columns are joined to the rows.
        groups: `[N]`, the class (or source) of each example: the same share of each is chosen, since queries of many
            classes are served by examples of many, and an average hides that.

    Returns:
        A row for each chosen example, best first: `rank` (among all), `train_index`, `score` (the mean over the
        queries), and the columns of `train_dataset`.

    Raises:
        ValueError: The budget is not between 1 and N.
        MismatchError: There is not one group for each example, or `train_dataset` has not N rows.

    Example:
        >>> scores = Scores(np.array([[3.0, -1.0, 2.0, 0.5], [1.0, 1.0, 1.0, 0.5]]), method="grad_dot")
        >>> select_subset(scores, 2)["train_index"][:]
        [0, 2]
        >>> select_subset(scores, 0.5, groups=["a", "b", "a", "b"])["train_index"][:]
        [0, 3]
    """
    num_examples = scores.values.shape[1]
    size = round(budget * num_examples) if isinstance(budget, float) and budget < 1 else int(budget)
    if not 1 <= size <= num_examples:
        raise ValueError(f"budget={budget} chooses {size} of {num_examples} examples: choose at least 1, at most all.")
    mean = scores.values.mean(axis=0, dtype=np.float64)
    ranked = Scores(mean[None], scores.method).top(num_examples, train_dataset).remove_columns("query")
    order = np.asarray(ranked["train_index"][:])
    if groups is None:
        return ranked.select(range(size))
    members = np.asarray(groups)
    if len(members) != num_examples:
        raise MismatchError(f"There are {len(members)} groups and {num_examples} examples: give one for each.")
    # The r-th best of a group of n stands at the share r / n of it: the best shares of all groups together.
    share = np.empty(num_examples)
    for group in np.unique(members):
        rows = np.flatnonzero(members[order] == group)
        share[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return ranked.select(np.sort(np.argsort(share, kind="stable")[:size]))
