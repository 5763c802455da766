"""The largest scores of each query: the same as those of the whole matrix, in bounded memory, read once."""

import doctest
import subprocess
import sys
import textwrap

import datasets
import numpy as np
import pytest
import tiny
import torch
from transformers import Trainer

from hf_attribution import AttributionMixin, attribute, attribute_top, top_scores
from hf_attribution.errors import ArtefactError, MismatchError, NonFiniteError, UnsupportedError
from hf_attribution.gradients import stored
from hf_attribution.gradients.stored import StoredProducts, StoredScores
from hf_attribution.methods import GradCos, GradDot, Influence, LoGra, TracIn, TrackStar, Trak
from hf_attribution.problem import Checkpoint
from hf_attribution.scores import Scores
from hf_attribution.store import FeatureStore, FeatureWriter, Manifest
from hf_attribution.top_scores import TopScores


def make_store(path, features):
    writer = FeatureWriter(path, Manifest(features.shape[1], "float32", {}, len(features)), shard_bytes=1000)
    writer.write(np.arange(len(features)), features, torch.zeros(len(features)))
    return writer.finish()


@pytest.fixture
def scores(tmp_path, monkeypatch):
    """Two models' products with whole numbers, many of them equal; blocks of 13 rows and of 4 queries."""
    monkeypatch.setattr(stored, "BLOCK_BYTES", 13 * 4 * 4)
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randint(-2, 3, (size, 2), generator=generator).float() for size in (90, 90, 10, 10)]
    stores = [make_store(tmp_path / str(number), features) for number, features in enumerate(parts[:2])]
    weights = torch.randint(0, 3, (90,), generator=generator).float().numpy()
    return StoredScores([StoredProducts(q, s) for q, s in zip(parts[2:], stores, strict=True)], weights)


@pytest.mark.parametrize("k", [1, 7, 89, 90, 1000])
def test_top_equals_the_top_of_the_matrix(scores, k):
    indices, values = scores.top(k, progress=False)
    matrix = scores.matrix()
    assert len(np.unique(matrix)) < 60  # there are ties in every row
    expected = np.argsort(-matrix, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(matrix, expected, axis=1))
    of_all = Scores(matrix, "trak").top(k=min(k, 90))
    assert of_all["train_index"][:] == indices.reshape(-1).tolist()


