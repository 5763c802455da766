"""A complete feature store: read in blocks, every shard checked when it is first read."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from hf_attribution.errors import ArtefactError
from hf_attribution.store.manifest import KIND, MANIFEST, Manifest, Shard
from hf_attribution.store.precision import decode
from hf_attribution.store.shards import ShardFile

if TYPE_CHECKING:
    import datasets

    from hf_attribution.hub.card import AttributionCardData

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
        object.__setattr__(self, "path", Path(self.path))  # a string will do
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

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        card_data: "AttributionCardData | None" = None,
    ) -> str:
        """Push to a dataset repository on the Hub: the shards as they are, and a card, in one commit or none.

        Shards that the Hub has already are not sent again.

        Args:
            repo_id: `"user/name"`, or `"name"` for your own. It is made if it is missing.
            private: Whether a new repository is private; an existing one that is not as it is said is refused.
            revision: The branch, by default the main one. It is made if it is missing.
            token: A token that may write; by default that of `hf auth login` or HF_TOKEN.
            card_data: What only you know: licence, model, dataset.

        Returns:
            The URL of the commit.

        Raises:
            HubError: No token, a repository that holds something else or is public and should be private, no network.
            ArtefactError: A shard is damaged, the card was edited so that it cannot be read, or the repository is of
                a newer schema.
        """
        from hf_attribution.hub.access import Place
        from hf_attribution.hub.card import AttributionCardData, Page, link
        from hf_attribution.hub.folders import push_folder

        self.verify()
        said = card_data or AttributionCardData()
        page = Page(
            title=f"Projected gradients of {len(self):,} examples, {self.dim:,} dimensions each",
            summary="What training data attributions of gradients are computed from.",
            facts={
                "model": link(said.model_id, said.model_revision),
                "data": link(said.dataset_id, said.dataset_revision, "datasets/"),
                "rows": len(self),
                "dimensions": self.dim,
                "number format": self.manifest.dtype,
            },
            tables={KIND: "an example: `features`, `value` (what was differentiated), and for int8 `scale`"},
            usage="from hf_attribution.store import FeatureStore\n\n"
            'store = FeatureStore.from_hub("{repo_id}", "store")  # a folder',
            details={"settings": self.manifest.settings},
            tags=["gradients"],
            pattern="*.arrow",
        )
        names = _files(self.manifest)
        return push_folder(KIND, self.path, names, page, said, Place(repo_id, revision, token), private)

    @classmethod
    def from_hub(
        cls, repo_id: str, path: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> "FeatureStore":
        """Fetch a store that `push_to_hub` pushed, check all of it, and put it into a folder.

        Args:
            repo_id: The dataset repository, `"user/name"`.
            path: The folder, which must not exist. Nothing is written elsewhere but in `<path>.fetched`, from where
                the same call goes on after a cut.
            revision: Branch, tag or commit; by default the main branch.
            token: A token for private repositories; by default that of `hf auth login` or HF_TOKEN.

        Returns:
            The store.

        Raises:
            FileExistsError: The folder exists.
            HubError: There is no such repository, or it is not for you, or the Hub could not be reached.
            ArtefactError: It holds something else, of a newer schema, or not what was pushed.
        """
        from hf_attribution.hub.access import Place
        from hf_attribution.hub.folders import pull_folder, put

        place, target = Place(repo_id, revision, token), Path(path)
        fetched = pull_folder(KIND, place, target, lambda folder: _files(Manifest.load(folder)))
        cls(fetched).verify()
        put(fetched, target)
        return cls(target)

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


def _files(manifest: Manifest) -> list[str]:
    """The files of a store."""
    return [MANIFEST, "dataset_info.json", "state.json", *(shard.file for shard in manifest.shards)]
