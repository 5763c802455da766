"""Unrolled differentiation from the user's side, and recordings that break, end early, or belong to something else."""

import dataclasses
import errno
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import arguments, make_trainer, model, points
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, default_data_collator

from hf_attribution import bookmark
from hf_attribution.artefacts import read_artefact, write_artefact
from hf_attribution.attribution import attribute
from hf_attribution.counterfactuals import Counterfactuals, Subsets
from hf_attribution.errors import ArtefactError, MismatchError, UnsupportedError
from hf_attribution.evaluation import evaluate_lds
from hf_attribution.methods import SmoothedUnroll, Unroll, smoothed_unroll
from hf_attribution.numbered import ROW
from hf_attribution.replay import recorder
from hf_attribution.replay.diagnostics import random_removal
from hf_attribution.replay.recording import Recording
from hf_attribution.replay.run import RecordedRun, Replay
from hf_attribution.replay.sweep import Differentiable
from hf_attribution.retraining.weighted import SubsetWithPassengers, give_weights, weighted_class
from hf_attribution.seeds import derive_seed
from hf_attribution.tasks import Classification
from hf_attribution.trainer import AttributionTrainer

QUICK = Unroll(radius=None, chunk=4)


def trained(folder, **settings):
    trainer = make_trainer(
        AttributionTrainer,
        folder,
        model_settings={"hidden": 4, "dropout": 0.1},
        trainer_settings={"record": True, **settings.pop("trainer_settings", {})},
        **{"optim": "adamw_torch", "num_train_epochs": 3, "learning_rate": 0.01, **settings},
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"))


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_scores_from_a_trainer(finished):
    scores = finished.attribute(method=Unroll(radius=0.1, seed=1))
    assert scores.values.shape == (7, 24)
    assert scores.provenance["choices"]["product"] == "forward_over_reverse"
    found = scores.provenance["choices"]["linearity"]
    assert found["correlation"] > 0.9
    assert 0.5 < found["slope"] < 2
    assert found["second_difference"] < 1
    assert scores.provenance["choices"]["adam_epsilon"] == 1e-8


def test_trainer_and_random_state_are_left_alone(finished):
    before, state, attributes = weights_of(finished).clone(), torch.get_rng_state(), set(vars(finished))
    finished.attribute(method=QUICK)
    assert torch.equal(weights_of(finished), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(vars(finished)) == attributes
    assert finished.callback_handler.callbacks == [
        each for each in finished.callback_handler.callbacks if not isinstance(each, recorder.Recorder)
    ]


def test_scores_from_the_folder_and_a_trainer_that_never_trained(finished, tmp_path):
    fresh = make_trainer(
        AttributionTrainer, tmp_path, model_settings={"hidden": 4, "dropout": 0.1}, optim="adamw_torch"
    )
    there = fresh.attribute(method=QUICK, recording=finished.recording_dir)
    assert np.array_equal(there.values, finished.attribute(method=QUICK).values)


def test_the_sum_of_queries_is_one_sweep(finished):
    each = finished.attribute(method=QUICK).values
    total = finished.attribute(method=dataclasses.replace(QUICK, queries="sum")).values
    assert total.shape == (1, 24)
    assert np.allclose(total[0], each.sum(0), rtol=1e-3, atol=1e-6)


def grouped(folder, finished, **given):
    """The finished run's trainer, with a column of groups beside its rows."""
    data, queries = (
        rows.add_column("source", (["b", "a", "c"] * 8)[: len(rows)]).add_column("whole", [0] * len(rows))
        for rows in (points(), points(7, seed=1))
    )
    trainer = make_trainer(
        AttributionTrainer, folder, model_settings={"hidden": 4, "dropout": 0.1}, optim="adamw_torch",
        trainer_settings={"train_dataset": data},
    )  # fmt: skip
    return trainer.attribute(queries, method=dataclasses.replace(QUICK, **given), recording=finished.recording_dir)


def test_groups_are_sums_of_their_examples(finished, tmp_path, monkeypatch):
    each = finished.attribute(points(7, seed=1), method=QUICK).values
    found = grouped(tmp_path, finished, groups="source", radius=0.2)
    choices = found.provenance["choices"]
    assert choices["groups"] == ["a", "b", "c"]
    expected = np.stack([each[:, start::3].sum(1) for start in (1, 0, 2)], axis=1)
    np.testing.assert_allclose(found.values, expected, rtol=1e-3, atol=1e-5)
    assert choices["tangent_growth"] > 0
    assert choices["linearity"]["correlation"] > 0.9
    assert choices["adam_epsilon"] == 1e-8
    total = grouped(tmp_path, finished, groups="whole", queries="sum")
    assert total.values.shape == (1, 1)
    np.testing.assert_allclose(total.values[0, 0], each.sum(), rtol=1e-3)
    last = grouped(tmp_path, finished, groups="source", last=0.5).values
    monkeypatch.setattr("hf_attribution.replay.sweep.Differentiable.fitting_block", lambda self: 2)
    np.testing.assert_allclose(grouped(tmp_path, finished, groups="source", last=0.5).values, last, rtol=1e-4)
    with pytest.raises(ValueError, match=r"no column 'play'.*source"):
        grouped(tmp_path, finished, groups="play")
    with pytest.raises(MismatchError, match="3 training examples"):
        found.predict(Subsets.random(24, 2))


def test_a_random_removal_takes_whole_groups_and_a_part_of_the_last():
    weights, columns = torch.ones(10), torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2])
    for seed in range(5):
        of_groups, of_examples = random_removal(weights, columns, 0.4, seed)
        assert float(of_examples.sum()) == pytest.approx(-4)
        assert torch.equal(of_examples, of_groups[columns])
        assert ((of_groups == 0) | (of_groups == -1)).sum() >= 2
    alone = random_removal(weights, torch.arange(10), 0.3, 0)[1]
    assert sorted(alone.tolist()) == [-1.0] * 3 + [0.0] * 7


