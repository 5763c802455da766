"""What a folder of retrainings belongs to: written beside them, compared before more are added."""

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_attribution.artefacts import fingerprint
from hf_attribution.errors import ArtefactError, MismatchError

_SCHEMA_VERSION = 1
_ABSENT = "(absent)"

# With more subsets, or after an update of a library, one goes on in the same folder, or is told why not.
_SETTLED_LATER = ("subsets", "subset_keys", "versions")


def folder_name(manifest: Mapping[str, Any]) -> str:
    """A name for the folder of these retrainings, the same when subsets or seeds are added."""
    settled = {key: value for key, value in manifest.items() if key not in _SETTLED_LATER}
    return "retraining-" + fingerprint(settled, manifest["subset_keys"][0])[:12]


def check_manifest(folder: Path, manifest: Mapping[str, Any], write: bool = True) -> None:
    """Compare with the manifest of a folder, and write it where there is none or subsets have been added.

    Args:
        folder: The folder of the retrainings.
        manifest: What the retrainings asked for belong to; JSON.
        write: Whether to write.

    Raises:
        ArtefactError: If the folder's manifest cannot be read, or is lost.
        MismatchError: If the folder belongs to something else; the message lists what differs.
    """
    path = folder / "manifest.json"
    new = json.loads(json.dumps({"schema_version": _SCHEMA_VERSION, **manifest}))
    if not path.exists():
        if any((folder / "runs").glob("*.safetensors")):
            raise ArtefactError(f"{folder} holds retrainings but no manifest.json: choose another output_dir.")
        if write:
            _write(path, new)
        return
    old = read_manifest(folder)
    lines = differences(old, new)
    if lines:
        raise MismatchError(
            f"{folder} holds retrainings of something else, which cannot be added to. What differs:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nGive another output_dir, or put back what was changed."
        )
    if write and len(new["subset_keys"]) > len(old["subset_keys"]):
        _write(path, new)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder.

    Args:
        folder: The folder of the retrainings.

    Returns:
        The manifest.

    Raises:
        ArtefactError: If there is none, or it cannot be read.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        manifest["subset_keys"]  # of another kind of file there is no such thing
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path} cannot be read ({error!r}): choose another output_dir.") from error
    return manifest


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Each key in which two manifests differ, as `key: old → new`; subsets only where both have them."""
    keys = zip(old["subset_keys"], new["subset_keys"], strict=False)
    changed = next((number for number, (before, after) in enumerate(keys) if before != after), None)
    left_out = {"subset_keys", "subsets"} if changed is None else {"subset_keys"}
    before, after = (_flat({k: v for k, v in each.items() if k not in left_out}) for each in (old, new))
    lines = [
        f"{key}: {before.get(key, _ABSENT)} → {after.get(key, _ABSENT)}"
        for key in {**before, **after}
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]
    if changed is not None:
        lines.append(f"subset {changed}: {old['subset_keys'][changed]} → {new['subset_keys'][changed]}")
    return lines


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}" if prefix else key).items()}


def _write(path: Path, manifest: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(json.dumps(manifest, indent=1))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
