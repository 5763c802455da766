"""Files that hold results: written wholly or not at all, and checked when read.

An artefact on disk is one safetensors file whose header carries, beside the arrays, our seal (see `seals`).
"""

from __future__ import annotations

import abc
import contextlib
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from safetensors import SafetensorError, safe_open

from hf_attribution.errors import ArtefactError
from hf_attribution.seals import content_fingerprint, dumps, fingerprint, open_seal, seal, seal_kind, unseal

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Artefact", "artefact_kind", "fingerprint", "first_non_finite", "freeze", "read_artefact", "write_artefact"]

_SEAL = "hf_attribution"  # the key in a safetensors header
_SAFETENSORS_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
}


def write_artefact(
    path: str | os.PathLike[str], kind: str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> None:
    """Write arrays and metadata as one safetensors file: wholly, or not at all.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and then take the place of
    `path` in one step. When anything fails (a full disk, an interrupt) the temporary file is removed and an
    older file at `path` is as it was. Missing parent folders are made. Memory needed beyond the arrays: none.

    Args:
        path: The file to write.
        kind: What it is, for example `"scores"`; `read_artefact` refuses any other.
        arrays: Name to array; bool, uint8, int32, int64, float16, float32 or float64.
        metadata: What else to keep; JSON.

    Raises:
        IsADirectoryError: `path` is a folder.
        OSError: The file cannot be written; of the class and `errno` that the system gave.

    Example:
        >>> import tempfile, numpy as np
        >>> folder = tempfile.TemporaryDirectory()
        >>> write_artefact(f"{folder.name}/a.safetensors", "example", {"x": np.arange(3)}, {"note": "hello"})
        >>> read_artefact(f"{folder.name}/a.safetensors", "example")
        ({'x': array([0, 1, 2])}, {'note': 'hello'})
        >>> folder.cleanup()
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder: give the name of a file, such as {target / kind}.safetensors.")
    chunks = _safetensors_chunks(arrays, sealed=seal(kind, arrays, metadata))
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        message = (
            f"{error.strerror or error}: the {kind} could not be written (an older file is unchanged): "
            "make room or choose a folder that you can write to"
        )
        raise OSError(error.errno, message, str(target)) from error


def read_artefact(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `write_artefact` wrote, each array once into memory, and check all of it.

    Args:
        path: The file to read.
        kind: The kind that it must be.

    Returns:
        The arrays and the metadata.

    Raises:
        FileNotFoundError: There is no such file.
        ArtefactError: The file is truncated, changed or foreign, of another kind, or of a newer schema.
    """
    with _opened(path, kind) as (file, text):
        sealed = open_seal(text, kind, str(path))
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    return arrays, unseal(sealed, arrays, str(path))


def artefact_kind(path: str | os.PathLike[str]) -> str:
    """Tell what a file of `write_artefact` holds, from its header.

    Args:
        path: The file.

    Returns:
        The kind: `"scores"`, say.

    Raises:
        FileNotFoundError: There is no such file.
        ArtefactError: The file is truncated or foreign.
    """
    with _opened(path, "artefact") as (_, text):
        return seal_kind(text, str(path))


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str], kind: str) -> Iterator[tuple[Any, str | None]]:
    """The file and the text of its seal."""
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"There is no {kind} file at {source}.")
    if source.is_dir():
        raise ArtefactError(f"{source} is a folder, not a {kind} file: give the name of the file in it.")
    try:
        with safe_open(source, framework="numpy") as file:
            yield file, (file.metadata() or {}).get(_SEAL)
    except (SafetensorError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ArtefactError(
            f"{source} is truncated, damaged or no safetensors file ({error}). Write it again or fetch another copy."
        ) from error


class Artefact(abc.ABC):
    """What `Scores`, `Subsets` and `Counterfactuals` share: a fingerprint, `save` and `load`."""

    kind: ClassVar[str]

    @abc.abstractmethod
    def _pack(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]: ...

    @classmethod
    @abc.abstractmethod
    def _unpack(cls, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> Self: ...

    @property
    def fingerprint(self) -> str:
        """32 hex digits, the same for artefacts that are equal; the `seconds` they took are left out."""
        arrays, metadata = self._pack()
        if "provenance" in metadata:
            provenance = {key: value for key, value in metadata["provenance"].items() if key != "seconds"}
            metadata = {**metadata, "provenance": provenance}
        return content_fingerprint(self.kind, arrays, metadata)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write this to one safetensors file, wholly or not at all: see `write_artefact`."""
        write_artefact(path, self.kind, *self._pack())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return what `save` wrote, checked; `ArtefactError` where it is not that: see `read_artefact`."""
        return cls._unpack(*read_artefact(path, cls.kind))


def freeze(array: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    """Return a read-only, contiguous view; copied only where layout or dtype demand it."""
    frozen = np.ascontiguousarray(array, dtype=dtype).view()
    frozen.flags.writeable = False
    return frozen


def first_non_finite(array: np.ndarray) -> tuple[int, ...] | None:
    """Return the index of the first NaN or infinity in row-major order, without a mask of its size."""
    with np.errstate(invalid="ignore"):
        if np.isfinite(array.min()) and np.isfinite(array.max()):
            return None
    row = next(row for row, values in enumerate(array) if not np.isfinite(values).all())
    return (row, *(int(i) for i in np.argwhere(~np.isfinite(array[row]))[0]))


def _safetensors_chunks(arrays: Mapping[str, np.ndarray], sealed: str) -> list[bytes | memoryview]:
    """Return the bytes of a safetensors file, without a copy of the arrays.

    `safetensors.numpy.save_file` hides the system's error number, and its files can be read by their owner
    only.

    Raises:
        TypeError: An array is of a type that is not written.
    """
    header: dict[str, Any] = {"__metadata__": {_SEAL: sealed}}
    chunks: list[bytes | memoryview] = []
    start = 0
    # The widest numbers first, so that all of them lie aligned in the file.
    for name in sorted(arrays, key=lambda name: (-arrays[name].itemsize, name)):
        array, dtype = arrays[name], arrays[name].dtype
        if dtype.name not in _SAFETENSORS_NAMES:
            raise TypeError(f"Array '{name}' is {dtype}; convert it to one of {', '.join(_SAFETENSORS_NAMES)}.")
        little = np.ascontiguousarray(array, dtype=dtype.newbyteorder("<"))
        offsets = [start, start := start + array.nbytes]
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[dtype.name],
            "shape": array.shape,
            "data_offsets": offsets,
        }
        chunks.append(little.reshape(-1).view(np.uint8).data)
    text = dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *chunks]
