"""Retraining by several processes: workers, shards, and one training by all processes of a launch."""

import errno
import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import make_trainer, points
from transformers import Trainer, TrainerCallback
from transformers.integrations import integration_utils

from hf_attribution.counterfactuals import Counterfactuals, Subsets
from hf_attribution.errors import MismatchError, UnfinishedError, UnsupportedError
from hf_attribution.methods import SmoothedUnroll
from hf_attribution.retraining import Request, make_plan, parcels, workers
from hf_attribution.retraining.worklist import Run
from hf_attribution.trainer import AttributionTrainer

ROOT = Path(__file__).parents[1]


class Deadly(TrainerCallback):
    """Kills the process in the middle of a training, as often as there are lives in a folder."""

    def __init__(self, folder, how=signal.SIGKILL):
        self.folder, self.how = folder, how

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and os.environ.get("OMP_NUM_THREADS") == "1" and _takes_a_life(self.folder):
            os.kill(os.getpid(), self.how)


def _takes_a_life(folder):
    for life in sorted(folder.glob("life*")):
        try:
            life.unlink()
        except FileNotFoundError:  # another one took it
            continue
        return True
    return False


class Failing(TrainerCallback):
    """Fails in every process but the one that made it."""

    def __init__(self, error):
        self.error, self.home = error, os.getpid()

    def on_train_begin(self, args, state, control, **kwargs):
        if os.getpid() != self.home:
            raise self.error


class Slow(TrainerCallback):
    """Leaves work for the others."""

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.05)


def trainer_in(folder, callbacks=(), trainer_class=AttributionTrainer, **settings):
    return make_trainer(
        trainer_class,
        folder,
        model_settings={"hidden": 4, "dropout": 0.2},
        trainer_settings={"callbacks": list(callbacks)},
        **settings,
    )


def only_others(monkeypatch):
    """The process that starts the workers waits, as it does where there are several GPUs."""
    monkeypatch.setattr(workers.Crew, "takes_part", property(lambda crew: False, lambda crew, value: None), False)


# Shards


def test_shards_do_their_share_and_the_last_one_collects(tmp_path):
    whole = trainer_in(tmp_path / "whole").retrain(num_subsets=3, seeds=2)
    folder = tmp_path / "shared"
    for shard, missing in (("1/3", 4), ("2/3", 2)):
        with pytest.raises(UnfinishedError, match=rf"shard {shard} are done; {missing} of 6 of other shards"):
            trainer_in(tmp_path).retrain(num_subsets=3, seeds=2, output_dir=folder, shard=shard)
        assert len(list((folder / "runs").iterdir())) == 6 - missing
    last = trainer_in(tmp_path).retrain(num_subsets=3, seeds=2, output_dir=folder, shard="3/3")
    assert last.fingerprint == whole.fingerprint
    again = trainer_in(tmp_path).retrain(num_subsets=3, seeds=2, output_dir=folder, shard="1/3")
    assert again.fingerprint == whole.fingerprint


def test_an_ensemble_is_trained_in_shards(tmp_path):
    with pytest.raises(UnfinishedError):
        trainer_in(tmp_path).train_ensemble(2, output_dir=tmp_path / "e", shard="2/2")
    assert len(trainer_in(tmp_path).train_ensemble(2, output_dir=tmp_path / "e", shard="1/2")) == 2


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "a/b", "-1/3", "1/0"])
def test_what_is_no_shard_is_refused(tmp_path, shard):
    with pytest.raises(ValueError, match=r"shard must be '1/16', ..., '16/16'.*SLURM_ARRAY_TASK_ID"):
        trainer_in(tmp_path).retrain(num_subsets=2, shard=shard)
    assert not list(tmp_path.glob("retraining-*"))


# What is refused, and what is found out before anything is trained


@pytest.mark.parametrize("number", [0, -1, "dask", 1.5])
def test_what_is_no_number_of_workers_is_refused(tmp_path, number):
    with pytest.raises(ValueError, match="workers must be a number of at least 1, or 'ray'"):
        trainer_in(tmp_path).retrain(num_subsets=2, workers=number)


def test_what_cannot_be_sent_is_named(tmp_path):
    lock = threading.Lock()
    trainer = trainer_in(tmp_path)
    trainer._recipe.named["compute_metrics"] = lambda prediction: lock
    with pytest.raises(UnsupportedError, match=r"Workers need the compute_metrics \(function\), which cannot be pick"):
        trainer.retrain(num_subsets=2, workers=2)
    assert trainer.retrain(num_subsets=2).outputs.shape == (2, 1, 7)


