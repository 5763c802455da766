"""Where an unfinished sweep stands, kept in a file, so that a killed attribution goes on from there."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_attribution.artefacts import read_artefact, write_artefact
from hf_attribution.errors import ArtefactError
from hf_attribution.replay.sweep import Standing

_KIND = "unfinished sweep"
_EVERY_SECONDS = 60.0
_SHARE = 20  # of the time at least 19/20 go into the sweep


@dataclasses.dataclass
class Unfinished:
    """Sweeps for blocks of queries, one after the other.

    Args:
        block: How many queries a block has.
        chunk: How many products are taken at once, which decides the last bits.
        values: The scores of finished blocks, float32 `[Q, N]`.
        growth: How much the cotangents of finished blocks grew.
        standing: Where the block that comes after them stands, if it was begun.
    """

    block: int
    chunk: int
    values: Tensor
    growth: list[float] = dataclasses.field(default_factory=list)
    standing: Standing | None = None


class Bookmark:
    """A file for where sweeps stand, written every minute, and less often where writing takes long.

    Args:
        path: The file, or `None` for none.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._next = path, time.monotonic() + _EVERY_SECONDS

    def read(self, like: Tensor) -> Unfinished | None:
        """Where sweeps were when an earlier call ended.

        Args:
            like: A tensor of the device and type of cotangents.

        Returns:
            What is in the file; `None` where there is none, or it is damaged.
        """
        if self._path is None or not self._path.exists():
            return None
        try:
            arrays, notes = read_artefact(self._path, _KIND)
        except ArtefactError:
            return None  # it only saves time
        found = {name: torch.from_numpy(array) for name, array in arrays.items()}
        standing = Standing(
            step=notes["step"],
            cotangents=[found[f"cotangents.{number}"].to(like) for number in range(notes["parts"])],
            scores=found["scores"].to(like),
            lengths=[*found["lengths"].to(like)],
        )
        return Unfinished(notes["block"], notes["chunk"], found["values"], notes["growth"], standing)

    def put(self, unfinished: Unfinished) -> None:
        """Write down where sweeps stand, if it is time to."""
        standing = unfinished.standing
        if self._path is None or standing is None or time.monotonic() < self._next:
            return
        started = time.monotonic()
        arrays = {f"cotangents.{number}": _exact(part) for number, part in enumerate(standing.cotangents)}
        arrays |= {"scores": _exact(standing.scores), "lengths": _exact(torch.stack(standing.lengths))}
        notes = {"block": unfinished.block, "chunk": unfinished.chunk, "growth": unfinished.growth}
        notes |= {"step": standing.step, "parts": len(standing.cotangents)}
        write_artefact(self._path, _KIND, {**arrays, "values": unfinished.values.numpy()}, notes)
        ended = time.monotonic()
        self._next = ended + max(_EVERY_SECONDS, (_SHARE - 1) * (ended - started))

    def remove(self) -> None:
        """Delete the file: all is finished."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _exact(tensor: Tensor) -> np.ndarray:
    """The same numbers, in a type that NumPy has."""
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).cpu().numpy()
