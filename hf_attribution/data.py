"""Deterministic passes over a dataset: every row once, with its index, whatever the batch size."""

import functools
import pickle
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
import xxhash
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from transformers.utils import logging

from hf_attribution.columns import hash_rows, is_arrow, is_transformed, plain, token_lengths
from hf_attribution.errors import UnsupportedError
from hf_attribution.processes import share
from hf_attribution.seeds import derive_seed, random_state, seeded

logger = logging.get_logger(__name__)

T = TypeVar("T")

Collator = Callable[[list[Any]], Mapping[str, Any]]


class Batch(NamedTuple):
    """Rows of a dataset, collated: their positions in the dataset `[B]`, and the model's inputs."""

    indices: Tensor
    inputs: dict[str, Any]

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on a device; the indices stay where they are."""
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in self.inputs.items()}
        return Batch(self.indices, moved)

    def part(self, where: slice) -> "Batch":
        """Some rows of the batch, padded as they are."""
        inputs = {
            key: value[where] if isinstance(value, Tensor) and value.shape[:1] == self.indices.shape else value
            for key, value in self.inputs.items()
        }
        return Batch(self.indices[where], inputs)


# Bytes up to which the rows of a dataset are kept in memory: methods read them many times, and `datasets` takes longer
# to make tensors of nested lists than a small model to learn from them.
KEPT_BYTES = 2**28

# Rows at the beginning that show what a collator does.
FIRST_ROWS = 8


class Split:
    """A dataset as a model sees it: its rows through the data collator, in batches, in a fixed order.

    Rows are bucketed by length, so that little is padded. A collator that draws random numbers (masking, image
    augmentation) is called row by row under a seed of the row's own, and only rows of equal shape share a batch:
    a row's inputs depend on nothing but the row.

    Args:
        dataset: A map-style dataset, usually a `datasets.Dataset`.
        collator: The data collator of training.
        batch_size: Rows in a batch.
        name: What error messages call it, `"train"` or `"query"`.
        seed: Seed of the rows' own draws.
        batch_tokens: Tokens in a batch, padding included, instead of `batch_size`: many short rows, or few long ones.

    Raises:
        ValueError: If the dataset is empty, or `batch_tokens` is given and it has no `input_ids`.
        UnsupportedError: If the dataset has no length, or the collator keeps random state of its own.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import default_data_collator
        >>> split = Split(Dataset.from_dict({"x": [0.0, 1.0, 2.0]}), default_data_collator, batch_size=2)
        >>> [batch.indices.tolist() for batch in split.batches()]
        [[0, 1], [2]]
    """

    streamed: ClassVar[bool] = False
    batch_tokens: int | None = None
    most_rows: int | None = None  # that fit in memory at once, where more have not

    def __init__(
        self,
        dataset: Any,
        collator: Collator,
        batch_size: int = 32,
        name: str = "train",
        seed: int = 0,
        batch_tokens: int | None = None,
    ) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise UnsupportedError(
                f"The {name} dataset is a {type(dataset).__name__} without length or positions: scores are rows and "
                "columns of a dataset, so give a map-style one (`Dataset.from_generator` makes one from a stream)."
            )
        if len(dataset) == 0:
            raise ValueError(f"The {name} dataset is empty.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        if batch_tokens is not None and batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, not {batch_tokens}.")
        self.dataset, self.collator, self.batch_size, self.name, self.seed = dataset, collator, batch_size, name, seed
        self.batch_tokens = batch_tokens
        self._kept: dict[int, Any] = {}
        if batch_tokens is not None and self._lengths is None:
            raise ValueError(
                f"batch_tokens={batch_tokens} counts the column input_ids, which the {name} dataset has not: give "
                "batch_size."
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def rows(self, indices: Iterable[int]) -> list[Any]:
        """Rows as the collator takes them."""
        indices = [int(index) for index in indices]
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(indices)
        return [self.dataset[index] for index in indices]

    def batches(
        self,
        skip: np.ndarray | None = None,
        only: np.ndarray | None = None,
        shared: bool = False,
        without: Container[int] = (),
    ) -> Iterator[Batch]:
        """Batches that hold every row exactly once.

        Args:
            skip: Rows that are not needed, `[N]` bool. Batches of such rows alone are left out; the others stay what
                they are, so that a pass that is resumed computes the same numbers.
            only: Rows to make batches of, `[N]` bool; all by default.
            shared: Whether the processes of a launch share the pass, so that each yields some of the batches: the same
                ones that one process would yield.
            without: Which of the batches that this process would yield it leaves out, by their numbers from 0 on.

        Yields:
            Row indices and inputs.
        """
        order = self._order if only is None else self._order[only[self._order]]
        if self.draws_random_numbers:
            drawn = self._drawn_batches(order)
            needed = (batch for batch in drawn if skip is None or not skip[batch.indices].all())
            yield from share_without(needed, shared, without)
        else:
            chunks = (chunk for chunk in self._row_chunks(order) if skip is None or not skip[chunk].all())
            for indices in share_without(chunks, shared, without):
                yield Batch(torch.from_numpy(indices), dict(self.collator(self._read(indices.tolist()))))

    def in_parts(self, function: Callable[[Batch], T], batch: Batch) -> list[T]:
        """What a function makes of a batch, or of its halves, quarters, ... once memory has run out.

        How many rows fit is remembered for the batches that follow; what was finished is kept.

        Args:
            function: Takes a batch of any number of rows.
            batch: The batch.

        Returns:
            What the function returned, by rows in order.

        Raises:
            RuntimeError: If a single row does not fit in memory; the message names it.
        """
        found: list[T] = []
        start, total = 0, len(batch.indices)
        rows = min(total, self.most_rows or total)
        while start < total:
            part = batch.part(slice(start, start + rows))
            try:
                found.append(function(part))
                start += rows
                continue
            except RuntimeError as error:
                if not runs_out_of_memory(error):
                    raise
                if rows == 1:
                    raise type(error)(
                        f"{self.name} row {int(part.indices[0])} alone does not fit in memory: shorten it, or take "
                        f"fewer parameters with modules=[...]. {error}"
                    ) from error
            # Not in the handler: its traceback holds the tensors that are in the way.
            clear_device_cache(garbage_collection=True)
            rows = self.most_rows = (rows + 1) // 2
            logger.warning(f"Out of memory: going on with batches of at most {rows} {self.name} rows.")
        return found

    def _row_chunks(self, order: np.ndarray) -> Iterator[np.ndarray]:
        """The rows of each batch."""
        start = 0
        while start < len(order):
            rows = self._capacity(order[start])
            yield order[start : start + rows]
            start += rows

    def _capacity(self, longest: int) -> int:
        """How many rows a batch holds of which this row is the longest."""
        if self.batch_tokens is None or self._lengths is None:
            return self.batch_size
        return max(1, self.batch_tokens // max(1, int(self._lengths[longest])))

    def _read(self, indices: list[int]) -> list[Any]:
        """Rows that are always the same, kept for the next pass where all of them are small."""
        missing = [index for index in indices if index not in self._kept]
        read = dict(zip(missing, self.rows(missing), strict=True)) if missing else {}
        if self._small:
            self._kept.update(read)
        found = (self._kept[index] if index in self._kept else read[index] for index in indices)
        # Some collators take columns out of the rows they are given.
        return [dict(row) if isinstance(row, dict) else row for row in found]

    @functools.cached_property
    def _small(self) -> bool:
        return len(self) * len(pickle.dumps(plain(self.rows([0])[0]))) <= KEPT_BYTES

    def _drawn_batches(self, order: np.ndarray) -> Iterator[Batch]:
        waiting: list[tuple[int, dict[str, Any]]] = []
        for index in order:
            inputs = self._drawn(int(index))
            if waiting and (
                len(waiting) == self._capacity(waiting[0][0]) or _shapes(waiting[0][1]) != _shapes(inputs)
            ):
                yield _stack(waiting)
                waiting = []
            waiting.append((int(index), inputs))
        if waiting:
            yield _stack(waiting)

    def probe(self) -> Batch:
        """A batch of two to try things on: the first and the last row, or the first twice."""
        ends = self._ends
        if not self.draws_random_numbers:
            return Batch(torch.tensor(ends), dict(self.collator(self.rows(ends))))
        first, last = ((index, self._drawn(index)) for index in ends)
        return _stack([first, last if _shapes(last[1]) == _shapes(first[1]) else first])

    @functools.cached_property
    def draws_random_numbers(self) -> bool:
        """Whether rows or collator depend on a random number generator."""
        ends = self._ends
        first = [self._drawn(index, seed=0) for index in ends]
        # A few looks, since drawing rarely (or masking few tokens) may by chance come out the same.
        if not all(_equal(first, [self._drawn(index, seed=0) for index in ends]) for _ in range(7)):
            raise UnsupportedError(
                f"The {self.name} data differ at every look, even from the same random seeds: the data collator keeps "
                "a generator of its own. Leave its `seed` unset, or apply it once with `dataset.map`."
            )
        with seeded(0):
            before = random_state()
            for index in ends:
                self.collator(self.rows([index]))
            return random_state() != before

    @property
    def columns(self) -> list[str] | None:
        """The columns that the fingerprint is of; None where the dataset has none."""
        return list(self.dataset.column_names or ()) or None if is_arrow(self.dataset) else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the rows' contents and types, the same in every process. 32 hex digits."""
        return self.fingerprint_of_first(len(self))

    def fingerprint_of_first(self, rows: int) -> str:
        """The fingerprint of a dataset of the first rows alone."""
        digest = xxhash.xxh3_128()
        if is_arrow(self.dataset):
            hash_rows(self.dataset if rows == len(self) else self.dataset.select(range(rows)), digest)
        if not is_arrow(self.dataset) or is_transformed(self.dataset):
            # A transform's code cannot be hashed; what it makes of the rows can.
            for index in range(rows):
                with seeded(derive_seed(self.seed, index)):
                    digest.update(pickle.dumps(plain(self.rows([index])[0])))
        return digest.hexdigest()

    @functools.cached_property
    def inputs_fingerprint(self) -> str:
        """A hash of what the collator makes of the first few rows, since its code cannot be hashed. 32 hex digits."""
        looks = [self._drawn(index) for index in range(self._num_first)]
        return xxhash.xxh3_128_hexdigest(pickle.dumps(plain(looks)))

    @property
    def _ends(self) -> list[int]:
        """Two rows to try things on."""
        return [0, len(self) - 1]

    @property
    def _num_first(self) -> int:
        """The number of rows at the beginning that are looked at."""
        return min(FIRST_ROWS, len(self))

    @functools.cached_property
    def _order(self) -> np.ndarray:
        lengths = self._lengths
        # Longest first, so that running out of memory happens at once or never; stable, so that it is one order.
        return np.arange(len(self)) if lengths is None else np.argsort(-lengths, kind="stable")

    @functools.cached_property
    def _lengths(self) -> np.ndarray | None:
        return token_lengths(self.dataset)

    def _drawn(self, index: int, seed: int | None = None) -> dict[str, Any]:
        with seeded(derive_seed(self.seed, index) if seed is None else seed):
            return dict(self.collator(self.rows([index])))


def share_without(items: Iterable[T], shared: bool, without: Container[int]) -> Iterator[T]:
    """This process's share of a pass, or all of it, without what has these numbers in it."""
    return (item for number, item in enumerate(share(items) if shared else items) if number not in without)


def runs_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that the memory of a GPU, or of the machine, is used up."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def _shapes(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value.shape) if isinstance(value, Tensor) else None for key, value in inputs.items()}


def _stack(rows: list[tuple[int, dict[str, Any]]]) -> Batch:
    indices = torch.tensor([index for index, _ in rows])
    keys = rows[0][1]
    return Batch(indices, {key: torch.cat([inputs[key] for _, inputs in rows]) for key in keys})


def _equal(left: Any, right: Any) -> bool:
    return pickle.dumps(plain(left)) == pickle.dumps(plain(right))