def test_the_parcel_holds_neither_the_trained_model_nor_the_queries(tmp_path):
    trainer = trainer_in(tmp_path)
    trainer.model.weight_of_the_parcel = torch.zeros(10**6)
    plan = trainer_plan(trainer)
    assert len(parcels.pack(plan, [Run(0, 0)], 1)) < 10**6


def trainer_plan(trainer, **settings):
    return make_plan(trainer, trainer._recipe, Request(trainer.eval_dataset, Subsets.random(24, 2), **settings))


def test_a_worker_with_other_versions_is_refused(tmp_path):
    plan = trainer_plan(trainer_in(tmp_path))
    plan.manifest["versions"]["torch"] = "1.0"
    packed = parcels.pack(plan, [Run(0, 0)], 1)
    with pytest.raises(MismatchError, match=r"A worker has torch .* instead of 1\.0: install the same versions"):
        parcels.unpack(packed)


def test_results_of_other_versions_are_not_mixed(tmp_path):
    trainer_in(tmp_path).retrain(num_subsets=1, output_dir=tmp_path / "runs")
    manifest = json.loads((tmp_path / "runs" / "manifest.json").read_text())
    manifest["versions"]["torch"] = "1.0"
    (tmp_path / "runs" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MismatchError, match=r"versions\.torch: 1\.0 → "):
        trainer_in(tmp_path).retrain(num_subsets=1, output_dir=tmp_path / "runs")


