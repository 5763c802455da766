"""One commit with all files of an artefact, or none: what is on the Hub is never half of something."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import DatasetInfo

from hf_attribution.errors import HubError
from hf_attribution.hub.access import LOGIN, Place, explained, status_code

README = "README.md"
WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds, before a commit that somebody else's overtook is tried again
OVERTAKEN = (409, 412)


@dataclass(frozen=True)
class Upload:
    """What goes into a repository.

    Attributes:
        kind: The kind of artefact, which is also the folder that it lies in.
        files: Called for the files, one by one: path in the repository, and content or local file.
        owned: Paths that belong to us: what matches and is not among `files` is deleted.
        is_ours: Given the repository and the paths in it, whether what lies in the folder was written by us.
        card: Given the repository id and the present README, if any, the new README.
    """

    kind: str
    files: Callable[[], Iterable[tuple[str, bytes | Path]]]
    owned: re.Pattern[str]
    is_ours: Callable[[Place, list[str]], bool]
    card: Callable[[str, str | None], str]


def commit(place: Place, private: bool | None, upload: Upload) -> str:
    """Put files and card into a dataset repository, in one commit.

    The repository and the branch are made where they are missing. Files are uploaded one by one as they come, and
    those that the Hub has already are not sent again, so that an upload that was cut goes on where it stopped.
    Nothing is visible before all of them are there. If another commit came in between, all is looked at and done
    anew.

    Args:
        place: The repository; its token must write.
        private: Whether a new repository is private, and what an existing one must be; None takes it as it is.
        upload: What goes there.

    Returns:
        The URL of the commit: the present one if nothing changed.

    Raises:
        HubError: The Hub refused; the visibility is not what was asked for, or the repository holds something else.
        HfHubHTTPError: Never: it becomes a `HubError`.
    """
    api = HfApi(token=place.token)
    if not place.has_token:
        raise HubError(f"Pushing to {place.repo_id} needs a token with write access: {LOGIN}.")
    with explained(place, "push to"):
        place = _named(api, place)
        _open(api, place, private)
        for wait in WAITS:
            try:
                return _commit(api, place, upload)
            except HfHubHTTPError as error:
                if status_code(error) not in OVERTAKEN:
                    raise
                time.sleep(wait)
        return _commit(api, place, upload)


def _named(api: HfApi, place: Place) -> Place:
    if "/" in place.repo_id:
        return place
    return Place(f"{api.whoami()['name']}/{place.repo_id}", place.revision, place.token)


def _open(api: HfApi, place: Place, private: bool | None) -> None:
    """Make the repository and the branch where they are missing.

    Raises:
        HubError: The repository is public and should be private, or the other way round.
    """
    try:
        info = api.dataset_info(place.repo_id)
    except RepositoryNotFoundError:
        api.create_repo(place.repo_id, repo_type="dataset", private=private, exist_ok=True)
        info = api.dataset_info(place.repo_id)
    if private is not None and info.private != private:
        names = {True: "private", False: "public"}
        raise HubError(
            f"{place.repo_id} exists and is {names[bool(info.private)]}, and private={private} was asked for: nothing "
            f"was pushed. Make it {names[private]} first, "
            f"`HfApi().update_repo_settings('{place.repo_id}', repo_type='dataset', private={private})`, take another "
            "name, or leave private out to push to it as it is."
        )
    if place.revision is not None:
        try:
            api.dataset_info(place.repo_id, revision=place.revision)
        except RevisionNotFoundError:
            api.create_branch(place.repo_id, repo_type="dataset", branch=place.revision, exist_ok=True)


def _commit(api: HfApi, place: Place, upload: Upload) -> str:
    head = api.dataset_info(place.repo_id, revision=place.revision)
    present = [sibling.rfilename for sibling in head.siblings or []]
    _refuse_others(dataclasses.replace(place, revision=head.sha), upload, present)
    readme = upload.card(place.repo_id, _read_card(api, place, head) if README in present else None)
    DatasetCard(readme).validate()  # before anything is uploaded
    additions = []
    for path, content in upload.files():
        additions.append(CommitOperationAdd(path, content))
        api.preupload_lfs_files(place.repo_id, additions=additions[-1:], repo_type="dataset", revision=place.revision)
    new = {addition.path_in_repo for addition in additions}
    stale = [CommitOperationDelete(path) for path in present if upload.owned.fullmatch(path) and path not in new]
    done = api.create_commit(
        place.repo_id,
        [*additions, *stale, CommitOperationAdd(README, readme.encode())],
        repo_type="dataset",
        revision=place.revision,
        commit_message=f"Upload {upload.kind} with hf_attribution",
        parent_commit=head.sha,
    )
    return done.commit_url


def _refuse_others(place: Place, upload: Upload, present: list[str]) -> None:
    """Refuse a repository that holds something, but not this kind of thing.

    Raises:
        HubError: It does.
    """
    others = [path for path in present if path not in (README, ".gitattributes")]
    if others and not upload.is_ours(place, present):
        raise HubError(
            f"{place.repo_id} exists and holds something else than {upload.kind} of hf_attribution ({others[0]}"
            f"{f' and {len(others) - 1} more files' if len(others) > 1 else ''}): nothing was pushed. "
            "Take another name, or empty the repository first."
        )


def _read_card(api: HfApi, place: Place, head: DatasetInfo) -> str:
    path = api.hf_hub_download(place.repo_id, README, repo_type="dataset", revision=head.sha)
    return Path(path).read_text(encoding="utf-8-sig")
