"""Subsets and retrained outputs: exact sizes, no bias, and a reliability that recovers a known one."""

import itertools

import datasets
import numpy as np
import pytest
import scipy.stats

from hf_attribution.counterfactuals import Counterfactuals, Subsets
from hf_attribution.errors import ArtefactError, MismatchError, NonFiniteError
from hf_attribution.reliability import spearman_brown

PROTOCOL = {"name": "resampled", "fraction": 0.5, "num_subsets": 6, "seeds": 2, "measurement": "margin"}
PROVENANCE = {"fingerprints": {"model": "m", "train": "t"}, "seconds": 10.0}


def make_truth(seed=0, shape=(6, 2, 3), num_examples=20):
    outputs = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return Counterfactuals(Subsets.random(num_examples, shape[0], seed=seed), outputs, PROTOCOL, PROVENANCE)


def simulate(num_subsets, num_seeds, num_queries, noise, seed=0):
    """Signal of variance 1, equal in all seeds, plus noise: one seed has reliability 1 / (1 + noise^2)."""
    generator = np.random.default_rng(seed)
    signal = generator.normal(size=(num_subsets, 1, num_queries))
    return signal, signal + noise * generator.normal(size=(num_subsets, num_seeds, num_queries))


def dummy_subsets(num_subsets):
    return Subsets.random(50, num_subsets)


