"""Kronecker-factored and other blockwise curvature against brute force over per-example gradients."""

import copy

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from models import make, moved
from tiny import PointsConfig, PointsForSequenceClassification, normal_points

from hf_attribution import DataInf, Diagonal, EKFac, KFac, attribute
from hf_attribution.attribution import self_influence
from hf_attribution.curvature import blocks, factors, fitting
from hf_attribution.curvature.fitting import fit_curvature
from hf_attribution.curvature.kronecker import KroneckerCurvature
from hf_attribution.curvature.rows import CurvatureRows
from hf_attribution.data import Split
from hf_attribution.errors import ArtefactError, NonFiniteError, UnsupportedError
from hf_attribution.gradients import products
from hf_attribution.gradients.terms import Dense, Outer, dense
from hf_attribution.methods import METHODS, fits
from hf_attribution.tasks import Classification, Regression, infer_task

N, Q = 23, 6
BLOCKWISE = ("diagonal", "kfac", "ekfac", "datainf")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return PointsForSequenceClassification(PointsConfig(size=4, hidden=5, num_labels=3)).eval()


TRAIN, QUERY = normal_points(N, 1), normal_points(Q, 2)


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


def flat(model, rows, function, task):
    """Plain gradients, one backward pass a row: `[rows, P]` by layer."""
    found = {}
    for row in rows:
        batch = {key: value[None] for key, value in row.items()}
        names, parameters = zip(*model.named_parameters(), strict=True)
        for name, gradient in zip(names, torch.autograd.grad(function(model, batch).sum(), parameters), strict=True):
            found.setdefault(name.rpartition(".")[0], {}).setdefault(name, []).append(gradient.flatten())
    return {layer: torch.cat([torch.stack(v) for v in own.values()], dim=1).double() for layer, own in found.items()}


def brute_force(model, name, damping, curvature="fisher"):
    """Scores by explicit matrices, layer by layer, and the self-influence."""
    task = Classification()
    measured, gained = flat(model, QUERY, task.measurement, task), flat(model, TRAIN, task.gains, task)
    unit = sum(own.square().sum(1).mean() for own in gained.values())
    total, own = 0, 0
    for layer, gains in gained.items():
        identity = torch.eye(gains.shape[1], dtype=torch.float64)
        if name == "diagonal":
            inverse = torch.diag(1 / (gains.square().sum(0) + damping * unit))
        else:
            ridge = damping * gains.square().sum(1).mean()
            inverses = [torch.linalg.inv(torch.outer(g, g) + ridge * identity) for g in gains]
            inverse = torch.stack(inverses).mean(0) / len(gains)
        total = total + measured[layer] @ inverse @ gains.T
        own = own + torch.einsum("ip,pq,iq->i", gains, inverse, gains)
    return total, own


@pytest.mark.parametrize("name", ["diagonal", "datainf"])
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_scores_equal_brute_force(network, name, damping):
    settings = {"curvature": "fisher"} if name == "diagonal" else {}
    method = METHODS[name](damping=damping, **settings)
    expected, own = brute_force(network, name, damping)
    found = run(network, method)
    agree(found.values, expected)
    assert found.provenance["choices"]["damping"] == damping
    agree(self_influence(network, TRAIN, method=method, task=Classification(), progress=False), own)


