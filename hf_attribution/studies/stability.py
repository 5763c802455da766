"""Stability: do scores agree between trainings that differ by chance, and not with those of a broken model?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from scipy.stats import rankdata
from torch import nn

from hf_attribution.artefacts import Artefact, freeze
from hf_attribution.copies import own_copy
from hf_attribution.errors import UnsupportedError
from hf_attribution.methods import Method, get_method
from hf_attribution.scores import Scores
from hf_attribution.seeds import derive_seed
from hf_attribution.trainer import AttributionMixin
from hf_attribution.weights import load_weights


@dataclass(frozen=True, eq=False)
class Stability(Artefact):
    """Spearman's correlations between the scores of one query by different models; NaN where scores are constant.

    Attributes:
        method: Whose scores.
        across_seeds: float64 `[pairs, Q]`, between models trained on the same data with other seeds: high is good.
        randomized: float64 `[models, Q]`, between a trained model and the same with shuffled weights: a method whose
            scores stay the same does not look at what was learned (Adebayo et al. 2018).
    """

    kind: ClassVar[str] = "stability"

    method: str
    across_seeds: np.ndarray
    randomized: np.ndarray

    def __post_init__(self) -> None:
        for name in ("across_seeds", "randomized"):
            object.__setattr__(self, name, freeze(getattr(self, name), np.float64))

    def __str__(self) -> str:
        return "\n".join(
            [
                f"Stability of {self.method}: mean rank correlation of a query's scores",
                f"  across training seeds   {_mean(self.across_seeds):.3f}",
                f"  with shuffled weights   {_mean(self.randomized):.3f}",
            ]
        )

    def _pack(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return {"across_seeds": self.across_seeds, "randomized": self.randomized}, {"method": self.method}

    @classmethod
    def _unpack(cls, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> Stability:
        return cls(metadata["method"], **arrays)


def stability(
    trainer: AttributionMixin,
    method: str | Method = "trak",
    query_dataset: Any = None,
    seeds: int = 3,
    seed: int = 0,
    output_dir: str | Path | None = None,
) -> Stability:
    """Compare the scores of models that were trained with different seeds, and of models whose weights are shuffled.

    The first should agree: an attribution that changes with the order of the data explains that order. The second
    should not: shuffling the entries of every weight leaves its distribution and removes what was learned. (The model
    randomisation test of Adebayo et al. 2018, Sanity checks for saliency maps.) Baselines that look at labels alone
    are perfectly stable, and fail the second test.

    Args:
        trainer: Trains.
        method: A name in `METHODS`, or a method with settings.
        query_dataset: The queries; by default the trainer's `eval_dataset`.
        seeds: Models trained on all of the data; they are kept and found again, as `train_ensemble` does.
        seed: Base of all random seeds.
        output_dir: Where the models are kept; by default as for `train_ensemble`.

    Returns:
        The correlations.

    Raises:
        ValueError: There are fewer than 2 seeds.
        UnsupportedError: The method follows one training, and cannot be given single models.

    Example:
        >>> print(stability(trainer, "trak", test))  # doctest: +SKIP
    """
    if seeds < 2:
        raise ValueError(f"seeds={seeds}: at least 2 trainings are needed to compare them.")
    chosen = get_method(method)
    if chosen.needs_checkpoints:
        raise UnsupportedError(f"{chosen.name} follows one training and its checkpoints: choose another method.")
    folders = trainer.train_ensemble(seeds, fraction=1.0, seed=seed, output_dir=output_dir).checkpoints
    trained, shuffled = [], []
    for number, folder in enumerate(folders):
        trained.append(_score(trainer, query_dataset, chosen, folder))
        model = load_weights(own_copy(cast(nn.Module, trainer.model)), Path(folder))
        shuffle_weights(model, derive_seed(seed, "stability", number))
        shuffled.append(_score(trainer, query_dataset, chosen, model))
    pairs = [rank_correlation(*pair) for pair in itertools.combinations(trained, 2)]
    broken = [rank_correlation(*pair) for pair in zip(trained, shuffled, strict=True)]
    return Stability(chosen.name, np.stack(pairs), np.stack(broken))


def shuffle_weights(model: nn.Module, seed: int) -> None:
    """Permute the entries of each parameter at random, in place.

    Args:
        model: The model; weights that it shares stay shared.
        seed: Of the permutations.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))


def rank_correlation(one: Scores, other: Scores) -> np.ndarray:
    """Spearman's correlation of two methods' scores for each query: float64 `[Q]`, NaN where one is constant."""
    ranks = [rankdata(scores.values, axis=1) for scores in (one, other)]
    a, b = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))


def _score(trainer: AttributionMixin, query_dataset: Any, method: Method, weights: Any) -> Scores:
    return trainer.attribute(query_dataset, method=method, checkpoints=cast(Sequence[Any], [weights]))


def _mean(correlations: np.ndarray) -> float:
    defined = correlations[~np.isnan(correlations)]
    return float(defined.mean()) if defined.size else float("nan")
