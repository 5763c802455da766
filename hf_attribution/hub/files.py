"""Artefacts of any kind: which a file holds, and which a repository."""

from __future__ import annotations

import os

from huggingface_hub import HfApi

from hf_attribution.artefacts import artefact_kind
from hf_attribution.counterfactuals import Counterfactuals
from hf_attribution.errors import ArtefactError
from hf_attribution.hub.access import Place, explained
from hf_attribution.hub.folders import MANIFEST
from hf_attribution.hub.tables import parquet_paths
from hf_attribution.scores import Scores
from hf_attribution.subsets import Subsets
from hf_attribution.top_scores import TopScores

Tabular = Scores | TopScores | Counterfactuals | Subsets
KINDS = {kind.kind: kind for kind in (Scores, TopScores, Counterfactuals, Subsets)}


def load(path: str | os.PathLike[str]) -> Tabular:
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


def kind_at(place: Place) -> str:
    """Tell what artefact a repository holds.

    Args:
        place: The repository.

    Returns:
        A name in `KINDS`, or of a kind that is a folder.

    Raises:
        ArtefactError: The repository holds none.
    """
    with explained(place, "read"):
        paths = HfApi(token=place.token).list_repo_files(place.repo_id, repo_type="dataset", revision=place.revision)
    for kind in KINDS:
        if any(parquet_paths(kind).fullmatch(path) for path in paths):
            return kind
    for path in paths:
        folder, _, name = path.partition("/")
        if name == MANIFEST:
            return folder
    raise ArtefactError(
        f"{place.repo_id} holds nothing that hf_attribution pushed ({', '.join(paths[:3]) or 'it is empty'}). "
        f"Load it with datasets.load_dataset('{place.repo_id}')."
    )
