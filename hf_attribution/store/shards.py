"""One file of the store: an Arrow stream whose place for every row is known before any row is.

A shard holds chunks (Arrow's record batches) of equally many rows, all buffers at fixed offsets. So rows can be
written in any order, and what comes out is what `datasets` reads.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Features, List, Value

from hf_attribution.store.precision import STORED

# Bytes of a chunk: what is formed in memory once, to see where Arrow puts things.
CHUNK_BYTES = 2**23

_END = 8  # bytes that end a stream


class _Message(NamedTuple):
    """A chunk in a file: the bytes before its columns, and its size with them."""

    head: bytes
    size: int


class _Chunk(NamedTuple):
    """Rows of a shard that lie together: the first, how many, and where each column begins in the file."""

    start: int
    rows: int
    offsets: dict[str, int]


def create_shard(path: Path, rows: int, dim: int, dtype: str) -> int:
    """Write a shard whose rows are zero, and take its space on the disk.

    Args:
        path: The file.
        rows: Rows in it.
        dim: Dimension of the features.
        dtype: Their number format.

    Returns:
        Bytes of the file.
    """
    chunk_rows = max(1, CHUNK_BYTES // row_bytes(dim, dtype))
    schema, end = _schema(dim, dtype)
    with path.open("wb") as file:
        file.write(schema)
        for first in range(0, rows, chunk_rows):
            message, start = _message(min(chunk_rows, rows - first), dim, dtype), file.tell()
            file.write(message.head)
            file.seek(start + message.size)
        file.write(end)
        size = file.tell()
        file.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
    return size


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """A shard on disk. Where its columns lie is read from the file itself, whichever version of Arrow wrote it.

    Args:
        path: The file.
        dim: Dimension of the features.
        dtype: Their number format.
    """

    path: Path
    dim: int
    dtype: str

    def read(self, start: int, stop: int, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Neighbouring rows of all or some columns, copied out of the memory-mapped file."""
        content = np.memmap(self.path, np.uint8, mode="r")
        columns = _columns(self.dim, self.dtype)
        columns = {name: columns[name] for name in names or columns}
        parts: dict[str, list[np.ndarray]] = {name: [] for name in columns}
        for rows, offsets in self._runs(start, stop):
            for name, (kind, width) in columns.items():
                size = (rows.stop - rows.start) * width * np.dtype(kind).itemsize
                part = content[offsets[name] : offsets[name] + size].view(kind)
                parts[name].append(part.reshape(-1, width) if name == "features" else part)
        return {name: np.concatenate(found) for name, found in parts.items()}

    def write(self, start: int, columns: Mapping[str, np.ndarray]) -> None:
        """Write neighbouring rows, from row `start` on."""
        with self.path.open("r+b", buffering=0) as file:
            for rows, offsets in self._runs(start, start + len(columns["features"])):
                for name, offset in offsets.items():
                    file.seek(offset)
                    _write_all(file, np.ascontiguousarray(columns[name][rows]).view(np.uint8).reshape(-1).data)

    def flush(self) -> None:
        """Wait until the disk has everything."""
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())

    def checksum(self) -> str:
        """A hash of the file's bytes, 32 hex digits, in little memory."""
        digest = xxhash.xxh3_128()
        with self.path.open("rb", buffering=0) as file:
            buffer = memoryview(bytearray(2**22))
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
        return digest.hexdigest()

    def _runs(self, start: int, stop: int) -> Iterator[tuple[slice, dict[str, int]]]:
        """Of the rows from `start` to `stop`, chunk by chunk: which they are, and where each column of them begins."""
        for chunk in self._chunks:
            first, last = max(start, chunk.start), min(stop, chunk.start + chunk.rows)
            if first < last:
                skipped = first - chunk.start
                yield (
                    slice(first - start, last - start),
                    {
                        name: chunk.offsets[name] + skipped * width * np.dtype(kind).itemsize
                        for name, (kind, width) in _columns(self.dim, self.dtype).items()
                    },
                )

    @functools.cached_property
    def _chunks(self) -> list[_Chunk]:
        with pa.memory_map(str(self.path)) as file:
            content = file.read_buffer()
        found, start = [], 0
        for batch in pa.ipc.open_stream(content):
            offsets = {name: address - content.address for name, address in _addresses(batch).items()}
            found.append(_Chunk(start, len(batch), offsets))
            start += len(batch)
        return found


def row_bytes(dim: int, dtype: str) -> int:
    """Bytes that a row takes."""
    return sum(np.dtype(kind).itemsize * width for kind, width in _columns(dim, dtype).values())


def arrow_features(dim: int, dtype: str) -> Features:
    """The columns of a store as `datasets` sees them."""
    names = {name: Value(np.dtype(kind).name) for name, (kind, _) in _columns(dim, dtype).items()}
    return Features({**names, "features": List(names["features"], length=dim)})


def _columns(dim: int, dtype: str) -> dict[str, tuple[Any, int]]:
    scale = {"scale": (np.float32, 1)} if dtype == "int8" else {}
    return {"features": (STORED[dtype], dim), **scale, "value": (np.float32, 1)}


def _stream(rows: int, dim: int, dtype: str) -> pa.Buffer:
    """The whole Arrow stream of a chunk of zeros, or of none."""
    schema, sink = arrow_features(dim, dtype).arrow_schema, pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        if rows:
            columns = []
            for name, (kind, width) in _columns(dim, dtype).items():
                column = pa.array(np.zeros(rows * width, kind))
                columns.append(pa.FixedSizeListArray.from_arrays(column, dim) if name == "features" else column)
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return sink.getvalue()


@functools.lru_cache(maxsize=16)
def _schema(dim: int, dtype: str) -> tuple[bytes, bytes]:
    """The bytes before all chunks, and those after."""
    stream = _stream(0, dim, dtype).to_pybytes()
    return stream[:-_END], stream[-_END:]


@functools.lru_cache(maxsize=64)
def _message(rows: int, dim: int, dtype: str) -> _Message:
    stream, start = _stream(rows, dim, dtype), len(_schema(dim, dtype)[0])
    (batch,) = pa.ipc.open_stream(stream)
    first = min(_addresses(batch).values()) - stream.address
    return _Message(stream[start:first].to_pybytes(), stream.size - _END - start)


def _addresses(batch: pa.RecordBatch) -> dict[str, int]:
    """Where in memory the numbers of each column begin."""
    columns = {name: batch.column(name) for name in batch.schema.names}
    return {
        name: (column.values if name == "features" else column).buffers()[1].address
        for name, column in columns.items()
    }


def _write_all(file: Any, content: memoryview) -> None:
    while len(content):
        content = content[file.write(content) :]
