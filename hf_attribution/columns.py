"""What `datasets.Dataset` tells of its columns and rows, without a pass of the model over them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from hf_attribution.errors import MismatchError
from hf_attribution.inputs import forward_arguments

_LABEL_COLUMNS = ("label", "label_ids", "labels")


def select_rows(dataset: Any, indices: np.ndarray) -> Any:
    """Rows of any map-style dataset, as one."""
    return dataset.select(indices) if hasattr(dataset, "select") else Subset(dataset, indices.tolist())


def used_columns(dataset: Any, model: nn.Module) -> Any:
    """A dataset with the columns that the model's `forward` takes and the labels, as `Trainer` keeps them.

    Args:
        dataset: A `datasets.Dataset`; anything else is returned as it is.
        model: The model whose arguments decide.

    Returns:
        The dataset without its unused columns.

    Raises:
        ValueError: If no column but labels is left.
    """
    columns = getattr(dataset, "column_names", None)
    if not columns or not hasattr(dataset, "remove_columns") or is_transformed(dataset):
        return dataset
    known = {*forward_arguments(model), *_LABEL_COLUMNS}
    unused = [name for name in columns if name not in known]
    if all(name in (*unused, *_LABEL_COLUMNS) for name in columns):
        raise ValueError(
            f"None of the columns {', '.join(columns)} is an argument of {type(model).__name__}.forward "
            f"({', '.join(forward_arguments(model))}): preprocess the dataset first (tokenize it, say), or, where the "
            "collator does, set remove_unused_columns=False."
        )
    return dataset.remove_columns(unused)


def check_same_columns(train: Any, query: Any) -> None:
    """Refuse a query dataset that lacks columns of the training dataset.

    Args:
        train: The training dataset.
        query: The query dataset.

    Raises:
        MismatchError: If the query dataset lacks one.
    """
    if not (is_arrow(train) and is_arrow(query)) or train.column_names is None or query.column_names is None:
        return
    missing = [name for name in train.column_names if name not in query.column_names]
    if missing:
        raise MismatchError(
            f"The query dataset has no column {', '.join(missing)} (it has {', '.join(query.column_names)}): "
            "preprocess it as the training dataset was."
        )


def is_arrow(dataset: Any) -> bool:
    """Whether it is a dataset of the `datasets` library, or a stream of it."""
    return hasattr(dataset, "features") and hasattr(dataset, "with_format")


def is_transformed(dataset: Any) -> bool:
    """Whether a function of the user's makes the rows. A stream has no format that would say so."""
    return hasattr(dataset, "format") and dataset.format["type"] == "custom"


def token_lengths(dataset: Any) -> np.ndarray | None:
    """The rows' numbers of tokens, `[N]`; `None` where they have none, or only a function knows."""
    if not is_arrow(dataset) or "input_ids" not in dataset.column_names or is_transformed(dataset):
        return None
    column = dataset.select_columns(["input_ids"]).with_format("arrow")
    return np.concatenate(
        [pc.list_value_length(table["input_ids"]).to_numpy() for table in column.iter(batch_size=10_000)]
    )


def hash_rows(dataset: Any, digest: Any) -> None:
    """Hash columns, types and values: how the table is chunked, sliced and indexed leaves no trace."""
    digest.update(repr(sorted(dataset.features.items())).encode())
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        for name in sorted(table.column_names):
            _hash_array(table[name].combine_chunks(), digest)


def _hash_array(array: pa.Array, digest: Any) -> None:
    """Hash the values alone: arrow says nothing of what its buffers hold under nulls and outside of a slice."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    digest.update(array.is_valid().to_numpy(zero_copy_only=False))
    kind = array.type
    if pa.types.is_struct(kind):
        for field in array.flatten():
            _hash_array(field, digest)
        return
    array = array.drop_null()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        digest.update(pc.list_value_length(array).to_numpy())
        _hash_array(array.flatten(), digest)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        digest.update(array.to_numpy(zero_copy_only=False))
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        digest.update(pc.binary_length(array).to_numpy())
        digest.update(b"".join(array.to_pylist()))
    else:
        digest.update(repr(array.to_pylist()).encode())


def plain(value: Any) -> Any:
    """Nested rows with arrays as their bytes, to be hashed: what tensors pickle is more than that."""
    if isinstance(value, Tensor):
        return (str(value.dtype), tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, Mapping):
        return {key: plain(value[key]) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.tobytes() if hasattr(value, "tobytes") else value
