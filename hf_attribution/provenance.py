"""Where results came from: of one, and of several that become one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_attribution.errors import MismatchError
from hf_attribution.seals import fingerprint


def merge_provenance(parts: Sequence[Mapping[str, Any]], shared: Sequence[str]) -> dict[str, Any]:
    """Join the provenance of artefacts that become one.

    Args:
        parts: The provenance of each.
        shared: Which of the `fingerprints` must be the same in all. Of the others, one that differs is
            replaced by the fingerprint of all its values.

    Returns:
        `fingerprints`; the sum of `seconds`; the union of `used_subsets`, in order; the list of `choices`; the
        `columns`; `sources` and `paper` where they are the same in all: each only where a part has it.

    Raises:
        MismatchError: One of the `shared` fingerprints differs.
    """
    fingerprints: dict[str, str] = {}
    for name in dict.fromkeys(key for part in parts for key in part.get("fingerprints", {})):
        values = [part.get("fingerprints", {}).get(name) for part in parts]
        if all(value == values[0] for value in values):
            fingerprints[name] = values[0]
        elif name in shared:
            other = next(index for index, value in enumerate(values) if value != values[0])
            raise MismatchError(
                f"Part 0 and part {other} do not belong together: the fingerprint of '{name}' is "
                f"{values[0]} in one and {values[other]} in the other. Join only results for the same {name}."
            )
        else:
            fingerprints[name] = fingerprint(values)
    joins: dict[str, Callable[[list[Any]], Any]] = {
        "seconds": sum,
        "used_subsets": lambda lists: list(dict.fromkeys(key for keys in lists for key in keys)),
        "choices": list,
        "columns": lambda found: found[0],  # that the fingerprints, which are the same, are of
    }
    merged: dict[str, Any] = {"fingerprints": fingerprints} if fingerprints else {}
    for key, join in joins.items():
        found = [part[key] for part in parts if key in part]
        if found:
            merged[key] = join(found)
    for key in ("sources", "paper"):
        if all(key in part and part[key] == parts[0][key] for part in parts):
            merged[key] = parts[0][key]
    return merged


def hub_sources(model: Any, dataset: Any) -> dict[str, dict[str, str]]:
    """Where on the Hub model and dataset were loaded from, as far as can be told: for the cards of results.

    Args:
        model: A model; it knows the name that it was loaded by, before it was trained further.
        dataset: A dataset; the files that it lies in know the commit that they were made from.

    Returns:
        `{"model": {"id": ...}, "dataset": {"id": ..., "revision": ...}}`, each only where it is known. Never a local
        path.
    """
    sources: dict[str, dict[str, str]] = {}
    name = getattr(getattr(model, "config", None), "name_or_path", None) or ""
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).exists():
        sources["model"] = {"id": name}
    for file in getattr(dataset, "cache_files", ()):
        source = _cached_dataset(Path(file["filename"]).parent.name)
        if source is not None:
            sources["dataset"] = source
    return sources


def _cached_dataset(commit: str) -> dict[str, str] | None:
    """The dataset repository in the Hub's cache that has this commit."""
    from huggingface_hub import constants

    if re.fullmatch("[0-9a-f]{40}", commit):
        for folder in Path(constants.HF_HUB_CACHE).glob(f"datasets--*/snapshots/{commit}"):
            return {"id": "/".join(folder.parts[-3].split("--")[1:]), "revision": commit}
    return None
