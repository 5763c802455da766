"""Kronecker-factored and other blockwise curvature against brute force over per-example gradients."""

import copy

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from models import make
from tiny import PointsConfig, PointsForSequenceClassification

from hf_attribution import DataInf, Diagonal, EKFac, KFac, attribute
from hf_attribution.curvature import blocks, factors
from hf_attribution.curvature.kronecker import KroneckerCurvature, fit_curvature
from hf_attribution.curvature.rows import CurvatureRows
from hf_attribution.data import Split
from hf_attribution.errors import ArtefactError, NonFiniteError, UnsupportedError
from hf_attribution.gradients import products
from hf_attribution.gradients.terms import dense
from hf_attribution.methods import METHODS
from hf_attribution.tasks import Classification, Regression, Task, infer_task

N, Q = 23, 6
BLOCKWISE = ("diagonal", "kfac", "ekfac", "datainf")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return PointsForSequenceClassification(PointsConfig(size=4, hidden=5, num_labels=3)).eval()


def points(rows, seed):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(rows, 4)).astype(np.float32)
    return datasets.Dataset.from_dict({"points": inputs, "labels": rng.integers(3, size=rows)}).with_format("torch")


TRAIN, QUERY = points(N, 1), points(Q, 2)


def run(model, method, train=TRAIN, query=QUERY, **kwargs):
    kwargs = {"task": Classification(), "batch_size": 5, "progress": False, **kwargs}
    return attribute(model, train, query, method=method, **kwargs)


class Rows(Split):
    """The rows of a batch that is there."""

    def __init__(self, batch, batch_size=2):
        self.inputs = batch
        super().__init__(list(range(len(batch["labels"]))), self.collate, batch_size)

    def collate(self, rows):
        return {key: value[rows] for key, value in self.inputs.items()}


def fit(model, rows, kind, curvature="fisher", task=None, batch_size=2, modules=None, seed=0):
    split = rows if isinstance(rows, Split) else Split(rows, tf.default_data_collator, batch_size)
    task = task or infer_task(model)
    with torch.no_grad():
        return fit_curvature(model, CurvatureRows(model, task, split, curvature, modules, seed), kind, progress=False)


def stacked(model, rows, curvature="fisher", task=None, seed=0):
    """The gradients by parameter, `[rows, P]`, of every row of a curvature matrix."""
    split = rows if isinstance(rows, Split) else Split(rows, tf.default_data_collator, 4)
    found = CurvatureRows(model, task or infer_task(model), split, curvature, None, seed)
    batches = list(found)
    return {
        name: torch.cat([dense(b.terms[name]) for b in batches if name in b.terms])
        for name in found.gradients[0].parameters
    }


def matrix(spectrum):
    """A block of the curvature, with parameters in the order of its flattened matrix."""
    rows, columns = spectrum.block.shape
    left = torch.block_diag(*spectrum.left.vectors) if spectrum.left.vectors else torch.eye(rows)
    right = torch.block_diag(*spectrum.right.vectors) if spectrum.right.vectors else torch.eye(columns)
    basis = torch.kron(left.contiguous(), right.contiguous())
    return basis @ torch.diag(spectrum.eigenvalues.flatten()) @ basis.T


def block_gradients(spectrum, gradients):
    """Per-example gradients `[n, rows, columns]` of a block, from those of its parameters."""
    block = spectrum.block
    rows, columns = block.shape
    weight = gradients[block.parameters[0]]
    if block.transposed:
        weight = weight.unflatten(1, (columns - block.has_bias, rows)).transpose(1, 2)
    weight = weight.reshape(len(weight), rows, columns - block.has_bias)
    if block.has_bias:
        weight = torch.cat([weight, gradients[block.parameters[1]][:, :, None]], dim=2)
    return weight


def agree(found, expected, tolerance=1e-4):
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("curvature", ["fisher", "true_fisher", "gauss_newton"])
@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_one_linear_layer_and_one_example_have_the_exact_block(kind, curvature):
    torch.manual_seed(0)
    model = PointsForSequenceClassification(PointsConfig(size=4, num_labels=3)).eval()
    one = TRAIN.select([0])
    (spectrum,) = fit(model, one, kind, curvature, Classification()).spectra
    gradients = block_gradients(spectrum, stacked(model, one, curvature, Classification())).flatten(1)
    agree(matrix(spectrum), gradients.T @ gradients)


