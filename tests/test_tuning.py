"""Choosing among scores: what is chosen is right, honest, and remembers what it was chosen on."""

import datasets
import numpy as np
import pytest

from hf_attribution import Counterfactuals, Scores, Subsets, evaluate_lds
from hf_attribution.errors import MismatchError
from hf_attribution.tuning import choose, cross_fit

Q, N, M = 5, 20, 24


@pytest.fixture
def world():
    """Linear outputs with noise, and scores that are ever further from what made them."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(Q, N))
    subsets = Subsets.random(N, M, seed=3)
    outputs = (subsets.masks @ values.T)[:, None] + 0.3 * rng.normal(size=(M, 2, Q))
    noise = rng.normal(size=(Q, N))
    candidates = [
        Scores((values + noise * level).astype(np.float32), method="influence", settings={"damping": level})
        for level in (3.0, 0.1, 1.0)
    ]
    return candidates, Counterfactuals(subsets, outputs.astype(np.float32))


def test_the_best_candidate_is_chosen_and_its_subsets_are_used_up(world):
    candidates, truth = world
    few, rest = truth.select(range(10)), truth.select(range(10, M))
    chosen = choose(candidates, few)
    assert chosen.settings == {"damping": 0.1}
    np.testing.assert_array_equal(chosen.values, candidates[1].values)
    numbers = [candidate["lds"] for candidate in chosen.provenance["chosen_from"]]
    assert numbers == [evaluate_lds(candidate, few).lds for candidate in candidates]
    assert evaluate_lds(chosen, rest).lds == evaluate_lds(candidates[1], rest).lds
    with pytest.raises(MismatchError, match="score it on other subsets"):
        evaluate_lds(chosen, truth)


def test_what_candidates_have_used_already_stays_used(world):
    candidates, truth = world
    used = [Scores(c.values, c.method, c.settings, {"used_subsets": ["abc"]}) for c in candidates]
    assert choose(used, truth.select(range(10))).provenance["used_subsets"][0] == "abc"
    with pytest.raises(MismatchError):
        choose([choose(candidates, truth.select(range(10)))], truth.select(range(5, 15)))


def test_cross_fitting_scores_every_fold_by_the_choice_of_the_others(world):
    candidates, truth = world
    found = cross_fit(candidates, truth, num_folds=3)
    assert [settings["damping"] for settings in found.settings] == [0.1] * 3
    folds = [truth.select(range(fold, M, 3)) for fold in range(3)]
    assert found.lds == pytest.approx(np.mean([evaluate_lds(candidates[1], fold).lds for fold in folds]))
    assert found.partial_lds is None
    assert set(found.scores.provenance["used_subsets"]) == set(truth.subsets.keys())
    assert "cross-fitted over 3 folds" in str(found)


def test_cross_fitting_is_not_fooled_by_candidates_that_know_nothing():
    # Among many random scores the best looks good on what chose it, and has nothing elsewhere.
    rng = np.random.default_rng(1)
    truth = Counterfactuals(Subsets.random(N, 16, seed=3), rng.normal(size=(16, 1, Q)).astype(np.float32))
    candidates = [
        Scores(rng.normal(size=(Q, N)).astype(np.float32), method="random", settings={"seed": seed})
        for seed in range(40)
    ]
    found = cross_fit(candidates, truth)
    best = max(candidate["lds"] for candidate in found.scores.provenance["chosen_from"])
    assert best > 0.2
    assert abs(found.lds) < best - 0.1


def test_the_partial_lds_can_be_what_counts(world):
    candidates, truth = world
    train = datasets.Dataset.from_dict({"label": np.arange(N) % 2})
    assert choose(candidates, truth, train, criterion="partial_lds").settings == {"damping": 0.1}
    assert cross_fit(candidates, truth, train).partial_lds > 0.8


def test_bad_input_is_named(world):
    candidates, truth = world
    with pytest.raises(ValueError, match="no candidates"):
        choose([], truth)
    with pytest.raises(ValueError, match="criterion must be"):
        choose(candidates, truth, criterion="accuracy")
    with pytest.raises(ValueError, match="needs groups"):
        choose(candidates, truth, criterion="partial_lds")
    with pytest.raises(ValueError, match="at least 2 folds, of 3"):
        cross_fit(candidates, truth.select(range(5)))
    constant = [Scores(np.ones((Q, N), np.float32), method="constant")]
    with pytest.raises(ValueError, match="undefined"):
        choose(constant, Counterfactuals(truth.subsets, np.zeros_like(truth.outputs)))
