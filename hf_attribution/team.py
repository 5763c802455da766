"""The processes of a launch, who wait for each other and find out when one is lost.

They wait in a key-value store, where each leaves a sign of life every few seconds, and only then exchange anything. So
none hangs when another has died, however uneven their work is, and whatever the time-out of the process group.
"""

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor
from transformers.utils import logging

from hf_attribution.errors import ProcessError

logger = logging.get_logger(__name__)

# Seconds between two signs of life, between looks at those of others, and of silence that means death.
HEARTBEAT, LOOK, SILENCE = 5.0, 1.0, 30.0

_REMEDY = "All processes stop. Start the same command again; what is finished in cache_dir is not computed anew."

_number = itertools.count()


class Team:
    """The processes of a launch, for one piece of work."""

    def __init__(self, what: str) -> None:
        own = state()
        self.what, self.size, self.rank, self.device = what, own.num_processes, own.process_index, own.device
        self._prefix = f"hf_attribution {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} {next(_number)}"
        self._store, self._meetings = self._connect(), 0
        self._last_signs: dict[int, tuple[bytes, float]] = {}
        self._started, self._warned = time.monotonic(), False

    def _connect(self) -> dist.Store:
        """A connection of its own to the store by which the launcher's processes found each other."""
        try:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except KeyError as error:
            raise ProcessError(f"{error.args[0]} is not set: start the processes by accelerate launch.") from error
        return dist.PrefixStore(self._prefix, dist.TCPStore(address, port, is_master=False))

    def meet(self) -> None:
        """Wait until all processes are here, or find out that one will not come."""
        self._meetings += 1
        key = f"meeting {self._meetings}"
        try:
            if self._store.add(key, 1) == self.size:
                self._store.set(f"{key} is complete", "1")
            pause, looked = 1e-4, time.monotonic()
            while not self._store.check([f"{key} is complete"]):
                time.sleep(pause)
                pause = min(1.5 * pause, 0.05)
                if time.monotonic() - looked > LOOK:
                    self._look()
                    looked = time.monotonic()
            if self.rank == 0:  # all have left the one before
                self._store.delete_key(f"meeting {self._meetings - 1}")
                self._store.delete_key(f"meeting {self._meetings - 1} is complete")
        except RuntimeError as error:
            raise ProcessError(f"{self.what}: the connection to process 0 is lost ({error}). {_REMEDY}") from error

    def _look(self) -> None:
        """Whether all others live."""
        if self._store.check(["failure"]):
            raise ProcessError(f"{self.what}: {self._store.get('failure').decode()} {_REMEDY}")
        now, absent = time.monotonic(), []
        for process in range(self.size):
            if not self._store.check([f"alive {process}"]):
                absent.append(str(process))
                continue
            sign = self._store.get(f"alive {process}")
            last, since = self._last_signs.get(process, (b"", now))
            if sign != last:
                self._last_signs[process] = (sign, now)
            elif now - since > SILENCE:
                raise ProcessError(
                    f"{self.what}: process {process} has given no sign of life for {SILENCE:.0f} seconds: it was "
                    f"killed (out of memory?), stopped, or its machine is gone. {_REMEDY}"
                )
        if absent and now - self._started > SILENCE and not self._warned:
            self._warned = True
            logger.warning(f"Waiting for process {', '.join(absent)} to call {self.what}, too: all of a launch must.")

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Leave signs of life for a while."""
        over, store = threading.Event(), self._connect()
        signs = itertools.count()

        def beat() -> None:
            with contextlib.suppress(RuntimeError):  # without a store nobody looks
                store.set(f"alive {self.rank}", str(next(signs)))
                while not over.wait(HEARTBEAT):
                    store.set(f"alive {self.rank}", str(next(signs)))

        heart = threading.Thread(target=beat, daemon=True)
        heart.start()
        try:
            yield
        finally:
            over.set()
            heart.join()

    def tell(self, error: BaseException) -> None:
        """Let the others know why this process stops."""
        if not isinstance(error, ProcessError):
            text = f"process {self.rank} stopped with {type(error).__name__}: {error}."
            with contextlib.suppress(RuntimeError):
                self._store.compare_set("failure", "", text)

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        self.meet()
        try:
            yield
        except RuntimeError as error:
            raise ProcessError(f"{self.what}: another process is lost ({error}). {_REMEDY}") from error

    def add_up(self, pieces: Sequence[Tensor]) -> None:
        """Add up flat tensors of one type in one exchange."""
        joined = pieces[0].to(self.device) if len(pieces) == 1 else torch.cat([p.to(self.device) for p in pieces])
        with self._exchange():
            dist.all_reduce(joined)
        for piece, found in zip(pieces, joined.split([len(piece) for piece in pieces]), strict=True):
            if found.data_ptr() != piece.data_ptr():
                piece.copy_(found)

    def gather(self, value: Any) -> list[Any]:
        """Picklable things of all processes."""
        found = [None] * self.size
        with self._exchange():
            dist.all_gather_object(found, value)
        return found

    def from_main(self, value: Any) -> Any:
        """A picklable thing of the main process."""
        found = [value]
        with self._exchange():
            dist.broadcast_object_list(found, src=0, device=self.device)
        return found[0]

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Rows `[n, ...]` of all processes, of which each has its own number, known to all."""
        padded = rows.new_zeros(max(counts), *rows.shape[1:], device=self.device)
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in counts]
        with self._exchange():
            dist.all_gather(found, padded)
        return [each[:n] for each, n in zip(found, counts, strict=True)]


def launched() -> bool:
    """Whether this process is one of several of a launch."""
    return dist.is_available() and (dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1)


def state() -> PartialState:
    """Accelerate's state of this process, as its `Accelerator` would make it: rank, device, process group."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
