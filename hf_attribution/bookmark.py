"""Where unfinished work stands, kept in a file, so that the same call goes on from there after it was killed."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_attribution.artefacts import read_artefact, write_artefact
from hf_attribution.errors import ArtefactError

EVERY_SECONDS = 60.0
SHARE = 20  # of the time at least 19/20 go into the work


class Bookmark:
    """A file for where some work stands, written every minute, and less often where writing takes long.

    Args:
        path: The file, or `None` for none. Its name says which work: what is in it is believed.
        kind: What kind of work.
    """

    def __init__(self, path: Path | None, kind: str) -> None:
        self._path, self._kind, self._next = path, kind, time.monotonic() + EVERY_SECONDS

    def read(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Arrays and notes of where the work was when an earlier call ended; `None` if there is no sound file."""
        try:
            return read_artefact(self._path, self._kind) if self._path is not None else None
        except (FileNotFoundError, ArtefactError):
            return None  # it only saves time

    def put(self, standing: Callable[[], tuple[Mapping[str, np.ndarray], Mapping[str, Any]]]) -> None:
        """Write down where the work stands, if it is time to.

        Args:
            standing: Gives arrays and notes (JSON) from which the work can go on.
        """
        started = time.monotonic()
        if self._path is None or started < self._next:
            return
        write_artefact(self._path, self._kind, *standing())
        ended = time.monotonic()
        self._next = ended + max(EVERY_SECONDS, (SHARE - 1) * (ended - started))

    def remove(self) -> None:
        """Delete the file: all is finished."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def forget(*unfinished: Path | None) -> None:
    """Delete the files whose names begin so: what they were kept for is there."""
    for begun in filter(None, unfinished):
        for name in (f"{begun.name}-*", f".{begun.name}-*.tmp"):  # the latter of a kill while writing
            for path in begun.parent.glob(name):
                path.unlink(missing_ok=True)
