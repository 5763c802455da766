"""Methods without gradients: hidden states, nearest neighbours, representer points and words."""

import itertools
import math
import sys

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from models import bert, gpt2, text_batch
from tiny import model as points_model
from tiny import points

from hf_attribution.attribution import attribute
from hf_attribution.errors import ConvergenceError, NonFiniteError, UnsupportedError
from hf_attribution.methods import BM25, KNNShapley, RepresentationSimilarity, Representer
from hf_attribution.methods.bm25 import text_column
from hf_attribution.methods.knn_shapley import knn_shapley
from hf_attribution.methods.representations import POOLINGS
from hf_attribution.methods.representer import fit_last_layer, representer_values
from hf_attribution.tasks import Classification


def scores(model, train, query, method, **kwargs):
    return attribute(model, train, query, method=method, progress=False, **kwargs).values


def brute_force_shapley(similarities, same, k):
    """Marginal contributions to all subsets of the others, weighed by how many orders put them first."""
    count = len(same)

    def utility(subset):
        nearest = sorted(subset, key=lambda i: (-similarities[i], i))[:k]
        return sum(same[i] for i in nearest) / k

    values = np.zeros(count)
    for example in range(count):
        others = [i for i in range(count) if i != example]
        for size in range(count):
            weight = math.factorial(size) * math.factorial(count - 1 - size) / math.factorial(count)
            for subset in itertools.combinations(others, size):
                values[example] += weight * (utility([*subset, example]) - utility(subset))
    return values


@pytest.mark.parametrize("k", [1, 2, 5, 6, 9])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_knn_shapley_equals_brute_force_over_all_subsets(count, k):
    generator = np.random.default_rng(k)
    similarities = generator.normal(size=(3, count))
    if count == 6:
        similarities[0, :3] = similarities[0, 3:]  # the earlier of equal ones is nearer
    same = generator.random((3, count)) < 0.5
    expected = [brute_force_shapley(*row, k) for row in zip(similarities, same, strict=True)]
    found = knn_shapley(similarities, same, k)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.dtype == np.float32


def test_knn_shapley_scores_are_those_of_the_hidden_states(monkeypatch):
    train, query, model = points(30), points(7, seed=1), points_model(hidden=5)
    with torch.no_grad():
        near, far = (model.body(torch.tensor(dataset["points"][:])) for dataset in (query, train))
    same = np.array(query["labels"])[:, None] == np.array(train["labels"])
    expected = knn_shapley(-torch.cdist(near, far).numpy(), same, 3)
    kwargs = {"task": Classification()}
    np.testing.assert_allclose(scores(model, train, query, KNNShapley(k=3), **kwargs), expected, atol=1e-6)
    monkeypatch.setattr("hf_attribution.methods.knn_shapley.BLOCK_SIZE", 61)  # blocks of two queries
    np.testing.assert_allclose(scores(model, train, query, KNNShapley(k=3), **kwargs), expected, atol=1e-6)


def token_rows(count, seed, **columns):
    rows = text_batch(batch=count, length=6, seed=seed)["input_ids"].tolist()
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": rows, **columns})


def test_knn_shapley_without_classes_needs_a_column():
    model, _ = gpt2()
    train, query = (token_rows(8, seed, play=["Lear", "Othello"] * 4) for seed in (0, 1))
    with pytest.raises(ValueError, match=r"knn_shapley needs classes.*column="):
        scores(model, train, query, "knn_shapley")
    assert scores(model, train, query, KNNShapley(column="play")).shape == (8, 8)
    with pytest.raises(UnsupportedError, match="representer needs classes"):
        scores(model, train, query, "representer")
    config = tf.BertConfig(**{**bert()[0].config.to_dict(), "num_labels": 1})
    regression = tf.BertForSequenceClassification(config)
    rated = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7]] * 4, "labels": [0.1, 0.5, 0.2, 0.9]})
    for name in ("knn_shapley", "representer"):
        with pytest.raises(ValueError, match="needs classes, and regression has none"):
            scores(regression, rated, rated, name)


def test_representer_points_add_up_to_the_logits():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 3, (40,), generator=generator)
    for l2 in (1e-3, 0.1):
        weights = fit_last_layer(states, targets, 3, l2)
        alphas = representer_values(states, targets, weights, l2)
        new = torch.randn(5, 6, generator=generator, dtype=torch.float64)
        np.testing.assert_allclose((new @ states.T) @ alphas, new @ weights, atol=1e-5)
    linear_model = pytest.importorskip("sklearn.linear_model")
    # scikit-learn minimises C times the sum of the losses plus half the squares.
    fit = linear_model.LogisticRegression(C=1 / (2 * l2 * 40), fit_intercept=False, tol=1e-10).fit(states, targets)
    np.testing.assert_allclose(weights, fit.coef_.T, atol=1e-4)


def test_representer_scores_add_up_to_a_refitted_margin(monkeypatch):
    train, query, model = points(30), points(7, seed=1), points_model(hidden=5)
    with torch.no_grad():
        near, far = (model.body(torch.tensor(dataset["points"][:])).double() for dataset in (query, train))
    near, far = (torch.nn.functional.pad(each, (0, 1), value=1.0) for each in (near, far))
    logits = near @ fit_last_layer(far, torch.tensor(train["labels"][:]), 2, 3e-3)
    labels = torch.tensor(query["labels"][:])
    # With two classes the margin is the difference of their logits.
    expected = logits.gather(1, labels[:, None])[:, 0] - logits.gather(1, 1 - labels[:, None])[:, 0]
    found = scores(model, train, query, "representer", task=Classification())
    np.testing.assert_allclose(found.sum(1), expected, rtol=1e-4)
    with pytest.raises(ValueError, match="l2 must be positive"):
        Representer(l2=0.0)
    monkeypatch.setattr("hf_attribution.methods.representer.MAX_ITERATIONS", 2)
    with pytest.raises(ConvergenceError, match="raise l2"):
        scores(model, train, query, "representer", task=Classification())


