"""The LDS report: numbers of the metric, protocol and ceiling, partial score by group, and what is refused."""

import json

import datasets
import numpy as np
import pytest
from scipy.stats import spearmanr

from hf_attribution.counterfactuals import Counterfactuals, Subsets
from hf_attribution.errors import MismatchError
from hf_attribution.evaluation import evaluate_lds
from hf_attribution.scores import Scores

NUM_EXAMPLES, NUM_QUERIES, NUM_SUBSETS = 60, 5, 80
PROTOCOL = {
    "name": "resampled",
    "fraction": 0.5,
    "num_subsets": NUM_SUBSETS,
    "seeds": 2,
    "measurement": "margin",
    "initial_weights": "fresh",
    "order": "fresh",
}


@pytest.fixture(scope="module")
def labels():
    return np.arange(NUM_EXAMPLES) % 3


@pytest.fixture(scope="module")
def effects(labels):
    """What an example does to a query: a class effect, and a smaller one of its own. `[Q, N]`"""
    rng = np.random.default_rng(0)
    return rng.normal(size=(NUM_QUERIES, 3))[:, labels] + 0.5 * rng.normal(size=(NUM_QUERIES, NUM_EXAMPLES))


def make_truth(effects, seeds=2, noise=2.0, protocol=PROTOCOL, provenance=None, num_subsets=NUM_SUBSETS):
    subsets = Subsets.random(NUM_EXAMPLES, num_subsets, seed=1)
    signal = subsets.masks @ effects.T
    outputs = signal[:, None] + noise * np.random.default_rng(2).normal(size=(num_subsets, seeds, len(effects)))
    return Counterfactuals(subsets, outputs, protocol, provenance or {})


@pytest.fixture(scope="module")
def truth(effects):
    return make_truth(effects)


def make_dataset(**columns):
    return datasets.Dataset.from_dict({"text": ["a"] * NUM_EXAMPLES, **columns})


def test_numbers_are_those_of_spearman(effects, truth):
    noisy = Scores(effects + np.random.default_rng(3).normal(size=effects.shape), method="noisy")
    report = evaluate_lds(noisy, truth)
    rows = zip(noisy.predict(truth.subsets), truth.mean(), strict=True)
    expected = [spearmanr(x, y) for x, y in rows]
    assert report.lds_per_query == pytest.approx([e.statistic for e in expected])
    assert report.p_values == pytest.approx([e.pvalue for e in expected], rel=1e-6)
    assert report.lds == pytest.approx(np.mean([e.statistic for e in expected]))
    assert report.confidence_interval[0] < report.lds < report.confidence_interval[1]
    assert report.ceiling == truth.mean_ceiling()
    assert report.protocol == truth.protocol
    assert report.partial_lds is None


def test_options_reach_the_metric(effects, truth):
    scores = Scores(effects + 1, method="s")
    wide = evaluate_lds(scores, truth).confidence_interval
    for options in ({"confidence_level": 0.5}, {"seed": 1}, {"num_resamples": 20}):
        assert evaluate_lds(scores, truth, **options).confidence_interval != wide


def test_partial_lds_unmasks_the_label(effects, labels, truth):
    train = make_dataset(label=labels.tolist())
    rng = np.random.default_rng(0)
    by_label = Scores(rng.normal(size=(NUM_QUERIES, 3))[:, labels], method="label_match")
    report = evaluate_lds(by_label, truth, train)
    assert report.lds > 0.4
    assert np.isnan(report.partial_lds)
    assert report.partial_num_undefined == NUM_QUERIES
    assert report.partial_ceiling == truth.mean_ceiling(truth.subsets.counts(labels))  # the truth's

    report = evaluate_lds(Scores(effects, method="oracle"), truth, train)
    assert (report.group_column, report.num_groups) == ("label", 3)
    assert 0 < report.partial_lds < report.lds
    assert report.partial_ceiling == truth.mean_ceiling(truth.subsets.counts(labels))
    design = np.column_stack([np.ones(NUM_SUBSETS), truth.subsets.counts(labels)])
    sides = (Scores(effects, method="oracle").predict(truth.subsets), truth.mean())
    left = [rows.T - design @ np.linalg.lstsq(design, rows.T, rcond=None)[0] for rows in sides]
    expected = [spearmanr(left[0][:, q], left[1][:, q]).statistic for q in range(NUM_QUERIES)]
    assert report.partial_lds_per_query == pytest.approx(expected)


@pytest.mark.parametrize(
    ("columns", "options", "column"),
    [
        ({"label": [0, 1] * 30}, {}, "label"),
        ({"labels": [0, 1] * 30}, {}, "labels"),
        ({"label": [0.5, 1.5] * 30}, {}, None),
        ({"labels": [[0, 1]] * 60}, {}, None),
        ({}, {}, None),
        ({"label": [0, 1] * 30, "source": ["a", "b", "c"] * 20}, {"group_column": "source"}, "source"),
    ],
)
def test_which_column_gives_the_groups(effects, truth, columns, options, column):
    report = evaluate_lds(Scores(effects, method="oracle"), truth, make_dataset(**columns), **options)
    assert report.group_column == column
    assert (report.partial_lds is None) == (column is None)


def test_class_labels_and_formats_count(effects, labels, truth):
    train = make_dataset(label=labels.tolist()).cast_column("label", datasets.ClassLabel(num_classes=3))
    scores = Scores(effects, method="oracle")
    reports = [evaluate_lds(scores, truth, each) for each in (train, train.with_format("numpy"))]
    assert reports[0] == reports[1]
    assert reports[0].num_groups == 3