def test_every_row_is_read_once_for_a_block_of_queries(scores, monkeypatch):
    read = []
    original = FeatureStore.read
    monkeypatch.setattr(
        FeatureStore, "read", lambda self, *where: read.append((self.path, *where)) or original(self, *where)
    )
    scores.top(5, progress=False)
    query_blocks = -(-10 // 4)
    for term in scores.terms:
        mine = [where for path, *where in read if path == term.train.path]
        assert len(mine) == query_blocks * -(-90 // 13)
        assert sorted(set(map(tuple, mine))) == [(start, min(start + 13, 90)) for start in range(0, 90, 13)]


def test_some_queries_alone(scores):
    indices, values = scores.top(6, progress=False, queries=slice(3, 9))
    for part, whole in zip((indices, values), scores.top(6, progress=False), strict=True):
        np.testing.assert_array_equal(part, whole[3:9])


def test_scores_that_are_no_numbers_are_refused(scores):
    scores.terms[1].queries[7] = torch.inf
    with pytest.raises(NonFiniteError, match=r"query 7 and train row \d+ is (nan|inf|-inf)"):
        scores.top(3, progress=False)


def test_memory_is_bounded(tmp_path):
    script = textwrap.dedent(
        f"""
        import resource, numpy as np, torch
        from pathlib import Path
        from hf_attribution.gradients import stored
        from hf_attribution.store import FeatureStore, FeatureWriter, Manifest
        torch.set_num_threads(1)
        stored.BLOCK_BYTES = 2**22
        writer = FeatureWriter(Path({str(tmp_path / "s")!r}), Manifest(256, "float32", {{}}, 200_000))
        for start in range(0, 200_000, 2000):
            writer.write(np.arange(start, start + 2000), torch.randn(2000, 256), torch.zeros(2000))
        store = writer.finish()
        scores = stored.StoredScores([stored.StoredProducts(torch.randn(100, 256), store)])
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        before = peak()
        scores.top(10, progress=False)
        print(peak() - before)
        """
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    on_disk = sum(file.stat().st_size for file in (tmp_path / "s").iterdir()) / 2**20
    assert on_disk > 190
    assert float(run.stdout) < 48


# --- methods ---

METHODS = {
    "trak": Trak(dim=8),
    "trak through the kernel": Trak(dim=64),
    "logra": LoGra(dim=8),
    "trackstar": TrackStar(dim=8),
    "grad_dot": GradDot(dim=8),
    "grad_cos": GradCos(dim=8),
    "tracin": TracIn(dim=8),
    "influence": Influence(dim=8),
    "influence through the kernel": Influence(dim=64),
    "influence normalized": Influence(dim=8, normalize="self_influence"),
}


@pytest.fixture(scope="module")
def material():
    models = [tiny.model(seed, hidden=4) for seed in range(2)]
    return models, tiny.points(40), tiny.points(rows=6, seed=1)


@pytest.mark.parametrize("name", METHODS)
def test_methods_rank_as_attribute_does(material, name, tmp_path):
    (model, other), train, query = material
    setup = {"method": METHODS[name], "checkpoints": [Checkpoint(model, 0.5), Checkpoint(other, 2.0)],
             "cache_dir": tmp_path, "progress": False}  # fmt: skip
    whole, top = attribute(model, train, query, **setup), attribute_top(model, train, query, k=9, **setup)
    expected = whole.top(9)
    assert top.indices.reshape(-1).tolist() == expected["train_index"][:]
    np.testing.assert_allclose(top.values.reshape(-1), expected["score"][:], rtol=1e-6)
    assert top.num_examples == 40
    for key in ("fingerprints", "choices", "weights", "measurement"):
        assert top.provenance[key] == whole.provenance[key]


def test_methods_without_stored_gradients_are_refused(material):
    (model, _), train, query = material
    for method in ("grad_dot", "ekfac", "random", "influence", Influence(dim=8, group_effect=1.0)):
        with pytest.raises(UnsupportedError, match=r"scores of (\w+) .* 'trak'.*with a dim"):
            attribute_top(model, train, query, method=method, progress=False)
    with pytest.raises(ValueError, match="at least 1"):
        attribute_top(model, train, query, k=0)


def test_a_trainer_gives_the_same(tmp_path):
    class MyTrainer(AttributionMixin, Trainer):
        pass

    trainer = tiny.make_trainer(MyTrainer, tmp_path)
    top = trainer.attribute_top(k=3, method=Trak(dim=4))
    assert top.indices.reshape(-1).tolist() == trainer.attribute(method=Trak(dim=4)).top(3)["train_index"][:]


# --- the artefact ---


def some_top():
    return TopScores(
        np.array([[4, 1, 2], [0, 3, 1]]), np.array([[3.0, 2.0, -1.0], [0.5, 0.5, 0.25]]), 5, "trak", {"dim": 8},
        {"fingerprints": {"train": "t"}},
    )  # fmt: skip


def test_top_scores_come_back(tmp_path):
    top = some_top()
    top.save(tmp_path / "top.safetensors")
    for back in (TopScores.load(tmp_path / "top.safetensors"), TopScores.from_dataset(top.to_dataset())):
        assert back.fingerprint == top.fingerprint
        np.testing.assert_array_equal(back.indices, top.indices)
        assert back.values.dtype == np.float32
        assert (back.num_examples, back.settings) == (5, {"dim": 8})
    with pytest.raises(ArtefactError, match="top_scores"):
        Scores.load(tmp_path / "top.safetensors")
    assert doctest.testmod(top_scores).failed == 0


def test_top_scores_join_the_examples():
    train = datasets.Dataset.from_dict({"text": list("abcde")})
    rows = some_top().top(k=2, train_dataset=train)
    assert rows["text"][:] == ["e", "b", "a", "d"]
    assert rows["rank"][:] == [1, 2, 1, 2]
    with pytest.raises(ValueError, match="top 3 of each query were kept"):
        some_top().top(k=4)
    with pytest.raises(MismatchError, match="5 training examples and train_dataset has 4"):
        some_top().top(k=1, train_dataset=train.select(range(4)))


def test_top_scores_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="of the 3 training examples"):
        TopScores(np.array([[3]]), np.array([[1.0]]), 3, "trak")
    with pytest.raises(NonFiniteError, match="query row 0 and rank 2"):
        TopScores(np.array([[0, 1]]), np.array([[1.0, np.nan]]), 3, "trak")
    with pytest.raises(ValueError, match=r"\[queries, k\]"):
        TopScores(np.array([[0, 1]]), np.array([[1.0]]), 3, "trak")


# --- an index ---


@pytest.fixture
def many(tmp_path):
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(40, 16, generator=generator)
    train = centres.repeat(50, 1) + torch.randn(2000, 16, generator=generator)
    queries = centres[:20] + torch.randn(20, 16, generator=generator)
    return StoredScores([StoredProducts(queries, make_store(tmp_path / "many", train))])


def test_an_exact_index_finds_all(many):
    pytest.importorskip("faiss")
    from hf_attribution.gradients.indexed import approximate_top

    indices, values, recall = approximate_top(many, 10, "Flat", progress=False)
    expected, scores = many.top(10, progress=False)
    assert recall == 1.0
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_allclose(values, scores, rtol=1e-6)


@pytest.mark.parametrize("index", ["IVF32,Flat", "HNSW16", "PQ4x4"])
def test_recall_is_what_was_found(many, index):
    pytest.importorskip("faiss")
    from hf_attribution.gradients.indexed import approximate_top

    indices, values, recall = approximate_top(many, 10, index, progress=False)
    truth = np.argsort(-many.matrix(), axis=1)[:, :10]
    hits = np.mean([len(set(one) & set(other)) for one, other in zip(truth, indices, strict=True)]) / 10
    assert recall == pytest.approx(hits)
    assert 0 < recall < 1 if index == "PQ4x4" else recall > 0.6
    # Whatever the index believes, scores are exact and in order.
    np.testing.assert_allclose(values, np.take_along_axis(many.matrix(), indices, axis=1), rtol=1e-5)
    assert (np.diff(values) <= 0).all()


def test_attribute_top_with_an_index(material, tmp_path):
    pytest.importorskip("faiss")
    (model, _), train, query = material
    top = attribute_top(model, train, query, k=5, method=Trak(dim=8), index="IVF2,Flat", progress=False)
    assert top.provenance["choices"]["index"] == "IVF2,Flat"
    assert 0 < top.provenance["choices"]["recall"] <= 1
    with pytest.raises(UnsupportedError, match="no index 'nonsense'"):
        attribute_top(model, train, query, k=5, method=Trak(dim=8), index="nonsense", progress=False)


def test_an_index_without_faiss_says_what_to_install(many, monkeypatch):
    from hf_attribution.gradients.indexed import approximate_top

    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"hf-attribution\[faiss\]"):
        approximate_top(many, 3, "Flat")
