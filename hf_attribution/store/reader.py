"""A complete feature store: read in blocks, every shard checked when it is first read."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from hf_attribution.errors import ArtefactError
from hf_attribution.store.manifest import Manifest, Shard
from hf_attribution.store.precision import decode
from hf_attribution.store.shards import ShardFile

if TYPE_CHECKING:
    import datasets

# Bytes of a block of features in float32.
BLOCK_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class FeatureStore:
    """Projected gradients of every row of a dataset, in one folder.

    The folder is also a `datasets` folder (`datasets.load_from_disk`), its shards are Arrow files. A shard is checked
    against its checksum when it is first read.

    Args:
        path: The folder.

    Attributes:
        manifest: Number of rows, dimension, number format, and the `settings` that the features depend on.

    Raises:
        ArtefactError: If the folder is not a complete store that this version reads.

    Example:
        >>> import tempfile, torch
        >>> from hf_attribution.store import FeatureWriter
        >>> folder = tempfile.TemporaryDirectory()
        >>> writer = FeatureWriter(Path(folder.name) / "store", Manifest(2, "float32", {}, num_rows=3))
        >>> writer.write(np.array([2, 0, 1]), torch.eye(3, 2), torch.zeros(3))
        >>> store = writer.finish()
        >>> store.read(0, 3).tolist()
        [[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
        >>> store.to_dataset()[2]
        {'features': [1.0, 0.0], 'value': 0.0}
        >>> folder.cleanup()
    """

    path: Path
    manifest: Manifest = dataclasses.field(init=False, repr=False)
    _checked: dict[str, ShardFile] = dataclasses.field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        manifest = Manifest.load(self.path)
        object.__setattr__(self, "manifest", manifest)
        if manifest.num_rows is None or any(shard.checksum is None for shard in manifest.shards):
            raise ArtefactError(f"The feature store {self.path} is not complete: repeat the call that writes it.")
        for shard in manifest.shards:
            file = self.path / shard.file
            if not file.is_file() or file.stat().st_size != shard.size:
                found = f"has {file.stat().st_size} bytes, not {shard.size}" if file.is_file() else "is missing"
                raise ArtefactError(
                    f"The feature store {self.path} is damaged: {shard.file} {found}. Fetch the file again, or delete "
                    "the folder."
                )

    def __len__(self) -> int:
        return self.manifest.num_rows or 0

    @property
    def dim(self) -> int:
        """Dimension of the projected gradients."""
        return self.manifest.dim

    @functools.cached_property
    def values(self) -> np.ndarray:
        """The values that were differentiated: float32 `[N]`."""
        parts = [self._check(shard).read(0, shard.rows, ("value",))["value"] for shard in self.manifest.shards]
        return np.concatenate(parts)

    def read(self, start: int, stop: int) -> Tensor:
        """Features of neighbouring rows: float32 `[stop - start, dim]`.

        Args:
            start: The first row.
            stop: One past the last row.

        Returns:
            A copy.

        Raises:
            ArtefactError: If a shard is not what was written.
        """
        parts: list[dict[str, np.ndarray]] = []
        first = 0
        for shard in self.manifest.shards:
            inside = slice(max(start - first, 0), min(stop - first, shard.rows))
            if inside.start < inside.stop:
                parts.append(self._check(shard).read(inside.start, inside.stop))
            first += shard.rows
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return decode(joined, self.manifest.dtype)

    def blocks(self, rows: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """The features in dataset order, some rows at a time, whatever the shards.

        Args:
            rows: Rows of a block; by default as many as take 64 MiB.

        Yields:
            Where the rows belong, and a float32 tensor `[rows, dim]`.
        """
        rows = rows if rows is not None else max(1, BLOCK_BYTES // (4 * self.dim))
        for start in range(0, len(self), rows):
            where = slice(start, min(start + rows, len(self)))
            yield where, self.read(where.start, where.stop)

    def verify(self) -> None:
        """Check all shards now.

        Raises:
            ArtefactError: If one is not what was written; the message names it and its rows.
        """
        for shard in self.manifest.shards:
            self._check(shard)

    def to_dataset(self) -> "datasets.Dataset":
        """The store as a memory-mapped dataset: `features` (a list of `dim` numbers), `value`, for int8 `scale`.

        bfloat16 appears as its bits, in uint16.

        Returns:
            A row for each example.

        Raises:
            ArtefactError: If a shard is not what was written.
        """
        import datasets

        self.verify()
        return datasets.Dataset.load_from_disk(str(self.path), keep_in_memory=False)

    def _check(self, shard: Shard) -> ShardFile:
        """A shard that is what was written; looked at once."""
        if shard.file not in self._checked:
            file = self.manifest.file_of(self.path, shard)
            found = file.checksum()
            if found != shard.checksum:
                start = sum(other.rows for other in self.manifest.shards[: self.manifest.shards.index(shard)])
                raise ArtefactError(
                    f"The feature store {self.path} is damaged: {shard.file} (rows {start} to "
                    f"{start + shard.rows - 1}) has the checksum {found} and was written with {shard.checksum}. Fetch "
                    "the file again, or delete the folder."
                )
            self._checked[shard.file] = file
        return self._checked[shard.file]