@pytest.mark.parametrize("pooling", POOLINGS)
def test_states_are_pooled_over_real_tokens(pooling):
    torch.manual_seed(0)
    model = bert()[0].eval()
    rows = datasets.Dataset.from_dict(
        {"input_ids": [[5, 6, 7, 8], [9, 10], [11, 12, 13], [6, 6, 6, 6, 6]], "labels": [0, 1, 2, 0]}
    )

    def pad(rows, side):
        length = max(len(row["input_ids"]) for row in rows) + 1
        ids, mask = torch.ones(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
        for number, row in enumerate(rows):
            tokens = torch.tensor(row["input_ids"])
            where = slice(0, len(tokens)) if side == "right" else slice(length - len(tokens), length)
            ids[number, where], mask[number, where] = tokens, 1
        # The same positions on either side, so that the states are the same.
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}

    def states(row):
        with torch.no_grad():
            return model.bert.encoder(model.bert.embeddings(torch.tensor([row["input_ids"]])))[0][0]

    by_hand = {
        "mean": lambda each: each.mean(0),
        "max": lambda each: each.amax(0),
        "first": lambda each: each[0],
        "last": lambda each: each[-1],
    }[pooling]
    vectors = torch.stack([by_hand(states(row)) for row in rows])
    for side, (similarity, expected) in itertools.product(
        ("left", "right"),
        {"dot": vectors @ vectors.T, "negative_distance": -torch.cdist(vectors, vectors).square()}.items(),
    ):
        method = RepresentationSimilarity("bert.encoder", pooling, similarity)
        found = scores(model, rows, rows, method, data_collator=lambda rows, side=side: pad(rows, side), batch_size=3)
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_bad_settings_of_hidden_states_are_named():
    model, train = points_model(hidden=5), points(4)
    for wrong in ({"pooling": "median"}, {"similarity": "l7"}):
        for kind in (RepresentationSimilarity, KNNShapley):
            with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be one of"):
                kind(**wrong)
    with pytest.raises(ValueError, match="k must be at least 1"):
        KNNShapley(k=0)
    task = Classification()
    with pytest.raises(ValueError, match="no module 'bodi'"):
        scores(model, train, train, KNNShapley(layer="bodi"), task=task)
    broken = points_model(hidden=5)
    bad = datasets.Dataset.from_dict({"points": [[1.0, 2.0, 3.0], [4.0, 1e30, 0.0]], "labels": [0, 1]})
    with torch.no_grad():
        broken.body[0].weight.fill_(1e30)
    broken.body[1] = torch.nn.Identity()
    for name in ("knn_shapley", "representer", "representation_similarity"):
        with pytest.raises(NonFiniteError, match=r"(row|query)"):
            scores(broken, bad, bad, name, task=task)


TEXTS = ["The king is dead.", "Long live the king!", "A horse, a horse, my kingdom for a horse", "to be or not to be"]


def test_bm25_finds_the_words():
    pytest.importorskip("bm25s")
    model, _ = gpt2()
    train = token_rows(4, 0, text=TEXTS)
    query = token_rows(3, 1, text=["Is it a HORSE?", "king", "xylophone ..."])
    found = scores(model, train, query, "bm25")
    assert found.argmax(1)[0] == 2
    assert not found[2].any()
    # Lucene's form, by hand: idf · tf / (tf + k1 (1 - b + b length / mean length)).
    lengths = np.array([4, 4, 9, 6])
    idf = np.log(1 + (4 - 2 + 0.5) / (2 + 0.5))
    expected = idf * np.array([1, 1, 0, 0]) / (1 + 1.5 * (0.25 + 0.75 * lengths / lengths.mean()))
    np.testing.assert_allclose(found[1], expected, rtol=1e-5)


def test_bm25_chooses_the_text_column_or_says_why_not(monkeypatch):
    pytest.importorskip("bm25s")
    model, _ = gpt2()
    tokens = token_rows(4, 0)
    assert text_column(tokens) == "input_ids"
    assert scores(model, tokens, tokens, "bm25").argmax(1).tolist() == [0, 1, 2, 3]
    assert text_column(token_rows(4, 0, line=TEXTS)) == "line"
    assert text_column(token_rows(4, 0, line=TEXTS, text=TEXTS)) == "text"
    two = token_rows(4, 0, line=TEXTS, speaker=["Lear"] * 4)
    with pytest.raises(UnsupportedError, match=r"line, speaker hold strings: say which with BM25\(column="):
        scores(model, two, two, "bm25")
    assert scores(model, two, two, BM25(column="line")).argmax(1).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no column 'lines'"):
        scores(model, two, two, BM25(column="lines"))
    empty = token_rows(4, 0, text=[""] * 4)
    assert not scores(model, empty, empty, "bm25").any()
    with pytest.raises(UnsupportedError, match="no column holds strings"):
        text_column(points(4))
    numbers = token_rows(4, 0, weight=[0.5] * 4)
    with pytest.raises(ValueError, match=r"must hold texts or lists of token ids; row 0 holds 0\.5"):
        scores(model, numbers, numbers, BM25(column="weight"))
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError, match=r"pip install hf-attribution\[text\]"):
        scores(model, tokens, tokens, "bm25")
