"""Simfluence: what it recovers of simulated trainings, predicts of real ones, and records of these."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny import arguments, model, points
from transformers import Trainer

from hf_attribution.errors import ArtefactError, MismatchError, NonFiniteError, UnsupportedError
from hf_attribution.scores import Scores
from hf_attribution.simfluence import LossCurves, LossRun, Simfluence, fit_simfluence, record_losses
from hf_attribution.subsets import Subsets

N, Q = 8, 3


def simulated(num_runs=12, steps=30, every=1, seed=0):
    """Trainings of a known simulator, whose rates are all the same."""
    rng = np.random.default_rng(seed)
    a, b = -0.08 * rng.random((Q, N)), 0.05 * rng.normal(size=(Q, N))
    truth = Simfluence(a, b, np.full(Q, 2.0), np.ones(steps), {"batch_size": 2, "epochs": 3})
    runs = []
    for _ in range(num_runs):
        batches = tuple(rng.choice(N, 2, replace=False) for _ in range(steps))
        losses = truth.simulate(batches, rng.uniform(0.5, 3, Q))
        where = np.unique([*range(0, steps, every), steps])
        runs.append(LossRun(losses[where].astype(np.float32), where, batches, np.full(steps, 0.1)))
    return truth, LossCurves(tuple(runs), N)


def test_a_simulated_truth_is_recovered():
    truth, curves = simulated()
    found = fit_simfluence(curves, penalty=1e-7)
    np.testing.assert_allclose(found.multiplicative, truth.multiplicative, atol=1e-3)
    np.testing.assert_allclose(found.additive, truth.additive, atol=1e-3)
    few_points = fit_simfluence(simulated(num_runs=40, every=4)[1], penalty=1e-6)
    assert np.corrcoef(few_points.additive.ravel(), truth.additive.ravel())[0, 1] > 0.99


def test_the_fit_is_ridge_regression_of_each_query():
    _, curves = simulated(num_runs=2, steps=4)
    found = fit_simfluence(curves, penalty=0.3)
    for query in range(Q):
        before = np.concatenate([run.losses[:-1, query] for run in curves.runs]).astype(np.float64)
        change = np.concatenate([np.diff(run.losses[:, query].astype(np.float64)) for run in curves.runs])
        shares = np.zeros((len(before), N))
        for row, batch in enumerate(batch for run in curves.runs for batch in run.batches):
            shares[row, batch] = 1 / len(batch)
        scale = np.sqrt(np.mean(before**2))
        design = np.concatenate([shares * before[:, None] / scale, shares], axis=1)
        ridge = 0.3 * np.mean(np.sum(design**2, axis=1)) * np.eye(2 * N)
        expected = np.linalg.solve(design.T @ design + ridge, design.T @ (change / scale))
        np.testing.assert_allclose(found.multiplicative[query], expected[:N], atol=1e-6)
        np.testing.assert_allclose(found.additive[query], expected[N:] * scale, atol=1e-6)


def test_scores_are_the_derivatives_of_an_average_training():
    simulator, _ = simulated()

    def end(weights):
        """Minus the losses after trainings whose batches all hold the examples by these weights."""
        losses, share = simulator.initial.astype(np.float64), weights / weights.sum()
        for _ in range(-(-N // 2) * 3):
            losses = losses + (simulator.multiplicative @ share) * losses + simulator.additive @ share
        return -losses

    expected = np.empty((Q, N))
    for example in range(N):
        step = 1e-5 * np.eye(N)[example]
        expected[:, example] = (end(1 + step) - end(1 - step)) / 2e-5
    scores = simulator.scores()
    assert isinstance(scores, Scores)
    np.testing.assert_allclose(scores.values, expected, rtol=1e-4, atol=1e-6)


def test_predictions_average_over_orders_and_follow_the_subset():
    simulator, _ = simulated()
    subsets = Subsets.random(N, 6, 0.5)
    one, same = simulator.predict(subsets, seed=1), simulator.predict(subsets, seed=1)
    assert one.shape == (Q, 6)
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, simulator.predict(subsets, seed=2))
    averaged = [simulator.predict(subsets, seeds=200, seed=seed) for seed in (1, 2)]
    assert np.abs(averaged[0] - averaged[1]).max() < 0.3 * one.std(1).max()
    with pytest.raises(MismatchError, match="8 training examples"):
        simulator.predict(Subsets.random(9, 2, 0.5))


class CountRows(Trainer):
    """Notes what is trained on."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("seen", []).append(inputs["points"].clone())
        return super().compute_loss(model, inputs, *args, **kwargs)


