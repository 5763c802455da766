"""Projected gradients of a whole dataset, in a feature store: computed once, resumed when interrupted."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_attribution.data import Batch, Split
from hf_attribution.errors import ArtefactError
from hf_attribution.finite import all_finite
from hf_attribution.gradients.checks import refuse_non_finite
from hf_attribution.gradients.moments import DividedGradients
from hf_attribution.gradients.per_example import PerExampleGradients
from hf_attribution.gradients.projections import Projection
from hf_attribution.locks import alone
from hf_attribution.processes import from_main, in_order
from hf_attribution.store import FeatureStore, FeatureWriter, Manifest


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
        settings: What the features depend on, as JSON. The fingerprint of the rows joins them as `data`. A store
            with other settings is refused.
        device: Where the model is.
        progress: Whether to show a progress bar.
        dtype: The number format that they are kept in.

    Returns:
        The complete store.

    Raises:
        MismatchError: If the folder holds features of something else.
        NonFiniteError: If a gradient is NaN or infinite; the message names the row and the parameter.
    """
    # Of a stream nobody knows the length and the fingerprint before the features are there.
    wanted = Manifest(projection.dim, dtype, settings, None if split.streamed else len(split))
    with contextlib.ExitStack() as stack:
        writers: list[FeatureWriter] = []

        def begun() -> np.ndarray | None:
            if not path.exists():
                stack.enter_context(alone(path))
            if path.exists():
                return None
            writers.append(FeatureWriter(path, wanted, _longest_beginning(path, wanted, split)))
            return writers[0].done

        def finish() -> None:
            writers[0].finish({**settings, "data": split.fingerprint})

        done = from_main(begun)
        if done is not None:
            bar = tqdm(total=wanted.num_rows, initial=int(done.sum()), unit="rows", desc=f"{split.name} gradients",
                       leave=False, disable=not progress)  # fmt: skip
            with bar:
                rows = _projected_rows(split, gradients, projection, device, skip=np.array(done))
                for indices, projected, values in in_order(rows):
                    for writer in writers:
                        writer.write(indices.cpu().numpy(), projected, values)
                    bar.update(len(indices))
            from_main(finish)
    store = FeatureStore(path)
    store.manifest.refuse_other(
        Manifest(projection.dim, dtype, {**settings, "data": split.fingerprint}, len(split)), path
    )
    return store


def _projected_rows(
    split: Split,
    gradients: PerExampleGradients | DividedGradients,
    projection: Projection,
    device: torch.device,
    skip: np.ndarray,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Dataset positions `[B]`, projected gradients `[B, dim]` and values `[B]` of this process's share of a split."""
    shapes = {name: parameter.shape for name, parameter in gradients.parameters.items()}

    def project(batch: Batch) -> tuple[Tensor, Tensor]:
        found = gradients(batch)
        projected = projection(found, shapes)
        if not all_finite(projected):
            for name, terms in found.terms.items():
                for term in terms:
                    refuse_non_finite(term.dense(), batch.indices, f"The gradient of {name}")
        return projected, found.values

    for batch in split.batches(skip=skip, shared=True):
        projected, values = zip(*split.in_parts(project, batch.to(device)), strict=True)
        yield batch.indices, torch.cat(projected), torch.cat(values)


def _longest_beginning(path: Path, wanted: Manifest, split: Split) -> FeatureStore | None:
    """The largest store beside a path that holds the same features of the split's first rows, if there is one."""
    found: list[FeatureStore] = []
    for folder in path.parent.glob("*") if not split.streamed else ():
        with contextlib.suppress(ArtefactError):  # unfinished, damaged, or no store at all
            store = FeatureStore(folder)
            same = {**store.manifest.settings, "data": None} == {**wanted.settings, "data": None}
            alike = (store.dim, store.manifest.dtype) == (wanted.dim, wanted.dtype)
            if same and alike and len(store) < len(split):
                found.append(store)
    found.sort(key=len, reverse=True)
    data = (store for store in found if store.manifest.settings["data"] == split.fingerprint_of_first(len(store)))
    return next(data, None)
