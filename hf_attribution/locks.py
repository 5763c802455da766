"""Locks on what is being made in a folder that several jobs use."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.utils import logging

logger = logging.get_logger(__name__)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock on the making of a file or folder, and wait for whoever holds it; it is freed when they die.

    Args:
        path: What is made; the lock is `<path>.lock`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning(f"Another job computes {path}: waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