def recorded(folder, train, queries, every=2, examples=None, num_examples=None, seed=0, **settings):
    args = arguments(folder, seed=seed, data_seed=seed, learning_rate=0.5, **settings)
    chosen = train if examples is None else train.select(examples)
    trainer = CountRows(model(hidden=4, seed=0), args, train_dataset=chosen)
    return trainer, record_losses(trainer, queries, every, examples, num_examples)


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"max_steps": 4}])
def test_batches_and_losses_are_those_of_the_training(settings, tmp_path):
    train, queries = points(10), points(5, seed=1)
    rows = np.array([7, 3, 1, 0, 9, 4, 2])
    trainer, curves = recorded(tmp_path, train, queries, 3, rows, len(train), **settings)
    (run,) = curves.runs
    assert len(run.batches) == trainer.state.global_step == run.measured[-1]
    assert run.measured[:-1].tolist() == [step for step in range(trainer.state.global_step) if step % 3 == 0]
    inputs = torch.tensor(train["points"])
    assert torch.equal(torch.cat(trainer.seen), inputs[np.concatenate(run.batches)])
    assert set(np.concatenate(run.batches)) <= set(rows.tolist())
    with torch.no_grad():
        logits = trainer.model.eval()(torch.tensor(queries["points"])).logits
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(queries["labels"]), reduction="none")
    np.testing.assert_allclose(run.losses[-1], expected, rtol=1e-5)
    # A linear schedule from .5.
    np.testing.assert_allclose(run.rates, 0.5 * (1 - np.arange(len(run.rates)) / len(run.rates)))
    assert type(trainer.train_dataset).__name__ == "Dataset"
    assert [type(c).__name__ for c in trainer.callback_handler.callbacks].count("_Recorder") == 0


def test_recording_does_not_change_the_training(tmp_path):
    train = points(10)
    trainer, _ = recorded(tmp_path, train, points(5, seed=1), seed=3)
    plain = Trainer(
        model(hidden=4, seed=0), arguments(tmp_path, seed=3, data_seed=3, learning_rate=0.5), train_dataset=train
    )
    plain.train()
    for ours, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_real_trainings_are_predicted_better_than_by_a_constant(tmp_path):
    train, queries = points(16), points(10, seed=1)
    subsets = Subsets.random(len(train), 40, 0.5, seed=0)
    curves = LossCurves.concatenate(
        [
            recorded(tmp_path, train, queries, 1, np.flatnonzero(mask), len(train), number, num_train_epochs=4)[1]
            for number, mask in enumerate(subsets.masks)
        ]
    )
    simulator = fit_simfluence(curves.select(range(32)))
    ends = -np.stack([run.losses[-1] for run in curves.runs]).T
    predicted = simulator.predict(subsets.select(range(32, 40)), seeds=5)
    errors = np.square(predicted - ends[:, 32:]).mean()
    constant = np.square(ends[:, :32].mean(1, keepdims=True) - ends[:, 32:]).mean()
    assert errors < 0.7 * constant
    assert simulator.scores().values.shape == (10, 16)


def test_curves_and_simulators_are_kept_in_files(tmp_path):
    _, curves = simulated(num_runs=3, every=4)
    curves.save(tmp_path / "curves.safetensors")
    loaded = LossCurves.load(tmp_path / "curves.safetensors")
    assert loaded.fingerprint == curves.fingerprint
    assert [len(run.batches) for run in loaded.runs] == [30] * 3
    simulator = fit_simfluence(loaded)
    simulator.save(tmp_path / "simulator.safetensors")
    again = Simfluence.load(tmp_path / "simulator.safetensors")
    np.testing.assert_array_equal(again.predict(Subsets.random(N, 2)), simulator.predict(Subsets.random(N, 2)))
    with pytest.raises(ArtefactError, match="simfluence"):
        LossCurves.load(tmp_path / "simulator.safetensors")


def test_bad_input_is_named(tmp_path):
    _, curves = simulated(num_runs=2)
    run = curves.runs[0]
    with pytest.raises(ValueError, match="leaves trainings out"):
        fit_simfluence(curves.select([0]))
    with pytest.raises(ValueError, match="penalty must be positive"):
        fit_simfluence(curves, penalty=0.0)
    with pytest.raises(MismatchError, match=r"saw example 7.*examples="):
        LossCurves((run,), 7)
    with pytest.raises(NonFiniteError, match="query 0 in training 0"):
        LossCurves((run._replace(losses=np.full_like(run.losses, np.nan)),), N)
    with pytest.raises(MismatchError, match="cannot be joined"):
        LossCurves.concatenate([curves, dataclasses.replace(curves, num_examples=N + 1)])
    with pytest.raises(ValueError, match="need a training"):
        LossCurves((), N)
    with pytest.raises(ValueError, match="every must be"):
        recorded(tmp_path, points(6), points(2), every=0)
    with pytest.raises(ValueError, match=r"3 examples= for 6 rows"):
        record_losses(Trainer(model(), arguments(tmp_path), train_dataset=points(6)), points(2), 1, np.arange(3))
    with pytest.raises(UnsupportedError, match="dataloader_num_workers"):
        recorded(tmp_path, points(6), points(2), dataloader_num_workers=1)
