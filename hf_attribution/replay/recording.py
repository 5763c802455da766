"""What defines a training run, in a folder: its header, its steps, and checkpoints of parameters and optimiser.

recording.json                     what was trained, how, on what
steps/00000000.safetensors         the steps from number 0 on; the next file begins where this one ends
checkpoints/00000000.safetensors   the state before step 0
"""

import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_attribution.artefacts import read_artefact, write_artefact
from hf_attribution.errors import ArtefactError
from hf_attribution.replay.optimizers import Group, Optimizer, State
from hf_attribution.seeds import RandomState

SCHEMA_VERSION = 1
_STEPS, _STATE, _WEIGHTS = "recorded steps", "recorded state", "example weights"


class MicroBatch(NamedTuple):
    """A batch of one forward and backward pass.

    Args:
        rows: The rows' positions in the training dataset, `[B]`.
        random: The random state before the forward pass.
        drawn: The packed random state before the rows were read and collated, where that draws random numbers.
    """

    rows: np.ndarray
    random: RandomState
    drawn: np.ndarray | None


class Step(NamedTuple):
    """One optimiser step.

    Args:
        batches: Its micro-batches.
        num_items: What the Trainer counted as items in them, or `None`.
        rates: The learning rate of each parameter group.
        checksum: Of the parameters after the step.
    """

    batches: tuple[MicroBatch, ...]
    num_items: float | None
    rates: tuple[float, ...]
    checksum: int


