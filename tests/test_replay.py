"""Recorded trainings: repeated bit for bit, and differentiated exactly."""

import dataclasses

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import make
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_attribution.errors import NonFiniteError
from hf_attribution.replay.run import RecordedRun
from hf_attribution.replay.sweep import Differentiable
from hf_attribution.replay.training import RecordedTraining
from hf_attribution.retraining.weighted import give_weights, weighted_class
from hf_attribution.tasks import infer_task


class RecordedTrainer(RecordedTraining, Trainer):
    pass


class SmoothConfig(PretrainedConfig):
    model_type = "smooth"

    def __init__(self, hidden=6, dropout=0.0, tied=False, **kwargs):
        self.hidden, self.dropout, self.tied = hidden, dropout, tied
        super().__init__(**kwargs)


class SmoothForSequenceClassification(PreTrainedModel):
    """A small network with a bias, a norm and dropout, and perhaps a layer that is used twice."""

    config_class = SmoothConfig

    def __init__(self, config):
        super().__init__(config)
        h = config.hidden
        self.inner = nn.Linear(4, h)
        self.norm = nn.LayerNorm(h)
        self.middle = nn.Linear(h, h)
        self.again = self.middle if config.tied else nn.Linear(h, h)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(h, config.num_labels)
        self.post_init()

    def forward(self, points=None, labels=None):
        hidden = self.dropout(nn.functional.gelu(self.norm(self.inner(points))))
        hidden = nn.functional.gelu(self.middle(hidden)) + nn.functional.gelu(self.again(hidden))
        logits = self.head(self.dropout(hidden))
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return SequenceClassifierOutput(loss=loss, logits=logits)


def smooth(seed=0, dtype=torch.float64, **config):
    torch.manual_seed(seed)
    model = SmoothForSequenceClassification(SmoothConfig(num_labels=3, **config)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def points(rows=12, seed=0, dtype=np.float64):
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(rows, 4)).astype(dtype)
    data = Dataset.from_dict({"points": inputs.tolist(), "labels": generator.integers(3, size=rows).tolist()})
    return data


class Collate:
    """float64 batches: the default collator makes float32."""

    def __call__(self, rows):
        return {
            "points": torch.tensor([row["points"] for row in rows], dtype=torch.float64),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }


def arguments(folder, **settings):
    defaults = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "optim": "sgd",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "max_grad_norm": 0.0,
        "seed": 3,
        "data_seed": 4,
    }
    return TrainingArguments(output_dir=str(folder), **(defaults | settings))


def trainer_of(folder, model=None, record=True, trainer_class=RecordedTrainer, data=None, **settings):
    extra = settings.pop("trainer_settings", {})
    trainer = trainer_class(
        model=model if model is not None else smooth(),
        args=arguments(folder, **settings),
        train_dataset=data if data is not None else points(),
        **({"data_collator": Collate()} | extra),
    )
    if record:
        trainer.recording_dir = folder / "recording"
    return trainer


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def ready(trainer):
    run = RecordedRun.open(trainer.recording_dir, trainer)
    return Differentiable.prepare(run, infer_task(trainer.model))


def query_batch(rows=3, seed=9):
    return Collate()(list(points(rows, seed)))


def targets_of(prepared, batch, parameters):
    """Gradients of the queries' measurements, `[Q, P]`, one by one."""
    flat = prepared.flat
    flat.model.eval()
    point = parameters.detach().requires_grad_()
    values = flat(flat.task.measurement, point, batch)
    rows = [torch.autograd.grad(value, point, retain_graph=True)[0] for value in values]
    flat.model.train()
    return torch.stack(rows)


def measured(prepared, batch, weights):
    return measured_at(prepared, batch, prepared.final(weights))


def measured_at(prepared, batch, parameters):
    flat = prepared.flat
    flat.model.eval()
    with torch.no_grad():
        values = flat(flat.task.measurement, parameters, batch)
    flat.model.train()
    return values


def finite_differences(prepared, batch, num_examples, h=1e-4):
    """Of fourth order."""
    columns = []
    for example in range(num_examples):
        values = []
        for step in (-2, -1, 1, 2):
            weights = torch.ones(num_examples, dtype=torch.float64)
            weights[example] += step * h
            values.append(measured(prepared, batch, weights))
        columns.append((values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h))
    return torch.stack(columns, dim=1)


