"""Several trained models to attribute with, and what each of them was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from hf_attribution.artefacts import Artefact
from hf_attribution.data import Split
from hf_attribution.errors import MismatchError
from hf_attribution.retraining.manifest import read_manifest
from hf_attribution.retraining.worklist import WorkList, kept_runs, read_subsets
from hf_attribution.seals import plain_json
from hf_attribution.subsets import Subsets


@dataclass(frozen=True, eq=False, repr=False)
class Ensemble(Artefact):
    """Models trained on subsets of one training set, or on all of it: pass it as `attribute(checkpoints=...)`.

    A method averages over the models. Scores from an ensemble remember its subsets, and `evaluate_lds` refuses
    to score them on any of these. It holds paths: the weights stay in the folder of their trainings.

    Attributes:
        checkpoints: The folders of weights, one a model.
        subsets: What each of them was trained on, a row a model.
        provenance: `fingerprints` of the training data and of the model before training; `seconds`, what all of
            the trainings took; JSON.

    Raises:
        ValueError: There are not as many folders as subsets.

    Example:
        >>> subsets = Subsets.random(num_examples=100, num_subsets=2)
        >>> Ensemble(("runs/00000-0", "runs/00001-0"), subsets)
        Ensemble(2 models, each trained on 0.5 of 100 examples)
    """

    kind: ClassVar[str] = "ensemble"

    checkpoints: Sequence[str | Path]
    subsets: Subsets
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.checkpoints) != len(self.subsets):
            raise ValueError(
                f"There are {len(self.checkpoints)} checkpoints and {len(self.subsets)} subsets: give the subset that "
                "each model was trained on."
            )
        object.__setattr__(self, "checkpoints", tuple(Path(folder).absolute() for folder in self.checkpoints))
        object.__setattr__(self, "provenance", plain_json(self.provenance, "Ensemble.provenance"))

    @classmethod
    def from_retraining(cls, output_dir: str | Path, num_models: int | None = None) -> Ensemble:
        """The models that `retrain(keep_checkpoints=True)` or `train_ensemble` kept in a folder.

        Judge their scores by the other subsets only: `truth.select(range(num_models, len(truth)))`.

        Args:
            output_dir: The folder.
            num_models: Take this many, the first seed of every subset before the second; by default all.

        Returns:
            The ensemble.

        Raises:
            ValueError: There are no models in the folder, or not as many.
            MismatchError: A result is of another subset than the folder's.

        Example:
            >>> truth = trainer.retrain(keep_checkpoints=True, output_dir="retraining")  # doctest: +SKIP
            >>> ensemble = Ensemble.from_retraining("retraining", num_models=5)  # doctest: +SKIP
            >>> scores = trainer.attribute(test, method="trak", checkpoints=ensemble)  # doctest: +SKIP
            >>> evaluate_lds(scores, truth.select(range(5, len(truth))))  # doctest: +SKIP
        """
        folder = Path(output_dir)
        runs = kept_runs(folder)
        wanted = num_models if num_models is not None else max(len(runs), 1)
        if not 1 <= wanted <= len(runs):
            raise ValueError(
                f"{folder} holds {len(runs)} trained models, not {wanted}: "
                "retrain with keep_checkpoints=True, or train_ensemble, and give its output_dir."
            )
        manifest, subsets = read_manifest(folder), read_subsets(folder)
        worklist = WorkList(folder, subsets.keys(), wanted, keep_checkpoints=True)
        chosen = runs[:wanted]
        return cls(
            [worklist.checkpoint(run) for run in chosen],
            subsets.select([run.subset for run in chosen]),
            {
                "fingerprints": {"model": manifest["initial_weights"], "train": manifest["train_dataset"]},
                "seconds": sum(worklist.read(run)[1] for run in chosen),
            },
        )

    def __len__(self) -> int:
        return len(self.checkpoints)

    def __repr__(self) -> str:
        models = f"{len(self)} models, each" if len(self) > 1 else "1 model"
        share = "all" if self.subsets.masks.all() else f"{self.subsets.fraction:.3g}"
        return f"Ensemble({models} trained on {share} of {self.subsets.num_examples} examples)"

    def used_subsets(self) -> list[str]:
        """Return the keys of the subsets that its models were trained on, each once."""
        return list(dict.fromkeys(self.subsets.keys()))

    def check_trained_on(self, train: Split) -> None:
        """Refuse other training data than the models were trained on.

        Args:
            train: The training data.

        Raises:
            MismatchError: They are others.
        """
        own = self.provenance.get("fingerprints", {}).get("train")
        if len(train) != self.subsets.num_examples or own not in (None, train.fingerprint):
            raise MismatchError(
                f"The ensemble was trained on subsets of other training data ({self.subsets.num_examples} rows, "
                f"fingerprint {own}) than are to be scored ({len(train)} rows, fingerprint {train.fingerprint}): "
                "pass the dataset of its training, preprocessed and ordered as it was, or train another ensemble."
            )

    def _pack(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        metadata = {"checkpoints": [str(folder) for folder in self.checkpoints], "provenance": self.provenance}
        return {"masks": self.subsets.masks}, {**metadata, "description": self.subsets.description}

    @classmethod
    def _unpack(cls, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> Ensemble:
        subsets = Subsets(arrays["masks"], metadata["description"])
        return cls(metadata["checkpoints"], subsets, metadata["provenance"])