def test_too_many_groups(effects, truth):
    train = make_dataset(label=list(range(NUM_EXAMPLES)), source=list(range(NUM_EXAMPLES)))
    few = make_truth(effects, num_subsets=20)
    report = evaluate_lds(Scores(effects, method="oracle"), few, train)
    assert report.partial_lds is None
    assert "needs 64 subsets for the 60 groups of 'label'" in str(report)
    with pytest.raises(ValueError, match="60 groups of column 'source' need 64 subsets"):
        evaluate_lds(Scores(effects, method="oracle"), few, train, group_column="source")


def test_report_reads_well(effects, labels, truth):
    report = evaluate_lds(Scores(effects, method="oracle"), truth, make_dataset(label=labels.tolist()))
    text = str(report)
    for part in (
        "LDS of oracle",
        f"{report.lds:.3f} [{report.confidence_interval[0]:.3f}, {report.confidence_interval[1]:.3f}] at 95%",
        f"ceiling {report.ceiling:.3f}",
        f"{report.partial_lds:.3f} [",
        f"ceiling {report.partial_ceiling:.3f}, given counts of 'label'",
        "resampled: 80 subsets keep 0.5 of the data, seeds 2, initial weights fresh, order fresh, measured margin",
        "0 of 5 queries, partial 0",
    ):
        assert part in text
    restored = json.loads(json.dumps(report.to_dict()))
    assert restored["lds"] == report.lds
    assert restored["protocol"] == PROTOCOL


def test_one_seed_has_no_ceiling_and_gaps_in_the_protocol_show(effects):
    report = evaluate_lds(Scores(effects, method="oracle"), make_truth(effects, seeds=1, protocol={}))
    assert report.ceiling is None
    assert "ceiling unknown (one seed)" in str(report)
    assert report.protocol == {"fraction": 0.5, "num_subsets": NUM_SUBSETS, "seeds": 1}
    assert "measured not recorded" in str(report)


def test_constant_scores_are_counted(effects, truth):
    values = effects.copy()
    values[2] = 0.1
    report = evaluate_lds(Scores(values, method="s"), truth)
    assert report.num_undefined == 1
    assert np.isnan(report.lds_per_query[2])
    nothing = evaluate_lds(Scores(np.zeros_like(effects), method="s"), truth)
    assert np.isnan(nothing.lds)
    assert nothing.ceiling == truth.mean_ceiling()
    assert "5 of 5 queries" in str(nothing)


def test_other_shapes_are_refused(effects, truth):
    with pytest.raises(MismatchError, match="scores are for 4 queries and the counterfactuals for 5"):
        evaluate_lds(Scores(effects[:4], method="s"), truth)
    with pytest.raises(MismatchError):
        evaluate_lds(Scores(effects[:, :50], method="s"), truth)
    short = make_dataset().select(range(50))
    with pytest.raises(MismatchError, match="50 rows and the subsets are of 60"):
        evaluate_lds(Scores(effects, method="s"), truth, short)


@pytest.mark.parametrize(
    ("scores", "truth", "message"),
    [
        ({"fingerprints": {"train": "a"}}, {"fingerprints": {"train": "b"}}, "different train datasets"),
        ({"fingerprints": {"query": "a"}}, {"fingerprints": {"query": "b"}}, "different query datasets"),
        ({"measurement": "loss"}, {}, "attribute 'loss' and the counterfactuals measured 'margin'"),
        (
            {"fingerprints": {"train": "a", "model": "m"}},
            {"fingerprints": {"train": "a", "model": "n"}},
            None,
        ),
        ({"fingerprints": {"train": "a"}}, {"fingerprints": {"query": "b"}}, None),
        ({"measurement": "margin"}, {}, None),
    ],
)
def test_other_data_or_measurement_is_refused(effects, scores, truth, message):
    scores = Scores(effects, method="s", provenance=scores)
    truth = make_truth(effects, provenance=truth)
    if message is None:
        assert evaluate_lds(scores, truth).lds > 0
    else:
        with pytest.raises(MismatchError, match=message):
            evaluate_lds(scores, truth)


def test_measurement_in_the_settings_counts(effects, truth):
    with pytest.raises(MismatchError, match="attribute 'loss'"):
        evaluate_lds(Scores(effects, method="s", settings={"measurement": "loss"}), truth)


def test_subsets_that_fed_the_method_are_refused(effects, truth):
    keys = truth.subsets.keys()
    fitted = Scores(effects, method="datamodel", provenance={"used_subsets": keys[7:10]})
    with pytest.raises(MismatchError, match=r"3 of the 80 subsets \(the first is 7\) fed datamodel"):
        evaluate_lds(fitted, truth)
    others = Subsets.random(NUM_EXAMPLES, 5, seed=99).keys()
    disjoint = Scores(effects, method="datamodel", provenance={"used_subsets": others})
    assert evaluate_lds(disjoint, truth).lds > 0


def test_group_column_that_cannot_be_is_refused(effects, truth):
    scores = Scores(effects, method="s")
    with pytest.raises(ValueError, match="needs the train_dataset"):
        evaluate_lds(scores, truth, group_column="source")
    with pytest.raises(ValueError, match=r"no column 'source'.*text"):
        evaluate_lds(scores, truth, make_dataset(), group_column="source")
    with pytest.raises(ValueError, match="row 59 holds None"):
        evaluate_lds(scores, truth, make_dataset(source=["a"] * 59 + [None]), group_column="source")
    with pytest.raises(ValueError, match="row 0 holds"):
        evaluate_lds(scores, truth, make_dataset(source=[[1]] * 60), group_column="source")
