"""Rows that carry their position in the dataset through the user's data collator, which never sees it."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_attribution.data import Collator
from hf_attribution.seeds import RandomState

ROW = "hf_attribution_row"
STATE = "hf_attribution_random_state"


class NumberedRows(Dataset[dict[str, Any]]):
    """A map-style dataset of dicts whose rows know their numbers.

    Args:
        dataset: The dataset.
        note_random_state: Whether the first row of a batch also carries the random state from before it was read.
    """

    def __init__(self, dataset: Any, note_random_state: bool = False) -> None:
        self.dataset, self.note_random_state = dataset, note_random_state

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return self.numbered(indices)

    @property
    def sampled(self) -> Any:
        """What a sampler draws its positions from."""
        return self.dataset

    def numbered(self, indices: list[int]) -> list[dict[str, Any]]:
        """Rows by their positions in the dataset."""
        state = RandomState.now().packed() if self.note_random_state else None
        many = getattr(self.dataset, "__getitems__", None)
        rows = many(indices) if many is not None else [self.dataset[index] for index in indices]
        numbered = [{**row, ROW: index} for row, index in zip(rows, indices, strict=True)]
        if state is not None:
            numbered[0][STATE] = state
        return numbered


class NumberedCollator:
    """The user's collator; the numbers go past it, since it might drop them, or stumble over them.

    Args:
        collator: The user's collator.
    """

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch with the numbers of its rows, `[B]`, and their random state if there is one."""
        extra = {ROW: torch.tensor([row[ROW] for row in rows])}
        states: list[np.ndarray] = [row[STATE] for row in rows if STATE in row]
        if states:
            extra[STATE] = torch.from_numpy(states[0])
        plain = [{key: value for key, value in row.items() if key not in (ROW, STATE)} for row in rows]
        return {**self.collator(plain), **extra}
