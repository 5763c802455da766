"""How far retrainings have come, seen from one process: their results, a bar, and what trackers are told."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import Trainer, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging

from hf_attribution.retraining.worklist import Run, WorkList

logger = logging.get_logger(__name__)

Tracker = Callable[[dict[str, float]], None]

_EVERY_SECONDS = 0.5


class Progress:
    """Reads results as they appear, whoever wrote them. A context: the bar is closed at its end.

    Args:
        worklist: The runs' folder.
        runs: The runs to be done.
        bar: Whether to show a bar.
        tracker: Told the numbers whenever runs have been finished.
    """

    def __init__(self, worklist: WorkList, runs: Sequence[Run], bar: bool, tracker: Tracker | None = None) -> None:
        self.worklist, self.finished, self._tracker = worklist, dict[Run, tuple[np.ndarray, float]](), tracker
        self._missing = list(runs)
        self._looked = 0.0
        self.refresh()
        self.found = len(self.finished)  # by an earlier call
        self._bar = tqdm(total=len(runs), initial=self.found, desc="Retraining", unit="run", disable=not bar)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()

    def missing(self) -> list[Run]:
        """The runs that are not finished now."""
        new = self.refresh()
        if new:
            self._bar.update(new)
            self._tell()
        return self._missing

    def glance(self) -> None:
        """The same, if it is some time since the last look at the folder."""
        if time.monotonic() - self._looked > _EVERY_SECONDS:
            self.missing()

    def refresh(self) -> int:
        """Read what has been finished, and say how many runs that are."""
        new = {run: self.worklist.read(run) for run in self._missing if self.worklist.is_finished(run)}
        self._missing = [run for run in self._missing if run not in new]
        self.finished.update(new)
        self._looked = time.monotonic()
        return len(new)

    def _tell(self) -> None:
        if self._tracker is None:
            return
        outputs, seconds = zip(*self.finished.values(), strict=True)
        numbers = {
            "finished": len(outputs),
            "seconds_per_run": float(np.mean(seconds)),
            "mean_measurement": float(np.mean(outputs)),
        }
        try:
            self._tracker({f"retraining/{name}": value for name, value in numbers.items()})
        except Exception as error:
            # Hours of trainings are not broken off because a tracker cannot be reached.
            logger.error(f"The progress of retraining is no longer reported: {type(error).__name__}: {error}")
            self._tracker = None


def trainer_tracker(trainer: Trainer) -> Tracker | None:
    """Tells the trackers of `report_to`, through the Trainer's own callbacks, under names of their own.

    The step of these numbers is the count of finished retrainings; state and control of the user's run are not
    touched.

    Args:
        trainer: The user's trainer.

    Returns:
        The function, or `None` where nothing is reported to.
    """
    kinds = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
    callbacks = [each for each in trainer.callback_handler.callbacks if isinstance(each, kinds)]
    if not callbacks or not trainer.is_world_process_zero():
        return None

    def tell(numbers: dict[str, float]) -> None:
        state = TrainerState(global_step=int(numbers["retraining/finished"]))
        control = dataclasses.replace(trainer.control)
        for callback in callbacks:
            callback.on_log(trainer.args, state, control, model=trainer.model, logs=dict(numbers))

    return tell
