"""The metric: against scipy and brute force, at its edges, and the coverage of its interval."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr

METRICS = Path(__file__).resolve().parent.parent / "metrics"


def load_core():
    spec = importlib.util.spec_from_file_location("lds_core", METRICS / "lds" / "lds_core.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


core = load_core()


@pytest.fixture(scope="module")
def lds(tmp_path_factory):
    import evaluate

    return evaluate.load(str(METRICS / "lds"), cache_dir=str(tmp_path_factory.mktemp("metrics")))


def make_rows(num_queries=6, num_subsets=40, rho=0.5, decimals=None, seed=0):
    rng = np.random.default_rng(seed)
    x, noise = rng.standard_normal((2, num_queries, num_subsets))
    y = rho * x + np.sqrt(1 - rho**2) * noise
    return (x, y) if decimals is None else (x.round(decimals), y.round(decimals))


@pytest.mark.parametrize("decimals", [None, 0], ids=["distinct", "ties"])
def test_rho_and_p_are_those_of_scipy(decimals):
    x, y = make_rows(decimals=decimals)
    result = core.compute_lds(x, y)
    expected = [spearmanr(a, b) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(result["lds_per_query"], [e.statistic for e in expected], atol=1e-14)
    np.testing.assert_allclose(result["p_values"], [e.pvalue for e in expected], rtol=1e-10)
    assert result["lds"] == pytest.approx(np.mean([e.statistic for e in expected]))
    assert result["share_significant"] == np.mean([e.pvalue < 0.05 for e in expected])
    assert result["num_undefined"] == 0


def test_perfect_and_flipped_predictions():
    x, _ = make_rows()
    perfect, flipped = core.compute_lds(np.exp(x), x), core.compute_lds(-x, x)
    assert (perfect["lds"], perfect["confidence_interval"]) == (1, (1, 1))
    assert (flipped["lds"], flipped["confidence_interval"]) == (-1, (-1, -1))
    assert perfect["p_values"] == [0] * len(x)


def test_only_ranks_count():
    x, y = make_rows()
    assert core.compute_lds(1e6 * x - 3, np.exp(y)) == core.compute_lds(x, y)


@pytest.mark.parametrize("side", ["predictions", "references"])
def test_constant_row_is_dropped_and_counted(side):
    x, y = make_rows(4)
    rows = {"predictions": x.copy(), "references": y.copy()}
    rows[side][1] = 0.1
    result = core.compute_lds(**rows)
    keep = [0, 2, 3]
    without = core.compute_lds(x[keep], y[keep])
    assert np.isnan(result["lds_per_query"][1])
    assert np.isnan(result["p_values"][1])
    assert result["num_undefined"] == 1
    for name in ("lds", "confidence_interval", "share_significant"):
        assert result[name] == without[name]


def test_row_that_differs_by_rounding_alone_is_constant():
    x, y = make_rows(2)
    x[0] = 0.3 + 1e-16 * np.arange(x.shape[1])
    assert np.ptp(x[0]) > 0
    assert np.isnan(core.compute_lds(x, y)["lds_per_query"][0])


def test_nothing_defined():
    _, y = make_rows(3)
    result = core.compute_lds(np.ones_like(y), y, covariates=np.arange(y.shape[1])[:, None])
    for prefix in ("", "partial_"):
        assert np.isnan(result[f"{prefix}lds"])
        assert np.isnan(result[f"{prefix}confidence_interval"]).all()
        assert result[f"{prefix}num_undefined"] == 3
    assert np.isnan(result["share_significant"])


def test_resampled_ranks_are_those_of_the_expanded_sample():
    """A resample given by counts has the rho of the sample with every subset written out that often."""
    x, y = make_rows(1, 12, decimals=0)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(12, np.full(12, 1 / 12), size=50).T.astype(float)
    positions = [core._rank_positions(side[0]) for side in (x, y)]
    rho, known = core._resampled_spearman(*positions, counts)
    for b in range(50):
        drawn = np.repeat(np.arange(12), counts[:, b].astype(int))
        a, c = rankdata(x[0, drawn]), rankdata(y[0, drawn])
        assert known[b] == (np.ptp(a) > 0 and np.ptp(c) > 0)
        if known[b]:
            assert rho[b] == pytest.approx(np.corrcoef(a, c)[0, 1], abs=1e-12)


def test_bootstrap_does_not_depend_on_the_block(monkeypatch):
    x, y = make_rows(decimals=0)
    bootstrap = core.Bootstrap(num_resamples=101)
    whole = core.bootstrap_subsets(x, y, bootstrap)
    monkeypatch.setattr(core, "BLOCK_SIZE", 7 * x.shape[1])
    for expected, blocked in zip(whole, core.bootstrap_subsets(x, y, bootstrap), strict=True):
        np.testing.assert_allclose(blocked, expected, atol=1e-12)


def test_interval_options():
    x, y = make_rows(20)
    low, high = core.compute_lds(x, y)["confidence_interval"]
    narrow = core.compute_lds(x, y, confidence_level=0.5)["confidence_interval"]
    assert -1 < low < narrow[0] < narrow[1] < high < 1
    assert core.compute_lds(x, y, seed=0)["confidence_interval"] == (low, high)
    assert core.compute_lds(x, y, seed=1)["confidence_interval"] != (low, high)
    assert core.compute_lds(x, y, num_resamples=10)["confidence_interval"] != (low, high)


def test_repeating_every_query_makes_the_interval_no_narrower_than_the_subsets_allow():
    """Copies of one query are one query: only the subsets' noise is left, and it does not average out."""
    x, y = make_rows(1, 50)
    alone = core.compute_lds(x, y)["confidence_interval"]
    copied = core.compute_lds(x.repeat(200, 0), y.repeat(200, 0))["confidence_interval"]
    np.testing.assert_allclose(copied, alone, atol=1e-6)


