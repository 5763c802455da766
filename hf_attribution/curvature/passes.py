"""Passes over the rows of a curvature matrix, of which sums are made: a fit that is killed goes on within a pass."""

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_attribution.artefacts import Artefact, fingerprint
from hf_attribution.bookmark import Bookmark
from hf_attribution.curvature.rows import CurvatureRows
from hf_attribution.errors import ArtefactError
from hf_attribution.gradients.per_example import Gradients
from hf_attribution.processes import count, from_main, gather, rank

A = TypeVar("A", bound=Artefact)
T = TypeVar("T")


class Passes:
    """This process's share of passes over rows, batch by batch in one order, and what a killed fit left of them.

    Every process writes its own sums into a file of their size, from time to time, through a copy in the memory of the
    CPU where they are on a GPU. Only a fit whose processes would add up the same batches goes on from there.

    Args:
        rows: The rows.
        unfinished: How the files' names begin, with all that the sums depend on beside batches and processes; `None`
            for no files. The caller deletes them, by `bookmark.forget`, once it keeps what it wanted the sums for.
        progress: Whether to show progress bars.
    """

    def __init__(self, rows: CurvatureRows, unfinished: Path | None, progress: bool) -> None:
        self.rows, self.progress, split = rows, progress, rows.split
        shares = fingerprint(split.batch_size, split.batch_tokens, split.streamed, count())
        own, common = (
            unfinished and unfinished.with_name(f"{unfinished.name}-{shares}-{n}.safetensors") for n in (rank(), "all")
        )
        self._bookmark, self._common, self._given = Bookmark(own, "unfinished curvature"), common, ""
        self._found = self._bookmark.read()

    def earlier(self, kind: type[A]) -> A | None:
        """What `keep` was given before the fit was killed, if all processes find the same."""
        if self._common is None:
            return None
        found = None
        with contextlib.suppress(FileNotFoundError, ArtefactError):  # it only saves time
            found = kind.load(self._common)
        given = found.fingerprint if found is not None else ""
        if set(gather(given)) != {given}:
            return None
        self._given = given
        return found

    def keep(self, result: Artefact) -> None:
        """Write down what the passes so far have come to, the same in all processes, for those that build on it."""
        if self._common is not None:
            path, self._given = self._common, result.fingerprint
            from_main(lambda: result.save(path))

    def batches(
        self, what: str, sums: Sequence[Tensor], kept: dict[int, T] | None = None
    ) -> Iterator[tuple[int, Iterable[Gradients] | T]]:
        """One pass.

        Args:
            what: What it makes, for the progress bar.
            sums: The sums of this process, to which the caller adds a batch before it takes the next one. They are
                replaced by those of a killed fit, and the batches in them left out.
            kept: What the caller has of some batches, by their numbers, to be given instead of their rows. Emptied.

        Yields:
            Number and rows of each batch.
        """
        start, kept = self._resume(what, sums), kept if kept is not None else {}
        computed = self.rows.by_batch(without={*range(start), *kept})
        with tqdm(initial=start, desc=what, unit="batches", leave=False, disable=not self.progress) as bar:
            for number in itertools.count(start):
                batch = kept.pop(number) if number in kept else next(computed, None)
                if batch is None:
                    return
                yield number, batch
                self._bookmark.put(functools.partial(self._standing, what, sums, number + 1))
                bar.update()

    def _standing(
        self, what: str, sums: Sequence[Tensor], batches: int
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        arrays = {str(number): total.cpu().numpy() for number, total in enumerate(sums)}
        notes = {"pass": what, "given": self._given, "batches": batches, "most_rows": self.rows.split.most_rows}
        return arrays, notes

    def _resume(self, what: str, sums: Sequence[Tensor]) -> int:
        """The number of batches that are in the sums."""
        found, self._found = self._found, None
        if found is None or (found[1]["pass"], found[1]["given"]) != (what, self._given):
            return 0
        arrays, notes = found
        for number, total in enumerate(sums):
            total.copy_(torch.from_numpy(arrays[str(number)]))
        self.rows.split.most_rows = notes["most_rows"]
        return int(notes["batches"])
