"""Artefacts of any kind: which a file holds, and which a repository."""

from __future__ import annotations

import os

from huggingface_hub import HfApi

from hf_attribution.artefacts import artefact_kind
from hf_attribution.counterfactuals import Counterfactuals
from hf_attribution.errors import ArtefactError
from hf_attribution.hub.access import Place, explained
from hf_attribution.hub.tables import parquet_paths
from hf_attribution.scores import Scores
from hf_attribution.subsets import Subsets

KINDS = {kind.kind: kind for kind in (Scores, Counterfactuals, Subsets)}


def load(path: str | os.PathLike[str]) -> Scores | Counterfactuals | Subsets:
    """Load whatever artefact a file holds.

    Args:
        path: The file.

    Returns:
        The artefact.

    Raises:
        ArtefactError: The file holds none, or one that is not shared on the Hub.
    """
    kind = artefact_kind(path)
    if kind not in KINDS:
        raise ArtefactError(f"{path} holds {kind}: on the Hub go {', '.join(KINDS)}.")
    return KINDS[kind].load(path)


def fetch(place: Place) -> Scores | Counterfactuals | Subsets:
    """Fetch whatever artefact a repository holds.

    Args:
        place: The repository.

    Returns:
        The artefact.

    Raises:
        ArtefactError: The repository holds none.
    """
    with explained(place, "read"):
        paths = HfApi(token=place.token).list_repo_files(place.repo_id, repo_type="dataset", revision=place.revision)
    for name, kind in KINDS.items():
        if any(parquet_paths(name).fullmatch(path) for path in paths):
            return kind.from_hub(place.repo_id, revision=place.revision, token=place.token)
    raise ArtefactError(
        f"{place.repo_id} holds nothing that hf_attribution pushed ({', '.join(paths[:3]) or 'it is empty'}). "
        f"Load it with datasets.load_dataset('{place.repo_id}')."
    )