class TestSubsets:
    def test_random_keeps_exactly_the_fraction(self):
        for num_examples, fraction, size in [
            (10, 0.5, 5),
            (11, 0.3, 3),
            (10, 0.97, None),
            (1000, 0.999, 999),
        ]:
            if size is None:
                with pytest.raises(ValueError, match=r"keeps 10 of 10 .* between 0.1 and 0.9"):
                    Subsets.random(num_examples, 5, fraction)
                continue
            subsets = Subsets.random(num_examples, 5, fraction)
            assert (subsets.masks.sum(axis=1) == size).all()
            assert subsets.fraction == pytest.approx(size / num_examples)

    def test_random_treats_all_examples_and_pairs_alike(self):
        masks = Subsets.random(10, 20_000, 0.3, seed=1).masks.astype(float)
        together = masks.T @ masks / len(masks)
        np.testing.assert_allclose(np.diag(together), 0.3, atol=0.015)
        np.testing.assert_allclose(together[~np.eye(10, dtype=bool)], 0.3 * 2 / 9, atol=0.01)

    @pytest.mark.parametrize("draw", [lambda m, s: Subsets.random(30, m, seed=s), lambda m, s: strata(m, s)])
    def test_more_subsets_begin_with_the_same(self, draw):
        np.testing.assert_array_equal(draw(3, 5).masks, draw(40, 5).masks[:3])
        assert draw(3, 5).fingerprint == draw(3, 5).fingerprint
        assert not (draw(3, 5).masks == draw(3, 6).masks).all()

    def test_a_fraction_that_keeps_nothing_or_all_is_refused(self):
        for fraction in (0.0, 0.04, 1.0, -1, 2):
            with pytest.raises(ValueError, match="give one between"):
                Subsets.random(10, 5, fraction)
            with pytest.raises(ValueError, match="give one between"):
                Subsets.stratified([0, 1] * 5, 5, fraction)
        for num_examples, num_subsets in ((1, 5), (10, 0)):
            with pytest.raises(ValueError, match="at least 1 of at least 2"):
                Subsets.random(num_examples, num_subsets)

    def test_stratified_sizes_add_up_and_favour_no_class(self):
        labels = np.repeat(["a", "b", "c", "d"], [1, 7, 7, 14])
        labels = np.random.default_rng(0).permutation(labels)
        subsets = Subsets.stratified(labels, 20_000, fraction=0.35, seed=0)
        size = round(0.35 * 29)
        shares = np.array([1, 7, 7, 14]) * size / 29
        counts = subsets.counts(labels)
        assert (counts.sum(axis=1) == size).all()
        assert (np.abs(counts - shares) < 1).all()
        np.testing.assert_allclose(counts.mean(axis=0), shares, atol=0.015)
        np.testing.assert_allclose(subsets.masks.mean(axis=0), size / 29, atol=0.015)

    def test_stratified_with_whole_shares_is_exact(self):
        labels = [0] * 40 + [7] * 60
        counts = Subsets.stratified(labels, 50, 0.25).counts(labels)
        assert (counts == [10, 15]).all()

    def test_stratified_draws_within_a_class_uniformly(self):
        masks = Subsets.stratified([0] * 4 + [1] * 4, 20_000, 0.5).masks[:, :4]
        drawn, times = np.unique(masks, axis=0, return_counts=True)
        assert len(drawn) == 6  # 2 of 4
        np.testing.assert_allclose(times / 20_000, 1 / 6, atol=0.01)

    def test_stratified_needs_a_list_of_labels(self):
        with pytest.raises(ValueError, match=r"one for each training example; their shape is \(2, 2\)"):
            Subsets.stratified(np.zeros((2, 2)), 3)

    def test_leave_one_out(self):
        np.testing.assert_array_equal(Subsets.leave_one_out(4).masks, ~np.eye(4, dtype=bool))
        np.testing.assert_array_equal(Subsets.leave_one_out(4, [2, 0]).masks, ~np.eye(4, dtype=bool)[[2, 0]])
        for outside in (4, -1):
            with pytest.raises(IndexError, match=f"Example {outside} is not in a training set of 4"):
                Subsets.leave_one_out(4, [0, outside])

    def test_impossible_masks_are_refused(self):
        with pytest.raises(TypeError, match="must be bool"):
            Subsets(np.array([[1, 0, 1]]))
        for masks in (np.ones(3, dtype=bool), np.zeros((0, 3), dtype=bool), np.ones((2, 1), dtype=bool)):
            with pytest.raises(ValueError, match="at least 2 examples"):
                Subsets(masks)
        with pytest.raises(ValueError, match="Subset 1 is empty"):
            Subsets(np.array([[True, False], [False, False]]))
        with pytest.raises(ValueError, match="Subset 0 is the whole training set"):
            Subsets(np.array([[True, True], [True, False]]))

    def test_the_whole_training_set_is_had_by_asking_for_it(self, tmp_path):
        whole = Subsets.whole(3)
        assert whole.masks.tolist() == [[True, True, True]]
        whole.save(tmp_path / "whole.safetensors")
        assert Subsets.load(tmp_path / "whole.safetensors").fingerprint == whole.fingerprint
        assert Subsets.from_dataset(whole.to_dataset()).fingerprint == whole.fingerprint
        assert whole.select([0, 0]).fraction == 1.0
        with pytest.raises(ValueError, match="Subset 0 is empty"):
            Subsets(np.array([[False, False]]), {"name": "whole"})

    def test_masks_are_shared_and_cannot_be_changed(self):
        masks = np.array([[True, False]])
        subsets = Subsets(masks)
        assert np.shares_memory(subsets.masks, masks)
        with pytest.raises(ValueError, match="read-only"):
            subsets.masks[0, 0] = False

    def test_indices_keys_counts_select(self):
        subsets = Subsets(np.array([[True, False, True, True], [False, True, False, True]]), {"name": "mine"})
        assert subsets.indices(0).tolist() == [0, 2, 3]
        assert subsets.indices(0).dtype == np.int64
        assert subsets.counts(["x", "x", "y", "y"]).tolist() == [[1, 2], [1, 1]]
        assert subsets.counts(datasets.Dataset.from_dict({"g": [5, 5, 3, 3]})["g"]).tolist() == [
            [2, 1],
            [1, 1],
        ]
        assert subsets.keys() == [*subsets.select([0]).keys(), *subsets.select([1]).keys()]
        assert len(set(subsets.keys())) == 2
        assert subsets.select([1, 0]).indices(1).tolist() == [0, 2, 3]
        with pytest.raises(MismatchError, match="3 groups and 4 examples"):
            subsets.counts([0, 1, 0])
        assert repr(subsets) == "Subsets(2 of 4 examples, fraction 0.625, mine)"
        assert (len(subsets), subsets.num_examples) == (2, 4)


def strata(num_subsets, seed):
    return Subsets.stratified(["a", "b", "b"] * 7, num_subsets, 0.4, seed)


