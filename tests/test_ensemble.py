import dataclasses

import numpy as np
import pytest
import torch
from tiny import (
    CountTrainings,
    PointsConfig,
    PointsForSequenceClassification,
    make_counted_trainer,
    model,
    plain_training,
    points,
)

from hf_attribution.artefacts import fingerprint
from hf_attribution.attribution import attribute
from hf_attribution.ensemble import Ensemble
from hf_attribution.errors import ArtefactError, MismatchError, NonFiniteError
from hf_attribution.evaluation import evaluate_lds
from hf_attribution.inputs import weights_fingerprint
from hf_attribution.scores import Scores
from hf_attribution.seeds import derive_seed
from hf_attribution.subsets import Subsets
from hf_attribution.trainer import AttributionTrainer
from hf_attribution.weights import load_weights

GRADIENT_METHODS = ["grad_dot", "grad_cos", "trak", "tracin", "representation_similarity"]


pytestmark = pytest.mark.usefixtures("quick_garbage_collection", "counted_trainings")


def trainer_in(folder, **kwargs):
    return make_counted_trainer(AttributionTrainer, folder, **{"model_settings": {"hidden": 4}, **kwargs})


def loaded(folder):
    return load_weights(model(hidden=4, seed=3), folder)


def weights_of(ensemble):
    return [weights_fingerprint(loaded(folder)) for folder in ensemble.checkpoints]


# The models


def test_each_model_is_a_plain_training_on_its_subset(tmp_path):
    trainer = trainer_in(tmp_path)
    ensemble = trainer.train_ensemble(k=2, fraction=0.25, seed=7)
    assert ensemble.subsets.masks.sum(axis=1).tolist() == [6, 6]
    for number, folder in enumerate(ensemble.checkpoints):
        data = points().select(ensemble.subsets.indices(number))
        seed = derive_seed(derive_seed(7, "ensemble"), "run", number, 0)
        trained = plain_training(model(hidden=4), trainer.args, data, seed)
        assert weights_fingerprint(loaded(folder)) == weights_fingerprint(trained)


def test_fraction_one_trains_on_everything_with_different_seeds(tmp_path):
    trainer = trainer_in(tmp_path)
    ensemble = trainer.train_ensemble(k=3, fraction=1.0)
    assert ensemble.subsets.masks.shape == (3, 24)
    assert ensemble.subsets.masks.all()
    assert len(set(weights_of(ensemble))) == 3
    seed = derive_seed(derive_seed(0, "ensemble"), "run", 0, 2)
    trained = plain_training(model(hidden=4), trainer.args, points(), seed)
    assert weights_fingerprint(loaded(ensemble.checkpoints[2])) == weights_fingerprint(trained)
    assert repr(ensemble) == "Ensemble(3 models, each trained on all of 24 examples)"


def test_with_model_init_every_model_has_initial_weights_of_its_own(tmp_path):
    def init():
        return PointsForSequenceClassification(PointsConfig(hidden=4))

    trainer = trainer_in(tmp_path, trainer_settings={"model_init": init}, max_steps=1, learning_rate=0.0)
    assert len(set(weights_of(trainer.train_ensemble(k=3, fraction=1.0)))) == 3


def test_an_interrupted_call_goes_on_and_a_larger_k_adds(tmp_path):
    whole = weights_of(trainer_in(tmp_path / "whole").train_ensemble(k=4))
    for fraction, already in ((0.5, 2), (1.0, 0)):
        folder = tmp_path / f"parts-{fraction}"
        CountTrainings.trainings, CountTrainings.interrupt_at = 0, 3
        with pytest.raises(KeyboardInterrupt):
            trainer_in(folder).train_ensemble(k=3, fraction=fraction)
        CountTrainings.trainings, CountTrainings.interrupt_at = 0, None
        resumed = trainer_in(folder).train_ensemble(k=3, fraction=fraction)
        assert CountTrainings.trainings == 1
        larger = trainer_in(folder).train_ensemble(k=4, fraction=fraction)
        assert CountTrainings.trainings == 2
        assert weights_of(larger)[:3] == weights_of(resumed)
        again = trainer_in(folder).train_ensemble(k=3, fraction=fraction)
        assert CountTrainings.trainings == 2
        assert again.checkpoints == resumed.checkpoints
        assert (weights_of(larger) == whole) is (already == 2)


