"""From rows of text or images to the inputs of a model: which column is what, labels as numbers, tokens, pixels.

Rows are neither split, merged nor dropped, and their columns stay: a score points at a row of the dataset that was
loaded, whose text or image can be shown.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Array3D, ClassLabel, Dataset, Features, Image, Value
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What data collators and models take for labels, whatever it is.
RESERVED_FOR_LABELS = ("label", "labels", "label_ids")

_TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
    ("content",),
    ("review",),
    ("document",),
)
_TARGET_COLUMNS = (
    ("text", "summary"),
    ("document", "summary"),
    ("dialogue", "summary"),
    ("article", "highlights"),
    ("source", "target"),
    ("input", "output"),
    ("input", "target"),
    ("prompt", "completion"),
)


def text_columns(dataset: Dataset, asked: Sequence[str] | None, label: str | None) -> tuple[str, ...]:
    """The column of the text, or the two of a pair of texts.

    Args:
        dataset: The training data.
        asked: The user's choice.
        label: The label's column, which is no text.

    Returns:
        One or two columns.

    Raises:
        ValueError: If a chosen column is not there, or the choice is not clear.
    """
    if asked:
        return tuple(_existing(dataset, name, "text_column_name") for name in asked)
    strings = [name for name in _columns(dataset, _is_string) if name != label]
    return _the_one(strings, _known(strings, _TEXT_COLUMNS), "text_column_name", "text", 1)


def source_and_target_columns(dataset: Dataset, source: Sequence[str] | None, target: str | None) -> tuple[str, str]:
    """The columns of the text that a seq2seq model reads, and of the one that it should write.

    Args:
        dataset: The training data.
        source: The user's choice of the first.
        target: The user's choice of the second.

    Returns:
        Both columns.

    Raises:
        ValueError: If a chosen column is not there, or the choice is not clear.
    """
    if target is not None:
        target = _existing(dataset, target, "target_column_name")
        (text, *pair) = text_columns(dataset, source, label=target)
        if pair:
            raise ValueError("A seq2seq model reads one text: give one --text_column_name.")
        return text, target
    strings = _columns(dataset, _is_string)
    known = [pair for pair in _known(strings, _TARGET_COLUMNS) if source is None or pair[0] == source[0]]
    text, target = _the_one(strings, known, "text_column_name and --target_column_name", "source and target", 0)
    return text, target


def image_column(dataset: Dataset, asked: str | None) -> str:
    """The column of the image: the user's choice, or the only one there is, or a `ValueError`."""
    if asked is not None:
        return _existing(dataset, asked, "image_column_name")
    images = _columns(dataset, lambda feature: isinstance(feature, Image))
    return _the_one(images, [], "image_column_name", "image", 1)[0]


def label_column(dataset: Dataset, asked: str | None) -> str:
    """The column of the label: the user's choice, `label`, `labels`, or the only class label, or a `ValueError`."""
    if asked is not None:
        return _existing(dataset, asked, "label_column_name")
    known = [(name,) for name in ("label", "labels") if name in dataset.column_names]
    classes = _columns(dataset, lambda feature: isinstance(feature, ClassLabel))
    return _the_one(classes, known, "label_column_name", "label", 1)[0]


def keep_from_collators(dataset: Dataset, label: str | None = None) -> Dataset:
    """A dataset in which nothing but the label is named as one.

    Args:
        dataset: The dataset.
        label: The column of the label, if there is one.

    Returns:
        The dataset with its label in `label` or `labels`, and other columns of such a name as `original_...`.
    """
    names = {name: f"original_{name}" for name in RESERVED_FOR_LABELS if name in dataset.column_names}
    if label in ("label", "labels"):
        del names[label]
    elif label is not None:
        names[label] = "labels"
    return dataset.rename_columns(names) if names else dataset


def encode_labels(
    splits: Mapping[str, Dataset], column: str, trained_names: Sequence[str] | None
) -> tuple[dict[str, Dataset], list[str] | None]:
    """Named labels as the numbers that the model knows them by.

    Args:
        splits: Datasets by their names, the training data first.
        column: The column of the label.
        trained_names: The names of the classes of a trained classifier, in its order.

    Returns:
        The datasets, and the names of the classes, or `None` where labels are plain numbers.

    Raises:
        ValueError: If a row has no label, or one that the training data have not.
    """
    for name, dataset in splits.items():
        _check_labelled(dataset, column, name)
    train = next(iter(splits.values()))
    feature = train.features[column]
    if not isinstance(feature, ClassLabel) and not _is_string(feature):
        return dict(splits), None
    names = list(feature.names) if isinstance(feature, ClassLabel) else sorted(set(train[column]))
    if trained_names is not None and _folded(names) <= _folded(trained_names):
        names = list(trained_names)
    elif trained_names is not None:
        logger.warning(
            f"The model calls its classes {', '.join(trained_names)} and the dataset {', '.join(names)}: they are "
            "taken to be the same, in this order."
        )
    return {name: _renumber(dataset, column, names, name) for name, dataset in splits.items()}, names


def tokenize(dataset: Dataset, tokenizer: Any, columns: Sequence[str], max_length: int, name: str) -> Dataset:
    """Add a text's tokens, each row cut off at `max_length`.

    Args:
        dataset: The dataset.
        tokenizer: The tokenizer.
        columns: Columns of the text, one or two.
        max_length: The most tokens of a row.
        name: What error messages call the dataset.

    Returns:
        The dataset with `input_ids` and what else the tokenizer returns.

    Raises:
        ValueError: If a row has no tokens.
    """

    def tokens(batch: dict[str, list[str]]) -> dict[str, Any]:
        return dict(tokenizer(*(batch[column] for column in columns), truncation=True, max_length=max_length))

    _check_texts(dataset, columns, name)
    return _not_empty(dataset.map(tokens, batched=True, desc=f"Tokenizing {name}"), columns, name)