class TestCounterfactuals:
    def test_mean(self):
        truth = make_truth()
        assert truth.mean().dtype == np.float64
        np.testing.assert_allclose(truth.mean(), truth.outputs.astype(np.float64).mean(axis=1).T)

    def test_names_the_output_that_is_not_finite(self):
        outputs = np.zeros((6, 2, 3))
        outputs[4, 1, 2] = np.nan
        with pytest.raises(NonFiniteError, match="output of query 2 is nan after training on subset 4 with seed 1"):
            Counterfactuals(dummy_subsets(6), outputs)

    def test_refuses_what_does_not_fit(self):
        with pytest.raises(MismatchError, match="outputs of 5 subsets but 6 subsets"):
            Counterfactuals(dummy_subsets(6), np.zeros((5, 2, 3)))
        for outputs in (np.zeros((6, 3)), np.zeros((6, 0, 3))):
            with pytest.raises(ValueError, match=r"\[subsets, seeds, queries\]"):
                Counterfactuals(dummy_subsets(6), outputs)
        with pytest.raises(TypeError, match=r"Counterfactuals\.protocol must be JSON"):
            Counterfactuals(dummy_subsets(6), np.zeros((6, 2, 3)), {"seeds": {1, 2}})

    def test_select(self):
        truth = make_truth()
        part = truth.select([4, 1])
        np.testing.assert_array_equal(part.outputs, truth.outputs[[4, 1]])
        assert part.subsets.keys() == [truth.subsets.keys()[4], truth.subsets.keys()[1]]
        assert part.protocol == {**PROTOCOL, "num_subsets": 2}
        assert len(part) == 2
        with pytest.raises(IndexError):
            truth.select([6])

    def test_concatenate_undoes_select(self):
        truth = make_truth()
        joined = Counterfactuals.concatenate([truth.select([0, 1]), truth.select([2, 3, 4, 5])])
        np.testing.assert_array_equal(joined.outputs, truth.outputs)
        assert joined.subsets.fingerprint == truth.subsets.fingerprint
        assert joined.protocol == truth.protocol
        assert joined.provenance["seconds"] == pytest.approx(10.0)

    def test_concatenate_refuses_what_does_not_belong_together(self):
        truth, other = make_truth(), make_truth(seed=1)
        protocol = {**PROTOCOL, "measurement": "loss"}
        otherwise = Counterfactuals(other.subsets, other.outputs, protocol)
        with pytest.raises(MismatchError, match="'measurement' is 'margin' in one and 'loss' in the other"):
            Counterfactuals.concatenate([truth, otherwise])
        with pytest.raises(MismatchError, match=r"\(20, 2, 3\) and \(21, 2, 3\)"):
            Counterfactuals.concatenate([truth, make_truth(num_examples=21)])
        with pytest.raises(MismatchError, match=r"\(20, 2, 3\) and \(20, 2, 4\)"):
            Counterfactuals.concatenate([truth, make_truth(shape=(6, 2, 4))])
        provenance = {"fingerprints": {"model": "m", "train": "other"}}
        elsewhere = Counterfactuals(other.subsets, other.outputs, PROTOCOL, provenance)
        with pytest.raises(MismatchError, match="'train'"):
            Counterfactuals.concatenate([truth, elsewhere])
        with pytest.raises(ValueError, match="Subset 6 of the joined ones is an earlier one"):
            Counterfactuals.concatenate([truth, truth.select([3])])
        with pytest.raises(ValueError, match="no counterfactuals"):
            Counterfactuals.concatenate([])

    def test_save_load_and_datasets(self, tmp_path):
        for artefact in (make_truth(), make_truth().subsets):
            artefact.save(tmp_path / "a")
            dataset = artefact.to_dataset()
            dataset.save_to_disk(tmp_path / artefact.kind)
            dataset.to_parquet(tmp_path / f"{artefact.kind}.parquet")
            parquet = datasets.Dataset.from_parquet(
                str(tmp_path / f"{artefact.kind}.parquet"), cache_dir=str(tmp_path)
            )
            cls = type(artefact)
            restored = [cls.load(tmp_path / "a"), cls.from_dataset(dataset), cls.from_dataset(parquet)]
            restored.append(cls.from_dataset(datasets.load_from_disk(tmp_path / artefact.kind)))
            assert {each.fingerprint for each in restored} == {artefact.fingerprint}
            with pytest.raises(ArtefactError):
                cls.from_dataset(dataset.select([1, 0, 2, 3, 4, 5]))

    def test_a_row_of_the_dataset_is_a_retraining(self):
        truth = make_truth()
        dataset = truth.to_dataset()
        assert len(dataset) == 12
        row = dataset[7]
        assert (row["subset"], row["seed"]) == (3, 1)
        assert row["outputs"] == truth.outputs[3, 1].tolist()
        assert row["mask"] == truth.subsets.masks[3].tolist()

    def test_fingerprint_sees_masks_outputs_and_protocol(self):
        truth = make_truth()
        others = [
            Counterfactuals(make_truth(seed=1).subsets, truth.outputs, PROTOCOL, PROVENANCE),
            Counterfactuals(truth.subsets, truth.outputs + 1, PROTOCOL, PROVENANCE),
            Counterfactuals(truth.subsets, truth.outputs, {}, PROVENANCE),
        ]
        assert len({each.fingerprint for each in [truth, *others]}) == 4
        assert repr(truth) == "Counterfactuals(6 subsets x 2 seeds x 3 queries, resampled)"