@pytest.mark.parametrize("name", BLOCKWISE)
def test_what_fits_in_memory_does_not_change_a_score(network, name, monkeypatch):
    expected = run(network, name).values
    own = self_influence(network, TRAIN, method=name, task=Classification(), progress=False)
    monkeypatch.setattr(products, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(blocks, "CHUNK", 40)
    agree(run(network, name).values, expected)
    agree(self_influence(network, TRAIN, method=name, task=Classification(), progress=False), own)


def test_wide_sides_are_cut_into_runs(network, monkeypatch):
    monkeypatch.setattr(factors, "MAX_SIDE", 4)
    monkeypatch.setattr(factors, "RUN", 3)
    curvature = fit(network, TRAIN, "ekfac", task=Classification())
    shapes = {s.block.name: [[len(v) for v in side.vectors] for side in (s.left, s.right)] for s in curvature.spectra}
    assert shapes == {"body.0": [[3, 2], [3, 2]], "head": [[3], [3, 3]]}
    gradients = stacked(network, TRAIN, task=Classification())
    for spectrum in curvature.spectra:
        found = block_gradients(spectrum, gradients)
        left, right = torch.block_diag(*spectrum.left.vectors), torch.block_diag(*spectrum.right.vectors)
        agree(spectrum.eigenvalues, (left.T @ found @ right).square().sum(0))


@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt2_left", "t5"])
def test_padding_does_not_count(family):
    model, batch = make(family)
    padded = moved(batch, left=0, right=4) if family != "gpt2_left" else moved(batch, left=4)
    one, other = (fit(model, Rows(rows, 3), "kfac", "true_fisher") for rows in (batch, padded))
    for mine, its in zip(one.spectra, other.spectra, strict=True):
        scale = max(float(mine.eigenvalues.max()), 1e-9)
        torch.testing.assert_close(its.eigenvalues / scale, mine.eigenvalues / scale, rtol=1e-2, atol=1e-4)


def test_factors_are_sums_over_the_positions_of_all_examples():
    model, batch = make("resnet")
    rows = CurvatureRows(model, infer_task(model), Rows(batch), "fisher", None)
    spectrum = next(s for s in fit(model, Rows(batch), "kfac").spectra if s.block.kind == "linear")
    name = spectrum.block.parameters[0]
    outers = [term for gradients in rows for term in gradients.terms[name]]
    inputs = torch.cat([outer.right.flatten(0, 1) for outer in outers])
    outputs = torch.cat([outer.left.flatten(0, 1) for outer in outers])
    used = (outputs != 0).any(1)
    inputs, outputs = inputs[used], outputs[used]
    agree(matrix(spectrum), torch.kron(outputs.T @ outputs, inputs.T @ inputs) / len(inputs), 1e-3)


def test_double_precision_is_kept(network):
    double = copy.deepcopy(network).double()
    rows = datasets.Dataset.from_dict({key: TRAIN[key][:].numpy() for key in ("points", "labels")})
    rows = rows.with_format("torch", dtype=torch.float64)
    split = Split(rows, lambda batch: {"points": torch.stack([r["points"] for r in batch]).double(),
                                       "labels": torch.stack([r["labels"] for r in batch]).long()}, 5)  # fmt: skip
    found = fit(double, split, "ekfac", task=Classification())
    assert all(s.eigenvalues.dtype == torch.float64 for s in found.spectra)
    for mine, its in zip(found.spectra, fit(network, TRAIN, "ekfac", task=Classification()).spectra, strict=True):
        agree(its.eigenvalues.sort().values.sum(), mine.eigenvalues.sort().values.sum())


def test_factors_are_kept_found_again_and_inspected(network, tmp_path, monkeypatch):
    first = run(network, "ekfac", cache_dir=tmp_path)
    (path,) = (tmp_path / "curvature").iterdir()
    curvature = KroneckerCurvature.load(path)
    summary = curvature.summary()
    assert summary["block"][:] == ["body.0", "head"]
    assert summary["rows"][:] == [5, 3]
    assert sum(summary["trace"][:]) == pytest.approx(curvature.unit)
    assert "ekfac, 2 blocks of 43 parameters, 23 examples" in repr(curvature)
    (ridges,) = first.provenance["choices"]["lambda"]
    assert ridges == pytest.approx({block: EKFac.auto_damping * unit for block, unit in curvature.units.items()})
    alike = run(network, EKFac(per_layer=False), cache_dir=tmp_path)
    assert alike.provenance["choices"]["lambda"] == [pytest.approx(EKFac.auto_damping * curvature.unit)]
    assert not np.allclose(alike.values, first.values, rtol=1e-2)
    monkeypatch.setattr(fits, "fit_curvature", None)  # it is not fitted again, for other queries either
    other = run(network, EKFac(damping=1.0), query=normal_points(3, 5), cache_dir=tmp_path)
    assert other.values.shape == (3, N)
    with pytest.raises(TypeError, match="not callable"):
        run(network, "ekfac", train=normal_points(N, 9), cache_dir=tmp_path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ArtefactError, match="truncated"):
        run(network, "ekfac", cache_dir=tmp_path)


def test_a_model_averages_with_others_each_with_its_own_damping(network):
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    for name in BLOCKWISE:
        settings = {} if name == "datainf" else {"curvature": "fisher"}
        both = run(network, METHODS[name](**settings), checkpoints=[network, other]).values
        alone = [run(model, METHODS[name](**settings)).values for model in (network, other)]
        agree(both, (alone[0] + alone[1]) / 2)


@pytest.mark.parametrize("curvature", ["true_fisher", "gauss_newton"])
def test_what_the_second_pass_need_not_compute_again_changes_nothing(network, monkeypatch, curvature):
    passes = []
    network = copy.deepcopy(network)
    network.register_forward_hook(lambda module, args, output: passes.append(len(output.logits)))
    each = 1 if curvature == "true_fisher" else 3  # rows of an example
    some_bytes, found = 1300 * each, {}
    for kept in (0, some_bytes, 2**20):  # of the five batches: none, some, all
        monkeypatch.setattr(fitting, "KEPT_BYTES", kept)
        passes.clear()
        curved = fit(network, TRAIN, "ekfac", curvature, Classification(), 5)
        found[kept] = [s.eigenvalues for s in curved.spectra], sum(passes)
    for some, _ in (found[some_bytes], found[2**20]):
        for one, other in zip(found[0][0], some, strict=True):
            assert torch.equal(one, other)
    saved = [found[0][1] - found[kept][1] for kept in (some_bytes, 2**20)]
    assert 0 < saved[0] < saved[1] == N * each


def test_what_is_drawn_depends_on_the_seed_alone(network):
    one, again = (run(network, EKFac(), batch_size=size).values for size in (5, 23))
    agree(again, one)
    assert not np.allclose(run(network, EKFac(seed=1)).values, one, rtol=1e-3)


def test_queries_and_examples_without_gradient_score_zero(network):
    class Flat(Classification):
        def measurement(self, model, batch):
            return super().measurement(model, batch) * (batch["points"][:, 0] > 0)

        def losses(self, model, batch):
            return super().losses(model, batch) * (batch["labels"] > 0)

    zero_rows, zero_columns = QUERY["points"][:][:, 0] <= 0, TRAIN["labels"][:] == 0
    for name in BLOCKWISE:
        settings = {} if name == "datainf" else {"curvature": "fisher"}
        found = run(network, METHODS[name](**settings), task=Flat()).values
        np.testing.assert_array_equal(found == 0, zero_rows.numpy()[:, None] | zero_columns.numpy())
    with pytest.raises(UnsupportedError, match=r"Flat says nothing.*curvature='fisher'"):
        run(network, "ekfac", task=Flat())


def test_training_data_without_any_gradient_score_zero(network):
    class Nothing(Classification):
        def losses(self, model, batch):
            return super().losses(model, batch) * 0

    for name in BLOCKWISE:
        settings = {} if name == "datainf" else {"curvature": "fisher"}
        assert not run(network, METHODS[name](**settings), task=Nothing()).values.any()


def test_bad_settings_are_named(network):
    for kind in (Diagonal, KFac, EKFac, DataInf):
        for damping in (0.0, -1):
            with pytest.raises(ValueError, match="damping must be positive"):
                kind(damping=damping)
        with pytest.raises(ValueError, match="either last_layer"):
            kind(last_layer=True, modules=("head",))
    with pytest.raises(ValueError, match="curvature must be one of true_fisher, gauss_newton, fisher"):
        KFac(curvature="hessian")
    config = tf.GPT2Config(vocab_size=20, n_embd=4, n_layer=1, n_head=1, n_positions=4, bos_token_id=0, eos_token_id=0)
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]] * 3, "labels": [[1, 2, 3]] * 3})
    with pytest.raises(UnsupportedError, match="use curvature='fisher'"):
        run(tf.GPT2LMHeadModel(config), EKFac(curvature="gauss_newton"), rows, rows, task=None)