def check_exact(trainer, batch=None, tolerance=1e-7, **settings):
    batch = batch if batch is not None else query_batch()
    trainer.train()
    prepared = ready(trainer)
    scores, _ = prepared.sweep(targets_of(prepared, batch, prepared.final()), **settings)
    expected = finite_differences(prepared, batch, len(trainer.train_dataset))
    assert float(expected.norm()) > 1e-3
    assert float((scores - expected).norm() / expected.norm()) < tolerance
    return prepared, scores


def test_recording_changes_nothing(tmp_path):
    settings = {"optim": "adamw_torch", "gradient_accumulation_steps": 2, "max_grad_norm": 1.0}
    plain = trainer_of(tmp_path / "a", smooth(dropout=0.2), trainer_class=Trainer, record=False, **settings)
    plain.train()
    recorded = trainer_of(tmp_path / "b", smooth(dropout=0.2), **settings)
    recorded.train()
    assert same(state_of(plain.model), state_of(recorded.model))


class WithOptimizer(RecordedTrainer):
    """A trainer whose optimiser has other settings, in the Trainer's own groups: with decay and without."""

    kind, settings = torch.optim.SGD, {}

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer()
        groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in optimizer.param_groups]
        self.optimizer = self.kind(groups, lr=self.args.learning_rate, **self.settings)
        return self.optimizer


def with_optimizer(kind, **settings):
    return type("Special", (WithOptimizer,), {"kind": kind, "settings": settings})


ADAM = {"eps": 1e-3, "betas": (0.9, 0.99)}


@pytest.mark.parametrize(
    ("kind", "settings", "tolerance"),
    [
        (torch.optim.SGD, {}, 1e-8),
        (torch.optim.SGD, {"momentum": 0.9}, 1e-8),
        (torch.optim.SGD, {"momentum": 0.8, "nesterov": True}, 1e-8),
        (torch.optim.AdamW, ADAM, 1e-6),
        (torch.optim.AdamW, {**ADAM, "fused": True}, 1e-6),
        (torch.optim.Adam, ADAM, 1e-6),
    ],
)
@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_scores_are_the_derivative_of_the_training(tmp_path, kind, settings, tolerance, clip):
    trainer = trainer_of(
        tmp_path, trainer_class=with_optimizer(kind, **settings), weight_decay=0.1, max_grad_norm=clip,
        learning_rate=0.1 if kind is torch.optim.SGD else 0.02,
    )  # fmt: skip
    check_exact(trainer, tolerance=tolerance)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({"dropout": 0.3}, {}),
        ({"dropout": 0.3}, {"gradient_accumulation_steps": 2}),
        ({"tied": True}, {}),
        ({}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}),
        ({}, {"per_device_train_batch_size": 5}),  # a smaller last batch
        ({}, {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2}),
        ({}, {"lr_scheduler_type": "cosine", "warmup_steps": 2, "num_train_epochs": 3}),
        ({}, {"per_device_train_batch_size": 1}),
    ],
)
def test_what_a_training_may_have(tmp_path, model, settings):
    check_exact(trainer_of(tmp_path, smooth(**model), **settings))


def test_frozen_parameters(tmp_path):
    model = smooth()
    model.inner.weight.requires_grad_(False)
    model.norm.requires_grad_(False)
    check_exact(trainer_of(tmp_path, model))


# Against trainings by the real Trainer


class RowsOfBatch:
    """A collator that looks rows up in a ready batch."""

    def __init__(self, batch):
        self.batch = batch

    def __call__(self, rows):
        picked = torch.tensor([row["row"] for row in rows])
        return {name: value[picked] for name, value in self.batch.items()}


class WeightedTrainer(weighted_class(WithOptimizer)):
    pass


ADAMW = {"kind": torch.optim.AdamW, "settings": ADAM, "learning_rate": 0.02}
MOMENTUM = {"kind": torch.optim.SGD, "settings": {"momentum": 0.9}, "learning_rate": 0.05}
NESTEROV = {"kind": torch.optim.SGD, "settings": {"momentum": 0.8, "nesterov": True}, "learning_rate": 0.05}
CLIPPED = {"weight_decay": 0.1, "max_grad_norm": 0.3}
SCHEDULED = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "gradient_accumulation_steps": 2}


