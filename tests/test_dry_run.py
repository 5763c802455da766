"""Dry runs of attribution: what they count, what they carry on, and that nothing is left of them."""

import time

import numpy as np
import pytest
import torch
from tiny import make_trainer, model, points

from hf_attribution import attribute, attribute_dry_run, dry_run
from hf_attribution.errors import UnsupportedError
from hf_attribution.methods import EKFac, Influence, Trak
from hf_attribution.methods import influence as influence_module
from hf_attribution.trainer import AttributionTrainer


@pytest.fixture
def quick(monkeypatch):
    """One try of everything."""
    monkeypatch.setattr(dry_run, "_ENOUGH_SECONDS", 0.0)
    monkeypatch.setattr(dry_run, "_quickest", dry_run._try)


def test_passes_and_batches_are_counted_and_nothing_is_kept(tmp_path, quick):
    trained, train, queries = model(), points(100), points(9, seed=1)
    state = torch.get_rng_state()
    expected = attribute_dry_run(trained, train, queries, method=Trak(dim=8), batch_size=4, cache_dir=tmp_path)
    assert (expected.shape, expected.train_passes, expected.query_passes) == ((9, 100), 1, 1)
    assert expected.num_batches == 28
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(tmp_path.iterdir())
    attribute(trained, train, queries, method=Trak(dim=8), batch_size=4, cache_dir=tmp_path)
    on_disk = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert expected.disk_bytes == pytest.approx(on_disk, rel=0.2)
    assert attribute_dry_run(model(), train, queries, method=EKFac(), batch_size=4).train_passes > 1
    assert "trak: 9 queries x 100 training examples. About 1 passes over the training" in str(expected)


def test_what_is_tried_is_carried_on_in_proportion(monkeypatch):
    """A method that takes 1 ms + 2 ms a query + 3 ms an example, by a clock of its own."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def score(method, problem):
        now[0] += 0.001 + 0.002 * len(problem.query) + 0.003 * len(problem.train)

    monkeypatch.setattr(Trak, "score", score)
    expected = attribute_dry_run(model(), points(1000), points(200, seed=1), batch_size=4)
    assert expected.seconds == pytest.approx(0.001 + 0.4 + 3.0)
    assert expected.memory_bytes == 4 * 1000 * 200 + sum(each.nbytes for each in model().parameters())


def test_settings_that_follow_the_number_of_examples_are_those_of_all(monkeypatch, quick):
    """Few examples would have exact gradients; all of them have projected ones."""
    tried = []
    monkeypatch.setattr(influence_module, "EXACT_SIZE", 1000)
    monkeypatch.setattr(Influence, "score", lambda method, problem: tried.append(method))
    attribute_dry_run(model(), points(500), points(9, seed=1), method="influence", batch_size=4)
    assert {method.dim for method in tried} == {influence_module.AUTO_DIM}
    tried.clear()
    attribute_dry_run(model(), points(50), points(9, seed=1), method="influence", batch_size=4)
    assert {(method.dim, method.solver) for method in tried} == {(None, "dual")}


def test_what_follows_a_training_or_is_a_stream_is_refused():
    with pytest.raises(UnsupportedError, match="unroll follows whole trainings"):
        attribute_dry_run(model(), points(), points(7), method="unroll")
    with pytest.raises(UnsupportedError, match="A stream has no rows to try"):
        attribute_dry_run(model(), points().to_iterable_dataset(), points(7))


def test_a_trainer_s_dry_run_takes_few_rows(tmp_path, quick):
    trainer = make_trainer(AttributionTrainer, tmp_path, trainer_settings={"train_dataset": points(3)})
    expected = trainer.attribute_dry_run(method="grad_dot")
    assert expected.shape == (7, 3)
    assert np.isfinite(expected.seconds)
