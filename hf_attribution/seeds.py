"""Seeds that depend on what they are for, and random state that is put back."""

import contextlib
import pickle
import random
from array import array
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import xxhash


def derive_seed(*parts: int | str) -> int:
    """A seed of its own for every purpose, the same in every process.

    Args:
        *parts: What the seed is for, for example a base seed, a parameter's name and a block.

    Returns:
        An integer in `[0, 2**31)`.

    Example:
        >>> derive_seed(0, "classifier.weight") == derive_seed(0, "classifier.weight")
        True
    """
    return xxhash.xxh3_64_intdigest("\x1f".join(map(str, parts)).encode()) & 0x7FFFFFFF


def generator(seed: int) -> torch.Generator:
    """A generator of random numbers on the CPU, which are the same wherever the model is."""
    return torch.Generator().manual_seed(seed)


def random_state() -> bytes:
    """The states of Python's, NumPy's and torch's generators, to tell whether anything was drawn from them."""
    legacy_numpy = np.random.get_state()  # noqa: NPY002
    return pickle.dumps((random.getstate(), legacy_numpy, torch.get_rng_state().numpy().tobytes()))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's generators for a while, and put their states back after it."""
    python, legacy_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (collators draw from it)
    with torch.random.fork_rng():
        try:
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy_numpy)  # noqa: NPY002


class RandomState(NamedTuple):
    """The states of all generators that a training step or a data collator may draw from, as bytes `[...]` uint8.

    Example:
        >>> state = RandomState.now()
        >>> first = torch.rand(())
        >>> state.restore()
        >>> bool(torch.rand(()) == first)
        True
    """

    torch_cpu: np.ndarray
    torch_device: np.ndarray
    python: np.ndarray
    numpy: np.ndarray

    @classmethod
    def now(cls) -> "RandomState":
        """The states as they are."""
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = np.empty(0, np.uint8)
        if accelerator is not None:
            device = torch.get_device_module(accelerator).get_rng_state().numpy().copy()
        _, words, gauss = random.getstate()
        _, keys, *rest = np.random.get_state()  # noqa: NPY002 (collators draw from it)
        return cls(
            torch.get_rng_state().numpy().copy(),
            device,
            # by way of `array`, which takes a tuple of Python's integers five times as fast as NumPy
            _bytes(np.frombuffer(array("I", words), np.uint32), np.array([np.nan if gauss is None else gauss])),
            _bytes(np.asarray(keys, np.uint32), np.array(rest, np.float64)),
        )

    def restore(self) -> None:
        """Put the states back."""
        torch.set_rng_state(torch.from_numpy(self.torch_cpu.copy()))
        if self.torch_device.size:
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            torch.get_device_module(accelerator).set_rng_state(torch.from_numpy(self.torch_device.copy()))
        words, gauss = self.python[:-8].view(np.uint32), float(self.python[-8:].view(np.float64)[0])
        random.setstate((3, tuple(words.tolist()), None if np.isnan(gauss) else gauss))
        keys, (position, has_gauss, cached) = self.numpy[:-24].view(np.uint32), self.numpy[-24:].view(np.float64)
        np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))  # noqa: NPY002

    def packed(self) -> np.ndarray:
        """All of it in one array of bytes."""
        sizes = np.array([part.size for part in self], np.int64)
        return np.concatenate([sizes.view(np.uint8), *self])

    @classmethod
    def unpacked(cls, packed: np.ndarray) -> "RandomState":
        """What `packed` packed."""
        sizes = packed[: 8 * len(cls._fields)].view(np.int64)
        return cls(*np.split(packed[8 * len(cls._fields) :], np.cumsum(sizes)[:-1]))


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever is drawn in the block, afterwards the generators are where they were."""
    state = RandomState.now()
    try:
        yield
    finally:
        state.restore()


def _bytes(*arrays: np.ndarray) -> np.ndarray:
    return np.concatenate([array.view(np.uint8) for array in arrays])
