"""Retraining by Ray's tasks, on a cluster of this machine that listens on the loopback interface alone."""

import errno
import sys

import numpy as np
import pytest
from test_workers import Deadly, Failing, trainer_in, trainer_plan

from hf_attribution.errors import ArtefactError
from hf_attribution.retraining import on_ray
from hf_attribution.retraining.worklist import Run

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def ray():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # by which Ray stays on the loopback interface
        patch.setenv("RAY_AUTH_MODE", "disabled")  # and leaves no token in the home folder
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # or its tasks stand still while other tests run
        ray = pytest.importorskip("ray")
        ray.init(address="local", include_dashboard=False, num_cpus=2, object_store_memory=2**27)
        yield ray
        ray.shutdown()


def test_killed_tasks_of_ray_cost_their_training_and_nothing_else(ray, tmp_path):
    """One of two workers dies in mid-training; the artefact is that of one process, bit for bit."""
    whole = trainer_in(tmp_path / "whole").retrain(num_subsets=3, seeds=2)
    (tmp_path / "life").touch()
    folder, trainer = tmp_path / "crew", trainer_in(tmp_path, [Deadly(tmp_path)])
    shared = trainer.retrain(num_subsets=3, seeds=2, output_dir=folder, workers="ray")
    assert not (tmp_path / "life").exists()
    np.testing.assert_array_equal(shared.outputs, whole.outputs)
    assert shared.subsets.fingerprint == whole.subsets.fingerprint
    assert not list((folder / "work").iterdir())
    assert ray.is_initialized()  # it was there before, and stays


def test_an_error_in_a_task_of_ray_reaches_the_user_with_its_traceback(ray, tmp_path):
    trainer = trainer_in(tmp_path, [Failing(OSError(errno.ENOSPC, "No space left on device"))])
    with pytest.raises(OSError, match="No space left on device") as caught:
        trainer.retrain(num_subsets=1, workers="ray")
    assert caught.value.errno == errno.ENOSPC
    assert "in on_train_begin" in str(caught.value.__cause__)


def test_a_training_that_loses_its_worker_again_and_again_is_given_up(ray, tmp_path, monkeypatch):
    monkeypatch.setattr(on_ray, "RETRIES", 0)
    (tmp_path / "life").touch()
    with pytest.raises(RuntimeError, match=r"subset 0 with seed 0 was tried 1 times.*trainings are kept"):
        trainer_in(tmp_path, [Deadly(tmp_path)]).retrain(num_subsets=1, workers="ray")


def test_a_dry_run_counts_the_places_of_the_cluster(ray, tmp_path):
    found = trainer_in(tmp_path).retrain(num_subsets=8, workers="ray", dry_run=True)
    assert found.seconds == pytest.approx(found.seconds_per_training * 8 / 2)


def test_a_folder_that_a_machine_does_not_see_is_named(tmp_path, monkeypatch):
    plan = trainer_plan(trainer_in(tmp_path), output_dir=tmp_path / "elsewhere")
    monkeypatch.setattr(on_ray, "_opened", lambda parcel, paths: plan)
    with pytest.raises(ArtefactError, match=r"elsewhere is not seen on .*an output_dir that all machines"):
        on_ray._train(b"", (), Run(0, 0))


def test_without_ray_it_is_said_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install hf-attribution\[ray\]"):
        trainer_in(tmp_path).retrain(num_subsets=1, workers="ray")