def test_what_fits_in_memory_is_taken_at_once(finished, monkeypatch):
    """AdamW: three cotangents of each query, as many while they change, and one by the gradient: 7 P, and N scores."""
    prepared = Differentiable.prepare(RecordedRun.open(finished.recording_dir, finished), Classification())
    size = sum(p.numel() for p in finished.model.parameters())
    whole = finished.attribute(method=QUICK).values
    for queries in (1, 3, 7):
        free = 4 * 4 * (7 * size + 24) * queries + 1
        monkeypatch.setattr(Differentiable, "_free_memory", lambda self, free=free: free)
        assert prepared.fitting_block() == queries
        found = finished.attribute(method=QUICK)
        assert found.provenance["choices"]["block"] == queries
        assert np.allclose(found.values, whole, rtol=1e-3, atol=1e-6)
    states = 4 * size * 4  # parameters, two moments and the gradient of a step, float32
    for free, storage in ((4 * 19 * states, "full"), (4 * 11 * states, "sqrt"), (4 * states, "tree")):
        monkeypatch.setattr(Differentiable, "_free_memory", lambda self, free=free: free)
        assert prepared.fitting_storage(torch.ones(24)) == storage
    assert found.provenance["choices"]["storage"] == "sqrt"


def test_products_at_once_are_those_that_fit(finished, monkeypatch):
    prepared = Differentiable.prepare(RecordedRun.open(finished.recording_dir, finished), Classification())
    tried = []

    def product(parameters, batch, weights, vectors):
        tried.append(len(vectors))
        return vectors, weights.expand(len(vectors), -1)  # the more at once, the better

    counted = dataclasses.replace(prepared, product=product)
    replay = prepared.replay()
    replay.load(0, prepared.run.recording.state(0))
    inputs = replay.parts(0)[0].inputs
    kept = prepared.flat.saved_bytes(replay.state()[0], inputs)
    assert kept > prepared.flat.saved_bytes(replay.state()[0], {name: rows[:1] for name, rows in inputs.items()}) > 0
    for vectors, largest in ((0.5, 1), (4.5, 4), (16.5, 16)):
        tried.clear()
        monkeypatch.setattr(Differentiable, "_free_memory", lambda self, free=int(vectors * 4 * 6 * kept): free)
        assert counted.fastest_chunk(64) <= largest == max(tried)