def test_interval_holds_the_estimate():
    x, y = make_rows(400, 20, rho=0.7)  # so many queries that the bias is larger than the standard error
    result = core.compute_lds(x, y)
    assert result["confidence_interval"][0] <= result["lds"] <= result["confidence_interval"][1]


def least_squares_residuals(rows, covariates):
    design = np.column_stack([np.ones(len(covariates)), covariates])
    return rows - (design @ np.linalg.lstsq(design, rows.T, rcond=None)[0]).T


def test_partial_is_spearman_of_residuals():
    x, y = make_rows(seed=1)
    rng = np.random.default_rng(2)
    covariates = rng.standard_normal((40, 3)) * [1, 1e6, 1e-4] + [0, 1e3, 0]
    pull = rng.standard_normal((6, 3)) @ (covariates / covariates.std(0)).T
    result = core.compute_lds(x + 5 * pull, y + 5 * pull, covariates=covariates)
    left = [least_squares_residuals(rows, covariates) for rows in (x, y)]
    expected = [spearmanr(a, b).statistic for a, b in zip(*left, strict=True)]
    np.testing.assert_allclose(result["partial_lds_per_query"], expected, atol=1e-12)
    assert result["partial_lds"] == pytest.approx(np.mean(expected))
    assert result["lds"] > 0.9 > result["partial_confidence_interval"][1]


def test_rank_deficient_covariates_change_nothing():
    x, y = make_rows()
    covariates = np.random.default_rng(0).integers(0, 9, (40, 2)).astype(float)
    padded = np.column_stack([covariates, covariates.sum(1), np.full(40, 0.1), 20 - covariates[:, 0]])
    plain, deficient = (core.compute_lds(x, y, covariates=c) for c in (covariates, padded))
    assert deficient["partial_lds_per_query"] == pytest.approx(plain["partial_lds_per_query"], abs=1e-12)
    assert deficient["partial_confidence_interval"] == pytest.approx(plain["partial_confidence_interval"])


def test_constant_covariates_leave_the_plain_score():
    x, y = make_rows(decimals=0)
    result = core.compute_lds(x, y, covariates=np.full((40, 2), 7.0))
    for name in ("lds", "confidence_interval", "num_undefined"):
        assert result[f"partial_{name}"] == result[name]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_score_of_the_label_alone_has_no_partial_score(dtype):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    masks = rng.random((50, 200)) < 0.5
    counts = np.stack([masks[:, labels == k].sum(1) for k in range(4)], axis=1)
    values = rng.standard_normal((3, 4)).astype(dtype)[:, labels]
    predictions = masks.astype(dtype) @ values.T  # an exact function of the counts, up to rounding
    result = core.compute_lds(predictions.T, rng.standard_normal((3, 50)), covariates=counts)
    assert result["num_undefined"] == 0
    assert result["partial_num_undefined"] == 3
    assert np.isnan(result["partial_lds"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predictions": [[1, 2, 3], [1, np.nan, 3]]}, "predictions row 1 is not finite: nan in column 1"),
        ({"references": [[1, 2, np.inf], [1, 2, 3]]}, "references row 0 is not finite: inf in column 2"),
        ({"references": [[1, 2, 3], [1, 2]]}, "references row 1 has 2 values, row 0 has 3"),
        ({"references": [[1, 2, 3]]}, "must have one shape"),
        ({"predictions": [1, 2, 3]}, "predictions must be a matrix"),
        ({"predictions": []}, "predictions must be a matrix"),
        ({"predictions": [[1, 2]], "references": [[1, 2]]}, "at least 3 subsets, got 2"),
        ({"covariates": [[1], [2]]}, "a row per subset: 2 rows for 3 subsets"),
        ({"covariates": [[1], [2], [3]]}, "1 covariates need at least 4 subsets, got 3"),
        ({"covariates": [[1], [np.nan], [3]]}, "covariates row 1 is not finite"),
        ({"confidence_level": 95}, "confidence_level must lie between 0 and 1"),
        ({"num_resamples": 1}, "num_resamples must be at least 2"),
    ],
)
def test_bad_input_is_named(arguments, message):
    rows = [[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]]
    with pytest.raises(ValueError, match=message):
        core.compute_lds(**{"predictions": rows, "references": rows, **arguments})