def tokenize_pairs(dataset: Dataset, tokenizer: Any, columns: tuple[str, str], max_length: int, name: str) -> Dataset:
    """Add the tokens of a source text, and those of its target as `labels`; else as `tokenize`."""

    def tokens(batch: dict[str, list[str]]) -> dict[str, Any]:
        source, target = (batch[column] for column in columns)
        return dict(tokenizer(source, text_target=target, truncation=True, max_length=max_length))

    _check_texts(dataset, columns, name)
    return _not_empty(dataset.map(tokens, batched=True, desc=f"Tokenizing {name}"), columns, name)


def add_pixels(dataset: Dataset, processor: Any, column: str, num_channels: int, name: str) -> Dataset:
    """Add the pixels of an image, computed once: retrainings then read them from disk.

    Args:
        dataset: The dataset.
        processor: The image processor, which must make all images the same size.
        column: The column of the image.
        num_channels: How many colour channels the model takes, 1 or 3.
        name: What error messages call the dataset.

    Returns:
        The dataset with `pixel_values`, float32 `[C, H, W]`, read as tensors.
    """
    mode = "L" if num_channels == 1 else "RGB"

    def pixels(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert(mode) for image in batch[column]]
        return {"pixel_values": processor(images, return_tensors="np")["pixel_values"].astype(np.float32)}

    shape = pixels(dataset[:1])["pixel_values"].shape[1:]
    features = Features({**dataset.features, "pixel_values": Array3D(shape, "float32")})
    dataset = dataset.map(pixels, batched=True, batch_size=64, features=features, desc=f"Processing {name} images")
    return dataset.with_format("torch", columns=["pixel_values"], output_all_columns=True)


def _columns(dataset: Dataset, kind: Any) -> list[str]:
    return [name for name, feature in dataset.features.items() if kind(feature)]


def _is_string(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _existing(dataset: Dataset, name: str, option: str) -> str:
    if name not in dataset.column_names:
        raise ValueError(
            f"--{option} {name}: the dataset has no such column, it has {', '.join(dataset.column_names)}."
        )
    return name


def _known(names: Sequence[str], known: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    found = [columns for columns in known if set(columns) <= set(names)]
    return [columns for columns in found if not any(set(columns) < set(other) for other in found)]


def _the_one(
    candidates: Sequence[str], known: Sequence[tuple[str, ...]], option: str, what: str, enough: int
) -> tuple[str, ...]:
    """The known columns if they are clear; else the candidates if they are as many as is `enough`."""
    if len(known) == 1:
        return known[0]
    if not known and len(candidates) == enough:
        return tuple(candidates)
    found = [" and ".join(columns) for columns in known] or list(candidates)
    why = f"could be {', '.join(found)}" if found else "was not found"
    raise ValueError(f"The column of the {what} {why}: choose with --{option}.")


def _folded(names: Sequence[str]) -> set[str]:
    return {name.lower() for name in names}


def _check_labelled(dataset: Dataset, column: str, name: str) -> None:
    if column not in dataset.column_names:
        raise ValueError(f"The {name} dataset has no column {column!r}: it has {', '.join(dataset.column_names)}.")
    whole = isinstance(dataset.features[column], ClassLabel) or "int" in str(dataset.features[column])
    for row, label in enumerate(dataset[column]):
        if label is None or (whole and label < 0):
            raise ValueError(
                f"Row {row} of the {name} dataset has no label (it is {label}; public test splits hide theirs): "
                f"choose another --{name}_split or --label_column_name."
            )


def _renumber(dataset: Dataset, column: str, names: list[str], split: str) -> Dataset:
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel) and feature.names == names:
        return dataset
    by_name = {**{name.lower(): i for i, name in enumerate(names)}, **{name: i for i, name in enumerate(names)}}
    numbers = {}
    for label in dataset.unique(column):
        name = feature.int2str(label) if isinstance(feature, ClassLabel) else label
        if name not in by_name and name.lower() not in by_name:
            raise ValueError(f"The {split} dataset has the label {name!r}; the classes are {', '.join(names)}.")
        numbers[label] = by_name.get(name, by_name.get(name.lower()))
    features = Features({**dataset.features, column: ClassLabel(names=names)})

    def number(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {column: [numbers[label] for label in batch[column]]}

    return dataset.map(number, batched=True, features=features, desc=f"Numbering {split} labels")


def _check_texts(dataset: Dataset, columns: Sequence[str], name: str) -> None:
    for column in columns:
        if column not in dataset.column_names:
            raise ValueError(f"The {name} dataset has no column {column!r}: it has {', '.join(dataset.column_names)}.")
        if None in dataset[column]:
            row = list(dataset[column]).index(None)
            raise ValueError(f"Row {row} of the {name} dataset has no {column!r}: remove or complete it.")


def _not_empty(dataset: Dataset, columns: Sequence[str], name: str) -> Dataset:
    empty = [row for row, ids in enumerate(dataset["input_ids"]) if not ids]
    if empty:
        raise ValueError(
            f"{len(empty)} rows of the {name} dataset have no tokens in {columns[0]!r}, the first is row {empty[0]}: "
            "remove them (`dataset.filter`), so that every row can be scored."
        )
    return dataset
