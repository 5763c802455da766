"""The states of a run from its end to its beginning, kept in memory or computed again."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from hf_attribution.replay.optimizers import State
from hf_attribution.replay.run import Replay

STORAGES = ("full", "sqrt", "tree")

# Of the tree: into how many parts a stretch of steps is cut, and steps that are kept whole.
_BRANCHES = 4


class Moment(NamedTuple):
    """A step of the run.

    Args:
        step: Its number.
        before: The state before it.
        after: The state after it.
        gradient: The gradient before clipping, `[P]`.
    """

    step: int
    before: State
    after: State
    gradient: Tensor


def backward_in_time(replay: Replay, first: int, storage: str, end: int | None = None) -> Iterator[Moment]:
    """The steps of a run, the last one first; all storages give the same bits.

    Args:
        replay: The run.
        first: The step to go back to.
        storage: `"full"`: run once and keep every state. `"sqrt"`: keep about √T states (a recorded run has them on
            disk) and run each stretch between them again. `"tree"`: cut stretches again and again, so that states
            grow with the logarithm of the steps, and so do repetitions (Engstrom et al. 2025, section 3).
        end: The step to go back from, by default the end of the run.

    Yields:
        Each step.
    """
    recording = replay.recording
    end = len(recording) if end is None else end
    kept = [step for step in recording.checkpoints if step < end]
    # Another training than the recorded one shares only its beginning.
    starts = [kept[0]] if storage == "full" or replay.weights is not None else kept
    for start, stop in reversed(list(zip(starts, [*starts[1:], end], strict=True))):
        if stop <= first:
            return
        steps = stop - start
        whole = {"full": steps, "sqrt": steps if len(starts) > 1 else math.isqrt(steps) + 1, "tree": _BRANCHES}[
            storage
        ]
        branches = _BRANCHES if storage == "tree" else max(2, math.ceil(steps / whole))
        yield from _stretch(replay, recording.state(start), start, stop, first, whole, branches)


def _stretch(
    replay: Replay, state: State, start: int, stop: int, first: int, whole: int, branches: int
) -> Iterator[Moment]:
    """The steps from `start` to `stop`, backwards."""
    if stop - start <= whole:
        states, gradients = [state], []
        replay.load(start, state)
        for _ in range(start, stop):
            gradients.append(replay.advance())
            states.append(replay.state())
        for step in range(stop - 1, max(start, first) - 1, -1):
            after = states.pop()
            yield Moment(step, states[-1], after, gradients.pop())
        return
    size = math.ceil((stop - start) / branches)
    cuts = list(range(start, stop, size))
    states = [state]
    replay.load(start, state)
    for step in range(start, cuts[-1]):
        replay.advance()
        if step + 1 in cuts:
            states.append(replay.state())
    for cut, end in reversed(list(zip(cuts, [*cuts[1:], stop], strict=True))):
        if end > first:
            yield from _stretch(replay, states.pop(), cut, end, first, whole, branches)
