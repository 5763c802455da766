"""Preconditioned gradients of queries as factors of low rank."""

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from tiny import PointsConfig, PointsForSequenceClassification

from hf_attribution import DataInf, Diagonal, EKFac, attribute
from hf_attribution.data import Split
from hf_attribution.gradients import products
from hf_attribution.gradients.terms import Dense, LowRank, inner_products, join, truncated
from hf_attribution.tasks import Classification


def matrices(rows=40, columns=60, decay=0.7):
    """Three random matrices whose singular values fall by a factor."""
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(3, rows, rows)).Q, torch.linalg.qr(torch.randn(3, columns, rows)).Q
    return (left * decay ** torch.arange(rows)) @ right.transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truncation_is_nearly_the_best(dtype):
    values = matrices().to(dtype)
    found = truncated(values.flatten(1), (40, 60), 8)
    assert isinstance(found, LowRank)
    assert found.left.dtype == dtype
    assert found.left.shape == (3, 8, 40)
    error = (found.dense() - values.flatten(1)).norm(dim=1)
    least = torch.linalg.svdvals(values)[:, 8:].norm(dim=1)  # Eckart & Young
    assert (error <= 1.02 * least).all()


def test_matrices_of_low_rank_are_kept_exactly():
    torch.manual_seed(0)
    values = torch.randn(4, 30, 5) @ torch.randn(4, 5, 50)
    values[1] = 0
    found = truncated(values.flatten(1), (30, 50), 5)
    torch.testing.assert_close(found.dense(), values.flatten(1), atol=1e-4, rtol=1e-4)
    assert torch.equal(truncated(values.flatten(1), (30, 50), 5).left, found.left)


@pytest.mark.parametrize("shape", [(6, 7), (1, 9), (9, 1), (1, 1)])
def test_factors_larger_than_matrices_are_not_made(shape):
    values = torch.randn(2, shape[0] * shape[1])
    found = truncated(values, shape, 4)
    assert isinstance(found, Dense)
    assert torch.equal(found.values, values)


def test_joined_factors_multiply_a_few_at_a_time(monkeypatch):
    values = matrices()
    first, second = (truncated(v.flatten(1), (40, 60), 8) for v in (values[:2], values[2:]))
    (terms,) = join([[first], [second]])
    assert isinstance(terms[0], LowRank)
    others = [Dense(torch.randn(5, 2400))]
    expected = torch.cat([first.dense(), second.dense()]) @ others[0].values.T
    monkeypatch.setattr("hf_attribution.gradients.terms._FORMED", 2400)
    torch.testing.assert_close(inner_products(terms, others), expected)


class Passes(Split):
    """Counts the passes over its rows."""

    count = 0

    def batches(self, *args, **kwargs):
        Passes.count += self.name == "train"
        return super().batches(*args, **kwargs)


def points(rows, seed):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(rows, 40)).astype(np.float32)
    labels = (inputs[:, :3].argmax(1)).astype(int)
    return datasets.Dataset.from_dict({"points": inputs, "labels": labels}).with_format("torch")


class DeepPoints(PointsForSequenceClassification):
    """Points that are seen from several sides, for gradients of more than rank one."""

    def forward(self, points=None, labels=None):
        sides = torch.stack([points.roll(side, 1) for side in range(12)], 1)
        hidden = self.body(sides).square().mean(1)
        return tf.modeling_outputs.SequenceClassifierOutput(logits=self.head(hidden))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = DeepPoints(PointsConfig(size=40, hidden=80, num_labels=3))
    rows = points(60, 1)[:]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(rows["points"]).logits, rows["labels"]).backward()
        optimizer.step()
    return model.eval()


def run(model, method):
    return attribute(
        model, points(60, 1), points(24, 2), method=method, task=Classification(), batch_size=16, progress=False
    )


@pytest.mark.parametrize("method", [EKFac, Diagonal, DataInf])
def test_scores_of_low_rank(network, method):
    exact = run(network, method(query_rank=None)).values
    found = {rank: run(network, method(query_rank=rank)).values for rank in (1, 16, 40)}
    np.testing.assert_array_equal(found[40], exact)
    errors = {rank: np.abs(values - exact).max() / np.abs(exact).max() for rank, values in found.items()}
    assert 0 < errors[16] < errors[1]
    assert np.corrcoef(found[16].ravel(), exact.ravel())[0, 1] > 0.99


def test_low_rank_saves_passes(network, monkeypatch):
    monkeypatch.setattr("hf_attribution.posing.Split", Passes)

    def passes(rank):
        Passes.count = 0
        return run(network, EKFac(query_rank=rank)), Passes.count

    in_one, most = passes("auto")
    assert in_one.provenance["choices"]["query_rank"] is None
    monkeypatch.setattr(products, "BLOCK_BYTES", 2 * 4 * 4 * 3600)  # four gradients, and their copies
    exact, several = passes(None)
    small, fewer = passes(4)
    np.testing.assert_allclose(exact.values, in_one.values, rtol=1e-3, atol=1e-5 * np.abs(exact.values).max())
    assert most < fewer < several
    assert small.provenance["choices"]["query_rank"] == 4
    assert run(network, EKFac()).provenance["choices"]["query_rank"] == 32


@pytest.mark.parametrize("rank", [0, -3, 1.5, True, "full"])
def test_rank_that_is_none(rank):
    with pytest.raises(ValueError, match="query_rank must be a positive integer, None or 'auto'"):
        EKFac(query_rank=rank)
