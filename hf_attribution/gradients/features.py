"""Projected gradients of a whole dataset, in a feature store: computed once, resumed when interrupted."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformers.utils import logging

from hf_attribution.data import Split
from hf_attribution.errors import ArtefactError
from hf_attribution.gradients.checks import refuse_non_finite
from hf_attribution.gradients.moments import DividedGradients
from hf_attribution.gradients.per_example import PerExampleGradients
from hf_attribution.gradients.projections import Projection
from hf_attribution.store import FeatureStore, FeatureWriter, Manifest

logger = logging.get_logger(__name__)


def compute_features(
    path: Path,
    split: Split,
    gradients: PerExampleGradients | DividedGradients,
    projection: Projection,
    settings: dict[str, Any],
    device: torch.device,
    progress: bool = True,
    dtype: str = "float32",
) -> FeatureStore:
    """The feature store of a split: opened if it is complete, else computed, from where it was left.

    Rows at the beginning that a store beside it holds, of a dataset that has since grown, are taken from there.

    Args:
        path: Its folder. While it is being computed, it is called `<path>.part`; a second process waits for the first.
        split: The rows.
        gradients: What computes their gradients.
        projection: The projection.
        settings: What the features depend on, as JSON; `data` is the fingerprint of the rows. A store with other
            settings is refused.
        device: Where the model is.
        progress: Whether to show a progress bar.
        dtype: The number format that they are kept in.

    Returns:
        The complete store.

    Raises:
        MismatchError: If the folder holds features of something else.
        NonFiniteError: If a gradient is NaN or infinite; the message names the row and the parameter.
    """
    wanted = Manifest(projection.dim, dtype, settings, len(split))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if not path.exists():
                writer = FeatureWriter(path, wanted, _longest_beginning(path, wanted, split))
                _write_all(writer, split, gradients, projection, device, progress)
                return writer.finish()
    store = FeatureStore(path)
    store.manifest.refuse_other(wanted, path)
    return store


def _write_all(
    writer: FeatureWriter,
    split: Split,
    gradients: PerExampleGradients | DividedGradients,
    projection: Projection,
    device: torch.device,
    progress: bool,
) -> None:
    """Compute and write the rows that are not there."""
    shapes = {name: parameter.shape for name, parameter in gradients.parameters.items()}
    bar = tqdm(total=len(split), initial=int(writer.done.sum()), unit="rows", desc=f"{split.name} gradients",
               leave=False, disable=not progress)  # fmt: skip
    with bar:
        for batch in split.batches(skip=writer.done):
            found = gradients(batch.to(device))
            projected = projection(found, shapes)
            if not projected.isfinite().all():
                for name, terms in found.terms.items():
                    for term in terms:
                        refuse_non_finite(term.dense(), batch.indices, f"The gradient of {name}")
            writer.write(batch.indices.numpy(), projected, found.values)
            bar.update(len(batch.indices))


def _longest_beginning(path: Path, wanted: Manifest, split: Split) -> FeatureStore | None:
    """The largest store beside a path that holds the same features of the split's first rows, if there is one."""
    found: list[FeatureStore] = []
    for folder in path.parent.glob("*"):
        with contextlib.suppress(ArtefactError):  # unfinished, damaged, or no store at all
            store = FeatureStore(folder)
            same = {**store.manifest.settings, "data": None} == {**wanted.settings, "data": None}
            alike = (store.dim, store.manifest.dtype) == (wanted.dim, wanted.dtype)
            if same and alike and len(store) < len(split):
                found.append(store)
    found.sort(key=len, reverse=True)
    data = (store for store in found if store.manifest.settings["data"] == split.fingerprint_of_first(len(store)))
    return next(data, None)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock on the making of a store; the system gives it up when its process dies."""
    lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning(f"Another process computes the features {path}: waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