class WithOption(AttributionTrainer):
    def __init__(self, *args, scale=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = scale

    def compute_loss(self, *args, **kwargs):
        return self.scale * super().compute_loss(*args, **kwargs)


def test_arguments_of_a_trainer_s_own_decide_the_folder(tmp_path):
    trainers = [make_trainer(WithOption, tmp_path, trainer_settings={"scale": scale}) for scale in (1.0, 2.0)]
    trainers[0].retrain(num_subsets=1, output_dir=tmp_path / "runs")
    with pytest.raises(MismatchError, match=r"trainer_arguments\.scale: 1\.0 → 2\.0"):
        trainers[1].retrain(num_subsets=1, output_dir=tmp_path / "runs")


def test_the_environment_of_a_launch_is_taken_out():
    kept = {"PATH": "x", "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "1", "RANKING": "1"}
    launched = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"), "0")
    accelerated = dict.fromkeys(("ACCELERATE_USE_FSDP", "FSDP_VERSION", "ACCELERATE_DEEPSPEED_ZERO_STAGE"), "1")
    environment = {**kept, **launched, **accelerated}
    workers.clean_environment(environment)
    assert environment == kept


def test_each_worker_sees_one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = SimpleNamespace(use_cpu=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert workers._devices(args) == ["4", "6"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert workers._devices(args) == ["0", "1", "2"]
    assert workers._devices(SimpleNamespace(use_cpu=True)) == []


def test_a_worker_of_a_process_of_a_launch_sees_the_gpu_of_that_process():
    crew = object.__new__(workers.Crew)
    crew._devices, crew._place, crew.threads = ["4", "6"], 1, 1
    assert [crew._environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["6", "4"]


# Workers


@pytest.mark.distributed
def test_workers_that_are_killed_cost_their_training_and_nothing_else(tmp_path, monkeypatch, caplog):
    """Two of three workers die in mid-training; the artefact is that of one process, bit for bit."""
    settings = {"num_subsets": 4, "seeds": 2, "keep_checkpoints": True}
    whole = trainer_in(tmp_path / "whole").retrain(**settings)
    for number in range(2):
        (tmp_path / f"life{number}").touch()
    only_others(monkeypatch)
    folder, trainer = tmp_path / "crew", trainer_in(tmp_path, [Deadly(tmp_path)])
    monkeypatch.setenv("RANK", "1")  # a worker that took this for a launch would wait for rank 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    shared = trainer.retrain(**settings, output_dir=folder, workers=2)
    assert not list(tmp_path.glob("life*"))
    np.testing.assert_array_equal(shared.outputs, whole.outputs)
    assert shared.subsets.fingerprint == whole.subsets.fingerprint
    assert not list((folder / "work").iterdir())
    assert len(list((folder / "runs").glob("*/model.safetensors"))) == 8


@pytest.mark.distributed
def test_an_error_in_a_worker_reaches_the_user_with_its_traceback(tmp_path, monkeypatch):
    only_others(monkeypatch)
    error = OSError(errno.ENOSPC, "No space left on device")
    trainer = trainer_in(tmp_path, [Failing(error)])
    with pytest.raises(OSError, match="No space left on device") as caught:
        trainer.retrain(num_subsets=1, workers=2)
    assert caught.value.errno == errno.ENOSPC
    assert "in on_train_begin" in str(caught.value.__cause__)


def test_workers_that_die_again_and_again_are_given_up(tmp_path, monkeypatch, caplog):
    only_others(monkeypatch)
    monkeypatch.setattr(workers, "_WORKER", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(RuntimeError, match=r"killed by SIGKILL before its first training, as 2 before it.*are kept"):
        trainer_in(tmp_path).retrain(num_subsets=1, workers=2)
    assert "1 trainings are left for 2 workers: 1 of them start" in caplog.text
    assert caplog.text.count("another one takes its place") == 2


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
from tiny import make_trainer
from hf_attribution import AttributionTrainer
from transformers import TrainerCallback

class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        import time
        time.sleep(0.05)

class Mine(AttributionTrainer):  # in the main script, without `if __name__ == "__main__"`
    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs)

torch.set_num_threads(1)
trainer = make_trainer(Mine, {folder!r}, trainer_settings={{"callbacks": [Slow()]}})
truth = trainer.retrain(num_subsets=12, output_dir={folder!r} + "/runs", workers={workers})
truth.save({folder!r} + "/truth.safetensors")
"""


def run_script(folder, workers=1):
    text = SCRIPT.format(tests=str(ROOT / "tests"), folder=str(folder), workers=workers)
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, str(folder / "script.py")], env=environment, stderr=subprocess.PIPE)


@pytest.mark.distributed
def test_a_script_killed_at_any_moment_is_resumed_by_any_runner(tmp_path):
    """SIGKILL of the whole script at random moments, its workers end with it; the bits are those of one sitting."""
    whole = run_script(tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read().decode()
    generator, folder = np.random.default_rng(), tmp_path / "parts"
    for number_of_workers in (1, 2):
        process = run_script(folder, number_of_workers)
        done = len(list(folder.glob("runs/runs/*")))
        while process.poll() is None and len(list(folder.glob("runs/runs/*"))) < done + 2:
            time.sleep(0.05)
        time.sleep(generator.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 30
    while _processes_of(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _processes_of(folder)  # no worker outlives the script that started it
    last = run_script(folder)
    assert last.wait() == 0, last.stderr.read().decode()
    one, other = (Counterfactuals.load(tmp_path / name / "truth.safetensors") for name in ("whole", "parts"))
    assert one.fingerprint == other.fingerprint


def _processes_of(folder):
    """Processes of this machine whose path of imports names a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(folder).encode() in process.read_bytes():
                found.append(process)
        except OSError:
            continue
    return found


@pytest.mark.distributed
def test_smoothed_unroll_by_workers_is_that_of_one_process(tmp_path):
    method = SmoothedUnroll(runs=3)
    scores = [
        trainer_in(tmp_path / str(number), [Slow()]).attribute(points(2, seed=1), method, workers=number)
        for number in (1, 2)
    ]
    # Not bit for bit: how many products are formed at once is found out by timing.
    one, two = (each.values for each in scores)
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5 * np.abs(one).max())


# All processes of a launch at one training


LAUNCHED = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np, torch
torch.set_num_threads(1)
from tiny import make_trainer, points
from hf_attribution import AttributionTrainer
from hf_attribution.errors import MismatchError, UnsupportedError
from hf_attribution.methods import SmoothedUnroll

def trainer(rows=24):
    return make_trainer(
        AttributionTrainer, {folder!r}, model_settings={{"hidden": 4}}, use_cpu=False,
        trainer_settings={{"train_dataset": points(rows)}}, per_device_train_batch_size=2, disable_tqdm=False,
    )

mine = trainer()
rank = mine.args.process_index
assert mine.args.world_size == 2
for protocol in ("resampled", "fixed"):
    settings = dict(num_subsets=2, protocol=protocol, output_dir={folder!r} + "/" + protocol)
    truth = mine.retrain(**settings)
    again = trainer().retrain(**settings)
    np.testing.assert_array_equal(truth.outputs, again.outputs)
    if rank == 0:
        truth.save({folder!r} + f"/{{protocol}}.safetensors")
scores = trainer().attribute(points(2, seed=1), SmoothedUnroll(runs=3), recording={folder!r} + "/smoothed")
np.save({folder!r} + f"/smoothed-{{rank}}.npy", scores.values)
try:
    mine.retrain(num_subsets=2, workers=2)
    raise SystemExit("workers in a launch")
except UnsupportedError as error:
    assert "one of 2 of a launch" in str(error)
try:
    trainer(rows=24 - 4 * rank).retrain(num_subsets=2, output_dir={folder!r} + "/other")
    raise SystemExit("different data")
except MismatchError as error:
    assert "train_dataset" in str(error), error
"""


@pytest.mark.distributed
def test_processes_of_a_launch_train_together(tmp_path):
    """As one process with the batches of both, and both find out when they were given different data."""
    (tmp_path / "script.py").write_text(
        textwrap.dedent(LAUNCHED.format(tests=str(ROOT / "tests"), folder=str(tmp_path)))
    )
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1",
         f"--master_port={29500 + os.getpid() % 1000}", str(tmp_path / "script.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    for protocol in ("resampled", "fixed"):
        together = Counterfactuals.load(tmp_path / f"{protocol}.safetensors")
        alone = make_trainer(
            AttributionTrainer, tmp_path / "alone", model_settings={"hidden": 4}, per_device_train_batch_size=4
        ).retrain(num_subsets=2, protocol=protocol)
        np.testing.assert_allclose(together.outputs, alone.outputs, atol=1e-4)
        assert not list((tmp_path / protocol / "work").iterdir())
    # Recorded trainings are of one process each: the processes share them, and all have the mean over them.
    alone = make_trainer(
        AttributionTrainer, tmp_path / "alone", model_settings={"hidden": 4}, per_device_train_batch_size=2
    ).attribute(points(2, seed=1), SmoothedUnroll(runs=3))
    found = [np.load(tmp_path / f"smoothed-{rank}.npy") for rank in (0, 1)]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0], alone.values, rtol=1e-3, atol=1e-6)  # chunks of products are chosen by time


# Dry runs and trackers


def test_a_dry_run_says_what_is_coming_and_leaves_no_trace(tmp_path):
    trainer = trainer_in(tmp_path / "out", gradient_accumulation_steps=2)
    settings = {"num_subsets": 6, "seeds": 2, "fraction": 0.5, "keep_checkpoints": True}
    state = torch.get_rng_state()
    expected = trainer.retrain(**settings, dry_run=True, workers=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    # 12 of 24 rows, batches of 4, two to a step: two steps an epoch, two epochs
    assert (expected.num_trainings, expected.num_finished, expected.steps_per_training) == (12, 0, 4)
    assert expected.seconds == pytest.approx(expected.seconds_per_training * 12 / 3)
    weights = sum(each.nbytes for each in trainer.model.parameters())
    assert expected.disk_bytes >= 12 * weights
    assert expected.memory_bytes >= 2 * weights
    assert "12 trainings in" in str(expected)
    trainer.retrain(**{**settings, "seeds": 1})
    assert trainer.retrain(**settings, dry_run=True).num_finished == 6
    assert trainer.retrain(**settings, dry_run=True, shard="1/2").num_trainings == 6


def test_trackers_get_the_progress_and_the_user_s_run_goes_on(tmp_path, monkeypatch):
    class Tracker(TrainerCallback):
        told, broken = [], False

        def on_log(self, args, state, control, logs=None, **kwargs):
            Tracker.told.append((state.global_step, dict(logs)))
            if Tracker.broken:
                raise ConnectionError("no network")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tracker", Tracker)
    trainer = trainer_in(tmp_path, report_to=["tracker"])
    trainer.train()
    state, before = trainer.state, len(Tracker.told)
    steps = trainer.state.global_step
    truth = trainer.retrain(num_subsets=3)
    told = [(step, logs) for step, logs in Tracker.told[before:]]
    assert told[-1][0] == 3
    assert {name for _, logs in told for name in logs} == {
        "retraining/finished", "retraining/seconds_per_run", "retraining/mean_measurement"
    }  # fmt: skip
    assert told[-1][1]["retraining/mean_measurement"] == pytest.approx(truth.outputs.mean(), rel=1e-5)
    assert trainer.state is state
    assert trainer.state.global_step == steps
    Tracker.broken = True
    assert trainer.retrain(num_subsets=5).outputs.shape == (5, 1, 7)


# Copies


def patched(original):
    """A model whose `forward` is a function that holds the model's own, as TRL's trainers make it."""
    forward = original.forward

    @functools.wraps(forward)  # as a signature that the Trainer reads columns off
    def twice(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = 2 * outputs.logits
        return outputs

    original.forward = twice
    return original


class Patching(Trainer):
    """Gives its model another forward, as SFTTrainer does."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        patched(self.model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(points=inputs["points"])
        loss = torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class PatchingAttributionTrainer(AttributionTrainer, Patching):
    pass


def test_retrained_models_of_a_patching_trainer_are_trained(tmp_path):
    truth = trainer_in(tmp_path, trainer_class=PatchingAttributionTrainer).retrain(num_subsets=3)
    assert len(np.unique(truth.outputs[:, 0, 0])) == 3  # of the original's weights they would be one
