"""Seeds that depend on what they are for, and random state that is put back."""

import contextlib
import pickle
import random
from collections.abc import Iterator

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
