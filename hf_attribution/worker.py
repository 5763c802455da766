"""What a worker process of `retrain` runs: it does the runs of a plan with the others, until none is missing.

Nothing heavy is imported before it watches over the process that started it.
"""

import contextlib
import gc
import os
import pickle
import signal
import sys
import threading
import traceback


def main() -> None:
    """Work on the plan that comes in; an error goes back with its traceback."""
    gc.disable()  # while modules are imported: they stay
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that was interrupted ends its workers
    answer = os.dup(1)
    os.dup2(2, 1)  # what users' code prints is no answer
    try:
        parcel = sys.stdin.buffer.read(int.from_bytes(sys.stdin.buffer.read(8), "little"))
        threading.Thread(target=_end_with_parent, daemon=True).start()
        from hf_attribution.retraining.parcels import unpack
        from hf_attribution.retraining.runs import work

        plan, runs = unpack(parcel)
        gc.enable()
        work(plan, lambda: plan.worklist.missing(runs))
    except BaseException as error:
        with os.fdopen(answer, "wb") as stream:
            stream.write(_packed(error, traceback.format_exc()))
        sys.exit(1)


def _end_with_parent() -> None:
    """End at once when the process that started this one has ended: it holds the other end of the input."""
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    os._exit(1)


def _packed(error: BaseException, trace: str) -> bytes:
    """An error that can be raised elsewhere: itself where it survives pickling, or its text."""
    try:
        packed = pickle.dumps((error, trace))
        pickle.loads(packed)
    except Exception:
        packed = pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), trace))
    return packed
