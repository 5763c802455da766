"""Where a repository is, and what its refusals mean."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_attribution.errors import HubError

LOGIN = "log in with `hf auth login`, set HF_TOKEN, or pass token="


@dataclass(frozen=True)
class Place:
    """A dataset repository on the Hub, at a revision, as somebody sees it.

    Attributes:
        repo_id: `"user/name"`.
        revision: Branch, tag or commit; by default the main branch.
        token: A token, None for the one of `hf auth login` or HF_TOKEN, False for none.
    """

    repo_id: str
    revision: str | None = None
    token: str | bool | None = None

    @property
    def has_token(self) -> bool:
        """Whether requests carry a token."""
        return isinstance(self.token, str) or (self.token is not False and get_token() is not None)


@contextlib.contextmanager
def explained(place: Place, action: str) -> Iterator[None]:
    """Turn what the Hub answers into an error that names the repository and the remedy.

    Args:
        place: The repository.
        action: What is done to it: "push to", "read".

    Yields:
        Nothing.

    Raises:
        HubError: The Hub refused, or could not be reached.
    """
    try:
        yield
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise HubError(f"Cannot {action} {place.repo_id}: {_remedy(error, place)}") from error


def status_code(error: Exception) -> int | None:
    """Return the HTTP status that an error is about, if any."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _remedy(error: Exception, place: Place) -> str:
    status = status_code(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it to reach the Hub."
    if isinstance(error, GatedRepoError):
        return f"it is gated. Ask for access at {constants.ENDPOINT}/datasets/{place.repo_id}, then {LOGIN}."
    if isinstance(error, RevisionNotFoundError):
        return f"it has no branch, tag or commit '{place.revision}'. `HfApi().list_repo_refs` lists them."
    if isinstance(error, RepositoryNotFoundError) and place.has_token:
        return (
            f"there is no such dataset repository on {constants.ENDPOINT}, or it is private and your token does "
            "not see it. Check the name, and the token's permissions."
        )
    if isinstance(error, RepositoryNotFoundError) or (status == 401 and not place.has_token):
        return (
            f"there is no such dataset repository on {constants.ENDPOINT}, or it is private. Check the name; if it is "
            f"private, {LOGIN}."
        )
    if status == 401:
        return f"the token is not valid (expired or revoked?): {LOGIN}."
    if status == 403:
        return (
            f"the token may not do that ({_said(error)}). Use a token with write access to "
            f"'{place.repo_id.split('/')[0]}', or a name of your own."
        )
    if status is not None:
        return f"the Hub answered {status} ({_said(error)})."
    return f"{constants.ENDPOINT} could not be reached ({type(error).__name__}: {error}). Check the network."


def _said(error: Exception) -> str:
    message = getattr(error, "server_message", None) or str(error)
    return " ".join(message.split())