class TestReliability:
    def test_is_the_stepped_up_mean_over_pairs_of_seeds(self):
        truth = make_truth(shape=(12, 3, 4))
        for query in range(4):
            pairs = itertools.combinations(truth.outputs[:, :, query].T, 2)
            one = np.mean([scipy.stats.spearmanr(*pair).statistic for pair in pairs])
            assert truth.reliability()[query] == pytest.approx(3 * one / (1 + 2 * one))

    def test_ties_are_ranked_as_scipy_ranks_them(self):
        outputs = np.random.default_rng(0).integers(0, 3, size=(30, 2, 1))
        one = scipy.stats.spearmanr(outputs[:, 0, 0], outputs[:, 1, 0]).statistic
        truth = Counterfactuals(dummy_subsets(30), outputs)
        assert truth.reliability()[0] == pytest.approx(2 * one / (1 + one))

    @pytest.mark.parametrize(("num_seeds", "noise"), [(2, 1.0), (3, 2.0), (5, 0.5)])
    def test_recovers_the_known_reliability_and_ceiling(self, num_seeds, noise):
        signal, outputs = simulate(500, num_seeds, 200, noise)
        truth = Counterfactuals(dummy_subsets(500), outputs)
        true_reliability = 1 / (1 + noise**2 / num_seeds)
        # Spearman's correlation of normal variables is up to .018 below Pearson's.
        assert truth.reliability().mean() == pytest.approx(true_reliability, abs=0.02)
        # The ceiling is what the signal itself, a perfect prediction, scores.
        perfect = [
            scipy.stats.spearmanr(signal[:, 0, query], mean).statistic for query, mean in enumerate(truth.mean())
        ]
        assert truth.ceiling().mean() == pytest.approx(np.mean(perfect), abs=0.02)
        assert truth.mean_ceiling() == pytest.approx(np.mean(perfect), abs=0.02)

    def test_of_the_mean_equals_its_agreement_with_new_seeds(self):
        _, outputs = simulate(400, 6, 300, noise=1.5)
        first, second = (Counterfactuals(dummy_subsets(400), outputs[:, part]) for part in (slice(3), slice(3, 6)))
        agreement = [scipy.stats.spearmanr(*pair).statistic for pair in zip(first.mean(), second.mean(), strict=True)]
        assert first.reliability().mean() == pytest.approx(np.mean(agreement), abs=0.015)

    def test_of_equal_seeds_is_one_and_of_noise_is_zero(self):
        same = np.random.default_rng(0).normal(size=(50, 1, 4)).repeat(3, axis=1)
        truth = Counterfactuals(dummy_subsets(50), same)
        np.testing.assert_allclose(truth.reliability(), 1)
        np.testing.assert_allclose(truth.ceiling(), 1)
        assert truth.mean_ceiling() == pytest.approx(1)
        noise = Counterfactuals(dummy_subsets(500), np.random.default_rng(0).normal(size=(500, 2, 200)))
        assert noise.reliability().mean() == pytest.approx(0, abs=0.02)

    @pytest.mark.parametrize(("noise", "bias"), [(3.0, -0.05), (1e6, 0.25)])
    def test_the_mean_ceiling_is_right_where_the_mean_of_ceilings_is_not(self, noise, bias):
        parts = [simulate(20, 2, 400, noise, seed)[1] for seed in range(20)]
        truths = [Counterfactuals(dummy_subsets(20), outputs) for outputs in parts]
        # Spearman's correlation of normal variables whose Pearson correlation is the root of the reliability.
        true_ceiling = 6 / np.pi * np.arcsin(np.sqrt(1 / (1 + noise**2 / 2)) / 2)
        assert np.mean([truth.mean_ceiling() for truth in truths]) == pytest.approx(true_ceiling, abs=0.07)
        averages = np.mean([truth.ceiling().mean() for truth in truths])
        assert averages - true_ceiling == pytest.approx(bias, abs=0.03)

    def test_covariates_take_away_what_they_explain(self):
        generator = np.random.default_rng(0)
        subsets = Subsets.random(40, 400)
        counts = subsets.counts([0] * 10 + [1] * 10 + [2] * 20)  # they add up to 20: rank 2 beside the intercept
        _, outputs = simulate(400, 2, 100, noise=1.0)
        by_class = outputs + 3 * counts[:, :1, None] + 1000
        plain = Counterfactuals(subsets, outputs)
        shifted = Counterfactuals(subsets, by_class)
        assert shifted.reliability().mean() > 0.9
        np.testing.assert_allclose(shifted.reliability(counts), plain.reliability(counts), atol=1e-3)
        assert shifted.reliability(counts).mean() == pytest.approx(2 / 3, abs=0.025)
        assert shifted.mean_ceiling(counts) == pytest.approx(np.sqrt(2 / 3), abs=0.025)
        unrelated = generator.normal(size=(400, 3))
        assert plain.reliability(unrelated).mean() == pytest.approx(plain.reliability().mean(), abs=0.01)

    def test_covariates_are_regressed_out_as_by_least_squares(self):
        truth = make_truth(shape=(30, 2, 3))
        covariates = np.random.default_rng(1).normal(size=(30, 2)) * [1, 1e6] + [5, 0]
        design = np.column_stack([np.ones(30), covariates])
        for query in range(3):
            y = truth.outputs[:, :, query].astype(np.float64)
            left = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
            one = scipy.stats.spearmanr(left[:, 0], left[:, 1]).statistic
            assert truth.reliability(covariates)[query] == pytest.approx(2 * one / (1 + one))
        constant = np.ones((30, 1))
        np.testing.assert_allclose(truth.reliability(constant), truth.reliability())

    def test_outputs_that_do_not_vary_have_none(self):
        outputs = make_truth(shape=(30, 2, 3)).outputs.copy()
        counts = np.arange(30)[:, None]
        outputs[:, :, 1] = 0.1 * counts + 7  # only as the covariate does, to rounding
        outputs[:, 0, 2] = 3.7
        truth = Counterfactuals(dummy_subsets(30), outputs)
        assert np.isnan(truth.reliability()).tolist() == [False, False, True]
        assert np.isnan(truth.reliability(counts)).tolist() == [False, True, True]
        assert np.isnan(truth.ceiling(counts)).tolist() == [False, True, True]
        alone = Counterfactuals(dummy_subsets(30), outputs[:, :, :1])
        assert truth.mean_ceiling(counts) == pytest.approx(alone.mean_ceiling(counts))
        with pytest.raises(ValueError, match="No query's outputs vary"):
            Counterfactuals(dummy_subsets(30), outputs[:, :, 2:]).mean_ceiling()

    def test_seeds_that_contradict_each_other_have_no_ceiling(self):
        one = np.random.default_rng(0).normal(size=(30, 1, 2))
        truth = Counterfactuals(dummy_subsets(30), np.concatenate([one, -one], axis=1))
        assert (truth.reliability() < -1e6).all()
        assert truth.ceiling().tolist() == [0, 0]
        assert truth.mean_ceiling() == 0

    def test_spearman_brown(self):
        np.testing.assert_allclose(spearman_brown(np.array([0.0, 0.5, 1.0]), 2), [0, 2 / 3, 1])
        assert spearman_brown(np.array([-0.5]), 3) == -np.inf

    def test_says_what_is_missing(self):
        with pytest.raises(ValueError, match="retrain with seeds=2"):
            make_truth(shape=(6, 1, 3)).ceiling()
        with pytest.raises(ValueError, match="at least 3 subsets; there are 2"):
            make_truth(shape=(2, 2, 3)).reliability()
        truth = make_truth()
        with pytest.raises(MismatchError, match=r"6 subsets; their shape is \(5, 1\)"):
            truth.reliability(np.ones((5, 1)))
        with pytest.raises(NonFiniteError, match=r"Covariate \[2, 0\]"):
            truth.reliability(np.array([[0.0], [1], [np.nan], [3], [4], [5]]))
        with pytest.raises(ValueError, match="3 covariates leave too little of 6 subsets"):
            truth.reliability(np.random.default_rng(0).normal(size=(6, 3)))
