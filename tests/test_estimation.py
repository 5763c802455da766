"""Estimators against simulated truths, closed forms, brute force and reference libraries."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from datasets import Dataset
from tiny import make_trainer, points

from hf_attribution.counterfactuals import Counterfactuals, Subsets
from hf_attribution.errors import ConvergenceError, MismatchError
from hf_attribution.estimation import AME, ESTIMATORS, LOO, Banzhaf, Datamodel, Shapley, estimate, get_estimator
from hf_attribution.estimation.groups import GroupCounts
from hf_attribution.estimation.lasso import fit_lasso
from hf_attribution.estimation.ridge import fit_ridge
from hf_attribution.evaluation import evaluate_lds
from hf_attribution.trainer import AttributionTrainer

N, Q = 30, 4


def truth(seed=0, num_examples=N, nonzero=None):
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(Q, num_examples))
    if nonzero is not None:
        values *= np.stack([generator.permutation(num_examples) < nonzero for _ in range(Q)])
    return values


def retrained(subsets, values, noise=0.0, seeds=1, **kwargs):
    """Outputs of a world in which examples add up."""
    signal = (subsets.masks @ values.T)[:, None] + 1.5
    draws = np.random.default_rng(1).normal(size=(len(subsets), seeds, len(values)))
    return Counterfactuals(subsets, signal + noise * draws, **kwargs)


def centered(values):
    """What subsets of one size determine: differences between examples."""
    return values - values.mean(axis=1, keepdims=True)


def orthogonal_halves(num_examples=6, seed=0):
    """16 subsets in which memberships are balanced and orthogonal: a fraction of the full factorial design."""
    patterns = np.array([[bin(row & column).count("1") % 2 for column in range(1, 16)] for row in range(16)], bool)
    flips = np.random.default_rng(seed).random(15) < 0.5
    masks = (patterns ^ flips)[:, :num_examples]
    assert not masks.all(1).any()
    assert masks.any(1).all()
    return Subsets(masks, {"name": "orthogonal"})


@pytest.mark.parametrize("penalty", ["lasso", "elastic_net", "ridge"])
@pytest.mark.parametrize("draw", [Subsets.random, Subsets.independent])
def test_datamodels_recover_a_linear_truth(penalty, draw):
    values = truth()
    scores = estimate(retrained(draw(N, 300), values), "datamodel", penalty=penalty)
    found = scores.values if draw == Subsets.independent else centered(scores.values)
    expected = values if draw == Subsets.independent else centered(values)
    np.testing.assert_allclose(found, expected, atol=0.03)


def test_a_sparse_truth_is_found_with_fewer_subsets_than_examples():
    values = truth(num_examples=200, nonzero=5)
    outputs = retrained(Subsets.random(200, 100), values, noise=0.1)
    sparse = estimate(outputs)
    found = {"lasso": sparse.values, "ridge": estimate(outputs, penalty="ridge").values}
    error = {penalty: np.abs(each - values).mean() for penalty, each in found.items()}
    assert error["lasso"] < 0.5 * error["ridge"]
    for query in range(Q):
        largest = np.argsort(-np.abs(values[query]))[0]
        assert np.argmax(np.abs(found["lasso"][query])) == largest
    assert sparse.provenance["choices"]["subsets_per_example"] == 0.5


def test_subsampled_influence_is_the_difference_of_two_means():
    outputs = retrained(Subsets.random(N, 40, fraction=0.3), truth(), noise=1.0, seeds=2)
    found = estimate(outputs, "subsampled_influence").values
    masks, mean = outputs.subsets.masks, outputs.mean()
    for query, example in itertools.product(range(Q), range(N)):
        inside = masks[:, example]
        expected = mean[query, inside].mean() - mean[query, ~inside].mean()
        np.testing.assert_allclose(found[query, example], expected, rtol=1e-5, atol=1e-6)


def test_in_a_balanced_orthogonal_design_banzhaf_subsampled_influence_and_ridge_agree():
    subsets = orthogonal_halves()
    outputs = Counterfactuals(subsets, np.random.default_rng(0).normal(size=(16, 1, Q)))
    influence = estimate(outputs, "subsampled_influence").values
    np.testing.assert_array_equal(influence, estimate(outputs, "banzhaf").values)
    ridge = estimate(outputs, penalty="ridge")
    penalties = np.array(ridge.provenance["choices"]["penalties"])[:, None]
    # A membership's squared norm, centered, is M / 4: ridge shrinks by it over itself plus the penalty.
    np.testing.assert_allclose(ridge.values, influence * 4 / (4 + penalties), rtol=1e-5, atol=1e-7)
    lasso = estimate(outputs)
    penalties = np.array(lasso.provenance["choices"]["penalties"])[:, None] * outputs.mean().std(axis=1)[:, None]
    # And the LASSO subtracts its penalty over the column's variance, 1 / 4.
    expected = np.sign(influence) * np.maximum(np.abs(influence) - 4 * penalties, 0)
    np.testing.assert_allclose(lasso.values, expected, atol=1e-4)


def game(masks, weights, pairs):
    """A game that is not additive: examples add up, and some pairs add something together."""
    masks = np.asarray(masks, dtype=float)
    return masks @ weights + sum(bonus * masks[..., i] * masks[..., j] for i, j, bonus in pairs)


WEIGHTS, PAIRS = np.array([1.0, -2.0, 0.5, 0.0, 3.0, 1.0]), [(0, 1, 4.0), (2, 4, -3.0)]


def brute_force_shapley():
    values, count = np.zeros(6), math.factorial(6)
    for order in itertools.permutations(range(6)):
        mask = np.zeros(6)
        for example in order:
            before = game(mask, WEIGHTS, PAIRS)
            mask[example] = 1
            values[example] += (game(mask, WEIGHTS, PAIRS) - before) / count
    return values


def play(subsets):
    return Counterfactuals(subsets, game(subsets.masks, WEIGHTS, PAIRS)[:, None, None])


def test_shapley_values_of_a_known_game():
    expected = brute_force_shapley()
    outputs = play(Subsets.permutations(6, 3000))
    scores = estimate(outputs, "shapley", empty_outputs=(0.0,))
    np.testing.assert_allclose(scores.values[0], expected, atol=0.1)
    # Each order adds up to the whole, whatever the sample.
    few = estimate(play(Subsets.permutations(6, 2)), Shapley(empty_outputs=(0.0,)))
    np.testing.assert_allclose(few.values.sum(), expected.sum(), rtol=1e-5)
    assert few.provenance["choices"]["num_permutations"] == 2
    by_two = estimate(play(Subsets.permutations(6, 3000, step=2)), Shapley(empty_outputs=(0.0,)))
    np.testing.assert_allclose(by_two.values.sum(), expected.sum(), rtol=1e-5)
    assert np.corrcoef(by_two.values[0], expected)[0, 1] > 0.9


def test_the_ends_of_shapley_permutations_are_stated():
    additive = retrained(Subsets.permutations(6, 50), truth(num_examples=6))
    scores = estimate(additive, "shapley")
    np.testing.assert_allclose(scores.values, truth(num_examples=6), atol=1e-5)  # but for the first, all are seen
    assert scores.provenance["choices"]["first_step"] == "left out"
    half = estimate(play(Subsets.permutations(6, 4000, truncation=0.5)), "shapley", empty_outputs=(0.0,))
    assert half.provenance["choices"]["truncated"]
    values = np.zeros(6)
    for order in itertools.permutations(range(6)):  # what comes after the third adds nothing
        masks = np.tril(np.ones((4, 6)), -1)[:, np.argsort(order)]
        values[list(order[:3])] += np.diff(game(masks, WEIGHTS, PAIRS)) / math.factorial(6)
    np.testing.assert_allclose(half.values[0], values, atol=0.15)


def test_banzhaf_values_of_a_known_game():
    masks = np.array(list(itertools.product((0, 1), repeat=6)))
    outputs = game(masks, WEIGHTS, PAIRS)
    expected = [outputs[masks[:, i] == 1].mean() - outputs[masks[:, i] == 0].mean() for i in range(6)]
    found = estimate(play(Subsets.independent(6, 20_000)), "banzhaf")
    np.testing.assert_allclose(
        found.values[0], expected, atol=0.25
    )  # the sample leaves out the two that are no subsets
    assert found.provenance["choices"]["subset_sizes"] == "independent"


def test_ame_recovers_a_linear_truth_and_averages_over_the_fractions():
    fractions = (0.2, 0.4, 0.6, 0.8)
    values = truth(num_examples=60, nonzero=10)
    subsets = Subsets.independent(60, 3000, fractions)
    found = estimate(retrained(subsets, values, noise=0.1), "ame").values
    np.testing.assert_allclose(found, values, atol=0.15)
    # Example 0 counts 1 + 2 x (share of the others that are there), on average 1 + 2 x .5, but only if it is there.
    share = subsets.masks[:, 1:].mean(axis=1)
    outputs = Counterfactuals(subsets, (subsets.masks[:, 0] * (1 + 2 * share))[:, None, None])
    assert estimate(outputs, "ame").values[0, 0] == pytest.approx(2.0, abs=0.1)


def test_leave_one_out_is_a_difference_and_needs_the_whole():
    values = truth()
    outputs = retrained(Subsets.leave_one_out(N, include_whole=True), values)
    np.testing.assert_allclose(estimate(outputs, LOO()).values, values, atol=1e-5)
    shuffled = outputs.select(np.random.default_rng(0).permutation(N + 1))
    np.testing.assert_allclose(estimate(shuffled, LOO()).values, values, atol=1e-5)
    with pytest.raises(ValueError, match="include_whole=True"):
        estimate(outputs.select(range(N)), "loo")
    with pytest.raises(ValueError, match="example 7 is in every subset"):
        estimate(outputs.select([row for row in range(N + 1) if row != 7]), "loo")
    with pytest.raises(ValueError, match="Subset 0 leaves out 15 examples"):
        estimate(retrained(Subsets.random(N, 5), values), "loo")


@pytest.mark.parametrize("many_queries", [1, 8])  # two queries are solved together, and one by one
@pytest.mark.parametrize("shape", [(120, 40), (60, 90), (20, 50)])
def test_the_lasso_is_scikit_learns_with_the_same_folds(shape, many_queries, monkeypatch):
    monkeypatch.setattr("hf_attribution.estimation.lasso.MANY_QUERIES", many_queries)
    monkeypatch.setattr("hf_attribution.estimation.lasso.PATH_TOLERANCE", 1e-5)
    linear_model = pytest.importorskip("sklearn.linear_model")
    num_subsets, num_examples = shape
    masks = Subsets.random(num_examples, num_subsets).masks
    values = truth(num_examples=num_examples, nonzero=8)[:2]
    outputs = retrained(Subsets(masks), values, noise=1.0).mean()
    outputs /= outputs.std(axis=1, keepdims=True)
    folds = [(np.flatnonzero(np.arange(num_subsets) % 5 != k), np.arange(k, num_subsets, 5)) for k in range(5)]
    centered_masks = masks - masks.mean(0)
    for ratio in (1.0, 0.5):
        found = fit_lasso(masks, outputs, ratio, num_penalties=20, smallest=1e-2)
        for query, own in enumerate(outputs):
            strongest = np.abs((own - own.mean()) @ centered_masks).max() / num_subsets / ratio
            settings = {"alphas": strongest * np.logspace(0, -2, 20), "cv": folds, "tol": 1e-6, "max_iter": 20_000}
            kind = linear_model.LassoCV(**settings) if ratio == 1.0 else linear_model.ElasticNetCV(**settings)
            if shape != (20, 50):  # there errors hardly differ between penalties
                assert found.penalties[query] == pytest.approx(kind.fit(masks.astype(float), own).alpha_, rel=1e-4)
            settings = {"alpha": found.penalties[query], "l1_ratio": ratio, "tol": 1e-8, "max_iter": 20_000}
            expected = linear_model.ElasticNet(**settings).fit(masks.astype(float), own)
            np.testing.assert_allclose(found.coefficients[query], expected.coef_, atol=1e-3)
    other_unit = fit_lasso(masks, 1000 * outputs, 0.5, num_penalties=20, smallest=1e-2)
    np.testing.assert_allclose(other_unit.coefficients, 1000 * found.coefficients, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("shape", [(120, 40), (40, 120)])
def test_the_ridge_is_scikit_learns(shape):
    linear_model = pytest.importorskip("sklearn.linear_model")
    masks = Subsets.random(shape[1], shape[0]).masks
    outputs = retrained(Subsets(masks), truth(num_examples=shape[1]), noise=2.0).mean()
    found = fit_ridge(masks, outputs)
    unit = ((masks - masks.mean(0)) ** 2).sum() / len(masks)
    grid = np.logspace(-3, 3, 37) * unit
    expected = linear_model.RidgeCV(grid, alpha_per_target=True).fit(masks.astype(float), outputs.T)
    np.testing.assert_allclose(found.penalties, expected.alpha_)
    np.testing.assert_allclose(found.coefficients, expected.coef_, atol=1e-8)


def test_both_solvers_choose_and_find_the_same(monkeypatch):
    masks = Subsets.random(N, 200).masks
    outputs = retrained(Subsets(masks), truth(), noise=2.0).mean()
    monkeypatch.setattr("hf_attribution.estimation.lasso.PATH_TOLERANCE", 1e-6)
    one_by_one = fit_lasso(masks, outputs)
    monkeypatch.setattr("hf_attribution.estimation.lasso.MANY_QUERIES", 1)
    together = fit_lasso(masks, outputs)
    np.testing.assert_array_equal(together.penalty_indices, one_by_one.penalty_indices)
    np.testing.assert_allclose(together.coefficients, one_by_one.coefficients, atol=1e-4)
    np.testing.assert_allclose(together.penalties, one_by_one.penalties, rtol=1e-6)


@pytest.mark.parametrize("many_queries", [1, 8])
def test_a_fit_that_does_not_converge_is_said(many_queries, monkeypatch):
    monkeypatch.setattr("hf_attribution.estimation.lasso.MANY_QUERIES", many_queries)
    monkeypatch.setattr("hf_attribution.estimation.lasso.MAX_ITERATIONS", 3)
    with pytest.raises(ConvergenceError, match="did not reach a duality gap"):
        estimate(retrained(Subsets.random(N, 60), truth(), noise=1.0))


@pytest.mark.parametrize("name", ["datamodel", "subsampled_influence", "banzhaf"])
def test_constant_outputs_get_zeros_and_are_named(name):
    values = truth()
    values[2] = 0
    scores = estimate(retrained(Subsets.random(N, 60), values), name)
    assert not scores.values[2].any()
    assert scores.values[[0, 1, 3]].any(axis=1).all()
    assert scores.provenance["choices"]["constant_queries"] == [2]
    assert not estimate(retrained(Subsets.random(N, 60), 0 * values), name).values.any()


def test_queries_without_signal_are_named():
    noise = retrained(Subsets.random(200, 40), np.zeros((Q, 200)), noise=1.0)
    scores = estimate(noise)
    choices, found = scores.provenance["choices"], scores.values
    assert choices["zero_queries"] == np.flatnonzero(~found.any(axis=1)).tolist()
    assert choices["zero_queries"]


def test_fit_and_evaluation_share_no_subset():
    outputs = retrained(Subsets.random(N, 120), truth(), noise=1.0, seeds=2)
    fit, held_out = outputs.select(range(90)), outputs.select(range(90, 120))
    scores = estimate(fit, held_out=held_out)
    assert evaluate_lds(scores, held_out).lds > 0.8
    assert scores.provenance["used_subsets"] == fit.subsets.keys()
    with pytest.raises(MismatchError, match="fed datamodel"):
        evaluate_lds(scores, outputs.select(range(80, 120)))
    with pytest.raises(MismatchError, match="10 of the 90 subsets to fit are also held out"):
        estimate(fit, held_out=outputs.select(range(80, 120)))


@pytest.mark.parametrize("other", [{"name": "fixed"}, {"measurement": "loss"}])
def test_what_is_held_out_is_of_the_same_protocol(other):
    protocol = {"name": "resampled", "measurement": "margin"}
    subsets = Subsets.random(N, 60)
    fit = retrained(subsets.select(range(40)), truth(), protocol=protocol)
    held_out = retrained(subsets.select(range(40, 60)), truth(), protocol=protocol | other)
    with pytest.raises(MismatchError, match=f"'{next(iter(other))}' is .* and '{next(iter(other.values()))}'"):
        estimate(fit, held_out=held_out)


def test_provenance_is_that_of_the_retrainings():
    kwargs = {
        "protocol": {"name": "resampled", "measurement": "margin", "fraction": 0.5},
        "provenance": {"fingerprints": {"train": "t", "query": "q"}, "seconds": 120.0},
    }
    outputs = retrained(Subsets.random(N, 60), truth(), **kwargs)
    found = estimate(outputs.select(range(30)), "subsampled_influence").provenance
    assert found["fingerprints"] == {"train": "t", "query": "q"}
    assert found["measurement"] == "margin"
    assert found["protocol"]["num_subsets"] == 30
    assert 60 < found["seconds"] < 61  # half of the trainings
    more = Subsets.random(N, 90).select(range(60, 90))
    joined = Counterfactuals.concatenate([outputs, retrained(more, truth(), **kwargs)])
    assert len(estimate(joined, "subsampled_influence").provenance["used_subsets"]) == 90


def test_bad_input_is_named():
    values = truth()
    masks = Subsets.random(N, 60).masks.copy()
    masks[:, 5] = True
    for name in ("datamodel", "subsampled_influence", "banzhaf"):
        with pytest.raises(ValueError, match="example 5 is in all of the 60 subsets"):
            estimate(retrained(Subsets(masks), values), name)
        with pytest.raises(ValueError, match="example 5 is in none of the 60 subsets"):
            estimate(retrained(Subsets(masks ^ (np.arange(N) == 5)), values), name)
    with pytest.raises(ValueError, match=r"probability 0\.5, and these keep 0\.3"):
        estimate(retrained(Subsets.random(N, 60, fraction=0.3), values), "banzhaf")
    with pytest.raises(ValueError, match=r"All subsets were drawn with the fraction"):
        estimate(retrained(Subsets.random(N, 60), values), "ame")
    with pytest.raises(ValueError, match=r"keeps 0\.967 of the examples.*Subsets\.independent"):
        estimate(retrained(Subsets.leave_one_out(N), values), AME(fractions=(0.2, 0.4)))
    with pytest.raises(ValueError, match=r"Subsets\.permutations"):
        estimate(retrained(Subsets.random(N, 60), values), "shapley")
    with pytest.raises(ValueError, match="one for each of the 4 queries"):
        estimate(retrained(Subsets.permutations(N, 2), values), "shapley", empty_outputs=(0.0,))
    with pytest.raises(ValueError, match="first step of every permutation"):
        estimate(retrained(Subsets.permutations(N, 1, step=10), values), "shapley")
    with pytest.raises(ValueError, match="at least 5 subsets"):
        estimate(retrained(Subsets(np.eye(4, dtype=bool)), truth(num_examples=4)))
    with pytest.raises(KeyError, match="Did you mean 'datamodel'"):
        estimate(retrained(Subsets.random(N, 60), values), "datamodels")
    with pytest.raises(TypeError, match=r"no setting 'alpha'.*penalty"):
        get_estimator("datamodel", alpha=3)
    for wrong in ({"penalty": "l0"}, {"l1_ratio": 0.0}, {"folds": 1}, {"num_penalties": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[-1]):
            Datamodel(**wrong)
    assert get_estimator(Banzhaf()) == Banzhaf()
    assert get_estimator(Datamodel(folds=3), penalty="ridge") == Datamodel(folds=3, penalty="ridge")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_two_examples_and_one_query_are_enough(name):
    drawn = {
        "shapley": Subsets.permutations(2, 9),
        "loo": Subsets.leave_one_out(2, include_whole=True),
    }
    masks = np.array([[True, False], [False, True]] * 3)
    if name == "ame":
        with pytest.raises(ValueError, match="fractions"):
            estimate(retrained(Subsets(masks), truth(num_examples=2)[:1]), name)
        return
    outputs = retrained(drawn.get(name, Subsets(masks)), truth(num_examples=2)[:1], noise=0.1)
    assert estimate(outputs, name).values.shape == (1, 2)


def test_independent_subsets_hold_each_example_with_the_fraction():
    subsets = Subsets.independent(50, 2000, 0.3)
    np.testing.assert_allclose(subsets.masks.mean(0), 0.3, atol=0.05)
    assert np.ptp(subsets.masks.sum(1)) > 5
    assert (Subsets.independent(50, 5, 0.3).masks == subsets.masks[:5]).all()
    several = Subsets.independent(1000, 400, (0.2, 0.8))
    assert set(several.masks.mean(1).round(1)) == {0.2, 0.8}
    with pytest.raises(ValueError, match="fraction"):
        Subsets.independent(50, 5, (0.5, 1.0))


def test_permutations_grow_step_by_step():
    subsets = Subsets.permutations(10, 3, step=4)
    assert subsets.masks.sum(1).tolist() == [10, 4, 8, 4, 8, 4, 8]
    assert all((subsets.masks[row] <= subsets.masks[row + 1]).all() for row in (1, 3, 5))
    assert (Subsets.permutations(10, 1, step=4).masks == subsets.masks[:3]).all()
    assert Subsets.permutations(10, 2, truncation=0.3).masks.sum(1).tolist() == [1, 2, 3, 1, 2, 3]
    for wrong in ({"step": 0}, {"step": 10}, {"truncation": 0.05}, {"truncation": 1.5}, {"num_permutations": 0}):
        with pytest.raises(ValueError, match="hold no subset"):
            Subsets.permutations(10, **{"num_permutations": 2, **wrong})


def grouped(num_examples=60, num_subsets=400, draw=Subsets.random, noise=0.5):
    """Outputs of a world with large effects of three classes, and of few examples within them."""
    generator = np.random.default_rng(5)
    labels = generator.integers(0, 3, num_examples)
    classes = np.array([[2.0, -1.0, -1.0], [0.0, 3.0, -3.0]])[:, labels]
    own = np.zeros((2, num_examples))
    own[0, 4], own[1, [7, 8]] = 3.0, [-4.0, 2.0]
    for label in range(3):  # a class's effect is the mean of its examples'
        own[:, labels == label] -= own[:, labels == label].mean(axis=1, keepdims=True)
    outputs = retrained(draw(num_examples, num_subsets, seed=2), classes + own, noise)
    return outputs, Dataset.from_dict({"label": labels}), classes + own, labels


def class_means(values, labels):
    return np.stack([values[:, labels == label].mean(axis=1) for label in range(3)], axis=1)


@pytest.mark.parametrize("penalty", ["lasso", "elastic_net", "ridge"])
@pytest.mark.parametrize("draw", [Subsets.random, Subsets.independent])
def test_datamodels_with_groups_recover_classes_and_examples(penalty, draw):
    outputs, train, values, labels = grouped(draw=draw)
    scores = estimate(outputs, train_dataset=train, penalty=penalty, group_column="label")
    found, expected = (centered(v) if draw == Subsets.random else v for v in (scores.values, values))
    np.testing.assert_allclose(found, expected, atol=0.35)
    np.testing.assert_allclose(class_means(found, labels), class_means(expected, labels), atol=0.12)
    assert scores.settings["group_column"] == "label"


def test_few_models_tell_classes_from_each_other():
    outputs, train, *_ = grouped(num_examples=300, num_subsets=160, noise=6.0)
    fit, held_out = outputs.select(range(60)), outputs.select(range(60, 160))
    plain, with_groups = (
        evaluate_lds(estimate(fit, held_out=held_out, train_dataset=train, penalty="ridge", **settings), held_out).lds
        for settings in ({}, {"group_column": "label"})
    )
    assert with_groups > plain + 0.1


def test_the_ridge_with_groups_is_the_joint_one_chosen_by_leaving_each_subset_out():
    outputs, train, _, labels = grouped(num_examples=24, num_subsets=30)
    found = estimate(outputs, train_dataset=train, penalty="ridge", group_column="label")
    masks, counts = outputs.subsets.masks.astype(float), np.eye(3)[labels].T @ outputs.subsets.masks.T
    design = np.concatenate([np.ones((30, 1)), counts.T, masks], axis=1)
    for query, target in enumerate(outputs.mean()):

        def fit(rows, penalty, target=target):
            penalties = np.concatenate([np.zeros(4), np.full(24, penalty)])
            products = design[rows].T @ design[rows] + np.diag(penalties)
            return np.linalg.lstsq(products, design[rows].T @ target[rows], rcond=1e-12)[0]

        counted = GroupCounts.of(outputs.subsets, train["label"][:])
        unit = np.square(counted.residuals(masks)).sum() / 30
        grid, everyone = np.logspace(-3, 3, 37) * unit, np.arange(30)
        errors = [
            sum((target[row] - design[row] @ fit(np.delete(everyone, row), penalty)) ** 2 for row in everyone)
            for penalty in grid
        ]
        best = grid[np.argmin(errors)]
        assert found.provenance["choices"]["penalties"][query] == pytest.approx(best)
        joint = fit(everyone, best)
        expected = joint[1:4][labels] + joint[4:]
        np.testing.assert_allclose(centered(found.values[[query]])[0], expected - expected.mean(), atol=1e-4)


def test_groups_refuse_what_they_cannot_be():
    outputs, train, *_ = grouped()
    with pytest.raises(ValueError, match="needs the train_dataset"):
        estimate(outputs, group_column="label")
    with pytest.raises(ValueError, match="no column 'play'"):
        estimate(outputs, train_dataset=train, group_column="play")
    with pytest.raises(MismatchError, match="59 rows"):
        estimate(outputs, train_dataset=train.select(range(59)), group_column="label")
    with pytest.raises(TypeError, match="no setting 'group_column'"):
        estimate(outputs, "banzhaf", train_dataset=train, group_column="label")
    halves = outputs.subsets.masks[:3]
    few = retrained(Subsets(np.concatenate([halves, ~halves])), truth(num_examples=60))
    with pytest.raises(ValueError, match="at least 7 subsets"):
        estimate(few, train_dataset=train, group_column="label")
    alone = train.add_column("own", [f"row {row}" for row in range(60)])  # every example its own group
    found = estimate(outputs, train_dataset=alone, group_column="own", penalty="ridge").values
    exact = np.linalg.lstsq(
        np.concatenate([outputs.subsets.masks, np.ones((400, 1))], axis=1), outputs.mean().T, rcond=None
    )[0][:-1].T
    np.testing.assert_allclose(centered(found), centered(exact), atol=1e-4)


@pytest.mark.slow
def test_the_lds_grows_with_the_number_of_retrained_models(tmp_path):
    trainer = make_trainer(
        AttributionTrainer, tmp_path, model_settings={"hidden": 4}, num_train_epochs=3,
        trainer_settings={"train_dataset": points(rows=40), "eval_dataset": points(rows=10, seed=1)},
    )  # fmt: skip
    outputs = trainer.retrain(points(rows=10, seed=1), num_subsets=160, seeds=2)
    held_out = outputs.select(range(120, 160))
    lds = [
        evaluate_lds(estimate(outputs.select(range(count)), penalty="ridge", held_out=held_out), held_out).lds
        for count in (15, 40, 120)
    ]
    assert lds == sorted(lds)
    assert lds[-1] > lds[0] + 0.1


@pytest.mark.parametrize("queries", [3, 12], ids=["one by one", "together"])
@pytest.mark.parametrize("penalty", ["lasso", "elastic_net"])
def test_a_fit_goes_on_where_it_was_with_more_subsets(queries, penalty):
    rng = np.random.default_rng(0)
    subsets = Subsets.random(num_examples=30, num_subsets=160, fraction=0.5)
    truth = rng.normal(size=(queries, 30)) * (rng.random((queries, 30)) < 0.3)
    outputs = subsets.masks @ truth.T + rng.normal(size=(160, queries))
    both = Counterfactuals(subsets, outputs[:, None])
    first = estimate(both.select(range(120)), penalty=penalty)
    cold = estimate(both, penalty=penalty)
    warm = estimate(both, penalty=penalty, previous=first)
    np.testing.assert_allclose(warm.values, cold.values, atol=1e-5 * np.abs(cold.values).max())
    assert warm.provenance["choices"]["penalties"] == cold.provenance["choices"]["penalties"]
    # From penalties that are past the best one the whole path is followed again.
    weak = [penalty_ / 3 for penalty_ in cold.provenance["choices"]["penalties"]]
    far = dataclasses.replace(first, provenance={**first.provenance, "choices": {"penalties": weak}})
    found = estimate(both, penalty=penalty, previous=far)
    np.testing.assert_allclose(found.values, cold.values, atol=1e-5 * np.abs(cold.values).max())


def test_previous_scores_of_something_else_are_refused():
    subsets = Subsets.random(num_examples=20, num_subsets=40)
    whole = Counterfactuals(subsets, np.random.default_rng(0).normal(size=(40, 1, 3)))
    first = estimate(whole.select(range(30)))
    with pytest.raises(MismatchError, match=r"of datamodel with .*elastic_net.*without previous"):
        estimate(whole, penalty="elastic_net", previous=first)
    with pytest.raises(MismatchError, match=r"\(3, 20\) there, \(2, 20\) now"):
        estimate(Counterfactuals(subsets, whole.outputs[:, :, :2]), previous=first)
    with pytest.raises(MismatchError, match="subsets of the previous scores are not among these 30"):
        estimate(whole.select(range(10, 40)), previous=first)
