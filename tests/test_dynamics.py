"""Methods that follow a training: SOURCE against its formula in dense matrices and its limits, TracIn with Adam."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import transformers as tf
from tiny import arguments, model, points

from hf_attribution.attribution import attribute, self_influence
from hf_attribution.checkpoints import trainer_checkpoints
from hf_attribution.curvature import flat
from hf_attribution.errors import MismatchError, UnsupportedError
from hf_attribution.methods import METHODS, Source, get_method, source
from hf_attribution.problem import Checkpoint
from hf_attribution.tasks import Classification
from hf_attribution.weights import load_weights

N, Q = 11, 4


def collate(rows):
    return {
        "points": torch.tensor([row["points"] for row in rows], dtype=torch.float64),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


@pytest.fixture(scope="module")
def train():
    return points(N, seed=1)


@pytest.fixture(scope="module")
def query():
    return points(Q, seed=2)


def train_model(folder, optim, start, train):
    settings = {"optim_args": "momentum=0.6"} if optim == "sgd" else {}
    args = arguments(folder, optim=optim, save_strategy="steps", save_steps=2, num_train_epochs=4, **settings)
    trainer = tf.Trainer(start.double(), args, train_dataset=train, data_collator=collate)
    trainer.train()
    return trainer.model, folder


@pytest.fixture(scope="module", params=["sgd", "adamw_torch"])
def run(request, train, tmp_path_factory):
    """A trained model and the folder of its six checkpoints."""
    folder = tmp_path_factory.mktemp(request.param)
    return train_model(folder, request.param, model(hidden=4, num_labels=3), train)


def scores(run, train, query, method, checkpoints=None, **settings):
    trained, folder = run
    return attribute(
        trained, train, query, method=get_method(method, **settings), data_collator=collate, progress=False,
        checkpoints=checkpoints if checkpoints is not None else trainer_checkpoints(folder),
    ).values  # fmt: skip


def gradients(weights, rows, function):
    values = function(weights, collate(list(rows)))
    found = [torch.autograd.grad(v, list(weights.parameters()), retain_graph=True) for v in values]
    return torch.stack([torch.cat([g.flatten() for g in each]) for each in found])


def gauss_newton(weights, rows):
    """The mean Gauss-Newton matrix, from Jacobians of the logits."""
    logits = weights(**collate(list(rows))).logits
    total = 0
    for each in logits:
        p = each.softmax(0).detach()
        jacobian = torch.stack([
            torch.cat([g.flatten() for g in torch.autograd.grad(v, list(weights.parameters()), retain_graph=True)])
            for v in each
        ])  # fmt: skip
        total = total + jacobian.T @ (p.diag() - p[:, None] * p) @ jacobian
    return total / len(logits)


def adam_scale(folder, weights):
    """`1 / (sqrt(v̂) + eps)` of all parameters, by their shapes: the Trainer puts weights before biases."""
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    names = [name for name, _ in weights.named_parameters()]
    ordered = [n for n in names if "bias" not in n] + [n for n in names if "bias" in n]
    group = saved["param_groups"][0]
    found = {}
    for number, name in enumerate(ordered):
        state = saved["state"][number]
        found[name] = 1 / ((state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"])).sqrt() + group["eps"])
    return torch.cat([found[name].flatten() for name in names])


def dense_source(run, train, query, num_segments):
    """The formula of the paper, in dense matrices."""
    trained, folder = run
    checkpoints, task = trainer_checkpoints(folder), Classification()
    models = [load_weights(copy.deepcopy(trained), c.source).eval() for c in checkpoints]
    adam = "state" in torch.load(checkpoints[0].source / "optimizer.pt") and "adam" in str(folder)
    direction = gradients(models[-1], query, task.measurement)
    total = torch.zeros(Q, N, dtype=torch.float64)
    for part in np.array_split(np.arange(len(checkpoints)), num_segments)[::-1]:
        rates = torch.tensor([checkpoints[n].learning_rate_sum for n in part], dtype=torch.float64)
        shares = rates / rates.sum()
        mean = sum(s * gauss_newton(models[n], train) for s, n in zip(shares, part, strict=True))
        gradient = sum(s * gradients(models[n], train, task.gains) for s, n in zip(shares, part, strict=True))
        scale = torch.ones(len(mean), dtype=torch.float64)
        time = rates.sum() if adam else rates.sum() / (1 - 0.6)
        if adam:
            scale = sum(s * adam_scale(checkpoints[n].source, trained) for s, n in zip(shares, part, strict=True))
        # The flow dδ/dt = -P (H δ - g), by one matrix exponential of the system augmented with its constant.
        size = len(mean)
        system = torch.zeros(2 * size, 2 * size, dtype=torch.float64)
        system[:size, :size], system[:size, size:] = -scale[:, None] * mean, torch.diag(scale)
        flow = torch.linalg.matrix_exp(time * system)
        total += direction @ flow[:size, size:] @ gradient.T / N
        direction = direction @ flow[:size, :size]
    return total.numpy()


@pytest.mark.parametrize("solver", ["dual", "explicit"])
@pytest.mark.parametrize("num_segments", [1, 3, 6])
def test_source_equals_its_formula_in_dense_matrices(run, train, query, num_segments, solver):
    expected = dense_source(run, train, query, num_segments)
    settings = {"segments": num_segments, "solver": solver, "curvature": "gauss_newton"}
    found = scores(run, train, query, "source", **settings)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("solver", ["auto", "ekfac", "dual", "explicit"])
def test_short_segments_are_tracin(run, train, query, solver):
    """Where little is learned, a checkpoint counts by its learning rates, and curvature not at all."""
    _, folder = run
    short = [
        dataclasses.replace(c, learning_rate_sum=1e-8 * c.learning_rate_sum) for c in trainer_checkpoints(folder)[-1:]
    ]
    optimizer = "adam" if "adam" in str(folder) else "sgd"
    expected = scores(run, train, query, "tracin", short, optimizer=optimizer)
    found = scores(run, train, query, "source", short, segments=1, solver=solver)
    momentum = 0.6 if optimizer == "sgd" else 0.0
    factor = short[0].learning_rate_sum / short[0].weight / (1 - momentum) / N
    np.testing.assert_allclose(found, factor * expected, rtol=1e-4, atol=1e-6 * factor * np.abs(expected).max())


@pytest.mark.parametrize(
    ("solver", "time", "method", "given"),
    [("ekfac", 1e14, "ekfac", {}), ("dual", 1e10, "influence", {"solver": "explicit"})],
)
def test_one_long_segment_is_the_influence_function(run, train, query, solver, time, method, given):
    _, folder = run
    long = [dataclasses.replace(trainer_checkpoints(folder)[-1], learning_rate_sum=time)]
    settings = {"segments": 1, "optimizer": "sgd", "momentum": 0.0, "curvature": "gauss_newton", "solver": solver}
    found = scores(run, train, query, "source", long, **settings, modules=("head",))
    expected = scores(
        run, train, query, method, [dataclasses.replace(long[0], weight=1.0)], damping=1e-13,
        curvature="gauss_newton", modules=("head",), **given,
    )  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_ekfac_is_exact_where_the_curvature_is_a_kronecker_product(optim, tmp_path):
    """Inputs of ±1 to one weight matrix: all examples have the same input factor, and Adam's scale one column."""
    signs = points(N, size=1, seed=3).map(lambda row: {"points": [1.0 if row["points"][0] > 0 else -1.0]})
    run = train_model(tmp_path, optim, model(size=1, num_labels=3), signs)
    settings = {"modules": ("head.weight",), "curvature": "gauss_newton", "segments": 2}
    exact, found = (scores(run, signs, signs, "source", solver=solver, **settings) for solver in ("explicit", "ekfac"))
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-7 * np.abs(exact).max())
    assert np.linalg.matrix_rank(exact, tol=1e-5 * np.abs(exact).max()) > 1