def check_against_real_trainings(
    folder, make_model, batch, num_examples, tolerance, kind, settings, h=1e-4, **arguments
):
    """The scores along a random direction of weights against finite differences of trainings by the Trainer."""
    trainer_class = type("Special", (WeightedTrainer,), {"kind": kind, "settings": settings})
    direction = torch.randn(num_examples, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    task = infer_task(make_model())

    def trained(weights, record):
        trainer = trainer_of(folder, make_model(), record=record, trainer_class=trainer_class, **arguments)
        give_weights(trainer, weights, task)
        trainer.train()
        return trainer

    def outputs(step):
        model = trained(1 + step * h * direction, False).model.eval()
        with torch.no_grad():
            return task.measurement(model, batch)

    prepared = ready(trained(torch.ones(num_examples, dtype=torch.float64), True))
    found = prepared.sweep(targets_of(prepared, batch, prepared.final()))[0] @ direction
    values = [outputs(step) for step in (-2, -1, 1, 2)]
    expected = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)
    assert float(expected.norm()) > 1e-4
    assert float((found - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize(
    ("optimizer", "arguments", "tolerance"),
    [
        (MOMENTUM, CLIPPED, 1e-6),
        (NESTEROV, CLIPPED, 1e-6),
        (MOMENTUM, {**SCHEDULED, "weight_decay": 0.1, "num_train_epochs": 4}, 1e-6),
        (ADAMW, {**CLIPPED, **SCHEDULED, "num_train_epochs": 4}, 1e-5),
    ],
    ids=["momentum", "nesterov", "scheduled momentum", "scheduled adamw"],
)
def test_scores_are_the_derivative_of_real_trainings(tmp_path, optimizer, arguments, tolerance):
    check_against_real_trainings(
        tmp_path, lambda: smooth(dropout=0.2), query_batch(), 12, tolerance, **optimizer, **arguments
    )


def check_family_against_real_trainings(folder, family, optimizer, tolerance, **given):
    batch = {k: v.double() if v.is_floating_point() else v for k, v in make(family)[1].items()}
    check_against_real_trainings(
        folder, lambda: make(family)[0].double(), batch, 5, tolerance, **{**optimizer, "learning_rate": 0.01},
        **CLIPPED, data=Dataset.from_dict({"row": [0, 1, 2, 1, 0]}), per_device_train_batch_size=2,
        remove_unused_columns=False, trainer_settings={"data_collator": RowsOfBatch(batch)}, **given,
    )  # fmt: skip


@pytest.mark.parametrize("optimizer", [NESTEROV, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("family", ["gpt2", "vit", "convnext"])
def test_models_are_differentiated_through_real_trainings(tmp_path, family, optimizer):
    check_family_against_real_trainings(tmp_path, family, optimizer, 1e-5)


@pytest.mark.parametrize(("optimizer", "h"), [(NESTEROV, 0.03), (ADAMW, 1e-3)], ids=["sgd", "adamw"])
def test_t5_is_differentiated_through_real_trainings(tmp_path, optimizer, h):
    """Its norms compute in float32, whose rounding hides smaller changes than these."""
    check_family_against_real_trainings(tmp_path, "t5", optimizer, 2e-3, h=h)


@pytest.mark.parametrize("family", ["bert", "bert_regression", "electra", "bart"])
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch_fused"])
def test_models_of_transformers(tmp_path, family, optim):
    model, batch = make(family)
    model = model.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    trainer = trainer_of(
        tmp_path, model, data=Dataset.from_dict({"row": [0, 1, 2, 1, 0]}), per_device_train_batch_size=2,
        num_train_epochs=1, learning_rate=0.01, optim=optim, adam_epsilon=1e-3, remove_unused_columns=False,
        trainer_settings={"data_collator": RowsOfBatch(batch)}, max_grad_norm=1.0,
    )  # fmt: skip
    # Rotary embeddings, norms and losses of some families compute in float32 islands.
    prepared, _ = check_exact(trainer, batch, tolerance=1e-6)
    assert prepared.product_name == "forward_over_reverse"


# How the states are come by


@pytest.fixture(scope="module")
def adam_run(tmp_path_factory):
    trainer = trainer_of(
        tmp_path_factory.mktemp("run"), smooth(dropout=0.2), optim="adamw_torch", num_train_epochs=7, max_grad_norm=1.0
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("weights", [None, torch.linspace(0.5, 1.5, 12)])
def test_storages_give_the_same_bits(adam_run, weights):
    prepared = ready(adam_run)
    targets = targets_of(prepared, query_batch(), prepared.final(weights))
    full, sqrt, tree = (
        prepared.sweep(targets.clone(), weights, storage=storage)[0] for storage in ("full", "sqrt", "tree")
    )
    assert torch.equal(full, sqrt)
    assert torch.equal(full, tree)


def test_chunks_and_blocks_change_nothing(adam_run):
    prepared = ready(adam_run)
    targets = targets_of(prepared, query_batch(), prepared.final())
    whole = prepared.sweep(targets.clone(), chunk=16)[0]
    assert torch.allclose(prepared.sweep(targets.clone(), chunk=2)[0], whole, rtol=1e-10)
    assert torch.allclose(prepared.sweep(targets[1:2].clone())[0], whole[1:2], rtol=1e-10)


def test_double_backward_gives_the_same(adam_run):
    prepared = ready(adam_run)
    targets = targets_of(prepared, query_batch(), prepared.final())
    slow = dataclasses.replace(prepared, product=prepared.flat.double_backward)
    assert torch.allclose(slow.sweep(targets.clone())[0], prepared.sweep(targets.clone())[0], rtol=1e-9)


def test_a_truncated_sweep_is_the_end_of_the_whole(adam_run):
    """An example's derivative by the steps from `first` on: that of a training which takes its weight from there."""
    prepared = ready(adam_run)
    targets = targets_of(prepared, query_batch(), prepared.final())
    first = 13
    scores, lengths = prepared.sweep(targets.clone(), first=first)
    assert len(lengths) == 21 - first + 1
    assert torch.equal(scores, prepared.sweep(targets.clone(), first=first, storage="full")[0])
    earlier = prepared.sweep(targets.clone())[0] - scores
    assert earlier.abs().max() > 1e-3


def test_derivatives_that_overflow_are_refused_by_step(adam_run):
    prepared = ready(adam_run)
    targets = targets_of(prepared, query_batch(), prepared.final())
    targets[1] *= 1e308
    with pytest.raises(NonFiniteError, match=r"query row 1 is not finite 1 steps before the end \(step 20\)"):
        prepared.sweep(targets)
    with pytest.raises(NonFiniteError, match=r"group 0 is not finite after step \d+ of 21"):
        prepared.push(torch.full((1, 12), 1e308, dtype=torch.float64))


# Forward, by groups of examples


@pytest.mark.parametrize("weights", [None, torch.linspace(0.5, 1.5, 12)])
@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "adamw_torch", "weight_decay": 0.1, "max_grad_norm": 0.3, "adam_epsilon": 1e-3},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.3, "weight_decay": 0.1},
    ],
    ids=["adamw", "sgd"],
)
def test_tangents_of_groups_are_sums_of_cotangents_scores(tmp_path, settings, weights):
    """What is carried back for queries equals what is carried forward for groups."""
    trainer = trainer_of(tmp_path, smooth(dropout=0.2), num_train_epochs=3, **settings)
    trainer.train()
    prepared = ready(trainer)
    targets = targets_of(prepared, query_batch(), prepared.final(weights))
    members = torch.eye(3, dtype=torch.float64)[torch.arange(12) % 3].T
    for first in (0, 5):
        tangents, lengths = prepared.push(members, weights, first, chunk=2)
        assert len(lengths) == len(prepared.run.recording) - first
        backward = prepared.sweep(targets.clone(), weights, first)[0] @ members.T
        assert torch.allclose(targets @ tangents.T, backward, rtol=1e-9, atol=1e-12)
    slow = dataclasses.replace(prepared, product=prepared.flat.double_backward)
    assert torch.allclose(slow.push(members, weights, 5)[0], tangents, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("kind", "given"), [
    (torch.optim.SGD, {"momentum": 0.8}),
    (torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    (torch.optim.Adam, ADAM),
])  # fmt: skip
def test_tangents_of_groups_are_the_derivative_of_the_training(tmp_path, kind, given):
    trainer = trainer_of(
        tmp_path, trainer_class=with_optimizer(kind, **given), weight_decay=0.1, max_grad_norm=0.3,
        learning_rate=0.1 if kind is torch.optim.SGD else 0.02,
    )  # fmt: skip
    trainer.train()
    prepared = ready(trainer)
    members = (torch.arange(12) < 5).double()[None]
    (tangent,), _ = prepared.push(members)
    h = 1e-4
    ends = [prepared.final(1 + step * h * members[0]) for step in (-2, -1, 1, 2)]
    expected = (ends[0] - 8 * ends[1] + 8 * ends[2] - ends[3]) / (12 * h)
    assert float((tangent - expected).norm() / expected.norm()) < 1e-7
