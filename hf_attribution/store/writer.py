"""Writing a feature store: rows in any order, from where a killed writer left off."""

import contextlib
import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datasets import DatasetInfo
from torch import Tensor

from hf_attribution.errors import ArtefactError
from hf_attribution.seals import dumps, fingerprint
from hf_attribution.store.manifest import MANIFEST, Manifest, Shard, replace_file
from hf_attribution.store.precision import check_dtype, encode
from hf_attribution.store.reader import FeatureStore
from hf_attribution.store.shards import ShardFile, arrow_features, create_shard, row_bytes

# Bytes of a shard.
SHARD_BYTES = 2**28

_JOURNAL = "journal"
_ENTRY = np.dtype([("start", "<i8"), ("stop", "<i8"), ("hash", "<u8")])


class FeatureWriter:
    """Writes features and values of rows in any order into `<path>.part`, which becomes `path` at the end.

    What was written is noted in a journal with its hash, so that a writer that was killed, or found the disk full,
    is followed by one that goes on. A shard is sealed with its checksum as soon as all of its rows are there.

    Args:
        path: The folder of the store.
        manifest: What it will hold, without shards. An unfinished store of something else is refused.
        base: A complete store of the first rows; they are taken from it, by links where the disk has them.
        shard_bytes: Bytes of a shard.

    Attributes:
        manifest: What it holds by now.
        done: Which rows are there, `[rows]` bool; it grows where their number is not known.

    Raises:
        MismatchError: If there is an unfinished store of something else.
        OSError: If the folder cannot be written to, or the disk is too small.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        base: FeatureStore | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.path, self.part = path, path.with_name(path.name + ".part")
        self._shard_rows = max(1, shard_bytes // row_bytes(manifest.dim, check_dtype(manifest.dtype)))
        self.manifest = manifest
        self._files: dict[str, ShardFile] = {}
        with self._explaining():
            if (self.part / MANIFEST).exists():
                self._resume()
            else:
                self._begin(base)
            self._journal = (self.part / _JOURNAL).open("ab", buffering=0)

    def write(self, rows: np.ndarray, features: Tensor, values: Tensor) -> None:
        """Write some rows. Those that are there already stay as they are: they may be shared with another store.

        Args:
            rows: Their positions in the dataset, `[B]`, in any order.
            features: `[B, dim]`.
            values: The values that were differentiated, `[B]`.

        Raises:
            NonFiniteError: If a feature is NaN or infinite.
            UnsupportedError: If a row does not fit into the number format.
            OSError: If the disk is full; what was written before stays, and the next writer goes on from there.
        """
        with self._explaining():
            self._grow(int(rows.max()) + 1)
            fresh = ~self.done[rows]
            if not fresh.all() or (np.diff(rows) < 0).any():
                order = np.argsort(rows, kind="stable")
                order = order[fresh[order]]
                if not len(order):
                    return
                rows, features, values = rows[order], features[order], values[order]
            columns = {**encode(features, self.manifest.dtype, rows), "value": values.detach().cpu().float().numpy()}
            entries = np.array([self._write_run(rows, columns, run) for run in self._runs(rows)], _ENTRY)
            self._journal.write(entries.tobytes())
            self.done[rows] = True
            for number in np.unique(self._shard_of(rows)):
                self._seal_if_full(int(number))

    def finish(self, settings: dict[str, Any] | None = None) -> FeatureStore:
        """Close the store.

        Args:
            settings: The settings, where they were not known before.

        Returns:
            It, complete.

        Raises:
            ArtefactError: If rows are missing.
            OSError: If the disk is full.
        """
        num_rows = self.manifest.num_rows
        if num_rows is None:
            num_rows = int(np.flatnonzero(self.done)[-1]) + 1 if self.done.any() else 0
        missing = np.flatnonzero(~self.done[:num_rows])
        if len(missing) or not num_rows:
            where = f", the first is row {missing[0]}" if len(missing) else ""
            raise ArtefactError(
                f"{len(missing)} of the {num_rows} rows of {self.part} were never written{where}: repeat the call."
            )
        with self._explaining():
            self._trim(num_rows)
            for shard in self.manifest.shards:
                self._file(shard).flush()
            self._save(num_rows=num_rows, settings=settings if settings is not None else self.manifest.settings)
            self._describe()
            self._journal.close()
            (self.part / _JOURNAL).unlink()
            self.part.rename(self.path)
        return FeatureStore(self.path)

    def _begin(self, base: FeatureStore | None) -> None:
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True)
        try:
            shards = base.manifest.shards if base is not None else ()
            for shard in shards:
                _link(base.path / shard.file, self.part / shard.file)  # type: ignore[union-attr]
            self.done = np.ones(sum(shard.rows for shard in shards), dtype=bool)
            self._save(shards=tuple(shards))
            if self.manifest.num_rows is not None:
                # The disk is found too small now, and not after hours.
                self._grow(self.manifest.num_rows)
        except OSError:
            shutil.rmtree(self.part, ignore_errors=True)
            raise

    def _resume(self) -> None:
        found = Manifest.load(self.part)
        found.refuse_other(self.manifest, self.part)
        # Until the end nobody waits for the disk: what was sealed may have been lost with the power.
        self._save(shards=tuple(self._checked(shard) for shard in found.shards))
        found = self.manifest
        sealed = np.array([shard.checksum is not None for shard in found.shards], dtype=bool)
        self.done = sealed.repeat([shard.rows for shard in found.shards])
        for shard in found.shards:
            file = self.part / shard.file
            if shard.checksum is None and (not file.exists() or file.stat().st_size != shard.size):
                self._create(file.name, shard.rows)
        for start, stop in self._noted():
            self.done[start:stop] = True
        for number in range(len(found.shards)):
            self._seal_if_full(number)
        if self.manifest.num_rows is not None:
            self._grow(self.manifest.num_rows)

    def _checked(self, shard: Shard) -> Shard:
        """A shard, no longer sealed if it is not what was sealed."""
        there = (self.part / shard.file).exists()
        same = shard.checksum is not None and there and self._file(shard).checksum() == shard.checksum
        return shard if same else dataclasses.replace(shard, checksum=None)

    def _noted(self) -> Iterator[tuple[int, int]]:
        """What the journal says was written to unsealed shards, where it is true: the disk may have lost power."""
        content = (self.part / _JOURNAL).read_bytes() if (self.part / _JOURNAL).exists() else b""
        entries = np.frombuffer(content[: len(content) // _ENTRY.itemsize * _ENTRY.itemsize], _ENTRY)
        starts = self._starts
        for start, stop, noted in entries.tolist():
            number = int(self._shard_of(np.array(start)))
            if number >= len(self.manifest.shards) or self.manifest.shards[number].checksum is not None:
                continue
            shard, first = self.manifest.shards[number], starts[number]
            if _hash(self._file(shard).read(start - first, stop - first)) == noted:
                yield start, stop

    def _runs(self, rows: np.ndarray) -> Iterator[slice]:
        """Sorted rows in slices of neighbours that lie in one shard."""
        apart = (np.diff(rows) != 1) | (np.diff(self._shard_of(rows)) != 0)
        edges = [0, *(np.flatnonzero(apart) + 1).tolist(), len(rows)]
        return (slice(start, stop) for start, stop in itertools.pairwise(edges))

    def _write_run(self, rows: np.ndarray, columns: Mapping[str, np.ndarray], run: slice) -> tuple[int, int, int]:
        number, start = int(self._shard_of(rows[run.start])), int(rows[run.start])
        shard, part = self.manifest.shards[number], {name: column[run] for name, column in columns.items()}
        self._file(shard).write(start - int(self._starts[number]), part)
        return start, start + run.stop - run.start, _hash(part)

    def _grow(self, num_rows: int) -> None:
        """Make shards until there is room for so many rows."""
        shards, room = list(self.manifest.shards), len(self.done)
        while room < num_rows:
            known = self.manifest.num_rows
            rows = self._shard_rows if known is None else min(self._shard_rows, known - room)
            shards.append(self._create(f"features-{len(shards):05d}.arrow", rows))
            room += rows
        if len(shards) > len(self.manifest.shards):
            self._save(shards=tuple(shards))
            self.done = np.concatenate([self.done, np.zeros(room - len(self.done), dtype=bool)])

    def _seal_if_full(self, number: int) -> None:
        shard, start = self.manifest.shards[number], int(self._starts[number])
        if shard.checksum is None and self.done[start : start + shard.rows].all():
            self._replace(number, self._sealed(shard))

    def _create(self, name: str, rows: int) -> Shard:
        return Shard(name, rows, create_shard(self.part / name, rows, self.manifest.dim, self.manifest.dtype))

    def _sealed(self, shard: Shard) -> Shard:
        return dataclasses.replace(shard, checksum=self._file(shard).checksum())

    def _trim(self, num_rows: int) -> None:
        """Cut what is too long: the last shard of a store whose length was not known."""
        last = len(self.manifest.shards) - 1
        shard, start = self.manifest.shards[last], int(self._starts[last])
        if num_rows < len(self.done):
            # Under a name of its own, so that a kill at any point leaves either of the two.
            short = self._create(f"features-{last:05d}-end.arrow", num_rows - start)
            self._file(short).write(0, self._file(shard).read(0, short.rows))
            self._replace(last, self._sealed(short))
            self.done = self.done[:num_rows]
            (self.part / shard.file).unlink()

    def _describe(self) -> None:
        """Write what makes the folder one of `datasets`."""
        info = DatasetInfo(
            description="Projected gradients, written by hf_attribution.",
            features=arrow_features(self.manifest.dim, self.manifest.dtype),
        )
        info.write_to_directory(str(self.part))
        state: dict[str, Any] = {
            "_data_files": [{"filename": shard.file} for shard in self.manifest.shards],
            "_fingerprint": fingerprint(*(str(shard.checksum) for shard in self.manifest.shards)),
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        replace_file(self.part / "state.json", dumps(state))

    def _replace(self, number: int, shard: Shard) -> None:
        shards = self.manifest.shards
        self._save(shards=(*shards[:number], shard, *shards[number + 1 :]))

    def _save(self, **changes: Any) -> None:
        self.manifest = dataclasses.replace(self.manifest, **changes)
        self.manifest.save(self.part)

    def _file(self, shard: Shard) -> ShardFile:
        if shard.file not in self._files:
            self._files[shard.file] = self.manifest.file_of(self.part, shard)
        return self._files[shard.file]

    @property
    def _starts(self) -> np.ndarray:
        """The first row of each shard, and the number of rows in all."""
        return np.cumsum([0, *(shard.rows for shard in self.manifest.shards)])

    def _shard_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, rows, side="right") - 1

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            rows, size = self.manifest.num_rows, row_bytes(self.manifest.dim, self.manifest.dtype)
            need = f"the features take {size} bytes a row" + (f", {1e-9 * size * rows:.2f} GB in all" if rows else "")
            message = (
                f"{error.strerror or error}: {need}. Make room, or give another cache_dir, a smaller dim or a shorter "
                "store_dtype. What was written before is kept, and the same call goes on from there"
            )
            raise OSError(error.errno, message, str(self.part)) from error


def _hash(columns: Mapping[str, np.ndarray]) -> int:
    digest = xxhash.xxh3_64()
    for name in sorted(columns):
        digest.update(np.ascontiguousarray(columns[name]).view(np.uint8).reshape(-1).data)
    return digest.intdigest()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
