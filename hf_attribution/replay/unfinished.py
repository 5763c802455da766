"""How far sweeps have come, as what a `Bookmark` keeps."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_attribution.replay.sweep import Standing


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

    def pack(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays and notes, while a block is unfinished."""
        standing = self.standing
        assert standing is not None
        arrays = {f"cotangents.{number}": _exact(part) for number, part in enumerate(standing.cotangents)}
        arrays |= {"scores": _exact(standing.scores), "lengths": _exact(torch.stack(standing.lengths))}
        notes = {"block": self.block, "chunk": self.chunk, "growth": self.growth}
        notes |= {"step": standing.step, "parts": len(standing.cotangents)}
        return {**arrays, "values": self.values.numpy()}, notes

    @classmethod
    def unpack(cls, arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any], like: Tensor) -> "Unfinished":
        """What was packed.

        Args:
            arrays: The arrays.
            notes: The notes.
            like: A tensor of the device and type of cotangents.

        Returns:
            How far the sweeps have come.
        """
        found = {name: torch.from_numpy(array) for name, array in arrays.items()}
        standing = Standing(
            step=notes["step"],
            cotangents=[found[f"cotangents.{number}"].to(like) for number in range(notes["parts"])],
            scores=found["scores"].to(like),
            lengths=[*found["lengths"].to(like)],
        )
        return cls(notes["block"], notes["chunk"], found["values"], notes["growth"], standing)


def _exact(tensor: Tensor) -> np.ndarray:
    """The same numbers, in a type that NumPy has."""
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).cpu().numpy()
