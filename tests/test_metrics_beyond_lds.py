"""The other metrics: against sklearn, scipy and counting by hand, at their edges, and what their intervals cover."""

import doctest
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score

METRICS = Path(__file__).resolve().parent.parent / "metrics"
NAMES = ("loo_correlation", "mislabel_auc", "recall_at_k", "brittleness")
NAN = float("nan")


def load_core(name):
    spec = importlib.util.spec_from_file_location(f"{name}_core", METRICS / name / f"{name}_core.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


loo, mislabel, recall, brittle = (load_core(name) for name in NAMES)


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    import evaluate

    folder = tmp_path_factory.mktemp("metrics")
    return {name: evaluate.load(str(METRICS / name), cache_dir=str(folder / name)) for name in NAMES}


def effects(num_queries=6, num_examples=40, rho=0.5, shared=0.0, seed=0, decimals=None):
    """Pairs of Gaussian rows of correlation rho, whose noise is shared by the queries in part."""
    rng = np.random.default_rng(seed)
    x, noise = (
        np.sqrt(shared) * rng.standard_normal((1, num_examples))
        + np.sqrt(1 - shared) * rng.standard_normal((num_queries, num_examples))
        for _ in range(2)
    )
    y = rho * x + np.sqrt(1 - rho**2) * noise
    return (x, y) if decimals is None else (x.round(decimals), y.round(decimals))


# Leave-one-out correlation


@pytest.mark.parametrize("decimals", [None, 0], ids=["distinct", "ties"])
def test_correlations_are_those_of_scipy(decimals):
    x, y = effects(decimals=decimals)
    result = loo.compute_loo_correlation(x, y)
    for name, function in (("pearson", pearsonr), ("spearman", spearmanr)):
        expected = [function(a, b).statistic for a, b in zip(x, y, strict=True)]
        np.testing.assert_allclose(result[f"{name}_per_query"], expected, atol=1e-12)
        assert result[name] == pytest.approx(np.mean(expected))
    assert result["num_undefined"] == 0


@pytest.mark.parametrize("decimals", [None, 0], ids=["distinct", "ties"])
@pytest.mark.parametrize("ranked", [False, True])
def test_jackknife_is_the_correlation_without_each_column(ranked, decimals, monkeypatch):
    monkeypatch.setattr(loo, "BLOCK_SIZE", 5 * 12)
    x, y = effects(3, 12, decimals=decimals)
    without = [loo.correlations(np.delete(x, j, 1), np.delete(y, j, 1), ranked) for j in range(12)]
    np.testing.assert_allclose(loo.jackknife(x, y, ranked), np.transpose(without), atol=1e-12)


def test_perfect_flipped_and_constant_effects():
    x, _ = effects()
    perfect, flipped = loo.compute_loo_correlation(x, x), loo.compute_loo_correlation(-x, np.exp(x))
    assert perfect["pearson"] == pytest.approx(1)
    assert perfect["spearman_confidence_interval"] == pytest.approx((1, 1))
    assert flipped["spearman"] == pytest.approx(-1)
    assert flipped["pearson"] > -1
    x[1] = 0.1
    constant = loo.compute_loo_correlation(x, effects()[0])
    assert np.isnan(constant["pearson_per_query"][1])
    assert np.isnan(constant["spearman_per_query"][1])
    assert (constant["pearson"], constant["num_undefined"]) == (pytest.approx(1), 1)
    nothing = loo.compute_loo_correlation(np.ones((2, 5)), np.ones((2, 5)))
    assert np.isnan([nothing["pearson"], *nothing["spearman_confidence_interval"]]).all()


def test_a_row_that_lives_on_one_column_keeps_its_correlation_without_it():
    x = np.zeros((1, 6))
    x[0, 2] = 1.0
    y = np.arange(6.0)[None]
    assert loo.jackknife(x, y, ranked=False)[0, 2] == loo.correlations(x, y, ranked=False)[0]


@pytest.mark.parametrize("case", [(10, 40, 0.4, 0.0), (10, 40, 0.4, 0.5), (50, 20, 0.8, 0.3), (1, 40, 0.4, 0.0)])
def test_interval_of_the_loo_correlation_covers_the_truth(case):
    num_queries, num_examples, rho, shared = case
    truth, hits = {"pearson": rho, "spearman": 6 / np.pi * np.arcsin(rho / 2)}, {"pearson": 0, "spearman": 0}
    for seed in range(200):
        result = loo.compute_loo_correlation(*effects(num_queries, num_examples, rho, shared, seed))
        for name, value in truth.items():
            low, high = result[f"{name}_confidence_interval"]
            hits[name] += low <= value <= high
            assert low <= result[name] <= high
    # Nominal 95%; the standard error of the coverage in 200 simulations is 1.5%.
    assert all(0.90 <= count / 200 <= 0.995 for count in hits.values()), hits


def test_copies_of_a_query_make_the_interval_no_narrower():
    x, y = effects(1, 30)
    alone = loo.compute_loo_correlation(x, y)["pearson_confidence_interval"]
    copied = loo.compute_loo_correlation(x.repeat(100, 0), y.repeat(100, 0))["pearson_confidence_interval"]
    np.testing.assert_allclose(copied, alone, atol=1e-6)


# Mislabel detection


def suspicions(num_examples=200, gap=1.0, share=0.2, seed=0, decimals=None):
    rng = np.random.default_rng(seed)
    flags = rng.random(num_examples) < share
    scores = rng.standard_normal(num_examples) + gap * flags
    return (scores if decimals is None else scores.round(decimals)), flags.astype(int)


@pytest.mark.parametrize("decimals", [None, 0], ids=["distinct", "ties"])
def test_areas_are_those_of_sklearn(decimals):
    scores, flags = suspicions(decimals=decimals)
    result = mislabel.compute_mislabel_auc(scores, flags)
    assert result["roc_auc"] == pytest.approx(roc_auc_score(flags, scores))
    assert result["average_precision"] == pytest.approx(average_precision_score(flags, scores))
    assert result["num_flagged"] == flags.sum()


def test_perfect_flipped_and_constant_suspicions():
    flags = np.array([0, 1, 0, 1, 0])
    perfect = mislabel.compute_mislabel_auc(flags, flags, k=[1, 2, 5])
    assert (perfect["roc_auc"], perfect["average_precision"], perfect["confidence_interval"]) == (1, 1, (1, 1))
    assert perfect["precision_at_k"] == {1: 1, 2: 1, 5: 0.4}
    assert mislabel.compute_mislabel_auc(-flags, flags)["roc_auc"] == 0
    constant = mislabel.compute_mislabel_auc(np.zeros(5), flags, k=3)
    assert (constant["roc_auc"], constant["average_precision"]) == (0.5, 0.4)
    assert constant["precision_at_k"][3] == pytest.approx(0.4)  # what drawing 3 of 5 gives


def test_precision_at_k_by_hand():
    scores, flags = [5, 4, 3, 3, 3, 1], [1, 0, 1, 0, 0, 1]
    found = mislabel.compute_mislabel_auc(scores, flags, k=[1, 2, 3, 5, 6])["precision_at_k"]
    assert found == pytest.approx({1: 1, 2: 1 / 2, 3: (1 + 1 / 3) / 3, 5: 2 / 5, 6: 1 / 2})


def test_interval_of_the_area_covers_the_truth():
    from scipy.stats import norm

    truth, hits = norm.cdf(1 / np.sqrt(2)), 0
    for seed in range(400):
        low, high = mislabel.compute_mislabel_auc(*suspicions(150, seed=seed))["confidence_interval"]
        hits += low <= truth <= high
    assert 0.92 <= hits / 400 <= 0.98


# Known sources


def test_recall_and_mrr_by_hand():
    rankings = [[4, 2, 7, 0], [1, 0, 5, 3], [9, 8, 7, 6], [3, 2, 1, 0]]
    sources = [[2], [1, 3, 6], [0], [0, 0]]
    result = recall.compute_recall_at_k(rankings, sources, k=[1, 2, 4])
    assert result["recall_at_k"] == pytest.approx({1: 1 / 12, 2: 1 / 3, 4: (1 + 2 / 3 + 0 + 1) / 4})
    assert result["reciprocal_rank_per_query"] == [1 / 2, 1, 0, 1 / 4]
    assert result["mrr"] == pytest.approx(7 / 16)
    perfect = recall.compute_recall_at_k([[5, 1]], [[5]], k=1)
    assert (perfect["recall_at_k"][1], perfect["mrr"]) == (1, 1)
    assert perfect["recall_confidence_intervals"][1][0] < 1  # one query proves little


def test_intervals_of_recall_and_mrr_cover_the_truth():
    # A source stands at rank 1, 2 or nowhere among two with these shares.
    shares, hits = [0.3, 0.2, 0.5], np.zeros(2)
    rng = np.random.default_rng(0)
    for _ in range(500):
        places = rng.choice(3, size=40, p=shares)
        rankings = [[0, 1] if place == 0 else [1, 0] if place == 1 else [1, 2] for place in places]
        result = recall.compute_recall_at_k(rankings, [[0]] * 40, k=1)
        bounds = [result["recall_confidence_intervals"][1], result["mrr_confidence_interval"]]
        hits += [low <= truth <= high for (low, high), truth in zip(bounds, (0.3, 0.4), strict=True)]
    assert (hits / 500 >= 0.93).all()
    assert hits[0] / 500 <= 0.98


# Brittleness


def test_brittleness_by_hand():
    result = brittle.compute_brittleness([3, 1, 8, None], [NAN, 5, NAN, NAN], max_size=8)
    assert result["sizes"] == [1, 2, 4, 8]
    assert result["share_flipped"] == [0.25, 0.25, 0.5, 0.75]
    assert result["random_share_flipped"] == [0, 0, 0, 0.25]
    assert result["median_size"] == 3
    assert np.isnan(result["random_median_size"])
    assert result["share_smaller"] == (1 + 1 + 1 + 0.5) / 4
    assert (result["num_flipped"], result["random_num_flipped"]) == (3, 1)
    assert brittle.compute_brittleness([3], [3], 3, sizes=[2, 3])["share_flipped"] == [0, 1]
    assert brittle.compute_brittleness([1], [1], 1)["sizes"] == [1]
    assert brittle.compute_brittleness([6, NAN, 2], [NAN] * 3, 10)["median_size"] == 6


def test_interval_of_the_share_flipped_covers_the_truth():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(500):
        sizes = np.where(rng.random(40) < 0.3, 1.0, NAN)
        low, high = brittle.compute_brittleness(sizes, [NAN] * 40, 1)["confidence_intervals"][0]
        hits += low <= 0.3 <= high
    assert 0.92 <= hits / 500 <= 0.98


# All of them


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loo.compute_loo_correlation([[1, 2, 3]], [[1, 2, 3]]), "at least 4 examples, got 3"),
        (lambda: loo.compute_loo_correlation([[1, 2, 3, NAN]], [[1, 2, 3, 4]]), "predictions row 0 is not finite"),
        (lambda: loo.compute_loo_correlation([[1, 2, 3, 4]], [[1, 2, 3]]), "must have one shape"),
        (lambda: loo.compute_loo_correlation([[1], [1, 2]], [[1]]), "predictions row 1 has 2 values"),
        (lambda: loo.compute_loo_correlation([], []), "predictions must be a matrix"),
        (lambda: loo.compute_loo_correlation([[1] * 4], [[1] * 4], 95), "confidence_level must lie between"),
        (lambda: mislabel.compute_mislabel_auc([1, 2], [0, None]), "references row 1 is None: every example needs"),
        (lambda: mislabel.compute_mislabel_auc([1, 2], [0, 2]), "references row 1 is 2"),
        (lambda: mislabel.compute_mislabel_auc([1, 2], [0, 0]), "none of the 2 examples are flagged"),
        (lambda: mislabel.compute_mislabel_auc([1, 2], [1, 1]), "all of the 2 examples are flagged"),
        (lambda: mislabel.compute_mislabel_auc([1, np.inf], [1, 0]), "predictions row 1 is not finite"),
        (lambda: mislabel.compute_mislabel_auc([1, 2], [1]), "give one flag for each"),
        (lambda: mislabel.compute_mislabel_auc([1, 2], [1, 0], k=3), "k must lie between 1 and the 2"),
        (lambda: recall.compute_recall_at_k([[1]], [[]], k=1), "references row 0 is empty"),
        (lambda: recall.compute_recall_at_k([[1], [1]], [[1], [1]], k=2), "ranks 1 examples: recall at 2 needs 2"),
        (lambda: recall.compute_recall_at_k([[1, 1]], [[1]], k=1), "predictions row 0 names an example twice"),
        (lambda: recall.compute_recall_at_k([[1]], [], k=1), "1 rankings and 0 lists"),
        (lambda: recall.compute_recall_at_k([[1]], [[1]], k=0), "k must be at least 1"),
        (lambda: brittle.compute_brittleness([0], [1], 5), "predictions row 0 is 0: a size is a whole number"),
        (lambda: brittle.compute_brittleness([1], [2.5], 5), "references row 0 is 2.5"),
        (lambda: brittle.compute_brittleness([6], [1], 5), "from 1 to max_size=5"),
        (lambda: brittle.compute_brittleness([1], [1, 2], 5), "1 predictions and 2 references"),
        (lambda: brittle.compute_brittleness([1], [1], 5, sizes=[9]), "sizes must lie between 1 and max_size=5"),
        (lambda: brittle.compute_brittleness([1], [1], 0), "max_size must be at least 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


RESULTS = {
    "loo_correlation": lambda: loo.compute_loo_correlation(*effects()),
    "mislabel_auc": lambda: mislabel.compute_mislabel_auc(*suspicions()),
    "recall_at_k": lambda: recall.compute_recall_at_k([[1, 2]], [[1]], k=1),
    "brittleness": lambda: brittle.compute_brittleness([1, 2], [NAN, 1], 4),
}


@pytest.mark.parametrize("name", NAMES)
def test_card_and_examples(modules, name, monkeypatch):
    """The examples of card and description run, and both list all that the metric returns."""
    import evaluate

    monkeypatch.setattr(evaluate, "load", lambda name: modules[name])
    card = (METRICS / name / "README.md").read_text()
    for source, text in (("card", card), ("inputs", modules[name].inputs_description)):
        example = doctest.DocTestParser().get_doctest(text, {}, source, None, 0)
        assert example.examples
        assert doctest.DocTestRunner().run(example).failed == 0
    for number in RESULTS[name]():
        assert f"`{number}`" in card
        assert number in modules[name].inputs_description


def test_the_modules_give_the_numbers_of_the_cores(modules):
    x, y = effects()
    scores, flags = suspicions()
    assert modules["loo_correlation"].compute(predictions=x, references=y) == loo.compute_loo_correlation(x, y)
    expected = mislabel.compute_mislabel_auc(scores, flags, k=[3, 9])
    assert modules["mislabel_auc"].compute(predictions=scores, references=flags, k=[3, 9]) == expected
    assert modules["mislabel_auc"].compute(predictions=scores, references=flags.astype(bool), k=[3, 9]) == expected
    with pytest.raises(ValueError, match="references row 1 is None"):
        modules["mislabel_auc"].compute(predictions=[1.0, 2.0], references=[1, None])
    sizes = [3.0, NAN, 1.0]
    expected = brittle.compute_brittleness(sizes, [NAN, 2, NAN], 4, [1, 4], 0.9)
    computed = modules["brittleness"].compute(
        predictions=sizes, references=[NAN, 2, NAN], max_size=4, sizes=[1, 4], confidence_level=0.9
    )
    assert str(computed) == str(expected)  # nan equals nan
    rankings, sources = [[4, 2], [1, 0]], [[2], [0, 9, 8]]
    expected = recall.compute_recall_at_k(rankings, sources, k=2)
    assert modules["recall_at_k"].compute(predictions=rankings, references=sources, k=2) == expected


def test_each_metric_is_whole():
    for name in NAMES:
        files = {path.name for path in (METRICS / name).iterdir() if path.is_file()}
        assert files >= {f"{name}.py", f"{name}_core.py", "README.md", "app.py", "requirements.txt"}
