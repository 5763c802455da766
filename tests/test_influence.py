"""Influence functions against closed forms, brute force and true leave-one-out retraining."""

import copy

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from sklearn.datasets import load_digits
from tiny import PointsConfig, PointsForSequenceClassification, normal_points
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_attribution import Influence, LoGra, attribute
from hf_attribution.curvature import dual, operators
from hf_attribution.errors import ConvergenceError, UnsupportedError
from hf_attribution.gradients import products
from hf_attribution.methods import influence
from hf_attribution.tasks import Classification, Regression

N, Q = 23, 6


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return PointsForSequenceClassification(PointsConfig(size=4, hidden=5, num_labels=3)).eval()


TRAIN, QUERY = normal_points(N, 1), normal_points(Q, 2)


def run(model, method, train=TRAIN, query=QUERY, **kwargs):
    kwargs = {"task": Classification(), "batch_size": 5, "progress": False, **kwargs}
    return attribute(model, train, query, method=method, **kwargs)


def flat_gradients(model, dataset, function):
    """One plain backward pass per row and output: `[rows, outputs, P]` in double precision."""
    model = copy.deepcopy(model).double()
    rows = []
    for row in dataset:
        row = {key: v[None].double() if v.is_floating_point() else v[None] for key, v in row.items()}
        values = function(model, row).flatten()
        found = [torch.autograd.grad(v, list(model.parameters()), retain_graph=True) for v in values]
        rows.append(torch.stack([torch.cat([g.flatten() for g in gradient]) for gradient in found]))
    return torch.stack(rows)


def brute_force(model, curvature, task=None, damping=0.3, train=TRAIN, query=QUERY, damp=None):
    """Dense H, its inverse, and scores with self-influences, all in double precision."""
    task = task or Classification()
    gains = flat_gradients(model, train, task.gains)[:, 0]
    measured = flat_gradients(model, query, task.measurement)[:, 0]
    unit = gains.square().sum(1).mean()
    if curvature == "fisher":
        matrix = gains.T @ gains
    elif curvature == "gauss_newton":
        jacobians = flat_gradients(model, train, lambda m, b: m(b["points"]).logits)
        with torch.no_grad():
            p = copy.deepcopy(model).double()(train["points"][:].double()).logits.softmax(1)
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        matrix = torch.einsum("ncp,ncd,ndq->pq", jacobians, inner, jacobians)
        unit = matrix.trace() / len(train)
    else:
        double = copy.deepcopy(model).double()
        names, tensors = zip(*double.named_parameters(), strict=True)
        sizes = [t.numel() for t in tensors]

        def total(vector):
            parameters = {n: v.view_as(t) for n, v, t in zip(names, vector.split(sizes), tensors, strict=True)}
            called = lambda **inputs: torch.func.functional_call(double, parameters, (), inputs)  # noqa: E731
            batch = {"points": train["points"][:].double(), "labels": train["labels"][:]}
            return torch.nn.functional.cross_entropy(called(**batch).logits, batch["labels"], reduction="sum")

        matrix = torch.func.hessian(total)(torch.cat([t.detach().flatten() for t in tensors]))
    ridge = damping * unit
    inverse = torch.linalg.inv(matrix + ridge * torch.eye(len(matrix)))
    own = torch.einsum("ip,pq,iq->i", gains, inverse, gains)
    return measured @ inverse @ gains.T, own, float(ridge)


def agree(found, expected, tolerance=1e-4):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * float(np.abs(expected).max()))


CASES = [
    (curvature, solver)
    for curvature in influence.CURVATURES
    for solver in ("dual", "explicit", "cg", "lissa", "arnoldi")
    if (curvature, solver) != ("hessian", "dual")
]


@pytest.mark.parametrize("normalize", [None, "self_influence"])
@pytest.mark.parametrize(("curvature", "solver"), CASES)
def test_every_solver_of_every_curvature_equals_brute_force(network, curvature, solver, normalize):
    # The Hessian of a network is indefinite: damped by more than its most negative eigenvalue, all solvers must agree.
    damping = 3.0 if curvature == "hessian" else 0.3
    expected, own, ridge = brute_force(network, curvature, damping=damping)
    expected = expected / own.sqrt() if normalize else expected
    method = Influence(curvature, solver, damping, normalize, tolerance=1e-5, iterations=1000)
    scores = run(network, method, batch_size=12)
    agree(scores.values, expected.numpy())
    choices = scores.provenance["choices"]
    assert choices["lambda"][0] == pytest.approx(ridge, rel=1e-4)
    assert choices["solver"] == solver
    assert choices.get("residual", 0) < 1e-4


