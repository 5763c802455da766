"""Training data that come as a stream: no length, no positions, the same rows in the same order at every pass."""

import itertools
import pickle
from collections.abc import Container, Iterable, Iterator
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
import xxhash

from hf_attribution.columns import plain
from hf_attribution.data import FIRST_ROWS, Batch, Collator, Split, share_without
from hf_attribution.errors import MismatchError, UnsupportedError


class StreamSplit(Split):
    """A stream as a model sees it: rows are numbered as they come, and every pass must bring the same ones.

    Its length and its fingerprint are known once it was read to the end; asking for them before reads it. Batches are
    neighbours in the stream: nothing is sorted by length, and only one batch of rows is in memory.

    Args:
        dataset: A `datasets.IterableDataset`, or anything else that can be iterated over again and again.
        collator: The data collator of training.
        batch_size: Rows in a batch.
        name: What error messages call it.
        seed: Seed of the rows' own draws.

    Raises:
        ValueError: If the stream is empty.
        UnsupportedError: If it can be read but once.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import default_data_collator
        >>> stream = Dataset.from_dict({"x": [0.0, 1.0, 2.0]}).to_iterable_dataset()
        >>> split = StreamSplit(stream, default_data_collator, batch_size=2)
        >>> [batch.indices.tolist() for batch in split.batches()]
        [[0, 1], [2]]
        >>> len(split)
        3
    """

    streamed: ClassVar[bool] = True

    def __init__(
        self, dataset: Any, collator: Collator, batch_size: int = 32, name: str = "train", seed: int = 0
    ) -> None:
        if iter(dataset) is dataset:
            raise UnsupportedError(
                f"The {name} dataset is a {type(dataset).__name__}, which can be read once only: give a "
                "`datasets.IterableDataset` (`IterableDataset.from_generator` makes one), which begins again."
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        self.dataset, self.collator, self.batch_size, self.name, self.seed = dataset, collator, batch_size, name, seed
        self._first = dict(enumerate(itertools.islice(dataset, FIRST_ROWS)))
        if not self._first:
            raise ValueError(f"The {name} dataset is empty.")
        self._at_hand: dict[int, Any] = {}
        self._read_before: tuple[int, str] | None = None

    def __len__(self) -> int:
        return self._identity[0]

    @property
    def fingerprint(self) -> str:
        """A hash of the rows, in their order. 32 hex digits."""
        return self._identity[1]

    def fingerprint_of_first(self, rows: int) -> NoReturn:
        """Refused: a stream has no beginning that could be taken alone."""
        self._refuse("The fingerprint of its beginning")

    def rows(self, indices: Iterable[int]) -> list[Any]:
        """Rows of the batch at hand, or of the first few; others are refused."""
        held = {**self._first, **self._at_hand}
        try:
            return [held[int(index)] for index in indices]
        except KeyError:
            self._refuse("Reading rows by their positions")

    def batches(
        self,
        skip: np.ndarray | None = None,
        only: np.ndarray | None = None,
        shared: bool = False,
        without: Container[int] = (),
    ) -> Iterator[Batch]:
        """Batches that hold every row exactly once, in the order of the stream.

        Args:
            skip: Rows that are not needed, of as many as are known. Batches of such rows alone are left out.
            only: Refused.
            shared: Whether the processes of a launch share the pass. Each reads the whole stream.
            without: Which of the batches that this process would yield it leaves out, by their numbers from 0 on.

        Yields:
            Row indices and inputs.
        """
        if only is not None:
            self._refuse("Choosing rows")
        chunks = (chunk for chunk in self._chunks() if not _all_marked(skip, chunk))
        if self.draws_random_numbers:
            drawn = (batch for chunk in chunks for batch in self._drawn_batches(self._take(chunk)))
            yield from share_without(drawn, shared, without)
        else:
            for chunk in share_without(chunks, shared, without):
                rows = [dict(row) if isinstance(row, dict) else row for row in chunk.values()]
                yield Batch(torch.tensor(list(chunk)), dict(self.collator(rows)))

    @property
    def _ends(self) -> list[int]:
        return [0, len(self._first) - 1]

    @property
    def _num_first(self) -> int:
        return len(self._first)

    @property
    def _identity(self) -> tuple[int, str]:
        """Number of rows and fingerprint."""
        if self._read_before is None:
            for _ in self._pass():
                pass
        assert self._read_before is not None
        return self._read_before

    def _pass(self) -> Iterator[tuple[int, Any]]:
        """All rows with their numbers; at the end it is known whether they are those of the last pass."""
        digest, count = xxhash.xxh3_128(), 0
        for row in self.dataset:
            digest.update(pickle.dumps(plain(row)))
            yield count, row
            count += 1
        before, now = self._read_before, (count, digest.hexdigest())
        if before is not None and before != now:
            raise MismatchError(
                f"The {self.name} stream differs from pass to pass (it had {before[0]} rows, now {count}): give it a "
                "fixed seed, do not shuffle anew at every pass, or save it first with `Dataset.from_generator`."
            )
        self._read_before = now

    def _chunks(self) -> Iterator[dict[int, Any]]:
        rows = self._pass()
        while chunk := dict(itertools.islice(rows, self.batch_size)):
            yield chunk

    def _take(self, chunk: dict[int, Any]) -> np.ndarray:
        self._at_hand = chunk
        return np.array(list(chunk))

    def _refuse(self, what: str) -> NoReturn:
        raise UnsupportedError(
            f"{what} needs random access, and the {self.name} dataset is a stream: save it first "
            "(`Dataset.from_generator`), or use a method that reads the data in passes, such as 'trak'."
        )


class StreamColumns:
    """Stands for the columns of a stream, which cannot be read whole: whatever is asked of it is refused.

    Args:
        name: What error messages call the stream.
    """

    cache_files: ClassVar[tuple[Any, ...]] = ()  # the files of a dataset on this disk

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> NoReturn:
        raise self._refusal()

    def __getitem__(self, key: Any) -> NoReturn:
        raise self._refusal()

    def _refusal(self) -> UnsupportedError:
        return UnsupportedError(
            f"This method reads columns of the {self._name} dataset, which is a stream: save it first "
            "(`Dataset.from_generator`), or use a method that reads the data in passes, such as 'trak'."
        )


def is_stream(dataset: Any) -> bool:
    """Whether a dataset can be iterated over, and has no length."""
    return hasattr(dataset, "__iter__") and not hasattr(dataset, "__len__")


def _all_marked(skip: np.ndarray | None, chunk: dict[int, Any]) -> bool:
    return skip is not None and all(index < len(skip) and skip[index] for index in chunk)