def test_given_subsets_are_trained_on(tmp_path):
    subsets = Subsets.stratified(points()["labels"], 3, 0.4)
    ensemble = trainer_in(tmp_path).train_ensemble(subsets=subsets)
    np.testing.assert_array_equal(ensemble.subsets.masks, subsets.masks)


def test_it_needs_no_queries(tmp_path):
    trainer = trainer_in(tmp_path, trainer_settings={"eval_dataset": None})
    assert len(trainer.train_ensemble(k=1)) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "0 subsets"),
        ({"k": 0, "fraction": 1.0}, "seeds must be at least 1"),
        ({"fraction": 0.0}, "keeps 0 of 24"),
        ({"fraction": 1.5}, "keeps 36 of 24"),
        ({"subsets": Subsets.random(10, 2)}, "of 10 examples and the training dataset has 24"),
    ],
)
def test_bad_requests_are_refused_before_training(tmp_path, settings, message):
    with pytest.raises((ValueError, MismatchError), match=message):
        trainer_in(tmp_path).train_ensemble(**settings)
    assert CountTrainings.trainings == 0


def test_a_folder_of_another_training_is_refused(tmp_path):
    trainer_in(tmp_path).train_ensemble(k=1, output_dir=tmp_path / "models")
    CountTrainings.trainings = 0
    with pytest.raises(MismatchError, match=r"arguments\.learning_rate: 0\.1 → 0\.2"):
        trainer_in(tmp_path, learning_rate=0.2).train_ensemble(k=1, output_dir=tmp_path / "models")
    with pytest.raises(MismatchError, match=r"subsets\.fraction: 0\.5 → 1\.0"):
        trainer_in(tmp_path).train_ensemble(k=1, fraction=1.0, output_dir=tmp_path / "models")
    assert CountTrainings.trainings == 0


def test_a_model_that_diverges_is_named(tmp_path):
    with pytest.raises(NonFiniteError, match="after training on subset 0 with seed 0"):
        trainer_in(tmp_path, learning_rate=3e38, max_grad_norm=0).train_ensemble(k=1)


# Kept checkpoints of retrainings


def test_the_kept_models_of_retrainings_are_an_ensemble(tmp_path):
    trainer = trainer_in(tmp_path)
    truth = trainer.retrain(num_subsets=4, seeds=2, output_dir=tmp_path / "runs", keep_checkpoints=True)
    everything = Ensemble.from_retraining(tmp_path / "runs")
    assert [folder.name for folder in everything.checkpoints] == [f"{m:05d}-{r}" for r in (0, 1) for m in range(4)]
    np.testing.assert_array_equal(everything.subsets.masks, np.tile(truth.subsets.masks, (2, 1)))
    two = Ensemble.from_retraining(tmp_path / "runs", num_models=2)
    assert two.used_subsets() == truth.subsets.keys()[:2]
    assert two.provenance["fingerprints"]["train"] == truth.provenance["fingerprints"]["train"]
    assert 0 < two.provenance["seconds"] < everything.provenance["seconds"]
    with pytest.raises(ValueError, match="holds 8 trained models, not 9"):
        Ensemble.from_retraining(tmp_path / "runs", num_models=9)


def test_subsets_that_were_added_belong_to_their_models(tmp_path):
    trainer, settings = trainer_in(tmp_path), {"output_dir": tmp_path / "runs", "keep_checkpoints": True}
    trainer.retrain(num_subsets=1, **settings)
    truth = trainer.retrain(num_subsets=3, **settings)
    trainer.retrain(num_subsets=2, **settings)
    assert Ensemble.from_retraining(tmp_path / "runs").used_subsets() == truth.subsets.keys()


def test_a_folder_without_models_is_refused(tmp_path):
    trainer_in(tmp_path).retrain(num_subsets=1, output_dir=tmp_path / "runs")
    with pytest.raises(ValueError, match="holds 0 trained models, not 1: retrain with keep_checkpoints=True"):
        Ensemble.from_retraining(tmp_path / "runs")
    trainer_in(tmp_path).retrain(num_subsets=1, output_dir=tmp_path / "runs", keep_checkpoints=True)
    (tmp_path / "runs" / "manifest.json").unlink()
    with pytest.raises(ArtefactError, match=r"manifest\.json cannot be read"):
        Ensemble.from_retraining(tmp_path / "runs")


# The artefact