@pytest.mark.parametrize("curvature", ["fisher", "gauss_newton"])
def test_what_fits_in_memory_does_not_change_a_score(network, curvature, monkeypatch):
    expected = {solver: run(network, Influence(curvature, solver, 3.0)).values for solver in ("dual", "cg")}
    monkeypatch.setattr(products, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(products, "TILE_BYTES", 500)
    monkeypatch.setattr(operators, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(operators, "ROWS_BYTES", 1000)
    for solver, values in expected.items():
        agree(run(network, Influence(curvature, solver, 3.0)).values, values)


@pytest.mark.parametrize("normalize", [None, "self_influence"])
@pytest.mark.parametrize(("curvature", "solver"), CASES)
def test_models_in_double_precision(network, curvature, solver, normalize):
    damping = 3.0 if curvature == "hessian" else 0.3
    expected, own, _ = brute_force(network, curvature, damping=damping)
    expected = expected / own.sqrt() if normalize else expected

    def collate(rows):
        return {
            "points": torch.stack([row["points"] for row in rows]).double(),
            "labels": torch.stack([row["labels"] for row in rows]),
        }

    method = Influence(curvature, solver, damping, normalize, tolerance=1e-10)
    found = run(copy.deepcopy(network).double(), method, data_collator=collate).values
    agree(found, expected.numpy(), 2e-5 if curvature == "gauss_newton" else 1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gauss_newton_with_label_smoothing(network, smoothing):
    task = Classification(label_smoothing=smoothing)
    expected, _, _ = brute_force(network, "gauss_newton", task)
    for solver in ("dual", "explicit"):
        agree(run(network, Influence("gauss_newton", solver), task=task).values, expected.numpy())


def test_rows_without_weight_are_left_out_of_the_gauss_newton_matrix(network, monkeypatch):
    confident = copy.deepcopy(network)
    with torch.no_grad():
        confident.head.weight.mul_(6)
    kept = []
    solve = dual.gradient_kernel
    monkeypatch.setattr(
        dual, "gradient_kernel", lambda rows, *rest: kept.append(sum(len(r.rows) for r in rows)) or solve(rows, *rest)
    )
    expected = brute_force(confident, "gauss_newton")[0].numpy()
    agree(run(confident, Influence("gauss_newton")).values, expected, 1e-3)
    monkeypatch.setattr(dual, "NEGLIGIBLE", 0.0)
    agree(run(confident, Influence("gauss_newton")).values, expected, 1e-4)
    assert kept[0] < kept[1] <= 3 * N


def test_a_group_effect_is_a_standardised_term_of_the_same_class(network):
    plain = run(network, Influence()).values
    found = run(network, Influence(group_effect=0.7)).values
    same = (np.array(QUERY["labels"])[:, None] == np.array(TRAIN["labels"])).astype(float)
    term = (same - same.mean(1, keepdims=True)) / same.std(1, keepdims=True)
    agree(found, plain + 0.7 * plain.std(1, keepdims=True) * term)
    # A query whose class no example has keeps its scores.
    strange = QUERY.with_format(None).map(lambda row: {"labels": 2}).with_format("torch")
    without = TRAIN.with_format(None).filter(lambda row: row["labels"] != 2).with_format("torch")
    values = [run(network, Influence(group_effect=w), without, strange).values for w in (None, 1.0)]
    np.testing.assert_array_equal(*values)


def test_automatic_settings_are_recorded(network):
    found = run(network, "influence").provenance["choices"]
    assert (found["damping"], found["solver"]) == (0.3, "dual")
    assert run(network, Influence("hessian", damping=3.0)).provenance["choices"]["solver"] == "explicit"
    np.testing.assert_array_equal(run(network, "influence").values, run(network, Influence(damping=0.3)).values)


def test_influence_averages_over_checkpoints_each_with_its_own_damping(network):
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    both = run(network, "influence", checkpoints=[network, other])
    expected = [brute_force(model, "fisher") for model in (network, other)]
    agree(both.values, ((expected[0][0] + expected[1][0]) / 2).numpy())
    np.testing.assert_allclose(both.provenance["choices"]["lambda"], [ridge for *_, ridge in expected], rtol=1e-4)


@pytest.mark.parametrize("normalize", [None, "self_influence"])
@pytest.mark.parametrize("num_train", [N, 80])
def test_projected_gradients_have_the_closed_form_of_their_own_space(network, num_train, normalize):
    # One weight matrix, sketched to as many dimensions as it has entries: that only permutes them and changes signs.
    train = normal_points(num_train, 3)
    modules = ("body.0.weight", "head.weight")
    exact = run(network, Influence(modules=modules[:1], normalize=normalize), train)
    projected = run(network, Influence(modules=modules[:1], normalize=normalize, dim=20), train)
    assert projected.provenance["choices"]["dim"] == 20
    agree(projected.values, exact.values)
    if normalize is None:
        agree(run(network, LoGra(dim=20, modules=modules[:1]), train).values, exact.values)


def test_too_many_gradients_are_projected_automatically(network, monkeypatch):
    monkeypatch.setattr(influence, "EXACT_SIZE", 10)
    found = run(network, "influence")
    assert found.provenance["choices"]["dim"] == influence.AUTO_DIM
    assert "dim" not in run(network, Influence(dim=None)).provenance["choices"]


def test_the_last_layer_is_found(network):
    found = run(network, Influence(last_layer=True))
    assert found.provenance["choices"]["modules"] == ["head"]
    np.testing.assert_array_equal(found.values, run(network, Influence(modules=("head",))).values)


def test_queries_and_examples_without_gradient_score_zero(network):
    class Flat(Classification):
        def measurement(self, model, batch):
            return super().measurement(model, batch) * (batch["points"][:, 0] > 0)

        def losses(self, model, batch):
            return super().losses(model, batch) * (batch["labels"] > 0)

    zero_rows, zero_columns = QUERY["points"][:][:, 0] <= 0, TRAIN["labels"][:] == 0
    assert 0 < zero_rows.sum() < Q
    assert 0 < zero_columns.sum() < N
    for solver in ("dual", "explicit", "cg"):
        found = run(network, Influence(solver=solver, normalize="self_influence"), task=Flat()).values
        np.testing.assert_array_equal(found == 0, zero_rows.numpy()[:, None] | zero_columns.numpy())


def test_an_attention_model_has_a_hessian():
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=20, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6,
        max_position_embeddings=4, num_labels=2,
    )  # fmt: skip
    model = tf.BertForSequenceClassification(config)
    rng = np.random.default_rng(0)
    rows = datasets.Dataset.from_dict({"input_ids": rng.integers(20, size=(6, 3)), "labels": rng.integers(2, size=6)})
    explicit, by_cg = (
        run(model, Influence("hessian", solver, damping=30.0), rows, rows, task=None).values
        for solver in ("explicit", "cg")
    )
    agree(by_cg, explicit, 1e-3)


class Linear(torch.nn.Module):
    def __init__(self, size, outputs):
        super().__init__()
        self.head = torch.nn.Linear(size, outputs)

    def forward(self, points, labels=None):
        return SequenceClassifierOutput(logits=self.head(points))


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("solver", ["explicit", "cg"])
def test_ridge_regression_equals_its_closed_form(curvature, solver):
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(30, 4)), rng.normal(size=30)
    design, alpha = np.hstack([inputs, np.ones((30, 1))]), 2.0
    matrix = 2 * design.T @ design + alpha * np.eye(5)
    theta = np.linalg.solve(matrix, 2 * design.T @ targets)
    model = Linear(4, 1)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor(theta[:4])[None])
        model.head.bias.copy_(torch.tensor(theta[4:]))
    data = datasets.Dataset.from_dict({"points": inputs, "labels": targets}).with_format("torch", dtype=torch.float32)
    residuals = targets - design @ theta
    # The exact effect of leaving i out is -h_qi r_i · 2 / (1 - h_ii): influence is its first order.
    expected = design @ np.linalg.solve(matrix, design.T) * 2 * residuals
    squares = 4 * (design * residuals[:, None]) ** 2
    unit = 2 * (design**2).sum() / 30 if curvature == "gauss_newton" else squares.sum() / 30
    task = Regression("logit")
    found = run(model, Influence(curvature, solver, alpha / unit, tolerance=1e-6), data, data, task=task).values
    agree(found, expected)
    leverages = 2 * np.einsum("ip,pq,iq->i", design, np.linalg.inv(matrix), design)
    without = [np.linalg.solve(matrix - 2 * np.outer(x, x), 2 * (design.T @ targets - x * y))
               for x, y in zip(design, targets, strict=True)]  # fmt: skip
    agree((design @ theta)[:, None] - design @ np.transpose(without), expected / (1 - leverages))