def test_infinite_gradients_are_refused_by_row(network):
    rows = {key: TRAIN[key][:].clone() for key in ("points", "labels")}
    rows["points"][7] = 1e30
    train = datasets.Dataset.from_dict({key: value.numpy() for key, value in rows.items()}).with_format("torch")
    with pytest.raises(NonFiniteError, match="row 7"):
        run(network, EKFac(curvature="fisher", modules=("body.0",)), train)


def test_a_layer_that_stops_giving_factors_is_named(network):
    block = blocks.Block("head", ("head.weight",), (3, 5), "linear")
    with pytest.raises(UnsupportedError, match=r"head has no Kronecker-factored curvature.*modules="):
        block.matrices({"head.weight": [Dense(torch.zeros(2, 3, 5))]})


def test_a_table_tied_to_a_head_keeps_the_trace_of_both():
    model, batch = make("gpt2")
    rows = CurvatureRows(model, infer_task(model), Rows(batch), "fisher", None)
    (spectrum,) = (s for s in fit(model, Rows(batch), "kfac").spectra if s.block.name == "transformer.wte.weight")
    assert spectrum.block.kind == "table"
    total = 0.0
    for gradients in rows:
        for term in gradients.terms[spectrum.block.name]:
            lefts = term.left.square().sum(2) if isinstance(term, Outer) else 1.0
            total += float((lefts * term.right.square().sum(2)).sum())
    assert spectrum.trace == pytest.approx(total, rel=1e-4)