def test_it_is_saved_and_loaded(tmp_path):
    ensemble = trainer_in(tmp_path).train_ensemble(k=2)
    ensemble.save(tmp_path / "ensemble.safetensors")
    again = Ensemble.load(tmp_path / "ensemble.safetensors")
    assert again.checkpoints == ensemble.checkpoints
    assert again.fingerprint == ensemble.fingerprint
    with pytest.raises(ArtefactError, match="holds ensemble, not scores"):
        Scores.load(tmp_path / "ensemble.safetensors")
    with pytest.raises(ValueError, match="2 checkpoints and 1 subsets"):
        dataclasses.replace(ensemble, subsets=ensemble.subsets.select([0]))


# Attribution


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    trainer = trainer_in(tmp_path_factory.mktemp("trained"))
    trainer.train()
    return trainer, trainer.train_ensemble(k=2)


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_scores_are_those_of_the_folders_of_weights(trained, method):
    trainer, ensemble = trained
    by_ensemble = trainer.attribute(method=method, checkpoints=ensemble)
    by_folders = trainer.attribute(method=method, checkpoints=[str(folder) for folder in ensemble.checkpoints])
    by_models = attribute(
        trainer.model,
        trainer.train_dataset,
        trainer.eval_dataset,
        method=method,
        checkpoints=[loaded(folder) for folder in ensemble.checkpoints],
    )
    np.testing.assert_array_equal(by_ensemble.values, by_folders.values)
    np.testing.assert_allclose(by_ensemble.values, by_models.values, atol=1e-6)
    by_one = trainer.attribute(method=method, checkpoints=ensemble.checkpoints[:1])
    assert not np.allclose(by_one.values, by_ensemble.values, atol=1e-3)


def test_scores_say_which_weights_and_subsets_fed_them(trained):
    trainer, ensemble = trained
    own = trainer.attribute(method="trak").provenance
    assert own["weights"] == [own["fingerprints"]["model"]] == [weights_fingerprint(trainer.model)]
    assert "used_subsets" not in own
    found = trainer.attribute(method="trak", checkpoints=ensemble).provenance
    assert found["weights"] == weights_of(ensemble)
    assert found["fingerprints"]["model"] == fingerprint(found["weights"])
    assert found["checkpoints"] == [str(folder) for folder in ensemble.checkpoints]
    assert found["used_subsets"] == ensemble.subsets.keys()


def test_scoring_on_the_subsets_that_fed_a_method_is_refused(tmp_path):
    trainer = trainer_in(tmp_path)
    truth = trainer.retrain(num_subsets=8, output_dir=tmp_path / "runs", keep_checkpoints=True)
    kept = Ensemble.from_retraining(tmp_path / "runs", num_models=2)
    scores = trainer.attribute(method="trak", checkpoints=kept)
    with pytest.raises(MismatchError, match=r"2 of the 8 subsets \(the first is 0\) fed trak"):
        evaluate_lds(scores, truth)
    assert np.isfinite(evaluate_lds(scores, truth.select(range(2, 8)), num_resamples=10).lds)


def test_from_one_seed_the_ensemble_has_other_subsets_than_the_truth(tmp_path):
    trainer = trainer_in(tmp_path)
    for fraction in (0.5, 1.0):
        ensemble, truth = trainer.train_ensemble(k=3, fraction=fraction), trainer.retrain(num_subsets=4)
        scores = trainer.attribute(method="grad_dot", checkpoints=ensemble)
        assert np.isfinite(evaluate_lds(scores, truth, num_resamples=10).lds)


@pytest.mark.parametrize("other", [points(seed=5), points(rows=23), points().select([1, 0, *range(2, 24)])])
def test_an_ensemble_of_other_training_data_is_refused(trained, other):
    trainer, ensemble = trained
    with pytest.raises(MismatchError, match="trained on subsets of other training data"):
        trainer.attribute(method="trak", train_dataset=other, checkpoints=ensemble)


def test_weights_that_are_gone_are_named(tmp_path):
    trainer, subsets = trainer_in(tmp_path), Subsets.random(24, 1)
    with pytest.raises(FileNotFoundError, match=r"checkpoint folder .*nowhere does not exist"):
        trainer.attribute(method="trak", checkpoints=Ensemble([tmp_path / "nowhere"], subsets))


def test_the_model_is_left_as_it_was(trained):
    trainer, ensemble = trained
    before, state = weights_fingerprint(trainer.model), torch.get_rng_state()
    trainer.attribute(method="trak", checkpoints=ensemble)
    assert weights_fingerprint(trainer.model) == before
    assert torch.equal(torch.get_rng_state(), state)