class Recording:
    """A recorded run.

    Args:
        folder: The folder that `record=True` wrote.

    Raises:
        FileNotFoundError: If there is no recording in the folder.
        ArtefactError: If it is damaged or of a newer schema.

    Example:
        >>> recording = Recording("outputs/recording")  # doctest: +SKIP
        >>> len(recording)  # doctest: +SKIP
        100
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.header = read_header(self.folder)
        self.first: int = self.header["first_step"]
        self._steps = _read_steps(self.folder, self.first)

    def __len__(self) -> int:
        return self.first + len(self._steps)

    def step(self, number: int) -> Step:
        """A step by its number, from 0."""
        return self._steps[number - self.first]

    def check_finished(self) -> None:
        """Refuse a recording that does not reach the end of its training.

        Raises:
            ArtefactError: The message says what happened.
        """
        if not self.header["finished"]:
            why = self.header["ended"] or "the training was interrupted, or is still going on"
            raise ArtefactError(
                f"The recording in {self.folder} ends at step {len(self)} of {self.header['total_steps']} ({why}): "
                "resume the training with resume_from_checkpoint=True, or train again with record=True."
            )

    @property
    def names(self) -> list[str]:
        """The trainable parameters, in the order of the flat vector."""
        return [name for group in self.header["optimizer"]["groups"] for name in group["parameters"]]

    @property
    def optimizer(self) -> Optimizer:
        """Its optimiser."""
        groups, start = [], 0
        for group in self.header["optimizer"]["groups"]:
            size = sum(int(np.prod(self.header["shapes"][name])) for name in group["parameters"])
            groups.append(Group(slice(start, start + size), group["settings"]))
            start += size
        return Optimizer(self.header["optimizer"]["class"], tuple(groups), self.header["max_grad_norm"])

    @property
    def checkpoints(self) -> list[int]:
        """The steps before which the state was kept, ascending; the end is the last."""
        return sorted(int(path.stem) for path in (self.folder / "checkpoints").glob("*.safetensors"))

    def state(self, step: int) -> State:
        """The state that was kept before a step.

        Args:
            step: Its number.

        Returns:
            Flat parameters and moments.

        Raises:
            ArtefactError: If the checkpoint is missing or damaged.
        """
        path = state_path(self.folder, step)
        try:
            arrays, _ = read_artefact(path, _STATE)
        except FileNotFoundError as error:
            raise ArtefactError(
                f"The recording's checkpoint {path} is missing: put it back, or train again with record=True."
            ) from error
        return tuple(torch.from_numpy(arrays[name]) for name in ("parameters", *self.optimizer.moments))

    @property
    def weights(self) -> Tensor | None:
        """The weight of every training example in the recorded run, `[N]` float32, or `None` where all are 1."""
        path = self.folder / "weights.safetensors"
        return torch.from_numpy(read_artefact(path, _WEIGHTS)[0]["weights"]) if path.exists() else None


def state_path(folder: Path, step: int) -> Path:
    """The file of the state before a step."""
    return folder / "checkpoints" / f"{step:08d}.safetensors"


def write_state(folder: Path, step: int, state: State, moments: Sequence[str]) -> None:
    """Keep the state before a step."""
    arrays = {name: part.cpu().numpy() for name, part in zip(("parameters", *moments), state, strict=True)}
    write_artefact(state_path(folder, step), _STATE, arrays, {"step": step})


def write_weights(folder: Path, weights: Tensor) -> None:
    """Keep the weights of the training examples, `[N]`."""
    write_artefact(folder / "weights.safetensors", _WEIGHTS, {"weights": weights.float().numpy()}, {})


def write_header(folder: Path, header: dict[str, Any]) -> None:
    """Write the header, in one step."""
    temporary = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        temporary.write_text(json.dumps({"schema_version": SCHEMA_VERSION, **header}, indent=1))
        temporary.replace(folder / "recording.json")
    finally:
        temporary.unlink(missing_ok=True)


def read_header(folder: Path) -> dict[str, Any]:
    """Read the header of a recording.

    Args:
        folder: The recording's folder.

    Returns:
        The header.

    Raises:
        FileNotFoundError: If there is none.
        ArtefactError: If it cannot be read or is of a newer schema.
    """
    path = folder / "recording.json"
    if not path.exists():
        raise FileNotFoundError(f"There is no recorded training in {folder}: train with record=True.")
    try:
        header = json.loads(path.read_text())
        newer = header["schema_version"] > SCHEMA_VERSION
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path} cannot be read ({error!r}): train again with record=True.") from error
    if newer:
        raise ArtefactError(f"{path} was written by a newer hf_attribution: pip install -U hf-attribution.")
    return header


def write_steps(folder: Path, first: int, steps: Sequence[Step]) -> None:
    """Write steps to a file of their own.

    Args:
        folder: The recording's folder.
        first: The number of the first.
        steps: The steps; at least one.
    """
    batches = [batch for step in steps for batch in step.batches]
    states: dict[str, list[np.ndarray]] = {name: [] for name in (*RandomState._fields, "drawn")}
    random = [[_noted(states[name], part) for name, part in batch.random._asdict().items()] for batch in batches]
    drawn = [-1 if batch.drawn is None else _noted(states["drawn"], batch.drawn) for batch in batches]
    arrays = {
        "rows": np.concatenate([batch.rows for batch in batches]).astype(np.int64),
        "batch_sizes": np.array([len(batch.rows) for batch in batches], np.int64),
        "num_batches": np.array([len(step.batches) for step in steps], np.int64),
        "num_items": np.array([-1 if step.num_items is None else step.num_items for step in steps], np.float64),
        "rates": np.array([step.rates for step in steps], np.float64),
        "checksums": np.array([step.checksum for step in steps], np.int64),
        "random": np.array(random, np.int64),
        "drawn": np.array(drawn, np.int64),
        **{f"state.{name}": np.stack(parts) for name, parts in states.items() if parts},
    }
    write_artefact(folder / "steps" / f"{first:08d}.safetensors", _STEPS, arrays, {"first": first})


def _read_steps(folder: Path, first: int) -> list[Step]:
    steps: list[Step] = []
    for path in sorted((folder / "steps").glob("*.safetensors")):
        if int(path.stem) != first + len(steps):
            raise ArtefactError(
                f"The recording in {folder} lacks steps {first + len(steps)} to {int(path.stem) - 1}: put back their "
                "file, or train again with record=True."
            )
        steps += _unpacked(read_artefact(path, _STEPS)[0])
    return steps


def _unpacked(arrays: dict[str, np.ndarray]) -> list[Step]:
    rows = np.split(arrays["rows"], np.cumsum(arrays["batch_sizes"])[:-1])
    random = [
        RandomState(*(arrays[f"state.{name}"][index] for name, index in zip(RandomState._fields, which, strict=True)))
        for which in arrays["random"]
    ]
    drawn = [None if number < 0 else arrays["state.drawn"][number] for number in arrays["drawn"]]
    batches = [MicroBatch(*each) for each in zip(rows, random, drawn, strict=True)]
    steps, start = [], 0
    for number, count in enumerate(arrays["num_batches"]):
        items = float(arrays["num_items"][number])
        steps.append(
            Step(
                batches=tuple(batches[start : start + count]),
                num_items=None if items < 0 else items,
                rates=tuple(arrays["rates"][number].tolist()),
                checksum=int(arrays["checksums"][number]),
            )
        )
        start += count
    return steps


def _noted(table: list[np.ndarray], state: np.ndarray) -> int:
    """Where a state stands in a table; added unless it is the last one still."""
    if not table or not np.array_equal(table[-1], state):
        table.append(state)
    return len(table) - 1