def test_the_module_gives_the_numbers_of_the_core(lds):
    x, y = make_rows()
    covariates = np.random.default_rng(0).standard_normal((40, 2))
    options = {"covariates": covariates, "confidence_level": 0.9, "num_resamples": 50, "seed": 3}
    expected = core.compute_lds(x, y, **options)
    assert lds.compute(predictions=x, references=y, **options) == expected
    assert lds.compute(predictions=x.tolist(), references=y.tolist(), **options) == expected
    lds.add_batch(predictions=x[:2], references=y[:2])
    for row_x, row_y in zip(x[2:], y[2:], strict=True):
        lds.add(prediction=row_x, reference=row_y)
    assert lds.compute(**options) == expected


def test_the_module_names_bad_rows_and_works_again(lds):
    rows = [[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]]
    for bad, message in [
        ([[1, 2, 3], [1, None, 3]], "predictions row 1 is not finite"),
        ([[1, 2, 3], [1, 2]], "predictions row 1 has 2 values"),
        ([[1, 2, 3]], "Mismatch in the number of predictions"),
    ]:
        with pytest.raises(ValueError, match=message):
            lds.compute(predictions=bad, references=rows)
        assert lds.compute(predictions=rows, references=rows)["lds"] == 1


def test_the_module_describes_itself(lds):
    assert lds.name == "lds"
    assert set(lds.features) == {"predictions", "references"}
    assert all(feature.feature.dtype == "float64" for feature in lds.features.values())
    assert "park2023trak" in lds.citation
    for name in core.compute_lds(*make_rows(), covariates=np.arange(40)[:, None]):
        assert name in lds.inputs_description


def test_card_and_examples(lds, monkeypatch):
    """The card's examples run, and it lists all that the metric returns."""
    import doctest

    import evaluate

    monkeypatch.setattr(evaluate, "load", lambda name: lds)
    card = (METRICS / "lds" / "README.md").read_text()
    for name, text in (("card", card), ("inputs", lds.inputs_description)):
        example = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
        assert example.examples
        assert doctest.DocTestRunner().run(example).failed == 0
    for name in core.compute_lds(*make_rows(), covariates=np.arange(40)[:, None]):
        assert f"`{name}`" in card


def gaussian_rows(rng, num_queries, num_subsets, rho, shared, spread, num_covariates):
    """Pairs of Gaussian rows whose correlation varies over queries, and whose noise is shared in part."""
    rho = np.clip(rho + spread * rng.standard_normal((num_queries, 1)), -0.98, 0.98)
    x, noise = (
        np.sqrt(shared) * rng.standard_normal((1, num_subsets))
        + np.sqrt(1 - shared) * rng.standard_normal((num_queries, num_subsets))
        for _ in range(2)
    )
    y = rho * x + np.sqrt(1 - rho**2) * noise
    if num_covariates == 0:
        return x, y, None
    covariates = rng.standard_normal((num_subsets, num_covariates))
    pulls = (rng.standard_normal((num_queries, num_covariates)) @ covariates.T for _ in range(2))
    return *(side + pull for side, pull in zip((x, y), pulls, strict=True)), covariates


def population_lds(rho, spread):
    """Mean of Spearman's rho of a bivariate normal, 6 / pi asin(r / 2), over queries."""
    sample = np.clip(rho + spread * np.random.default_rng(0).standard_normal(200_000), -0.98, 0.98)
    return float(np.mean(6 / np.pi * np.arcsin(sample / 2)))


COVERAGE_CASES = [
    # queries, subsets, rho, share of noise common to all queries, spread of rho, covariates
    (30, 50, 0.4, 0.0, 0.0, 0),
    (30, 50, 0.4, 0.3, 0.1, 0),
    (30, 50, 0.9, 0.5, 0.03, 0),
    (200, 50, 0.4, 0.0, 0.1, 0),
    (10, 20, 0.3, 0.3, 0.2, 0),
    (1, 50, 0.4, 0.0, 0.0, 0),
    (30, 50, 0.4, 0.3, 0.1, 9),
]


def coverage(case, num_simulations, num_resamples=300):
    *shape, rho, shared, spread, num_covariates = case
    rng, truth = np.random.default_rng(0), population_lds(rho, spread)
    hits, width = 0, 0.0
    for _ in range(num_simulations):
        x, y, covariates = gaussian_rows(rng, *shape, rho, shared, spread, num_covariates)
        result = core.compute_lds(x, y, covariates=covariates, num_resamples=num_resamples)
        low, high = result["confidence_interval" if covariates is None else "partial_confidence_interval"]
        hits += low <= truth <= high
        width += high - low
    return hits / num_simulations, width / num_simulations


@pytest.mark.slow
@pytest.mark.parametrize("case", COVERAGE_CASES)
def test_interval_covers_the_population_as_often_as_it_says(case):
    # Nominal 95%; with 300 simulations the standard error of the coverage is 1.3%.
    assert 0.90 <= coverage(case, num_simulations=300 if case[0] < 100 else 150)[0] <= 0.99


def test_interval_covers_the_population_quickly():
    assert 0.90 <= coverage((10, 30, 0.4, 0.2, 0.1, 0), 200, num_resamples=100)[0] <= 0.99
