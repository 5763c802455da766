"""Projected gradients of a whole dataset, on disk: computed once, read in blocks, resumed when interrupted."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_attribution.data import Split
from hf_attribution.errors import ArtefactError, MismatchError
from hf_attribution.gradients.checks import refuse_non_finite
from hf_attribution.gradients.moments import DividedGradients
from hf_attribution.gradients.per_example import PerExampleGradients
from hf_attribution.gradients.projections import Projection

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class FeatureStore:
    """Projected gradients of every row of a dataset, in memory-mapped files of one folder.

    Args:
        path: The folder.

    Attributes:
        features: `[N, dim]` float32, the projected gradients, in dataset order.
        values: `[N]` float32, the values that were differentiated.

    Raises:
        ArtefactError: If the folder is not a complete store of this schema.
    """

    path: Path
    features: np.ndarray = dataclasses.field(init=False, repr=False)
    values: np.ndarray = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        manifest = read_manifest(self.path)
        try:
            features = np.load(self.path / "features.npy", mmap_mode="r")
            values = np.load(self.path / "values.npy")
        except (OSError, ValueError) as error:
            raise ArtefactError(f"The feature store {self.path} is damaged ({error}): delete the folder.") from error
        if list(features.shape) != [manifest["num_rows"], manifest["dim"]] or len(values) != len(features):
            raise ArtefactError(f"The feature store {self.path} is not of the size it claims: delete the folder.")
        object.__setattr__(self, "features", features)
        object.__setattr__(self, "values", values)

    def __len__(self) -> int:
        return len(self.features)

    @property
    def dim(self) -> int:
        """Dimension of the projected gradients."""
        return self.features.shape[1]

    def blocks(self, rows: int = 8192) -> Iterator[tuple[slice, Tensor]]:
        """The features in order, some rows at a time: where they belong, and a float32 tensor `[rows, dim]`."""
        for start in range(0, len(self), rows):
            where = slice(start, min(start + rows, len(self)))
            yield where, torch.from_numpy(np.array(self.features[where]))


def compute_features(
    path: Path,
    split: Split,
    gradients: PerExampleGradients | DividedGradients,
    projection: Projection,
    settings: dict[str, Any],
    device: torch.device,
    progress: bool = True,
) -> FeatureStore:
    """The feature store of a split: opened if it is complete, else computed, from where it was left.

    Args:
        path: Its folder. While it is being computed, it is called `<path>.part`.
        split: The rows.
        gradients: What computes their gradients.
        projection: The projection.
        settings: What the features depend on, as JSON. A store with other settings is refused.
        device: Where the model is.
        progress: Whether to show a progress bar.

    Returns:
        The complete store.

    Raises:
        MismatchError: If the folder holds features of something else.
        NonFiniteError: If a gradient is NaN or infinite; the message names the row and the parameter.
    """
    manifest = {"schema_version": SCHEMA_VERSION, "num_rows": len(split), "dim": projection.dim, "settings": settings}
    if path.exists():
        _refuse_other(path, manifest)
        return FeatureStore(path)
    part = path.with_name(path.name + ".part")
    features, values, done = _open_part(part, manifest)
    shapes = {name: parameter.shape for name, parameter in gradients.parameters.items()}
    bar = tqdm(total=len(split), initial=int(done.sum()), unit="rows", desc=f"{split.name} gradients", leave=False,
               disable=not progress)  # fmt: skip
    with bar:
        for batch in split.batches(skip=done):
            found = gradients(batch.to(device))
            projected = projection(found, shapes)
            if not projected.isfinite().all():
                for name, terms in found.terms.items():
                    for term in terms:
                        refuse_non_finite(term.dense(), batch.indices, f"The gradient of {name}")
            rows = batch.indices.numpy()
            features[rows] = projected.cpu().numpy()
            values[rows] = found.values.cpu().numpy()
            done[rows] = True
            bar.update(len(rows))
    for array in (features, values, done):
        array.flush()
    (part / "done.npy").unlink()
    part.rename(path)
    return FeatureStore(path)


def read_manifest(path: Path) -> dict[str, Any]:
    """What a feature store says of itself.

    Args:
        path: Its folder.

    Returns:
        Schema version, number of rows, dimension and settings.

    Raises:
        ArtefactError: If there is none that can be read, or it is of another schema.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} is not a feature store ({error}): choose another folder.") from error
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ArtefactError(
            f"The feature store {path} has schema {manifest.get('schema_version')}, this version of hf_attribution "
            f"reads {SCHEMA_VERSION}: delete the folder, or use the version that wrote it."
        )
    return manifest


def _refuse_other(path: Path, manifest: dict[str, Any]) -> None:
    found = read_manifest(path)
    flat = {**found, **found["settings"]}, {**manifest, **manifest["settings"]}
    different = [key for key in flat[1] if key != "settings" and flat[0].get(key) != flat[1][key]]
    if different:
        changes = ", ".join(f"{key}: {flat[0].get(key)} there, {flat[1][key]} now" for key in different)
        raise MismatchError(f"The feature store {path} was made for something else ({changes}): use another folder.")


def _open_part(part: Path, manifest: dict[str, Any]) -> tuple[np.memmap, np.memmap, np.memmap]:
    """The unfinished files, new or as they were left: features, values, and which rows are done."""
    names = ("features.npy", "values.npy", "done.npy")
    if all((part / name).exists() for name in names):
        _refuse_other(part, manifest)
        features, values, done = (np.lib.format.open_memmap(part / name, mode="r+") for name in names)
        return features, values, done
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    (part / "manifest.json").write_text(json.dumps(manifest, indent=2))
    rows, dim = manifest["num_rows"], manifest["dim"]
    try:
        return (
            _create(part / names[0], np.float32, (rows, dim)),
            _create(part / names[1], np.float32, (rows,)),
            _create(part / names[2], np.bool_, (rows,)),
        )
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        message = f"{error.strerror or error}: the features of {rows} rows take {4e-9 * rows * dim:.2f} GB"
        raise OSError(error.errno, message + "; give another cache_dir, or a smaller dim", str(part)) from error


def _create(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        # A mapped file has holes, and a hole that finds the disk full kills the process: take the space now.
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
