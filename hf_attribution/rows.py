"""Artefacts as rows of a `datasets.Dataset`, for Arrow, Parquet and the Hub: sealed like their files."""

from __future__ import annotations

import abc
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_attribution.artefacts import Artefact
from hf_attribution.errors import ArtefactError
from hf_attribution.seals import open_seal, seal, unseal

if TYPE_CHECKING:
    import datasets
    from typing_extensions import Self


class TabularArtefact(Artefact):
    """What `Scores`, `Subsets` and `Counterfactuals` share: they become tables, and come back from the Hub."""

    @abc.abstractmethod
    def to_dataset(self) -> datasets.Dataset:
        """Return this as a sealed table: see `to_rows`."""

    @classmethod
    @abc.abstractmethod
    def from_dataset(cls, dataset: datasets.Dataset) -> Self:
        """Return what `to_dataset` was given."""

    @classmethod
    def from_hub(cls, repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> Self:
        """Fetch what `push_to_hub` pushed, or find it in the cache, and check all of it.

        Args:
            repo_id: The dataset repository, `"user/name"`.
            revision: Branch, tag or commit; by default the main branch.
            token: A token for private repositories; by default that of `hf auth login` or HF_TOKEN.

        Returns:
            The artefact, with the fingerprint that it had.

        Raises:
            HubError: There is no such repository, or it is not for you, or the Hub could not be reached.
            ArtefactError: It holds something else, of a newer schema, or not what was pushed.
        """
        from hf_attribution.hub.access import Place
        from hf_attribution.hub.tables import download

        return cls.from_dataset(download(Place(repo_id, revision, token), cls.kind))


def to_rows(kind: str, columns: Mapping[str, np.ndarray], metadata: Mapping[str, Any], title: str) -> datasets.Dataset:
    """Make a `datasets.Dataset` of equally long columns, and seal it in its `metadata` column (first row).

    Args:
        kind: What it is, for `from_rows`.
        columns: Name to column: `[rows]`, or `[rows, width]`, which becomes a list of fixed length.
        metadata: What else to keep; JSON.
        title: A line for human readers, kept as the dataset's description.

    Returns:
        The dataset. Numeric columns share memory with the arrays.
    """
    import datasets
    import pyarrow as pa

    fields: dict[str, pa.Array] = {}
    features: dict[str, Any] = {}
    for name, column in columns.items():
        fields[name] = pa.array(column.reshape(-1))
        features[name] = datasets.Value(column.dtype.name)
        if column.ndim == 2:
            fields[name] = pa.FixedSizeListArray.from_arrays(fields[name], column.shape[1])
            features[name] = datasets.List(features[name], length=column.shape[1])
    sealed, num_rows = seal(kind, columns, metadata), len(next(iter(columns.values())))
    fields["metadata"] = pa.array([sealed] + [None] * (num_rows - 1), pa.string())
    features["metadata"] = datasets.Value("string")
    info = datasets.DatasetInfo(description=title, features=datasets.Features(features))
    # Without a fingerprint `datasets` would pickle the whole table to make one.
    return datasets.Dataset(pa.table(fields), info=info, fingerprint=json.loads(sealed)["fingerprint"])


def from_rows(dataset: datasets.Dataset, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read the columns and the metadata of a dataset made by `to_rows`, and check all of it.

    Args:
        dataset: The dataset, all its rows in their order.
        kind: The kind that it must be.

    Returns:
        The columns and the metadata.

    Raises:
        TypeError: `dataset` is not a `datasets.Dataset`.
        ArtefactError: It was not made by `to_rows`, is of another kind or a newer schema, or its rows were
            changed.
    """
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(f"{kind} rows are read from a datasets.Dataset (one split), not a {type(dataset).__name__}.")
    if "metadata" not in dataset.column_names or not len(dataset):
        raise ArtefactError(
            f"The dataset holds no {kind}: it has no column 'metadata'; it must come from to_dataset()."
        )
    table = dataset.with_format("arrow")[:]
    fields = open_seal(table["metadata"][0].as_py(), kind, "The dataset")
    columns = {name: column_to_numpy(table[name]) for name in table.column_names if name != "metadata"}
    return columns, unseal(fields, columns, "The dataset")


def column_to_numpy(column: Any) -> np.ndarray:
    """Return a column of an Arrow table as `[rows]`, or `[rows, width]` if it holds lists of fixed length.

    Raises:
        ArtefactError: It has empty cells.
    """
    import pyarrow as pa

    if column.null_count:
        raise ArtefactError("The dataset has empty cells where numbers were written. Write it again.")
    if not pa.types.is_fixed_size_list(column.type):
        return column.to_numpy()
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(parts).reshape(len(column), column.type.list_size)
