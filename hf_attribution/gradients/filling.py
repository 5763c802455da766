"""Scores while they are computed: a matrix filled block by block, which goes on from there after it was killed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from hf_attribution.bookmark import Bookmark
from hf_attribution.data import Split
from hf_attribution.errors import ProcessError
from hf_attribution.processes import add_up, count, gather, rank
from hf_attribution.seals import fingerprint


class Filling:
    """Scores `[Q, N]`: for one block of queries after the other, of the training examples batch by batch.

    The processes of a launch share the batches of a block, and join what they have at its end. Each writes all of it
    into a file of its own from time to time, which takes as much disk as the scores. What it holds is taken up by as
    many processes with the same batches.

    Args:
        num_queries: Q.
        train: The training examples.
        unfinished: How the files' names begin, with all that the scores depend on; `None` for no files. The caller
            deletes them, by `bookmark.forget`.

    Attributes:
        scores: float32 `[Q, N]`.
    """

    def __init__(self, num_queries: int, train: Split, unfinished: Path | None = None) -> None:
        self.scores = np.zeros((num_queries, len(train)), dtype=np.float32)
        self._finished = np.zeros(num_queries, dtype=np.int32)
        self._rows, self._done = np.zeros(0, dtype=np.int64), np.zeros(len(train), dtype=np.int32)
        shares = fingerprint(train.batch_size, train.batch_tokens, count())
        path = unfinished and unfinished.with_name(f"{unfinished.name}-{shares}-{rank()}.safetensors")
        self._bookmark = Bookmark(path, "unfinished scores")
        if found := self._bookmark.read():
            arrays = found[0]
            self.scores, self._finished = arrays["scores"], arrays["finished"]
            self._rows, self._done = arrays["rows"], arrays["done"]
        add_up(self._finished)
        # By all: one process may have been killed a block before the others.
        self._finished = (self._finished == count()).astype(np.int32)

    def bar(self, progress: bool) -> tqdm:
        """A progress bar, of pairs of a query and an example."""
        total = self.scores.size
        return tqdm(
            total=total, desc="gradient products", unit="pairs", unit_scale=True, leave=False, disable=not progress
        )

    def begin(self, rows: np.ndarray) -> np.ndarray:
        """Begin with a block of queries, or go on with it. All processes do.

        Args:
            rows: Their positions, `[q]`.

        Returns:
            The training examples whose scores are there already, with this process or another, `[N]` bool.

        Raises:
            ProcessError: If the processes are at different blocks.
        """
        if len(set(gather(rows.tobytes()))) > 1:
            raise ProcessError(
                "The processes take the queries in different blocks, for some have run out of memory where others "
                "have not: give a smaller batch_size."
            )
        if self._finished[rows].all():
            return np.ones(len(self._done), dtype=bool)
        if not np.array_equal(rows, self._rows):
            self.scores[rows], self._rows, self._done = 0, rows, np.zeros_like(self._done)
        done = self._done.copy()
        add_up(done)
        twice = done > 1  # of files that are not of one launch
        self.scores[np.ix_(rows, twice)], self._done[twice] = 0, 0
        return done == 1

    def note(self, examples: np.ndarray) -> None:
        """The scores of a batch of examples, by their positions, are in `scores` for the whole block."""
        self._done[examples] = 1
        self._bookmark.put(self._standing)

    def end(self, rows: np.ndarray) -> None:
        """Join what the processes have of a block."""
        if count() > 1 and not self._finished[rows].all():
            joined = self.scores[rows]
            add_up(joined)
            self.scores[rows] = joined
        self._finished[rows] = 1

    def _standing(self) -> tuple[Mapping[str, np.ndarray], Mapping[str, Any]]:
        arrays: dict[str, np.ndarray] = {"scores": self.scores, "finished": self._finished}
        return {**arrays, "rows": self._rows, "done": self._done}, {}
