"""Artefacts as rows of a `datasets.Dataset`, for Arrow, Parquet and the Hub: sealed like their files."""

from __future__ import annotations

import abc
import json
from collections.abc import Mapping, Sequence
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


def ranked_rows(
    indices: np.ndarray, scores: np.ndarray, train_dataset: datasets.Dataset | None = None
) -> datasets.Dataset:
    """Ranked training examples of each query as rows, with the examples' own columns.

    Args:
        indices: Positions of training examples, `[Q, k]`.
        scores: Their scores, `[Q, k]`.
        train_dataset: The training set; its columns are joined, as they are. One that bears one of our names gets
            the prefix `train_`.

    Returns:
        `query`, `rank` (from 1), `train_index`, `score`, and the columns of `train_dataset`.
    """
    import datasets

    num_queries, k = indices.shape
    rows = datasets.Dataset.from_dict(
        {
            "query": np.arange(num_queries).repeat(k),
            "rank": np.tile(np.arange(1, k + 1), num_queries),
            "train_index": indices.reshape(-1),
            "score": scores.reshape(-1),
        }
    )
    if train_dataset is None:
        return rows
    examples = train_dataset.with_format(None).select(indices.reshape(-1))
    names = _unlike(train_dataset.column_names, rows.column_names)
    return datasets.concatenate_datasets([rows, examples.rename_columns(names)], axis=1)


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


def _unlike(names: Sequence[str], taken: Sequence[str]) -> dict[str, str]:
    """Return new names, with `train_` the names that are taken, until they are not."""
    renamed: dict[str, str] = {}
    for name in names:
        new = name
        while new in taken or (new != name and new in names):
            new = f"train_{new}"
        renamed[name] = new
    return renamed
