"""Passes over the training data that are killed go on from where they stood, to the same bits."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from tiny import PointsConfig, PointsForSequenceClassification, normal_points
from transformers import default_data_collator

from hf_attribution import attribute, bookmark
from hf_attribution.curvature import fitting
from hf_attribution.curvature.kronecker import KroneckerCurvature
from hf_attribution.curvature.rows import CurvatureRows
from hf_attribution.data import Split
from hf_attribution.errors import ProcessError
from hf_attribution.gradients import products
from hf_attribution.gradients.filling import Filling
from hf_attribution.methods import METHODS, Source, fits
from hf_attribution.problem import Checkpoint
from hf_attribution.tasks import Classification

TRAIN, QUERY = normal_points(23, 1), normal_points(6, 2)
BATCHES = 5

torch.manual_seed(0)
NETWORK = PointsForSequenceClassification(PointsConfig(size=4, hidden=5, num_labels=3)).eval()


def run(method, folder, **settings):
    settings = {"task": Classification(), "batch_size": 5, "progress": False, **settings}
    return attribute(NETWORK, TRAIN, QUERY, method=method, cache_dir=folder, **settings).values


def interrupted(monkeypatch, owner, name, counting):
    """Calls a function that is interrupted at the so many-th call of a method; says what the calls before were of.

    What stands in for the method is `counting(method, check, count)`: it calls `check()`, which may interrupt, and
    `count(what)`.
    """
    monkeypatch.setattr(bookmark, "EVERY_SECONDS", 0)
    monkeypatch.setattr(bookmark, "SHARE", 1)
    method = getattr(owner, name)

    def live(function, batches):
        counted = []

        def check():
            if len(counted) == batches:
                raise KeyboardInterrupt

        monkeypatch.setattr(owner, name, counting(method, check, counted.append))
        try:
            return function(), counted
        except KeyboardInterrupt:
            return None, counted

    return live


@pytest.fixture
def life(monkeypatch):
    """Calls a function that is interrupted before its rows of so many batches; says of which batches it had rows."""

    def counting(compute, check, count):
        def rows_of(self, batch):
            check()
            count(batch.indices.tolist())
            yield from compute(self, batch)

        return rows_of

    return interrupted(monkeypatch, CurvatureRows, "_rows_of", counting)


def lives(life, function, batches):
    """A function that is interrupted after so many batches until it ends: its result, and all of these."""
    computed = []
    for _ in range(50):
        found, more = life(function, batches)
        computed += more
        if found is not None:
            return found, computed
    raise AssertionError("A life did not go on from where the one before it ended.")


@pytest.mark.parametrize(("name", "settings", "batches", "kept_bytes"), [
    ("diagonal", {}, 2, 0),
    ("kfac", {}, 2, 0),
    ("ekfac", {}, 2, 0),
    ("ekfac", {}, BATCHES, 0),
    ("ekfac", {}, 3, 1300),
    ("ekfac", {"curvature": "gauss_newton"}, 3, 4000),
])  # fmt: skip
def test_no_batch_is_computed_again(life, tmp_path, monkeypatch, name, settings, batches, kept_bytes):
    monkeypatch.setattr(fitting, "KEPT_BYTES", kept_bytes)
    method = METHODS[name](**settings)
    whole, once = life(lambda: run(method, tmp_path / "whole"), None)
    found, computed = lives(life, lambda: run(method, tmp_path / "parts"), batches)
    np.testing.assert_array_equal(found, whole)
    (expected,) = (tmp_path / "whole" / "curvature").iterdir()
    assert (tmp_path / "parts" / "curvature" / expected.name).read_bytes() == expected.read_bytes()
    assert not list((tmp_path / "parts" / "unfinished").iterdir())
    # What a life keeps of its first pass is lost with it.
    assert len(once) <= len(computed) <= (2 if name == "ekfac" else 1) * BATCHES
    if kept_bytes == 0:
        assert computed == once


def test_source_keeps_its_segments(life, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "KEPT_BYTES", 0)
    checkpoints = []
    for factor in (0.5, 0.7, 0.9, 1.0):
        checkpoints.append(Checkpoint(copy.deepcopy(NETWORK), learning_rate_sum=factor))
        for parameter in checkpoints[-1].source.parameters():
            parameter.data *= factor
    method = Source(segments=2, solver="ekfac", optimizer="sgd", momentum=0.0)

    def scores(folder):
        return run(method, folder, checkpoints=checkpoints)

    whole, once = life(lambda: scores(tmp_path / "whole"), None)
    assert len(once) == 2 * 4 * BATCHES  # two passes over every checkpoint
    found, computed = lives(life, lambda: scores(tmp_path / "parts"), 7)
    np.testing.assert_array_equal(found, whole)
    assert computed == once
    again, computed = life(lambda: scores(tmp_path / "parts"), 0)
    np.testing.assert_array_equal(again, whole)
    changed = dataclasses.replace(checkpoints[3], learning_rate_sum=2.0)
    _, computed = life(lambda: run(method, tmp_path / "parts", checkpoints=[*checkpoints[:3], changed]), None)
    assert len(computed) == 2 * 2 * BATCHES


def unfinished(folder, number):
    (found,) = (folder / "unfinished").glob(f"*-{number}.safetensors")
    return found


@pytest.mark.parametrize("lost", ["0", "all"])
def test_what_is_damaged_costs_time_alone(life, tmp_path, monkeypatch, lost):
    monkeypatch.setattr(fitting, "KEPT_BYTES", 0)
    whole, _ = life(lambda: run("ekfac", tmp_path / "whole"), None)
    life(lambda: run("ekfac", tmp_path), BATCHES + 2)  # in the second pass
    path = unfinished(tmp_path, lost)
    path.write_bytes(path.read_bytes()[:-7])
    found, computed = life(lambda: run("ekfac", tmp_path), None)
    np.testing.assert_array_equal(found, whole)
    assert len(computed) == (BATCHES if lost == "0" else 2 * BATCHES)


def test_eigenvalues_in_other_bases_are_not_gone_on_with(life, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "KEPT_BYTES", 0)
    whole, _ = life(lambda: run("ekfac", tmp_path / "whole"), None)
    life(lambda: run("ekfac", tmp_path), BATCHES + 2)
    path = unfinished(tmp_path, "all")
    bases = KroneckerCurvature.load(path)
    for spectrum in bases.spectra:
        spectrum.left.vectors[0].neg_()  # as another machine may have them
    bases.save(path)
    found, computed = life(lambda: run("ekfac", tmp_path), None)
    np.testing.assert_array_equal(found, whole)
    assert len(computed) == BATCHES


def test_other_batches_begin_again(life, tmp_path):
    whole, _ = life(lambda: run("kfac", tmp_path / "whole", batch_size=4), None)
    life(lambda: run("kfac", tmp_path), 3)
    found, computed = life(lambda: run("kfac", tmp_path, batch_size=4), None)
    np.testing.assert_array_equal(found, whole)
    assert sum(map(len, computed)) == len(TRAIN)
    assert not list((tmp_path / "unfinished").iterdir())


def test_batches_that_memory_has_halved_stay_so(life, tmp_path, monkeypatch):
    parts, calls = [], []

    class Narrow(Classification):
        """Runs out of memory once, at the first batch of more than three rows."""

        def losses(self, model, batch):
            calls.append(len(batch["labels"]))
            if len(batch["labels"]) > 3 and not parts:
                parts.append(len(batch["labels"]))
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return super().losses(model, batch)

    # The first half of the second batch is kept for the second pass as long as it is not known that the other is not.
    monkeypatch.setattr(fitting, "KEPT_BYTES", 620)
    method = METHODS["ekfac"](curvature="fisher")
    whole, _ = life(lambda: run(method, tmp_path / "whole", task=Narrow()), None)
    parts.clear()
    found, _ = lives(life, lambda: run(method, tmp_path / "parts", task=Narrow()), 2)
    np.testing.assert_array_equal(found, whole)
    plain, _ = life(lambda: run(method, tmp_path / "plain"), None)
    np.testing.assert_allclose(whole, plain, rtol=1e-3, atol=1e-6)
    assert calls.count(5) == 2  # once for each of the two fits


@pytest.fixture
def passes(monkeypatch):
    """Calls a function that is interrupted after so many batches of scores; says which blocks had which batches."""

    def counting(note, check, count):
        def noted(self, examples):
            check()
            note(self, examples)
            count((self._rows.tolist(), examples.tolist()))

        return noted

    return interrupted(monkeypatch, Filling, "note", counting)


@pytest.mark.parametrize(
    ("name", "batches"), [("grad_dot", 2), ("grad_cos", BATCHES), ("kfac", BATCHES + 2), ("datainf", 3), ("tracin", 7)]
)
def test_no_scores_are_computed_again(passes, tmp_path, monkeypatch, name, batches):
    other = copy.deepcopy(NETWORK)
    for parameter in other.parameters():
        parameter.data *= 0.9
    checkpoints = [Checkpoint(NETWORK, weight=0.5), Checkpoint(other, weight=2.0)]
    monkeypatch.setattr(products, "BLOCK_BYTES", 700)
    settings = {"checkpoints": checkpoints}
    whole, once = passes(lambda: run(name, tmp_path / "whole", **settings), None)
    assert len(once) > 2 * BATCHES  # some blocks of queries for each checkpoint
    found, noted = lives(passes, lambda: run(name, tmp_path / "parts", **settings), batches)
    np.testing.assert_array_equal(found, whole)
    assert noted == once
    assert not list((tmp_path / "parts" / "unfinished").iterdir())


def test_scores_of_other_queries_or_batches_begin_again(passes, tmp_path):
    passes(lambda: run("grad_dot", tmp_path), 3)
    found, noted = passes(lambda: run("grad_dot", tmp_path, batch_size=4), None)
    assert len(noted) == 6
    np.testing.assert_allclose(found, run("grad_dot", None), rtol=1e-5)
    passes(lambda: run("grad_dot", tmp_path), 3)
    _, noted = passes(lambda: run("grad_cos", tmp_path), None)
    assert len(noted) == BATCHES


def test_batches_that_two_files_hold_are_computed_again(monkeypatch, tmp_path):
    """As after two launches at once on one folder, of which a file each is left."""
    split = Split(TRAIN, default_data_collator, 5)
    filling = Filling(2, split)
    filling.begin(np.arange(2))
    filling.scores[:, :10] = 1.0
    filling.note(np.arange(10))

    def add_up(*parts):
        for part in parts:
            part[5:15] += 1  # the other process has these

    monkeypatch.setattr("hf_attribution.gradients.filling.add_up", add_up)
    done = filling.begin(np.arange(2))
    assert done.nonzero()[0].tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert not filling.scores[:, 5:].any()
    monkeypatch.setattr("hf_attribution.gradients.filling.gather", lambda value: [value, b"others"])
    with pytest.raises(ProcessError, match="batch_size"):
        filling.begin(np.arange(2))


def test_second_moments_are_kept(tmp_path, monkeypatch):
    first = run("trackstar", tmp_path)
    monkeypatch.setattr(fits, "second_moments", None)
    np.testing.assert_array_equal(run("trackstar", tmp_path), first)
    with pytest.raises(TypeError):
        run(METHODS["trackstar"](modules=["head"]), tmp_path)