def test_blocks_of_queries(finished, monkeypatch):
    whole = finished.attribute(method=QUICK).values
    monkeypatch.setattr("hf_attribution.replay.sweep.Differentiable.fitting_block", lambda self: 2)
    assert np.allclose(finished.attribute(method=QUICK).values, whole, rtol=1e-3, atol=1e-6)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_unroll import reopened
from hf_attribution import bookmark
from hf_attribution.replay.sweep import Differentiable

def put_and_die(self, standing, put=bookmark.Bookmark.put, count=iter(range(10**6))):
    put(self, standing)
    if next(count) == 24:
        os.kill(os.getpid(), signal.SIGKILL)

bookmark.EVERY_SECONDS, bookmark.SHARE = 0, 1
bookmark.Bookmark.put = put_and_die
Differentiable.fitting_block = lambda self: 3
reopened(None, {folder!r}, {recording!r}, cache_dir={folder!r} + "/cache")
"""


def test_a_killed_sweep_goes_on_to_the_same_bits(finished, tmp_path, monkeypatch):
    """Killed within the second block of queries, then interrupted within the third, under another size of blocks."""
    script = KILLED.format(
        tests=str(Path(__file__).parent), folder=str(tmp_path), recording=str(finished.recording_dir)
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (file,) = (tmp_path / "cache" / "unfinished").iterdir()

    monkeypatch.setattr(bookmark, "EVERY_SECONDS", 0)
    monkeypatch.setattr(bookmark, "SHARE", 1)
    put, steps = bookmark.Bookmark.put, []

    def put_and_stop(self, standing):
        put(self, standing)
        steps.append(standing()[1]["step"])
        if len(steps) == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bookmark.Bookmark, "put", put_and_stop)
        with pytest.raises(KeyboardInterrupt):
            reopened(finished, tmp_path, cache_dir=tmp_path / "cache")
    assert steps[:2] == [10, 9]  # 25 steps back were done: the 18 of the first block, and 7 of the second
    resumed = reopened(finished, tmp_path, cache_dir=tmp_path / "cache")
    assert resumed.provenance["choices"]["block"] == 3
    assert not file.exists()
    monkeypatch.setattr(Differentiable, "fitting_block", lambda self: 3)
    whole = reopened(finished, tmp_path)
    np.testing.assert_array_equal(resumed.values, whole.values)
    assert resumed.provenance["choices"] == whole.provenance["choices"]


def test_a_bookmark_of_another_sweep_or_that_is_damaged_is_not_read(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(bookmark, "EVERY_SECONDS", 0)
    monkeypatch.setattr(bookmark.Bookmark, "remove", lambda self: None)
    whole = reopened(finished, tmp_path, cache_dir=tmp_path / "cache")
    (file,) = (tmp_path / "cache" / "unfinished").iterdir()
    other = finished.attribute(
        points(7, seed=1), method=dataclasses.replace(QUICK, last=0.5), cache_dir=tmp_path / "cache"
    )
    assert not np.allclose(other.values, whole.values)
    file.write_bytes(b"\0" * 1000)
    np.testing.assert_array_equal(reopened(finished, tmp_path, cache_dir=tmp_path / "cache").values, whole.values)


def test_gauss_newton_of_a_linear_model_is_exact(tmp_path):
    trainer = make_trainer(AttributionTrainer, tmp_path, trainer_settings={"record": True})
    trainer.train()
    exact = trainer.attribute(method=QUICK).values
    assert np.allclose(
        trainer.attribute(method=dataclasses.replace(QUICK, curvature="gauss_newton")).values,
        exact,
        rtol=1e-3,
        atol=1e-6,
    )


def test_the_mean_weight_is_where_the_derivative_is_taken(finished):
    full = finished.attribute(method=QUICK).values
    mean = finished.attribute(method=dataclasses.replace(QUICK, at="mean", fraction=0.5)).values
    assert not np.allclose(full, mean, rtol=1e-2)
    nearly = finished.attribute(method=dataclasses.replace(QUICK, at="mean", fraction=1.0)).values
    assert np.allclose(full, nearly, rtol=1e-2, atol=1e-5)


def test_settings_are_checked():
    for wrong in ({"at": "half"}, {"last": 0.0}, {"storage": "disk"}, {"chunk": 0}, {"curvature": "fisher"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Unroll(**wrong)


def test_tracin_follows_every_recorded_step(tmp_path):
    trainer = make_trainer(
        AttributionTrainer, tmp_path, model_settings={"hidden": 4, "dropout": 0.1}, num_train_epochs=3,
        trainer_settings={"record": True}, gradient_accumulation_steps=2, lr_scheduler_type="linear",
    )  # fmt: skip
    trainer.train()
    task, run = Classification(), RecordedRun.open(trainer.recording_dir, trainer)
    replay = Replay(run, task)
    replay.load(0, run.recording.state(0))
    names = ("points", "labels")
    queries, train = ({name: torch.tensor(rows[name]) for name in names} for rows in (points(7, seed=1), points()))

    def gradients(values):
        found = [torch.autograd.grad(value, replay.parameters, retain_graph=True) for value in values]
        return torch.stack([torch.cat([part.flatten() for part in each]) for each in found])

    expected = torch.zeros(7, 24)
    for number in range(len(run.recording)):
        step = run.recording.step(number)
        replay.model.eval()
        products = gradients(task.measurement(replay.model, queries)) @ gradients(-task.losses(replay.model, train)).T
        replay.model.train()
        for batch in step.batches:
            rows = torch.from_numpy(batch.rows)
            expected[:, rows] += step.rates[0] / 8 * products[:, rows]  # two micro-batches of four
        replay.advance()
    found = trainer.attribute(method="tracin_ideal")
    assert found.provenance["choices"]["steps"] == 9
    np.testing.assert_allclose(found.values, expected.numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="record=True"):
        attribute(trainer.model, points(), points(), method="tracin_ideal")


# Recordings that are interrupted


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("flushed", [True, False], ids=["interrupted", "killed"])
def test_resumed_trainings_are_recorded_whole(tmp_path, finished, monkeypatch, flushed):
    settings = {"save_strategy": "steps", "save_steps": 5}
    if not flushed:  # as if the process had been killed: nothing more is written
        monkeypatch.setattr(recorder.Recorder, "break_off", lambda self, step: None)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, trainer_settings={"callbacks": [Interrupt(13)]}, **settings)
    with pytest.raises(ArtefactError, match="of 18"):
        Recording(tmp_path / "recording").check_finished()
    again = make_trainer(
        AttributionTrainer, tmp_path, model_settings={"hidden": 4, "dropout": 0.1},
        trainer_settings={"record": True}, optim="adamw_torch", num_train_epochs=3, learning_rate=0.01, **settings,
    )  # fmt: skip
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights_of(again), weights_of(finished))
    assert np.array_equal(again.attribute(method=QUICK).values, finished.attribute(method=QUICK).values)


def test_a_resumed_training_without_a_recording_is_recorded_from_there(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 9}
    trainer = trained(tmp_path, **settings)
    shutil.rmtree(tmp_path / "recording")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    with pytest.raises(ValueError, match=r"begins at step 9 of 18: use last=0\.5"):
        trainer.attribute(method=QUICK)
    last = trainer.attribute(method=dataclasses.replace(QUICK, last=0.5)).values
    assert last.any()


def test_another_run_is_not_continued(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 9}
    trained(tmp_path, **settings)
    other = trained(tmp_path / "other", seed=1, **settings)
    other.recording_dir = tmp_path / "recording"
    with pytest.raises(MismatchError, match="another run"):
        other.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-9"))


def test_a_full_disk_ends_the_recording_and_not_the_training(tmp_path, finished, monkeypatch, caplog):
    write = recorder.write_state

    def full(folder, step, *rest):
        if step == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, step, *rest)

    monkeypatch.setattr(recorder, "write_state", full)
    trainer = trained(tmp_path)
    assert torch.equal(weights_of(trainer), weights_of(finished))
    with pytest.raises(ArtefactError, match=r"of 18 \(No space left on device\)"):
        trainer.attribute(method=QUICK)


def test_a_disk_that_is_full_from_the_start_is_refused_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(recorder.shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(OSError, match=r"cannot be recorded in .*three checkpoints .* Make room") as caught:
        trained(tmp_path, trainer_settings={"callbacks": [Interrupt(0)]})
    assert caught.value.errno == errno.ENOSPC


def test_what_checkpoints_take_is_said_before_training(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(recorder.logger, "propagate", True)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, trainer_settings={"callbacks": [Interrupt(1)]}, log_level="info")
    size = 3 * 4 * sum(p.numel() for p in model(hidden=4).parameters()) / 2**20
    said = f"a checkpoint every 4 of 18 steps, 6 of {size:.3g} MiB each, {6 * size / 2**10:.3g} GiB in all"
    assert said in caplog.text


def test_too_small_a_disk_takes_fewer_checkpoints(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    size = 3 * 4 * sum(p.numel() for p in model(hidden=4).parameters())
    monkeypatch.setattr(recorder.shutil, "disk_usage", lambda _: usage._replace(free=2 * 4 * size))
    trainer = trained(tmp_path)
    assert Recording(trainer.recording_dir).header["spacing"] == 9
    assert trainer.attribute(method=QUICK).values.any()


# Recordings of something else


def reopened(finished, folder, recording=None, cache_dir=None, **given):
    trainer = make_trainer(
        AttributionTrainer, folder, model_settings={"hidden": 4, "dropout": 0.1, **given.pop("config", {})},
        trainer_settings=given, optim="adamw_torch",
    )  # fmt: skip
    recording = recording or finished.recording_dir
    return trainer.attribute(points(7, seed=1), method=QUICK, recording=recording, cache_dir=cache_dir)


def test_other_data_are_refused(finished, tmp_path):
    with pytest.raises(MismatchError, match="other training data"):
        reopened(finished, tmp_path, train_dataset=points(seed=5))


def test_another_model_is_refused(finished, tmp_path):
    with pytest.raises(MismatchError, match=r"another model .* body\.0\.bias"):
        reopened(finished, tmp_path, config={"hidden": 5})


def test_changed_code_is_refused_at_the_first_step_that_differs(finished, tmp_path):
    trainer = make_trainer(AttributionTrainer, tmp_path, model_settings={"hidden": 4, "dropout": 0.1})
    trainer.model.body[1] = nn.Sigmoid()
    with pytest.raises(MismatchError, match="Step 0 of the recorded training comes out differently"):
        trainer.attribute(method=QUICK, recording=finished.recording_dir)


def test_a_step_that_comes_out_differently_is_named(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished.recording_dir, folder)
    (chunk,) = [path for path in (folder / "steps").iterdir() if path.stem == "00000012"]
    arrays, metadata = read_artefact(chunk, "recorded steps")
    arrays["checksums"][2] += 1
    write_artefact(chunk, "recorded steps", arrays, metadata)
    with pytest.raises(MismatchError, match=r"Step 14 of .* from step 12 on"):
        reopened(finished, tmp_path, folder)


def test_missing_and_damaged_files(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished.recording_dir, folder)
    (folder / "checkpoints" / "00000008.safetensors").write_bytes(b"no")
    with pytest.raises(ArtefactError, match=r"00000008\.safetensors"):
        reopened(finished, tmp_path, folder)
    (folder / "checkpoints" / "00000018.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"00000018\.safetensors is missing"):
        reopened(finished, tmp_path, folder)
    sorted((folder / "steps").iterdir())[1].unlink()
    with pytest.raises(ArtefactError, match="lacks steps 4 to 7"):
        reopened(finished, tmp_path, folder)
    header = json.loads((folder / "recording.json").read_text())
    (folder / "recording.json").write_text(json.dumps({**header, "schema_version": 99}))
    with pytest.raises(ArtefactError, match="newer"):
        reopened(finished, tmp_path, folder)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="train with record=True"):
        reopened(finished, tmp_path, folder)


def test_without_a_recording(finished):
    with pytest.raises(ValueError, match="record=True"):
        attribute(finished.model, points(), points(), method="unroll")


# Trainings that are refused before they start


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bf16": True}, "bf16"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}, "reduce_lr_on_plateau"),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}, "load_best_model"),
        ({"optim": "adafactor"}, "Adafactor"),
        ({"neftune_noise_alpha": 1.0}, "neftune"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
    ],
)
def test_refused_settings(tmp_path, settings, message):
    with pytest.raises(UnsupportedError, match=message):
        trained(tmp_path, **settings)
    assert not (tmp_path / "recording").exists()


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("fp16", True, "scales the loss and skips steps"),
        ("lr_scheduler_type", "greedy", "'greedy' follows evaluations"),
        ("torch_compile", True, "torch_compile"),
        ("use_liger_kernel", True, "use_liger_kernel"),
        ("_n_gpu", 2, "2 GPUs"),
    ],
)
def test_settings_that_need_other_machines_are_refused_before_training(tmp_path, setting, value, message):
    trainer = make_trainer(
        AttributionTrainer, tmp_path, trainer_settings={"record": True, "callbacks": [Interrupt(0)]}
    )
    setattr(trainer.args, setting, value)
    with pytest.raises(UnsupportedError, match=message):
        trainer.train()


def test_rows_without_names_and_streams_are_refused_before_training(tmp_path):
    class Tuples(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, row):
            return [0.0] * 3, 0

    for data, message in ((Tuples(), "rows must be dicts"), (points().to_iterable_dataset(), "map-style")):
        with pytest.raises((UnsupportedError, TypeError, ValueError), match=message):
            trained(tmp_path, trainer_settings={"train_dataset": data}, max_steps=2)
        assert not (tmp_path / "recording").exists()


def test_refused_optimisers(tmp_path):
    class WithAmsgrad(AttributionTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.Adam(self.model.parameters(), amsgrad=True)
            return self.optimizer

    with pytest.raises(UnsupportedError, match="amsgrad"):
        make_trainer(WithAmsgrad, tmp_path, trainer_settings={"record": True}).train()


def test_refused_models_and_callbacks(tmp_path):
    with pytest.raises(UnsupportedError, match=r"body\.0 \(BatchNorm1d\)"):
        make_trainer(
            AttributionTrainer, tmp_path, model_settings={"norm": "batch"}, trainer_settings={"record": True}
        ).train()
    with pytest.raises(UnsupportedError, match="EarlyStoppingCallback"):
        trained(tmp_path, trainer_settings={"callbacks": [EarlyStoppingCallback()]})
    with pytest.raises(UnsupportedError, match="float32"):
        make_trainer(
            AttributionTrainer, tmp_path, trainer_settings={"record": True, "model": model().bfloat16()}
        ).train()


class Contrastive(Classification):
    def losses(self, model, batch):
        losses = super().losses(model, batch)
        return losses - 0.1 * losses.mean()


def test_losses_that_mix_examples_or_are_others(tmp_path):
    trainer = make_trainer(AttributionTrainer, tmp_path, trainer_settings={"record": True}, label_smoothing_factor=0.2)
    trainer.train()
    assert trainer.attribute(method=QUICK).values.any()  # the task is told of the smoothing
    with pytest.raises(UnsupportedError, match="did not follow the gradient"):
        trainer.attribute(method=QUICK, task=Classification())

    class Mixing(AttributionTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return Contrastive().losses(model, inputs).mean()

    trainer = make_trainer(Mixing, tmp_path, trainer_settings={"record": True})
    trainer.train()
    with pytest.raises(UnsupportedError, match="depends on the other examples"):
        trainer.attribute(method=QUICK, task=Contrastive())


# Data that draw random numbers


class NoisyCollator:
    """Draws from all three generators."""

    def __call__(self, rows):
        values = torch.tensor([row["points"] for row in rows])
        noise = torch.rand(values.shape) + float(np.random.rand()) + __import__("random").random()  # noqa: NPY002
        return {"points": values + 0.1 * noise, "labels": torch.tensor([row["labels"] for row in rows])}


def test_random_collators_are_repeated(tmp_path):
    trainer = trained(tmp_path, trainer_settings={"data_collator": NoisyCollator()})
    plain = make_trainer(
        Trainer, tmp_path / "plain", model_settings={"hidden": 4, "dropout": 0.1}, optim="adamw_torch",
        num_train_epochs=3, learning_rate=0.01, trainer_settings={"data_collator": NoisyCollator()},
    )  # fmt: skip
    plain.train()
    assert torch.equal(weights_of(trainer), weights_of(plain))
    run = RecordedRun.open(trainer.recording_dir, trainer)
    replay = Replay(run, Classification())
    replay.load(0, run.recording.state(0))
    for _ in range(18):
        replay.advance()  # compares checksums
    with pytest.raises(UnsupportedError, match="dataloader_num_workers=0"):
        trained(tmp_path / "workers", trainer_settings={"data_collator": NoisyCollator()}, dataloader_num_workers=1)


def test_orders_by_length(tmp_path):
    given = {
        "train_dataset": points().add_column("length", [7 * row % 24 for row in range(24)]),
        "data_collator": lambda rows: default_data_collator(
            [{k: row[k] for k in ("points", "labels")} for row in rows]
        ),
    }
    settings = {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
    trainer = trained(tmp_path / "a", trainer_settings=given, **settings)
    plain = make_trainer(
        Trainer, tmp_path / "b", model_settings={"hidden": 4, "dropout": 0.1}, optim="adamw_torch",
        num_train_epochs=3, learning_rate=0.01, trainer_settings=given, **settings,
    )  # fmt: skip
    plain.train()
    assert torch.equal(weights_of(trainer), weights_of(plain))


def test_arguments_reach_the_constructor(tmp_path):
    trainer = AttributionTrainer(model=model(), args=arguments(tmp_path), record=tmp_path / "there")
    assert trainer.recording_dir == tmp_path / "there"
    assert "record" not in trainer._recipe.named


# Averages over masked runs


def count_trainings(folder):
    return len(list(folder.rglob("found/*.safetensors")))


@pytest.mark.parametrize("masks", ["random", "antithetic", "stratified"])
def test_smoothed_scores(tmp_path, masks):
    trainer = make_trainer(AttributionTrainer, tmp_path, model_settings={"hidden": 4})
    before = weights_of(trainer).clone()
    two = trainer.attribute(method=SmoothedUnroll(runs=2, masks=masks, shrink=False))
    four = trainer.attribute(method=SmoothedUnroll(runs=4, masks=masks, shrink=False))
    assert torch.equal(weights_of(trainer), before)
    assert count_trainings(tmp_path) == 4  # two of them are those of before
    assert not list(tmp_path.rglob("recording"))
    found = sorted(tmp_path.rglob("found/*.safetensors"))
    runs = np.stack([read_artefact(path, "derivatives of a run")[0]["values"] for path in found])
    steepness = np.linalg.norm(runs, axis=2).mean(1)[:, None, None]
    for scores, some in ((two, slice(2)), (four, slice(4))):
        scaled = runs[some] / steepness[some] / (1 / steepness[some]).mean()
        assert np.allclose(scaled.mean(0), scores.values, atol=1e-6)
    assert not np.allclose(runs[0], runs[1], rtol=0.1)
    assert runs.any(axis=1).all()  # examples of weight 0 have derivatives, too
    choices = four.provenance["choices"]
    error = (scaled.std(0, ddof=1) / 2) ** 2
    assert choices["standard_error"] == pytest.approx(float(np.sqrt(error.mean())), rel=1e-3)
    assert len(four.provenance["used_subsets"]) == 4
    kept = Counterfactuals.load(choices["counterfactuals"])
    assert kept.outputs.shape == (4, 1, 7)
    with pytest.raises(ValueError, match="subset"):
        evaluate_lds(four, kept)


def test_masks_alone_are_derivatives_of_the_fixed_training(tmp_path):
    """The removal of one more example from a masked run, against a real training without it."""
    trainer = make_trainer(AttributionTrainer, tmp_path, model_settings={"hidden": 4}, learning_rate=0.01)
    scores = trainer.attribute(method=SmoothedUnroll(runs=1, vary="masks"))
    seed = derive_seed(0, "run", 0)
    mask = Subsets.random(24, 1, 0.5, derive_seed(0, "smoothed_unroll", "subsets")).masks[0]
    outputs = []
    for row in (None, *np.flatnonzero(mask)[:3]):
        weights = torch.from_numpy(mask.astype(np.float32))
        if row is not None:
            weights[row] = 0
        weighted = make_trainer(
            weighted_class(AttributionTrainer), tmp_path / "w", model_settings={"hidden": 4}, learning_rate=0.01,
            seed=seed, data_seed=seed,
        )  # fmt: skip
        give_weights(weighted, weights, Classification())
        weighted.train()
        with torch.no_grad():
            batch = {name: torch.tensor(points(7, seed=1)[name]) for name in ("points", "labels")}
            outputs.append(Classification().measurement(weighted.model.eval(), batch))
    for number, row in enumerate(np.flatnonzero(mask)[:3], 1):
        actual = (outputs[0] - outputs[number]).numpy()
        assert np.linalg.norm(actual - scores.values[:, row]) < 0.05 * np.linalg.norm(actual)


def test_averages_are_shrunk_by_as_much_as_they_are_noisy():
    generator = np.random.default_rng(0)
    towards, truth = (generator.normal(size=(5, 4000)) for _ in range(2))
    truth, variance = 0.7 * towards + truth, np.array([0.0, 0.5, 1.0, 4.0, 1e6])
    mean = truth + np.sqrt(variance)[:, None] * generator.normal(size=truth.shape)
    found, taken = smoothed_unroll._shrunk(mean, variance, 3 * towards)
    assert np.allclose(found[0], truth[0])
    distances = [((each - truth) ** 2).mean(1)[1:4] for each in (found, mean, 0.7 * towards)]
    assert np.allclose(distances[0], variance[1:4] / (1 + variance[1:4]), rtol=0.1)  # the least that is possible
    assert (distances[0] < np.minimum(*distances[1:])).all()
    assert taken == pytest.approx(0.5, abs=0.05)


def test_shrinkage_is_towards_influence_functions_of_the_same_runs(tmp_path):
    trainer = make_trainer(AttributionTrainer, tmp_path, model_settings={"hidden": 4})
    scores = trainer.attribute(method=SmoothedUnroll(runs=3))
    plain = trainer.attribute(method=SmoothedUnroll(runs=3, shrink=False), recording=tmp_path / "plain")
    run = read_artefact(sorted(tmp_path.rglob("retraining-*/found/*.safetensors"))[0], "derivatives of a run")[0]
    assert run["influence"].shape == (7, 24)
    assert 0 < scores.provenance["choices"]["shrinkage"] <= 1
    assert not np.allclose(scores.values, plain.values, rtol=1e-2)
    assert plain.provenance["choices"]["shrinkage"] is None


def test_masked_runs_train_like_retrainings_on_their_subsets(tmp_path):
    """Passengers of weight 0 change no weight, and every one of them is in a batch once an epoch."""
    trainer = make_trainer(AttributionTrainer, tmp_path, model_settings={"hidden": 4}, gradient_accumulation_steps=2)
    subsets = Subsets.random(24, 3, 0.5, seed=5)
    runs = {
        protocol: trainer.retrain(points(7, seed=1), protocol=protocol, subsets=subsets, seed=3)
        for protocol in ("resampled", "masked")
    }
    assert np.allclose(runs["masked"].outputs, runs["resampled"].outputs, atol=1e-5)
    for fraction in (0.2, 0.7):
        rows = SubsetWithPassengers(points(), Subsets.random(24, 1, fraction, seed=5).masks[0], seed=0)
        batches = [rows.__getitems__(range(len(rows))[start:][:4]) for start in range(0, len(rows), 4)]
        assert sorted(row[ROW] for batch in batches for row in batch) == list(range(24))


def test_smoothed_settings():
    for wrong in ({"runs": 0}, {"fraction": 1.0}, {"vary": "seeds"}, {"masks": "even"}, {"last": 2.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SmoothedUnroll(**wrong)
    with pytest.raises(ValueError, match="antithetic"):
        SmoothedUnroll(masks="antithetic", fraction=0.3)
    with pytest.raises(ValueError, match="AttributionTrainer"):
        attribute(model(), points(), points(), method="smoothed_unroll")
