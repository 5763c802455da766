"""Several processes of a launch: the same scores as of one, and an end with a message when one is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_attribution.processes import add_up, count, from_main, gather, in_order, is_main, share, sharing

HERE = Path(__file__).parent

distributed = pytest.mark.distributed


def run(command, folder):
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(HERE / "shared_passes.py"), command, str(folder)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def test_alone_everything_is_the_processs_own():
    numbers = np.arange(3.0)
    with sharing("a test"):
        add_up(numbers)
        assert (count(), is_main(), gather(1), from_main(lambda: 2)) == (1, True, [1], 2)
        assert list(share("abc")) == list(in_order("abc")) == ["a", "b", "c"]
    np.testing.assert_array_equal(numbers, np.arange(3.0))


@distributed
def test_scores_do_not_depend_on_the_number_of_processes(tmp_path):
    run("worlds", tmp_path)
    expected = np.load(tmp_path / "1-0.npz")
    assert len(expected) > 60
    for name in ("2-0", "2-1", "3-0", "3-1", "3-2"):
        found = np.load(tmp_path / f"{name}.npz")
        assert set(found) == set(expected)
        for what, values in expected.items():
            message = f"{what}, process {name}"
            np.testing.assert_allclose(
                found[what], values, rtol=2e-3, atol=2e-5 * np.abs(values).max(), err_msg=message
            )
            first = np.load(tmp_path / f"{name[0]}-0.npz")[what]
            np.testing.assert_array_equal(found[what], first, err_msg=message)


@distributed
def test_killed_at_any_point_it_resumes_to_the_same_bits(tmp_path):
    run("lives", tmp_path)
    for size in (1, 2):
        whole, parts = tmp_path / f"{size}-whole", tmp_path / f"{size}-parts"
        deaths, left = json.loads((parts / "deaths.json").read_text())
        assert deaths >= 3
        assert left[:size] == [f"{process}.safetensors" for process in range(size)]
        assert not list((parts / "cache" / "unfinished").iterdir())
        for process in range(size):
            expected, found = np.load(whole / f"{process}.npz"), np.load(parts / f"{process}.npz")
            for name in expected:
                np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    stored = [sorted((tmp_path / f"{n}-whole" / "cache" / "features").rglob("*.arrow")) for n in (1, 2)]
    assert len(stored[0]) == 2
    assert [path.read_bytes() for path in stored[0]] == [path.read_bytes() for path in stored[1]]


@distributed
def test_processes_learn_of_each_others_ends(tmp_path):
    run("failures", tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for seen in (first, second):
        assert seen["other data"][0] == seen["other weights"][0] == "ProcessError"
        assert "Process 1 has another train" in seen["other data"][1]
        assert "Process 1 has another model" in seen["other weights"][1]
    assert second["a failure"][:2] == ["ZeroDivisionError", "a bad row"]
    assert "process 1 stopped with ZeroDivisionError: a bad row" in first["a failure"][1]
    assert "process 1" in first["a death"][1]
    assert first["a death"][2] < 30
    assert "a death" not in second


@distributed
def test_two_jobs_on_one_cache_dir(tmp_path):
    run("jobs", tmp_path)
    first, second = (np.load(tmp_path / f"{job}.npz") for job in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
