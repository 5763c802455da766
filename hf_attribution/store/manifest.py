"""What a store says of itself, in `manifest.json`: sealed like every artefact."""

import dataclasses
import json
import os
import uuid
from pathlib import Path
from typing import Any

from hf_attribution.errors import ArtefactError, MismatchError
from hf_attribution.seals import open_seal, seal, unseal
from hf_attribution.store.shards import ShardFile

KIND = "features"
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of a store.

    Args:
        file: Its name.
        rows: How many rows it has.
        size: How many bytes.
        checksum: The hash of its bytes, once all of its rows are written.
    """

    file: str
    rows: int
    size: int
    checksum: str | None = None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a store holds.

    Args:
        dim: Dimension of the features.
        dtype: Their number format: `"float32"`, `"float16"`, `"bfloat16"` or `"int8"` (with a scale for each row).
        settings: What they depend on: hashes of model and data, the task, the projection.
        num_rows: How many rows there are; `None` where that is not known before the last.
        shards: The files, in the order of their rows.
    """

    dim: int
    dtype: str
    settings: dict[str, Any]
    num_rows: int | None = None
    shards: tuple[Shard, ...] = ()

    def file_of(self, folder: Path, shard: Shard) -> ShardFile:
        """A shard of the store in this folder."""
        return ShardFile(folder / shard.file, self.dim, self.dtype)

    def save(self, folder: Path) -> None:
        """Write `manifest.json` wholly, or not at all."""
        text = seal(KIND, {}, dataclasses.asdict(self))
        replace_file(folder / MANIFEST, json.dumps(json.loads(text), indent=1))

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """What `save` wrote.

        Args:
            folder: The folder of the store.

        Returns:
            The manifest.

        Raises:
            ArtefactError: If there is none that can be read, it was changed, or it is of a newer schema.
        """
        try:
            text = (folder / MANIFEST).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ArtefactError(f"{folder} is not a feature store ({error}): choose another folder.") from error
        try:
            fields = unseal(open_seal(text, KIND, "It"), {}, "It")
        except ArtefactError as error:
            raise ArtefactError(f"The feature store {folder} cannot be read, delete the folder: {error}") from error
        return cls(**{**fields, "shards": tuple(Shard(**shard) for shard in fields["shards"])})

    def refuse_other(self, other: "Manifest", folder: Path) -> None:
        """Refuse a store that was made for something else.

        Args:
            other: What is wanted.
            folder: Where this is.

        Raises:
            MismatchError: If they differ; the message names what.
        """
        there, now = (
            {"num_rows": side.num_rows, "dim": side.dim, "dtype": side.dtype, **side.settings}
            for side in (self, other)
        )
        if other.num_rows is None:
            del now["num_rows"]
        different = [key for key in now if there.get(key) != now[key]]
        if different:
            changes = ", ".join(f"{key}: {there.get(key)} there, {now[key]} now" for key in different)
            raise MismatchError(f"The feature store {folder} was made for something else ({changes}): use another.")


def replace_file(path: Path, text: str) -> None:
    """Write a text file wholly, or not at all."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
