"""Folders of files with a sealed manifest, as they are: feature stores."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from hf_attribution.errors import ArtefactError
from hf_attribution.hub.access import Place, explained
from hf_attribution.hub.card import AttributionCardData, Page, write_card
from hf_attribution.hub.commits import Upload, commit
from hf_attribution.seals import open_seal

MANIFEST = "manifest.json"
_PLAIN = re.compile(r"\w[\w.-]*")  # the name of a file, and of nothing outside of the folder


def push_folder(
    kind: str, folder: Path, names: Iterable[str], page: Page, said: AttributionCardData, place: Place,
    private: bool | None,
) -> str:  # fmt: skip
    """Push files of a folder, as they are, beside a card.

    Args:
        kind: What the folder is, and is called in the repository.
        folder: Where it is.
        names: Its files.
        page: What its card says.
        said: What its owner says.
        place: The repository.
        private: As for `commit`.

    Returns:
        The URL of the commit.
    """

    def is_ours(where: Place, present: list[str]) -> bool:
        path = f"{kind}/{MANIFEST}"
        if path not in present:
            return False
        file = hf_hub_download(where.repo_id, path, repo_type="dataset", revision=where.revision, token=where.token)
        return bool(open_seal(Path(file).read_text(encoding="utf-8"), kind, where.repo_id))

    files = [(f"{kind}/{name}", folder / name) for name in names]
    upload = Upload(
        kind=kind,
        files=lambda: files,
        owned=re.compile(rf"{kind}/[\w.-]+\.(arrow|json)"),
        is_ours=is_ours,
        card=lambda repo_id, present: write_card(page, said, repo_id, present),
    )
    return commit(place, private, upload)


def pull_folder(kind: str, place: Place, path: Path, names: Callable[[Path], Iterable[str]]) -> Path:
    """Fetch such a folder; what was fetched before a cut is kept beside it, and the next call goes on from there.

    Args:
        kind: What the folder is.
        place: The repository.
        path: Where it will be, once it is checked.
        names: Given a folder with the manifest, which is read before the rest is fetched, the names of the files.

    Returns:
        The folder beside `path` that holds all of it: check it, then call `put`.

    Raises:
        FileExistsError: There is something at `path`.
        ArtefactError: The repository holds no such folder, or its manifest names files that lie elsewhere.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists: give the name of a folder that does not, or delete it.")
    part = path.with_name(f"{path.name}.fetched")
    found = _fetch(place, part, [f"{kind}/{MANIFEST}"])
    if not (found / kind / MANIFEST).is_file():
        raise ArtefactError(f"{place.repo_id} holds no {kind} that hf_attribution pushed.")
    files = list(names(found / kind))
    outside = [name for name in files if not _PLAIN.fullmatch(name)]
    if outside:
        raise ArtefactError(
            f"The manifest of {place.repo_id} names {outside[0]!r}, which is no file of it: do not use it."
        )
    return _fetch(place, part, [f"{kind}/{name}" for name in files]) / kind


def put(fetched: Path, path: Path) -> None:
    """Move a folder that was fetched and checked to its place."""
    fetched.rename(path)
    shutil.rmtree(fetched.parent)


def _fetch(place: Place, part: Path, paths: list[str]) -> Path:
    with explained(place, "read"):
        return Path(
            snapshot_download(
                place.repo_id, repo_type="dataset", revision=place.revision, token=place.token, allow_patterns=paths,
                local_dir=part,
            )
        )  # fmt: skip