def fit_logistic(inputs, labels, alpha, theta):
    """Weights `[C, p]` at the optimum of summed cross-entropy plus `alpha/2 ‖θ‖²`, by Newton's method."""
    for _ in range(30):
        p = (inputs @ theta.T).softmax(1)
        gradient = (p - torch.eye(10)[labels]).T @ inputs + alpha * theta
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        matrix = torch.einsum("ncd,np,nq->cpdq", inner, inputs, inputs).reshape(theta.numel(), -1)
        step = torch.linalg.solve(matrix + alpha * torch.eye(len(matrix)), gradient.flatten())
        theta = theta - step.view_as(theta)
        if step.norm() < 1e-9:
            return theta
    raise AssertionError("Newton's method did not converge")


def test_logistic_regression_predicts_true_leave_one_out_retraining():
    digits, count, alpha = load_digits(), 300, 5.0
    pixels = torch.tensor(digits.images / 16)[: count + 20]
    inputs = torch.nn.functional.avg_pool2d(pixels[:, None], 2).flatten(1)
    inputs, labels = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1), torch.tensor(digits.target)[: len(inputs)]
    train, query = slice(0, count), slice(count, count + 20)
    theta = fit_logistic(inputs[train], labels[train], alpha, torch.zeros(10, 17, dtype=torch.float64))
    model = Linear(16, 10)
    with torch.no_grad():
        model.head.weight.copy_(theta[:, :16])
        model.head.bias.copy_(theta[:, 16])
    data = [
        datasets.Dataset.from_dict({"points": inputs[rows, :16].float().numpy(), "labels": labels[rows].numpy()})
        .with_format("torch")
        for rows in (train, query)
    ]  # fmt: skip

    def margins(theta):
        logits = inputs[query] @ theta.T
        others = logits.scatter(1, labels[query][:, None], -torch.inf).logsumexp(1)
        return logits.gather(1, labels[query][:, None])[:, 0] - others

    left_out = list(range(0, count, 5))
    true = torch.stack([
        margins(theta) - margins(fit_logistic(*(v[[j for j in range(count) if j != i]] for v in (inputs, labels)),
                                              alpha, theta))
        for i in left_out
    ], dim=1).numpy()  # fmt: skip
    p = (inputs[train] @ theta.T).softmax(1)
    norms = inputs[train].square().sum(1)
    units = {
        "gauss_newton": ((p * (1 - p)).sum(1) * norms).mean(),
        "hessian": ((p - torch.eye(10)[labels[train]]).square().sum(1) * norms).mean(),
    }
    found = {}
    for curvature, solver in (("gauss_newton", "dual"), ("gauss_newton", "cg"), ("hessian", "explicit")):
        method = Influence(curvature, solver, float(alpha / units[curvature]), tolerance=1e-6)
        found[solver] = run(model, method, *data).values
        assert np.corrcoef(found[solver][:, left_out].ravel(), true.ravel())[0, 1] > 0.99
    agree(found["cg"], found["dual"])
    agree(found["explicit"], found["dual"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": 0.0}, "damping must be positive"),
        ({"damping": -1}, "damping must be positive"),
        ({"curvature": "ekfac"}, "curvature must be one of fisher, gauss_newton, hessian"),
        ({"solver": "lu"}, "solver must be one of"),
        ({"normalize": "cosine"}, "normalize must be one of None, self_influence"),
        ({"dim": 8, "curvature": "hessian"}, "dim=... projects"),
        ({"curvature": "hessian", "solver": "dual"}, "no dual form"),
        ({"group_effect": -1.0}, "group_effect must not be negative"),
        ({"last_layer": True, "modules": ("head",)}, "either last_layer"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Influence(**settings)
    with pytest.raises(ValueError, match="damping must be positive"):
        LoGra(damping=0.0)


def test_what_cannot_be_solved_is_named(network, monkeypatch):
    with pytest.raises(UnsupportedError, match=r"curvature -.*not positive definite"):
        run(network, Influence("hessian", "cg", damping=1e-6))
    with pytest.raises(ConvergenceError, match="cg reached a relative residual of"):
        run(network, Influence(solver="cg", damping=1e-5, iterations=2))
    with pytest.raises(ConvergenceError, match="diverges"):
        run(network, Influence("hessian", "lissa", damping=1e-6, iterations=100_000))
    monkeypatch.setattr(dual, "MAX_ROWS", N - 1)
    with pytest.raises(UnsupportedError, match=r"23 rows takes 0 GB.*dim=4096"):
        run(network, Influence(solver="dual"))


def test_language_models_have_no_gauss_newton_in_closed_form():
    config = tf.GPT2Config(vocab_size=20, n_embd=4, n_layer=1, n_head=1, n_positions=4, bos_token_id=0, eos_token_id=0)
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]] * 3, "labels": [[1, 2, 3]] * 3})
    with pytest.raises(UnsupportedError, match="use curvature='fisher'"):
        run(tf.GPT2LMHeadModel(config), Influence("gauss_newton"), rows, rows, task=None)
