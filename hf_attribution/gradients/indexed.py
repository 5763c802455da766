"""The largest scores from an approximate index of FAISS, through `datasets`, and how much of the truth it finds."""

import numpy as np
import torch
from datasets.search import FaissIndex
from tqdm.auto import tqdm

from hf_attribution.errors import UnsupportedError
from hf_attribution.gradients.stored import StoredScores

# Vectors that an index learns its cells from, and queries that it is tried on.
TRAINING_VECTORS = 2**17
TRIED_QUERIES = 100

# Share of an inverted file's cells that are searched.
PROBED = 1 / 16


class _Vectors:
    """The training examples' vectors as `datasets` takes them: read when they are asked for."""

    def __init__(self, scores: StoredScores) -> None:
        self.scores = scores

    def __len__(self) -> int:
        return self.scores.shape[1]

    def __getitem__(self, where: slice) -> np.ndarray:
        return self.scores.vectors(slice(where.start, min(where.stop, len(self)))).float().numpy()


def approximate_top(
    scores: StoredScores, k: int, index: str, progress: bool = True
) -> tuple[np.ndarray, np.ndarray, float]:
    """The largest scores of each query that an index finds. Scores are exact, some examples may be missed.

    Args:
        scores: The scores.
        k: How many.
        index: A FAISS index factory string, such as `"IVF4096,Flat"` or `"HNSW32"`.
        progress: Whether to show progress bars.

    Returns:
        Positions, int64 `[Q, k]`, scores, float32 `[Q, k]`, ordered as `StoredScores.top` does, and the recall: the
        share of the true k largest that was found, over the first hundred queries.

    Raises:
        ImportError: If FAISS is not installed.
        UnsupportedError: If the index is unknown, or finds fewer than k.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError("An index needs FAISS: pip install 'hf-attribution[faiss]', or leave index out.") from error
    queries, k = scores.query_vectors().float().numpy(), min(k, scores.shape[1])
    try:
        built = faiss.index_factory(queries.shape[1], index, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UnsupportedError(f"FAISS makes no index {index!r} (try 'IVF4096,Flat'): {error}") from error
    built.train(_sample(scores, progress))
    if isinstance(built, faiss.IndexIVF):
        built.nprobe = max(1, round(PROBED * built.nlist))
    searched = FaissIndex(custom_index=built)
    searched.add_vectors(_Vectors(scores), batch_size=scores.block_rows)
    _, found = searched.search_batch(queries, k)
    if (found < 0).any():
        query = int(np.flatnonzero((found < 0).any(1))[0])
        raise UnsupportedError(
            f"The index {index!r} found fewer than {k} examples for query {query}: use fewer cells."
        )
    indices, values = _ranked(scores, found)
    tried = min(TRIED_QUERIES, len(indices))
    truth, _ = scores.top(k, progress, slice(0, tried))
    hits = [len(np.intersect1d(one, other)) for one, other in zip(truth, indices[:tried], strict=True)]
    return indices, values, float(np.mean(hits) / k)


def _sample(scores: StoredScores, progress: bool) -> np.ndarray:
    """Vectors evenly spread over the training examples, since many datasets are sorted."""
    step, count = max(1, scores.shape[1] // TRAINING_VECTORS), scores.shape[1]
    starts = range(0, count, scores.block_rows)
    return np.concatenate([
        scores.vectors(slice(start, min(start + scores.block_rows, count)))[-start % step :: step].float().numpy()
        for start in tqdm(starts, desc="index", unit="blocks", leave=False, disable=not progress)
    ])  # fmt: skip


def _ranked(scores: StoredScores, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The candidates of each query by their exact scores, of equal scores the lower position first."""
    rows, place = np.unique(found, return_inverse=True)
    place = place.reshape(found.shape)
    vectors = torch.cat([scores.vectors(slice(row, row + 1)) for row in rows.tolist()])
    queries = scores.query_vectors()
    products = [vectors[own] @ query for own, query in zip(torch.from_numpy(place), queries, strict=True)]
    values = torch.stack(products).float().numpy()
    order = np.lexsort((found, -values))
    return np.take_along_axis(found, order, axis=1), np.take_along_axis(values, order, axis=1)
