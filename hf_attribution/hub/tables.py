"""Tables as Parquet files in a repository, and back: whole, or only some rows of them."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
from huggingface_hub import HfApi, HfFileSystem, snapshot_download

from hf_attribution.errors import ArtefactError
from hf_attribution.hub.access import Place, explained
from hf_attribution.rows import column_to_numpy
from hf_attribution.seals import open_seal

if TYPE_CHECKING:
    import datasets

SHARD_BYTES = 128 * 2**20  # of Arrow: what is sent again at most when an upload is cut
GROUP_BYTES = 4 * 2**20  # what is read at least for one row
SEAL = "metadata"  # the column whose first row holds the seal


def parquet_files(tables: Mapping[str, datasets.Dataset]) -> Iterator[tuple[str, bytes]]:
    """Write tables as Parquet, file by file, the same bytes each time.

    Images and audio that lie in files are taken into the tables. Pages carry checksums.

    Args:
        tables: Folder to table.

    Yields:
        The path in the repository, `folder/train-00000-of-00001.parquet`, and the content.
    """
    import datasets

    for folder, table in tables.items():
        rows_per_group = max(1, int(GROUP_BYTES / _bytes_per_row(table)))
        rows_per_file = rows_per_group * max(1, SHARD_BYTES // GROUP_BYTES)
        num_files = math.ceil(len(table) / rows_per_file)
        for number in range(num_files):
            rows = _rows(table, number * rows_per_file, (number + 1) * rows_per_file)
            file = datasets.Dataset(rows, info=datasets.DatasetInfo(features=table.features), fingerprint="rows")
            buffer = io.BytesIO()
            file.to_parquet(buffer, batch_size=rows_per_group, write_page_checksum=True)
            yield f"{folder}/train-{number:05d}-of-{num_files:05d}.parquet", buffer.getvalue()


def parquet_paths(folder: str) -> re.Pattern[str]:
    """Return what matches the paths that `parquet_files` writes to a folder; several: `"a|b"`."""
    return re.compile(rf"({folder})/train-\d{{5}}-of-\d{{5}}\.parquet")


def is_sealed(place: Place, kind: str, present: list[str]) -> bool:
    """Whether a repository holds an artefact of ours.

    Args:
        place: The repository.
        kind: The kind of the artefact.
        present: The paths in it.

    Returns:
        Whether there is a table of this kind with our seal.
    """
    paths = sorted(filter(parquet_paths(kind).fullmatch, present))
    if not paths:
        return False
    text = _seal_text(place, paths[0])
    return text is not None and bool(open_seal(text, kind, place.repo_id))


def download(place: Place, kind: str) -> datasets.Dataset:
    """Fetch a sealed table whole, into the cache of `huggingface_hub`, or find it there.

    The first file comes first, and its seal is looked at before the others are fetched.

    Args:
        place: The repository.
        kind: The kind of the artefact.

    Returns:
        The table, for `from_rows`.

    Raises:
        ArtefactError: The repository holds no such artefact, or one of a newer schema.
    """
    import datasets

    first = _snapshot(place, f"{kind}/train-00000-of-*.parquet")
    files = sorted(first.glob(f"{kind}/train-00000-of-*.parquet"))
    if not files:
        raise ArtefactError(f"{place.repo_id} holds no {kind}{_what_it_holds(place)}.")
    open_seal(_first_seal(pq.ParquetFile(files[0])), kind, place.repo_id)
    whole = _snapshot(Place(place.repo_id, first.name, place.token), f"{kind}/train-*.parquet")
    files = sorted(whole.glob(f"{kind}/train-*.parquet"))
    missing = int(files[0].stem[-5:]) - len(files)
    if missing:
        raise ArtefactError(f"{missing} files of {kind} are missing in {place.repo_id}: it must be pushed again.")
    table = pa.concat_tables([pq.read_table(file, page_checksum_verification=True) for file in files])
    return datasets.Dataset(table, fingerprint=first.name)


def read_rows(place: Place, kind: str, key: str, rows: slice) -> tuple[dict[str, np.ndarray], dict[str, Any], range]:
    """Read some rows of a sealed table, over the network, without fetching the others.

    Their pages' checksums are verified; the fingerprint of the whole cannot be.

    Args:
        place: The repository.
        kind: The kind of the artefact.
        key: The column that numbers the rows from 0.
        rows: Which rows.

    Returns:
        The columns, the metadata, and the rows that `rows` means.

    Raises:
        ArtefactError: The repository holds no such artefact, or one of a newer schema.
        IndexError: There are no such rows.
    """
    with explained(place, "read"):
        head = HfApi(token=place.token).dataset_info(place.repo_id, revision=place.revision)
        paths = sorted(path for each in head.siblings or [] if parquet_paths(kind).fullmatch(path := each.rfilename))
        if not paths:
            raise ArtefactError(f"{place.repo_id} holds no {kind}{_what_it_holds(place)}.")
        pinned = Place(place.repo_id, head.sha, place.token)
        fields = open_seal(_seal_text(pinned, paths[0]), kind, place.repo_id)
        scan = pa.dataset.ParquetFragmentScanOptions(page_checksum_verification=True)
        table = pa.dataset.dataset(
            [_url(pinned, path) for path in paths],
            filesystem=HfFileSystem(token=place.token),
            format=pa.dataset.ParquetFileFormat(default_fragment_scan_options=scan),
        )
        wanted = range(table.count_rows())[rows]
        if not wanted:
            raise IndexError(f"{place.repo_id} has {table.count_rows()} rows of {kind}: {rows} holds none of them.")
        low, high = min(wanted), max(wanted)
        number = pa.dataset.field(key)
        found = table.to_table(filter=(number >= low) & (number <= high)).drop_columns([SEAL])
    columns = {name: column_to_numpy(found[name]) for name in found.column_names}
    if not np.array_equal(columns.pop(key), np.arange(low, high + 1)):
        raise ArtefactError(f"The rows of {kind} in {place.repo_id} are not in order: it must be pushed again.")
    columns = {name: column[[row - low for row in wanted]] for name, column in columns.items()}
    return columns, fields["metadata"], wanted


def _rows(table: datasets.Dataset, start: int, stop: int) -> pa.Table:
    from datasets.table import embed_table_storage

    return embed_table_storage(table.with_format("arrow")[start:stop])


def _bytes_per_row(table: datasets.Dataset) -> float:
    rows = _rows(table, 0, 100)
    return max(1.0, rows.nbytes / max(1, len(rows)))


def _url(place: Place, path: str) -> str:
    return f"datasets/{place.repo_id}@{place.revision}/{path}"


def _seal_text(place: Place, path: str) -> str | None:
    with HfFileSystem(token=place.token).open(_url(place, path)) as file:
        return _first_seal(pq.ParquetFile(file))


def _first_seal(file: pq.ParquetFile) -> str | None:
    if SEAL not in file.schema_arrow.names or not file.metadata.num_rows:
        return None
    return file.read_row_group(0, columns=[SEAL])[SEAL][0].as_py()


def _snapshot(place: Place, pattern: str) -> Path:
    with explained(place, "read"):
        return Path(
            snapshot_download(
                place.repo_id, repo_type="dataset", revision=place.revision, token=place.token, allow_patterns=pattern
            )
        )


def _what_it_holds(place: Place) -> str:
    with explained(place, "read"):
        paths = HfApi(token=place.token).list_repo_files(place.repo_id, repo_type="dataset", revision=place.revision)
    kinds = sorted({path.split("/")[0] for path in paths if "/" in path})
    return f"; it holds {', '.join(kinds)}" if kinds else ""
