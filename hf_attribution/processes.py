"""Several processes that attribute together: each takes its share of every pass over data, and the shares are joined.

Under `accelerate launch` (or torchrun, or srun) all processes run the same program with the same arguments. Of a pass
that is shared each process takes every W-th batch, and what came of it is added up, or put in order, over the
processes. What each of them holds in the end is what one process would hold.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from hf_attribution.team import Team, launched

T = TypeVar("T")

# Batches of a process that are exchanged at once.
AT_ONCE = 16

# Numbers that are added up at once.
_CHUNK = 2**24


def count() -> int:
    """How many processes share the work: 1 outside of `sharing`."""
    return _team.size if _team is not None else 1


def is_main() -> bool:
    """Whether this process writes files and shows progress: the first one of those that share the work."""
    return _team is None or _team.rank == 0


def rank() -> int:
    """The number of this process among those that share the work: 0 outside of `sharing`."""
    return _team.rank if _team is not None else 0


def share(items: Iterable[T]) -> Iterator[T]:
    """This process's share of a pass.

    Args:
        items: The whole pass, the same in all processes.

    Returns:
        Every `count()`-th item.

    Example:
        >>> list(share("abc"))
        ['a', 'b', 'c']
    """
    return itertools.islice(items, _team.rank, None, _team.size) if _team is not None else iter(items)


def add_up(*parts: Tensor | np.ndarray) -> None:
    """Replace numbers by their sums over the processes, in place. Where all but one hold 0, nothing is rounded.

    Args:
        *parts: Contiguous tensors or arrays of the same shapes and types in all processes.
    """
    if _team is None:
        return
    flat = [(torch.from_numpy(part) if isinstance(part, np.ndarray) else part).detach().view(-1) for part in parts]
    for kind in dict.fromkeys(part.dtype for part in flat):
        pieces = [piece for part in flat if part.dtype == kind for piece in part.split(_CHUNK)]
        while pieces:
            ends = list(itertools.accumulate(len(piece) for piece in pieces))
            taken = max(1, sum(end <= _CHUNK for end in ends))
            _team.add_up(pieces[:taken])
            del pieces[:taken]


def in_order(batches: Iterable[tuple[Tensor, ...]], at_once: int = AT_ONCE) -> Iterator[tuple[Tensor, ...]]:
    """All processes' batches, in the order in which one process would have made them.

    Args:
        batches: This process's share of them: tensors `[B, ...]`, of one kind in all batches and processes.
        at_once: How many batches of each process are exchanged, and held in memory, at once.

    Yields:
        The batches of all processes, on the device of the process group.
    """
    if _team is None:
        yield from batches
        return
    stream = iter(batches)
    while True:
        own = list(itertools.islice(stream, at_once))
        sizes = _team.gather([len(batch[0]) for batch in own])
        found = [list(zip(*(field.split(n) for field in fields), strict=True)) for n, fields in _fields(own, sizes)]
        for number in range(len(sizes[0])):  # the first process has as many batches as any
            yield from (batches[number] for batches in found if number < len(batches))
        if len(sizes[0]) < at_once:
            return


def gather(value: Any) -> list[Any]:
    """What all processes have, in the order of their ranks; it must be picklable."""
    return _team.gather(value) if _team is not None else [value]


def from_main(function: Callable[[], T]) -> T:
    """What a function returns in the main process, which alone runs it, and shares nothing while it does."""
    if _team is None:
        return function()
    team, found = _team, None
    if team.rank == 0:
        with _as_team(None):
            found = function()
    return team.from_main(found)


@contextlib.contextmanager
def sharing(what: str) -> Iterator[None]:
    """Share passes over data with the other processes of a launch for a while. They all enter, and leave together.

    Args:
        what: What they do, for messages.

    Raises:
        ProcessError: If another process fails, dies or falls silent, in all that wait for it.

    Example:
        >>> with sharing("attribute"):
        ...     count()  # under `accelerate launch --num_processes 2` it is 2
        1
    """
    if _team is not None or not launched():
        yield
        return
    team = Team(what)
    with team.alive():
        try:
            team.meet()
            with _as_team(team):
                yield
            team.meet()
        except BaseException as error:
            team.tell(error)
            raise


_team: Team | None = None


@contextlib.contextmanager
def _as_team(team: Team | None) -> Iterator[None]:
    global _team
    before, _team = _team, team
    try:
        yield
    finally:
        _team = before


def _fields(own: list[tuple[Tensor, ...]], sizes: list[list[int]]) -> list[tuple[list[int], list[Tensor]]]:
    """For each process the sizes of its batches, and their fields, joined."""
    assert _team is not None
    if not sizes[0]:
        return [(each, []) for each in sizes]
    kinds = _team.from_main([(field.shape[1:], field.dtype) for field in own[0]] if own else None)
    joined = [torch.cat(fields) for fields in zip(*own, strict=True)] or [
        torch.empty(0, *s, dtype=d) for s, d in kinds
    ]
    counts = [sum(each) for each in sizes]
    gathered = [_team.gather_rows(field, counts) for field in joined]
    return [(each, [rows[number] for rows in gathered]) for number, each in enumerate(sizes)]