@pytest.mark.parametrize("solver", ["dual", "explicit"])
def test_exact_solvers_agree_in_single_precision(run, train, query, solver):
    trained, folder = run
    single = (copy.deepcopy(trained).float(), folder)

    def to_single(rows):
        return {key: value.float() if key == "points" else value for key, value in collate(rows).items()}

    expected = scores(run, train, query, "source", solver="explicit", curvature="fisher")
    found = attribute(
        single[0], train, query, method=Source(solver=solver, curvature="fisher"), data_collator=to_single,
        checkpoints=trainer_checkpoints(folder), progress=False,
    ).values  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=2e-3 * np.abs(expected).max())


def test_curvature_that_does_not_fit_is_refused(run, train, query, monkeypatch):
    monkeypatch.setattr(flat, "MAX_BYTES", 1000)
    monkeypatch.setattr(flat, "MAX_EXPLICIT", 10)
    for solver in ("dual", "explicit"):
        with pytest.raises(UnsupportedError, match=r"GB.*use solver='ekfac'"):
            scores(run, train, query, "source", solver=solver)


def test_the_exact_solver_is_chosen_where_it_fits(run, train, query, monkeypatch):
    trained, folder = run

    def found(**settings):
        return attribute(
            trained, train, query, method=Source(**settings), data_collator=collate, progress=False,
            checkpoints=trainer_checkpoints(folder),
        )  # fmt: skip

    exact = found()
    assert exact.provenance["choices"]["solver"] == "dual"
    assert np.array_equal(exact.values, found(solver="dual").values)
    monkeypatch.setattr(source, "MAX_BYTES", 1000)
    by_memory = found()
    assert by_memory.provenance["choices"]["solver"] == "ekfac"
    assert np.array_equal(by_memory.values, found(solver="ekfac").values)
    monkeypatch.undo()
    monkeypatch.setattr(source, "MAX_AUTO_ROWS", 2 * N - 1)  # 3 segments of 2 checkpoints each
    assert found().provenance["choices"]["solver"] == "ekfac"
    assert found(segments=6).provenance["choices"]["solver"] == "dual"