def test_true_fisher_gauss_newton_and_hessian_agree_for_a_linear_softmax_model():
    torch.manual_seed(0)
    model = PointsForSequenceClassification(PointsConfig(size=4, num_labels=3)).eval()
    task = Classification()
    gradients = stacked(model, TRAIN, "gauss_newton", task)
    rows = torch.cat([gradients["head.weight"], gradients["head.bias"]], dim=1)

    def total(flat):
        parameters = {"head.weight": flat[:12].view(3, 4), "head.bias": flat[12:]}
        logits = torch.func.functional_call(model, parameters, (), {"points": TRAIN["points"][:]}).logits
        return torch.nn.functional.cross_entropy(logits, TRAIN["labels"][:], reduction="sum")

    flat = torch.cat([model.head.weight.flatten(), model.head.bias]).detach()
    hessian = torch.func.hessian(total)(flat)
    agree(rows.T @ rows, hessian)
    draws = 400
    sampled = torch.zeros_like(hessian)
    for seed in range(draws):
        drawn = stacked(model, TRAIN, "true_fisher", task, seed)
        drawn = torch.cat([drawn["head.weight"], drawn["head.bias"]], dim=1)
        sampled += drawn.T @ drawn / draws
    assert (sampled - hessian).norm() < 0.05 * hessian.norm()
    empirical = stacked(model, TRAIN, "fisher", task)
    empirical = torch.cat([empirical["head.weight"], empirical["head.bias"]], dim=1)
    assert (empirical.T @ empirical - hessian).norm() > 0.2 * hessian.norm()


def test_the_true_fisher_of_a_regression_is_its_gauss_newton_matrix():
    torch.manual_seed(0)
    model, task = PointsForSequenceClassification(PointsConfig(size=4, num_labels=2)).eval(), Regression()
    rng = np.random.default_rng(0)
    rows = datasets.Dataset.from_dict({"points": TRAIN["points"][:].numpy(), "labels": rng.normal(size=(N, 2))})
    rows = rows.with_format("torch")
    exact = stacked(model, rows, "gauss_newton", task)["head.weight"]
    exact = exact.T @ exact
    total = torch.zeros_like(exact)
    for seed in range(400):
        drawn = stacked(model, rows, "true_fisher", task, seed)["head.weight"]
        total += drawn.T @ drawn / 400
    assert (total - exact).norm() < 0.1 * exact.norm()


FAMILIES = ["bert", "gpt2", "gpt2_left", "gpt2_classification", "llama", "t5", "resnet", "convnext", "vit", "albert",
            "mobilenet", "bert_mlm", "mamba", "mixtral"]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_eigenvalues_are_the_squared_rotated_gradients(family):
    model, batch = make(family)
    curvature = fit(model, Rows(batch), "ekfac", "fisher")
    gradients = stacked(model, Rows(batch, 1), "fisher")
    assert {p for s in curvature.spectra for p in s.block.parameters} == {n for n, _ in model.named_parameters()}
    for spectrum in curvature.spectra:
        if spectrum.block.parameters[0] not in gradients:
            continue
        found = block_gradients(spectrum, gradients)
        left = torch.block_diag(*spectrum.left.vectors) if spectrum.left.vectors else torch.eye(found.shape[1])
        right = torch.block_diag(*spectrum.right.vectors) if spectrum.right.vectors else torch.eye(found.shape[2])
        if spectrum.block.kind == "linear":
            agree(left @ left.T, torch.eye(len(left)))
            agree(right @ right.T, torch.eye(len(right)))
        expected = (left.T @ found @ right).square().sum(0)
        scale = max(float(expected.max()), 1e-9)
        torch.testing.assert_close(spectrum.eigenvalues / scale, expected / scale, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_inverse_is_that_of_the_matrix(family):
    model, batch = make(family)
    curvature = fit(model, Rows(batch), "ekfac", "fisher")
    ridge = 0.1 * curvature.unit
    rows = CurvatureRows(model, infer_task(model), Rows(batch, 3), "fisher", None)
    (gradients,) = list(rows)
    inverse = curvature.inverse(ridge)
    (product,), (form,) = inverse([gradients]), inverse.quadratic_forms([gradients])
    expected_form = 0
    for spectrum in curvature.spectra:
        names = spectrum.block.parameters
        if names[0] not in gradients.terms:
            continue
        found = block_gradients(spectrum, {n: dense(gradients.terms[n]) for n in names})
        values = block_gradients(spectrum, {n: dense(product.terms[n]) for n in names})
        if found[0].numel() <= 1000:
            damped = matrix(spectrum) + ridge * torch.eye(found[0].numel())
            agree(values.flatten(1) @ damped, found.flatten(1), 1e-3)
        expected_form += (values * found).sum((1, 2))
    agree(form, expected_form, 1e-3)
