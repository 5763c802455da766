"""Studies against an oracle whose retrainings are known, and on real retrainings of a tiny model."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import CountTrainings, make_trainer, model, points
from transformers import BertConfig, BertForMaskedLM

from hf_attribution import AttributionTrainer, Counterfactuals, Scores
from hf_attribution.errors import MismatchError, UnsupportedError
from hf_attribution.methods import LabelMatch
from hf_attribution.studies import Brittleness, RemovalCurve, Stability, brittleness, removal_curve, stability
from hf_attribution.studies.bisection import smallest_flipping
from hf_attribution.studies.brittleness import decision_margin
from hf_attribution.studies.removal import RANDOM_DRAWS
from hf_attribution.studies.stability import rank_correlation, shuffle_weights


class Oracle:
    """A trainer whose models say `offset + values @ mask`, plus noise of each training: the answers are known."""

    def __init__(self, values, offset, folder, noise=0.0):
        self.values, self.offset, self.noise = values, offset, noise
        self.train_dataset, self.eval_dataset = range(values.shape[1]), range(len(values))
        self.args, self.model = SimpleNamespace(output_dir=folder), model()
        self.asked = []

    def retrain(self, query_dataset, subsets, output_dir, seeds, seed, task):
        self.asked.append(len(subsets))
        outputs = (subsets.masks @ self.values.T + self.offset)[:, None].repeat(seeds, axis=1)
        if self.noise:
            generators = [np.random.default_rng([seed, *mask]) for mask in subsets.masks.astype(int)]
            outputs = outputs + self.noise * np.stack([rng.normal(size=outputs.shape[1:]) for rng in generators])
        return Counterfactuals(subsets, outputs, provenance={"fingerprints": {"train": "t", "query": "q"}})


def make_oracle(folder, num_queries=8, num_examples=60, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(num_queries, num_examples))
    whole = np.linspace(-1, 12, num_queries)  # the first is predicted wrongly, the last hard to flip
    return Oracle(values, whole - values.sum(1), folder, noise), Scores(values, method="oracle")


def test_functions_that_share_a_module_s_name_are_what_is_imported():
    # `studies/brittleness.py`, once imported, is an attribute of its package, too.
    script = (
        "from importlib import import_module; "
        "modules = [import_module(f'hf_attribution.studies.{name}') for name in ('stability', 'brittleness')]; "
        "from hf_attribution.studies import brittleness, stability; "
        "assert [stability, brittleness] == [modules[0].stability, modules[1].brittleness]; "
        "import hf_attribution; "
        "assert (hf_attribution.brittleness, hf_attribution.stability) == (brittleness, stability)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("max_size", [1, 2, 7, 64])
def test_bisection_finds_what_brute_force_finds(max_size):
    rng = np.random.default_rng(max_size)
    borders = dict(enumerate(rng.integers(1, 80, size=200)))
    rounds = []

    def flips(pairs):
        rounds.append(len(pairs))
        return [size >= borders[query] for query, size in pairs]

    expected = {query: border for query, border in borders.items() if border <= max_size}
    assert smallest_flipping(flips, list(borders), max_size) == expected
    assert len(rounds) <= 1 + np.ceil(np.log2(max_size))


def test_bisection_of_an_oracle_that_is_not_monotone_ends_at_a_flip():
    table = np.random.default_rng(0).random((50, 101)) < 0.5
    found = smallest_flipping(lambda pairs: [table[pair] for pair in pairs], range(50), 100)
    assert set(found) == set(np.flatnonzero(table[:, 100]))
    for query, size in found.items():
        assert table[query, size]
        assert size == 1 or not table[query, size - 1]


def test_bisection_asks_nothing_for_nothing():
    assert smallest_flipping(lambda pairs: pytest.fail("asked"), [], 5) == {}
    with pytest.raises(ValueError, match="max_size=0"):
        smallest_flipping(lambda pairs: [], [1], 0)


def test_brittleness_of_an_oracle_is_that_of_brute_force(tmp_path):
    oracle, scores = make_oracle(tmp_path)
    found = brittleness(scores, oracle, max_share=0.25)
    left = np.linspace(-1, 12, 8)[:, None] - np.cumsum(-np.sort(-scores.values, axis=1), axis=1)[:, :15]
    assert found.max_size == 15
    assert found.correct.tolist() == [False] + [True] * 7
    for query in range(8):
        flipped = np.flatnonzero(left[query] < 0)
        if query == 0 or not len(flipped):
            assert np.isnan(found.smallest[query])
            assert np.isnan(found.flip_rate[query])
        else:
            assert found.smallest[query] == 1 + flipped[0]
            assert found.flip_rate[query] == 1
    assert np.isnan(found.smallest[1:]).sum() < 7
    assert found.summary()["share_smaller"] > 0.7
    assert "7 of 8 queries are predicted correctly" in str(found)


def test_brittleness_is_verified_by_seeds_that_did_not_choose(tmp_path):
    """Where sets do nothing and outputs are noise, those that were found flipped the seeds that found them."""
    oracle, scores = make_oracle(tmp_path, num_queries=40, noise=1.0)
    oracle.values, oracle.offset = 0 * oracle.values, np.full(40, 0.5)
    found = brittleness(scores, oracle, max_share=0.2, seeds=3)
    chosen = np.isfinite(found.smallest)
    assert chosen.sum() > 3
    # A training flips with probability P(z < -1/2) = .31, whatever is removed.
    assert found.flip_rate[chosen].mean() < 0.6
    assert abs(found.flip_rate[chosen].mean() - found.random_flip_rate[chosen].mean()) < 0.3


def test_removal_curve_of_an_oracle(tmp_path):
    oracle, scores = make_oracle(tmp_path)
    curve = removal_curve(scores, oracle, sizes=[1, 5], seeds=2)
    ordered = -np.sort(-scores.values, axis=1)
    np.testing.assert_allclose(curve.whole, np.linspace(-1, 12, 8), atol=1e-5)
    change = curve.outputs - curve.whole
    np.testing.assert_allclose(change[0], np.stack([-ordered[:, :1].sum(1), -ordered[:, :5].sum(1)]), atol=1e-4)
    np.testing.assert_allclose(change[2], np.stack([-ordered[:, -1:].sum(1), -ordered[:, -5:].sum(1)]), atol=1e-4)
    assert curve.mean_change()["top"][1] < curve.mean_change()["random"][1] < curve.mean_change()["bottom"][1]
    assert max(oracle.asked) <= 2 * 2 * 8 + 2 * RANDOM_DRAWS
    rows = curve.to_dataset()
    assert rows.num_rows == 3 * 2 * 8
    first = rows[0]
    assert (first["removed"], first["size"], first["query"]) == ("top", 1, 0)
    assert first["change"] == pytest.approx(-ordered[0, 0], abs=1e-4)
    assert "top" in str(curve)


def test_default_sizes_of_a_small_training_set(tmp_path):
    oracle, scores = make_oracle(tmp_path, num_examples=4)
    assert removal_curve(scores, oracle).sizes.tolist() == [1]


def small_trainer(folder, **settings):
    return make_trainer(
        AttributionTrainer, folder, trainer_settings={"callbacks": [CountTrainings], **settings}, num_train_epochs=3
    )


def test_studies_of_real_retrainings_resume(tmp_path):
    trainer = small_trainer(tmp_path)
    trainer.train()
    scores = trainer.attribute(method="grad_dot")
    CountTrainings.trainings = 0
    found = brittleness(scores, trainer, max_share=0.5, seeds=1)
    curve = removal_curve(scores, trainer, sizes=[3], seeds=1)
    assert CountTrainings.trainings > 0
    CountTrainings.trainings = 0
    assert brittleness(scores, trainer, max_share=0.5, seeds=1).fingerprint == found.fingerprint
    assert removal_curve(scores, trainer, sizes=[3], seeds=1).fingerprint == curve.fingerprint
    assert CountTrainings.trainings == 0
    for artefact in (found, curve):
        artefact.save(tmp_path / "study.safetensors")
        again = type(artefact).load(tmp_path / "study.safetensors")
        assert again.fingerprint == artefact.fingerprint
        assert isinstance(again, (Brittleness, RemovalCurve))
    assert found.to_dataset().num_rows == 7
    assert found.to_dataset()["smallest"][:] == pytest.approx(found.smallest.tolist(), nan_ok=True)


def test_a_flip_is_another_class_predicted():
    torch.manual_seed(0)
    network = model(num_labels=5)
    batch = {"points": torch.randn(64, 3), "labels": torch.randint(5, (64,))}
    predicted = network(batch["points"]).logits.argmax(1)
    margins = decision_margin(network, batch)
    assert ((margins > 0) == (predicted == batch["labels"])).all()


def test_stability_tells_a_method_from_a_baseline(tmp_path):
    trainer = small_trainer(tmp_path, train_dataset=points(rows=40))
    trainer.train()
    found = stability(trainer, "grad_dot", seeds=2)
    assert found.across_seeds.shape == (1, 7)
    assert found.randomized.shape == (2, 7)
    assert found.across_seeds.mean() > 0.8 > found.randomized.mean()
    match = stability(trainer, LabelMatch(), seeds=2)
    assert match.across_seeds.mean() == match.randomized.mean() == pytest.approx(1)
    found.save(tmp_path / "stability.safetensors")
    assert Stability.load(tmp_path / "stability.safetensors").fingerprint == found.fingerprint
    assert "across training seeds" in str(found)


def test_shuffled_weights_are_the_same_numbers_elsewhere():
    network = BertForMaskedLM(
        BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    shuffle_weights(network, seed=0)
    moved = 0
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter.flatten().sort()[0], before[name].flatten().sort()[0])
        moved += not torch.equal(parameter, before[name])
    assert moved > 3
    assert network.get_output_embeddings().weight is network.get_input_embeddings().weight


def test_rank_correlation_of_constant_scores_is_undefined():
    one, other = Scores(np.array([[1.0, 2, 3], [1, 1, 1]]), "a"), Scores(np.array([[3.0, 4, 9], [1, 2, 3]]), "b")
    correlations = rank_correlation(one, other)
    assert correlations[0] == pytest.approx(1)
    assert np.isnan(correlations[1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda o, s: brittleness(s, o, max_share=0.001), ValueError, "removes up to 0 of 60 examples"),
        (lambda o, s: brittleness(s, o, max_share=1.0), ValueError, "removes up to 60 of 60"),
        (lambda o, s: brittleness(s, o, query_dataset=range(3)), MismatchError, "there are 3 queries and 60"),
        (lambda o, s: removal_curve(s, o, sizes=[60]), ValueError, "at most 59 examples"),
        (lambda o, s: removal_curve(s, o, sizes=[]), ValueError, "at least 1"),
        (lambda o, s: removal_curve(s, o, query_dataset=range(3)), MismatchError, "there are 3 queries and 60"),
        (lambda o, s: stability(o, seeds=1), ValueError, "at least 2 trainings"),
        (lambda o, s: stability(o, "tracin"), UnsupportedError, "tracin follows one training"),
    ],
)
def test_bad_input_is_named(call, error, message, tmp_path):
    with pytest.raises(error, match=message):
        call(*make_oracle(tmp_path))


def test_scores_of_other_data_are_refused(tmp_path):
    oracle, scores = make_oracle(tmp_path)
    other = Scores(scores.values, "trak", provenance={"fingerprints": {"train": "another"}})
    for study in (brittleness, removal_curve):
        with pytest.raises(MismatchError, match="scores are of another train dataset"):
            study(other, oracle)
    oracle.eval_dataset = None
    with pytest.raises(ValueError, match="no query or training dataset"):
        brittleness(scores, oracle)


def test_what_has_no_classes_cannot_flip(tmp_path):
    oracle, scores = make_oracle(tmp_path)
    oracle.model = BertForMaskedLM(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(UnsupportedError, match="masked language modelling"):
        brittleness(scores, oracle)


def test_nothing_to_flip_is_said(tmp_path):
    oracle, scores = make_oracle(tmp_path)
    oracle.offset = oracle.offset - 100
    with pytest.raises(ValueError, match="None of the 8 queries"):
        brittleness(scores, oracle)