def test_what_source_must_know_is_asked_for_before_work(run, train, query, tmp_path):
    trained, folder = run
    checkpoints = trainer_checkpoints(folder)
    with pytest.raises(ValueError, match=r"3 segments.*\(1 in all\)"):
        scores(run, train, query, "source", checkpoints[:1])
    with pytest.raises(ValueError, match="does not say its learning rates"):
        scores(run, train, query, "source", [c.source for c in checkpoints])
    with pytest.raises(ValueError, match=r"no optimizer\.pt.*momentum="):
        scores(run, train, query, "source", [Checkpoint(trained, learning_rate_sum=1.0)] * 3)
    other = "sgd" if "adam" in str(folder) else "adam"
    with pytest.raises(ValueError, match=rf"not {other}\."):
        scores(run, train, query, "source", optimizer=other)
    for wrong in (
        {"segments": 0},
        {"momentum": 1.0},
        {"solver": "cg"},
        {"curvature": "hessian"},
        {"optimizer": "x"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Source(**wrong)


def test_tracin_with_adam_divides_by_the_second_moments(run, train, query):
    trained, folder = run
    checkpoints, task = trainer_checkpoints(folder), Classification("negative_loss")
    if "adam" not in str(folder):
        with pytest.raises(UnsupportedError, match="trained with sgd"):
            scores(run, train, query, "tracin", optimizer="adam")
        return
    expected, own = np.zeros((Q, N)), np.zeros(N)
    for checkpoint in checkpoints:
        weights = load_weights(copy.deepcopy(trained), checkpoint.source).eval()
        gains = gradients(weights, train, task.gains)
        scaled = checkpoint.weight * adam_scale(checkpoint.source, trained) * gains
        expected += (gradients(weights, query, Classification().measurement) @ scaled.T).numpy()
        own += (gains * scaled).sum(1).numpy()
    found = scores(run, train, query, "tracin", optimizer="adam")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    kwargs = {"method": get_method("tracin", optimizer="adam"), "checkpoints": checkpoints, "task": task}
    influence = self_influence(trained, train, data_collator=collate, progress=False, **kwargs)
    np.testing.assert_allclose(influence, own, rtol=1e-5)


def test_tracin_reads_queries_and_training_examples_once_for_each_checkpoint(run, train, query):
    trained, folder = run
    rows = []

    def counting(batch):
        rows.append(len(batch))
        return collate(batch)

    checkpoints = trainer_checkpoints(folder)
    optimizer = "adam" if "adam" in str(folder) else "sgd"
    for number in (1, 3):
        rows.clear()
        attribute(
            trained, train, query, method=METHODS["tracin"](optimizer=optimizer), data_collator=counting,
            checkpoints=checkpoints[:number], batch_size=4, progress=False,
        )  # fmt: skip
        looked_at = [size for size in rows if size <= 2]  # two examples, to check the rules on
        assert sum(rows) - sum(looked_at) == number * (N + Q)


def test_second_moments_of_other_parameters_are_refused(run, train, query):
    trained, folder = run
    if "adam" not in str(folder):
        return
    frozen = copy.deepcopy(trained)
    frozen.head.bias.requires_grad_(False)
    with pytest.raises(MismatchError, match="groups of 2, 2 parameters"):
        scores((frozen, folder), train, query, "tracin", optimizer="adam")
    with pytest.raises(ValueError, match=r"needs the optimizer\.pt"):
        scores(run, train, query, "tracin", [trained], optimizer="adam")
    with pytest.raises(ValueError, match="optimizer must be"):
        get_method("tracin", optimizer="lion")
