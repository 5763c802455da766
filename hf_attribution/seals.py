"""What makes a result checkable: content fingerprints, and the seal that is stored with arrays.

The seal is one JSON string: schema version, kind, metadata, and the fingerprint of all of it with the arrays.
It lies in the header of a file (see `artefacts`) or in the first row of a dataset (see `rows`), and so it
survives Arrow, Parquet and the Hub.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash

from hf_attribution.errors import ArtefactError

SCHEMA_VERSION = 1


def fingerprint(*parts: Any) -> str:
    """Name a sequence of values by their content: 32 hex digits (xxh3_128), the same in every process.

    Args:
        *parts: NumPy arrays (of any dtype but object), bytes, strings, or anything that JSON can hold. Type,
            dtype and shape count: `"1"`, `1` and `np.array(1)` differ.

    Returns:
        The fingerprint, 32 lower-case hexadecimal digits.

    Raises:
        TypeError: A part is neither an array nor bytes nor JSON.

    Example:
        >>> import numpy as np
        >>> fingerprint("train", np.arange(3)) == fingerprint("train", np.arange(3))
        True
        >>> fingerprint("ab", "c") == fingerprint("a", "bc")
        False
    """
    digest = xxhash.xxh3_128()
    for part in parts:
        if isinstance(part, np.ndarray):
            if part.dtype.hasobject:
                raise TypeError("An array of Python objects has no fingerprint; convert it to numbers or strings.")
            array = np.ascontiguousarray(part, dtype=part.dtype.newbyteorder("<"))
            digest.update(f"array {array.dtype.str} {part.shape};".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
            continue
        if isinstance(part, bytes):
            tag, content = "bytes", part
        elif isinstance(part, str):
            tag, content = "str", part.encode()
        else:
            tag, content = "json", dumps(part, sort_keys=True).encode()
        digest.update(f"{tag} {len(content)};".encode())
        digest.update(content)
    return digest.hexdigest()


def seal(kind: str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> str:
    """Return the JSON that goes with arrays: schema version, kind, metadata, fingerprint of it all."""
    content = content_fingerprint(kind, arrays, metadata)
    fields = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "fingerprint": content,
        "metadata": dict(metadata),
    }
    return dumps(fields)


def open_seal(text: str | None, kind: str, source: str) -> dict[str, Any]:
    """Read a seal before any array is read.

    Args:
        text: What `seal` gave.
        kind: The kind that it must be of.
        source: Where it was found, for messages.

    Returns:
        Its fields, for `unseal`.

    Raises:
        ArtefactError: It is none of ours, of another kind, or of a newer schema.
    """
    fields = _fields(text, kind, source)
    if fields["kind"] != kind:
        raise ArtefactError(f"{source} holds {fields['kind']}, not {kind}: load it with the class that wrote it.")
    return fields


def seal_kind(text: str | None, source: str) -> str:
    """Return the kind that a seal names, with the errors of `open_seal`."""
    return _fields(text, "artefact", source)["kind"]


def _fields(text: str | None, kind: str, source: str) -> dict[str, Any]:
    """Return the fields of a seal that this version reads.

    Raises:
        ArtefactError: There is none, or it is of a newer schema.
    """
    if text is None:
        raise ArtefactError(f"{source} is no {kind} of hf_attribution: it lacks our metadata. Was it written by us?")
    try:
        fields = json.loads(text)
        version, _ = fields["schema_version"], fields["kind"]
        newer = version > SCHEMA_VERSION
    except (ValueError, TypeError, KeyError) as error:
        raise ArtefactError(f"{source} has metadata that cannot be read ({error!r}). Write it again.") from error
    if newer:
        raise ArtefactError(
            f"{source} has schema version {version} and this hf_attribution reads up to {SCHEMA_VERSION}: "
            "pip install -U hf-attribution."
        )
    return fields


def unseal(fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray], source: str) -> dict[str, Any]:
    """Return the metadata of an opened seal if the arrays are those that were sealed.

    Raises:
        ArtefactError: They are not.
    """
    metadata = fields.get("metadata")
    if not isinstance(metadata, dict) or content_fingerprint(fields["kind"], arrays, metadata) != fields.get(
        "fingerprint"
    ):
        raise ArtefactError(
            f"{source} is not what was written: its content does not match its fingerprint (damaged, edited, "
            "or rows left out or reordered). Write it again or fetch another copy."
        )
    return metadata


def plain_json(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a copy as JSON gives it back (tuples become lists, NumPy scalars numbers): saving loses nothing.

    Raises:
        TypeError: It holds something that JSON cannot, such as NaN; the message begins with `name`.
    """
    try:
        return json.loads(dumps(dict(value)))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be JSON (numbers, strings, lists, dicts with string keys): {error}") from error


def dumps(value: Any, *, sort_keys: bool = False) -> str:
    """Return compact JSON; NumPy scalars become numbers, and NaN or infinity is a `ValueError`."""
    return json.dumps(value, default=_scalar, allow_nan=False, sort_keys=sort_keys, separators=(",", ":"))


def _scalar(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")


def content_fingerprint(kind: str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> str:
    """Return the fingerprint of named arrays and metadata, whatever the order of their names."""
    named = [part for name in sorted(arrays) for part in (name, arrays[name])]
    return fingerprint(SCHEMA_VERSION, kind, dict(metadata), *named)
