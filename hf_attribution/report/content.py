"""What a row of a dataset looks like on a page: its texts, cut where they are long, its small images and its group.

Rows are read one at a time and only where they are shown. Nothing here raises over what a row holds: a missing image
or a broken file becomes a note, since a page about 50,000 rows should not fail over one of them.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np

from hf_attribution.preprocessing import text_columns

# All content of a page together: a browser opens so much in well under a second.
CONTENT_BYTES = 7_000_000
# The least and the most that a row may take of it, whatever the number of rows.
LEAST_BYTES, MOST_BYTES = 300, 20_000
# What WebP takes for a pixel of a photograph, as base64.
_BYTES_PER_PIXEL = 0.3
_LEAST_SIDE, _MOST_SIDE = 48, 256
_SURROGATES = re.compile("[\ud800-\udfff]")

Pieces = Callable[[dict[str, Any], Sequence[str]], list[dict[str, Any]] | None]


def shown_columns(dataset: datasets.Dataset, asked: Sequence[str] | None, group_column: str | None) -> list[str]:
    """The columns that show a row: images, then texts; without either, what holds one value a row.

    Args:
        dataset: The rows.
        asked: The user's choice.
        group_column: The column of the group, which is shown elsewhere.

    Returns:
        Columns, perhaps none.

    Raises:
        ValueError: A chosen column is not there.
    """
    if asked is not None:
        missing = [name for name in asked if name not in dataset.column_names]
        if missing:
            raise ValueError(f"There is no column '{missing[0]}' to show; there are {dataset.column_names}.")
        return list(asked)
    images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    strings = [name for name, feature in dataset.features.items() if _is_text(feature) and name != group_column]
    try:
        texts: Sequence[str] = text_columns(dataset, None, group_column) if strings else ()
    except ValueError:  # not clear which: all of them
        texts = strings
    if images or texts:
        return [*images, *texts]
    scalars = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Value)]
    return [name for name in scalars if name != group_column]


def share_of(num_rows: int) -> int:
    """How many bytes a row may take where so many are shown.

    Args:
        num_rows: Rows on the page.

    Returns:
        Bytes.

    Example:
        >>> share_of(10), share_of(4000), share_of(1_000_000)
        (20000, 1750, 300)
    """
    return min(max(CONTENT_BYTES // max(num_rows, 1), LEAST_BYTES), MOST_BYTES)


def read_items(
    dataset: datasets.Dataset,
    rows: Iterable[int],
    columns: Sequence[str],
    group_column: str | None,
    share: int,
    pieces: Pieces | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read rows as what is shown of them.

    Args:
        dataset: The rows.
        rows: Positions, in any order.
        columns: What is shown.
        group_column: The column of the group, if there is one.
        share: Bytes that a row may take.
        pieces: Splits a row's texts into tokens: given the row and the columns, the fields, or None.

    Yields:
        Position and item: `fields`, one for each column, and `group`. A field has `text` (and `cut`, the length that
        it had), `pieces` and `tokens`, `image` (a data URL) with `width` and `height`, or `note`.
    """
    rows = sorted({int(row) for row in rows})
    wanted = [*columns, group_column, *(("input_ids", "attention_mask") if pieces else ())]
    kept = [name for name in dict.fromkeys(wanted) if name in dataset.column_names]
    selected: Any = dataset.with_format(None).select(rows).select_columns(kept) if kept else [{} for _ in rows]
    features = dataset.features  # a copy at each look
    for name in kept:  # undecoded, so that a broken image spoils no row
        if isinstance(features[name], datasets.Image):
            selected = selected.cast_column(name, datasets.Image(decode=False))
    for row, values in zip(rows, selected, strict=True):
        fields = pieces(values, columns) if pieces is not None else None
        if fields is None:
            fields = [_field(values[name], features[name], share) for name in columns]
        item: dict[str, Any] = {"fields": fields or [{"note": "no column to show: choose one with columns="}]}
        if group_column is not None and group_column in values:
            item["group"] = group_name(features[group_column], values[group_column])
        yield row, item


def group_name(feature: Any, value: Any) -> str:
    """A group as people call it, given the feature of its column."""
    if isinstance(feature, datasets.ClassLabel) and value is not None and value >= 0:
        return clean(feature.int2str(value))
    return "none" if value is None else clean(str(value))[:200]


def clean(text: str) -> str:
    r"""Text that can be written as UTF-8: half a surrogate pair is no character.

    Args:
        text: Any text.

    Returns:
        The text, with such halves replaced.

    Example:
        >>> clean("odd \ud800") == "odd \ufffd"
        True
    """
    return _SURROGATES.sub("\ufffd", text)


def cut(text: str, share: int) -> dict[str, Any]:
    """A text field of at most so many bytes.

    Args:
        text: The text, of any length.
        share: Bytes.

    Returns:
        `text`, and `cut`, its length in characters, where it was longer.

    Example:
        >>> cut("short", 300), cut("x" * 1000, 4)
        ({'text': 'short'}, {'text': 'xxxx', 'cut': 1000})
    """
    start = clean(text[:share])
    kept = start.encode()[:share].decode(errors="ignore")
    return {"text": kept} if len(kept) == len(text) else {"text": kept, "cut": len(text)}


def _field(value: Any, feature: Any, share: int) -> dict[str, Any]:
    if isinstance(feature, datasets.Image):
        return {"note": "no image"} if value is None else _image_field(value, feature, share)
    if value is None:
        return {"note": "empty"}
    if isinstance(value, str):
        return cut(value, share) if value.strip() else {"note": "empty text"}
    if isinstance(value, (list, tuple)):  # not written out whole: it may be long
        return cut(repr(value[:100]), share)
    return cut(str(value), share)


def _image_field(stored: dict[str, Any], feature: datasets.Image, share: int) -> dict[str, Any]:
    try:
        image = datasets.Image(mode=feature.mode).decode_example(stored)
        return _encoded(image, share)
    except (OSError, ValueError, SyntaxError, TypeError) as error:  # what Pillow raises over broken files
        return {"note": f"the image cannot be read ({type(error).__name__})"}


def _encoded(image: Any, share: int) -> dict[str, Any]:
    from PIL import Image

    side = int(min(max(math.sqrt(share / _BYTES_PER_PIXEL), _LEAST_SIDE), _MOST_SIDE))
    if image.mode.startswith(("I", "F")):  # scientific images: their own darkest and brightest
        values = np.asarray(image, dtype=np.float64)
        low, high = np.nanmin(values), np.nanmax(values)
        image = Image.fromarray(np.uint8(np.clip((values - low) / (high - low or 1), 0, 1) * 255))
    elif image.mode not in ("L", "RGB", "RGBA"):
        image = image.convert("RGBA" if "transparency" in image.info or image.mode in ("LA", "PA") else "RGB")
    small = max(image.size) <= 64
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    if small:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "WEBP", quality=70)
    kind = "png" if small else "webp"
    url = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"image": url, "width": image.width, "height": image.height}


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
