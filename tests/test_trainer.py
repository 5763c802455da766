import copy
import gc
import random

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from tiny import (
    CountTrainings,
    PointsConfig,
    PointsForSequenceClassification,
    arguments,
    make_trainer,
    model,
    plain_training,
    points,
)
from torch.utils.data import Dataset as TorchDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hf_attribution.counterfactuals import Subsets
from hf_attribution.errors import MismatchError, UnsupportedError
from hf_attribution.methods import LabelMatch
from hf_attribution.retraining.recipe import positional_names
from hf_attribution.seeds import derive_seed
from hf_attribution.tasks import Classification
from hf_attribution.trainer import AttributionMixin, AttributionTrainer

pytestmark = pytest.mark.usefixtures("quick_garbage_collection", "counted_trainings")


def trainer_in(folder, **kwargs):
    return make_trainer(AttributionTrainer, folder, **kwargs)


def random_state():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


class Notes(TrainerCallback):
    """Keeps what it sees of the trainings, and where it was called."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)
        if len(self.steps) >= 5:
            control.should_training_stop = True


# What is left as it was


@pytest.mark.parametrize("protocol", ["resampled", "fixed"])
def test_retraining_leaves_everything_as_it_was(tmp_path, protocol):
    notes = Notes()
    trainer = trainer_in(
        tmp_path, model_settings={"hidden": 4, "dropout": 0.3}, trainer_settings={"callbacks": [notes]}
    )
    trainer.train()
    trainer.model.body[1].eval()  # a mode of its own
    model_before, optimizer, data = trainer.model, trainer.optimizer, trainer.train_dataset
    weights = copy.deepcopy(trainer.model.state_dict())
    modes = [module.training for module in trainer.model.modules()]
    settings, steps = copy.deepcopy(trainer.args.to_dict()), list(notes.steps)
    attributes, callbacks = set(vars(trainer)), list(trainer.callback_handler.callbacks)
    state, collator = copy.deepcopy(trainer.state), trainer.data_collator
    randomness, verbosity = random_state(), logging.get_verbosity()

    trainer.retrain(num_subsets=2, protocol=protocol)

    assert random_state() == randomness
    assert logging.get_verbosity() == verbosity
    assert (trainer.model, trainer.optimizer, trainer.train_dataset) == (model_before, optimizer, data)
    assert trainer.data_collator is collator
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert [module.training for module in trainer.model.modules()] == modes
    assert trainer.args.to_dict() == settings
    assert (notes.steps, trainer.state) == (steps, state)
    assert (set(vars(trainer)), trainer.callback_handler.callbacks) == (attributes, callbacks)
    assert "hf_attribution_row" not in data.column_names


def test_garbage_collection_is_as_before(tmp_path):
    gc.unfreeze()
    try:
        trainer_in(tmp_path).retrain(num_subsets=1)
        assert gc.get_freeze_count() == 0
    finally:
        gc.freeze()


def test_retraining_starts_from_the_weights_and_callbacks_before_training(tmp_path):
    untrained = trainer_in(tmp_path / "a", trainer_settings={"callbacks": [Notes()]})
    trained = trainer_in(tmp_path / "b", trainer_settings={"callbacks": [Notes()]})
    trained.train()
    one, two = untrained.retrain(num_subsets=2), trained.retrain(num_subsets=2)
    np.testing.assert_array_equal(one.outputs, two.outputs)
    assert one.fingerprint == two.fingerprint
    without = trainer_in(tmp_path / "c").retrain(num_subsets=2)
    assert not np.array_equal(one.outputs, without.outputs)  # the callback stops trainings


def test_every_run_has_callbacks_of_its_own(tmp_path):
    trainer = trainer_in(tmp_path, trainer_settings={"callbacks": [Notes()]})
    both = trainer.retrain(num_subsets=2, output_dir=tmp_path / "runs")
    (tmp_path / "runs" / "runs" / "00000-0.safetensors").unlink()
    # The first run, now after the second: notes that were shared would stop it at once.
    again = trainer.retrain(num_subsets=2, output_dir=tmp_path / "runs")
    np.testing.assert_array_equal(again.outputs, both.outputs)


def test_mixed_precision_leaves_no_trace(tmp_path):
    """accelerate wraps the forward of a trained model; a copy of it would still run the user's weights."""
    untrained, trained = (trainer_in(tmp_path / name, bf16=True) for name in "ab")
    trained.train()
    one, two = untrained.retrain(num_subsets=1), trained.retrain(num_subsets=1)
    np.testing.assert_array_equal(one.outputs, two.outputs)


# Any trainer


class Foreign(Trainer):
    def __init__(self, scale, *args, note="none", **kwargs):
        super().__init__(*args, **kwargs)
        self.scale, self.note = scale, note

    def compute_loss(self, model, inputs, **kwargs):
        return self.scale * super().compute_loss(model, inputs, **kwargs)


class ForeignAttribution(AttributionMixin, Foreign):
    pass


class OwnConstructor(AttributionTrainer):
    def __init__(self, rate, model=None, args=None, **kwargs):
        args = copy.copy(args)
        args.learning_rate = rate
        super().__init__(model=model, args=args, **kwargs)


class Unrepeatable(AttributionTrainer):
    def __init__(self, folder):
        super().__init__(model(), arguments(folder), train_dataset=points(), eval_dataset=points(7, seed=1))


def measured_after(trainer, truth, **settings):
    """What run (0, 0) must have measured, by the plain Trainer with these training arguments."""
    args = TrainingArguments(**{**trainer.args.to_dict(), **settings})
    trained = plain_training(model(), args, points().select(truth.subsets.indices(0)), derive_seed(0, "run", 0, 0))
    queries = {name: torch.tensor(points(7, seed=1)[name]) for name in ("points", "labels")}
    with torch.no_grad():
        return Classification().measurement(trained.eval(), queries).numpy()


def test_over_a_foreign_trainer_with_arguments_of_its_own(tmp_path):
    data = {"train_dataset": points(), "eval_dataset": points(7, seed=1)}
    trainer = ForeignAttribution(0.5, model(), arguments(tmp_path, max_grad_norm=0.0), note="mine", **data)
    assert (trainer.scale, trainer.note) == (0.5, "mine")
    truth = trainer.retrain(num_subsets=1)
    # Half the loss is half the learning rate, for gradient descent.
    expected = measured_after(trainer, truth, learning_rate=0.05)
    np.testing.assert_allclose(truth.outputs[0, 0], expected, atol=1e-6)


def test_a_subclass_with_a_constructor_of_its_own(tmp_path):
    data = {"train_dataset": points(), "eval_dataset": points(7, seed=1)}
    trainer = OwnConstructor(0.3, model(), arguments(tmp_path), **data)
    truth = trainer.retrain(num_subsets=1)
    np.testing.assert_array_equal(truth.outputs[0, 0], measured_after(trainer, truth, learning_rate=0.3))


def test_positional_arguments_are_known_by_name(tmp_path):
    assert positional_names(ForeignAttribution)[:3] == ["scale", "model", "args"]
    assert positional_names(AttributionTrainer)[:3] == ["model", "args", "data_collator"]
    trainer = AttributionTrainer(model(), arguments(tmp_path), None, points(), points(7, seed=1))
    truth = trainer.retrain(num_subsets=1)
    np.testing.assert_array_equal(truth.outputs[0, 0], measured_after(trainer, truth))


def test_a_constructor_that_takes_no_other_data_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match=r"Unrepeatable cannot be built again.*let its __init__ take model"):
        Unrepeatable(tmp_path).retrain(num_subsets=1)


class Rows(TorchDataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return {"points": points()["points"][index], "labels": points()["labels"][index], "note": "x"}


@pytest.mark.parametrize("protocol", ["resampled", "fixed"])
def test_any_dataset_with_length_and_positions_will_do(tmp_path, protocol):
    own = trainer_in(tmp_path / "a", trainer_settings={"train_dataset": Rows()})
    arrow = trainer_in(tmp_path / "b")
    settings = {"num_subsets": 1, "protocol": protocol}
    np.testing.assert_allclose(own.retrain(**settings).outputs, arrow.retrain(**settings).outputs, atol=1e-6)


class BareForSequenceClassification(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.points_model = model()

    def forward(self, points=None, labels=None):
        return self.points_model(points, labels)


def test_any_module_will_do_as_a_model(tmp_path):
    trainer = trainer_in(tmp_path, trainer_settings={"model": BareForSequenceClassification()})
    truth = trainer.retrain(num_subsets=1)
    np.testing.assert_array_equal(truth.outputs, trainer_in(tmp_path).retrain(num_subsets=1).outputs)
    with pytest.raises(UnsupportedError, match="keep_checkpoints needs a model with save_pretrained"):
        trainer.retrain(num_subsets=1, keep_checkpoints=True)


def test_model_init_gives_every_run_weights_of_its_own(tmp_path):
    def init():
        return PointsForSequenceClassification(PointsConfig())

    trainer = trainer_in(tmp_path, trainer_settings={"model_init": init}, max_steps=1, learning_rate=0.0)
    truth = trainer.retrain(num_subsets=2, seeds=2)
    assert truth.protocol["initial_weights"] == "fresh"
    assert len(np.unique(truth.outputs[:, :, 0])) == 4  # nothing is learned: what differs are the weights
    fixed = trainer.retrain(num_subsets=2, seeds=2, protocol="fixed")
    assert fixed.protocol["initial_weights"] == "shared"
    np.testing.assert_array_equal(fixed.outputs[0], fixed.outputs[1])
    assert len(np.unique(fixed.outputs[:, :, 0])) == 2


# What is refused


def test_trainings_that_hang_on_evaluations_are_refused(tmp_path):
    stopping = {"callbacks": [EarlyStoppingCallback(3)]}
    evaluated = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    cases = [
        ({"trainer_settings": stopping, **evaluated, "metric_for_best_model": "loss"}, "EarlyStoppingCallback"),
        ({"load_best_model_at_end": True, **evaluated}, "load_best_model_at_end"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", **evaluated}, "reduce_lr_on_plateau"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
    ]
    for settings, message in cases:
        with pytest.raises(UnsupportedError, match=message):
            trainer_in(tmp_path, **settings).retrain(num_subsets=1)


def test_evaluating_and_saving_are_left_out_of_retrainings(tmp_path):
    trainer = trainer_in(
        tmp_path,
        eval_strategy="epoch",
        save_strategy="epoch",
        trainer_settings={"compute_metrics": lambda prediction: pytest.fail("evaluated")},
    )
    trainer.retrain(num_subsets=1)
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_an_optimiser_of_one_model_is_refused(tmp_path):
    mine = model()
    optimizers = (torch.optim.SGD(mine.parameters(), lr=0.1), None)
    trainer = trainer_in(tmp_path, trainer_settings={"model": mine, "optimizers": optimizers})
    with pytest.raises(UnsupportedError, match="optimizer_cls_and_kwargs"):
        trainer.retrain(num_subsets=1)


def test_sharded_training_is_refused_by_name(tmp_path):
    for attribute, name in (("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")):
        trainer = trainer_in(tmp_path)
        setattr(trainer, attribute, True)
        with pytest.raises(UnsupportedError, match=f"Retraining with {name} is not supported.*workers="):
            trainer.retrain(num_subsets=1)


def test_callbacks_that_cannot_be_copied_are_refused_when_they_are_needed(tmp_path):
    class Open(TrainerCallback):
        def __init__(self):
            self.generator = (i for i in range(3))

    trainer = trainer_in(tmp_path, trainer_settings={"callbacks": [Open()]})
    trainer.train()
    with pytest.raises(UnsupportedError, match="copy of the callbacks Open"):
        trainer.retrain(num_subsets=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_subsets": 0}, "0 subsets"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"fraction": 0.0}, "keeps 0 of 24"),
        ({"fraction": 1.0}, "keeps 24 of 24"),
        ({"fraction": 0.01}, "keeps 0 of 24"),
        ({"protocol": "frozen"}, "resampled, fixed"),
        ({"subsets": Subsets.random(10, 2)}, "of 10 examples and the training dataset has 24"),
        ({"query_dataset": {"a": points()}}, "dict of several"),
        ({"query_dataset": points().remove_columns("labels")}, "no column labels"),
        ({"query_dataset": points().select([])}, "query dataset is empty"),
    ],
)
def test_bad_requests_are_refused_before_training(tmp_path, settings, message):
    trainer = trainer_in(tmp_path, trainer_settings={"callbacks": [CountTrainings()]})
    with pytest.raises((ValueError, MismatchError), match=message):
        trainer.retrain(**{"num_subsets": 1, **settings})
    assert CountTrainings.trainings == 0


def test_missing_or_streamed_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no query dataset: pass it"):
        trainer_in(tmp_path, trainer_settings={"eval_dataset": None}).retrain(num_subsets=1)
    with pytest.raises(ValueError, match="no train dataset"):
        trainer_in(tmp_path, trainer_settings={"train_dataset": None}).retrain(num_subsets=1)
    stream = IterableDataset.from_generator(lambda: iter(points()))
    trainer = trainer_in(tmp_path, trainer_settings={"train_dataset": stream}, max_steps=1)
    with pytest.raises(UnsupportedError, match=r"map-style"):
        trainer.retrain(num_subsets=1)


# Attribution


def test_attribute_takes_what_the_trainer_has(tmp_path):
    trainer = trainer_in(tmp_path)
    trainer.train()
    scores = trainer.attribute(method="label_match")
    assert scores.values.shape == (7, 24)
    same = np.array(points(7, seed=1)["labels"])[:, None] == np.array(points()["labels"])
    np.testing.assert_array_equal(np.sign(scores.values - scores.values.mean()), np.where(same, 1, -1))
    other = trainer.attribute(points(5, seed=2), method=LabelMatch(), train_dataset=points(9), batch_size=2)
    assert other.values.shape == (5, 9)


def test_methods_that_follow_a_training_take_its_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="save_strategy"):
        trainer_in(tmp_path / "none").attribute(method="tracin")
    trainer = trainer_in(tmp_path, save_strategy="epoch")
    trainer.train()
    scores = trainer.attribute(method="tracin")
    assert [name.rpartition("/")[2] for name in scores.provenance["checkpoints"]] == ["checkpoint-6", "checkpoint-12"]


def test_scores_and_retrained_truth_go_together(tmp_path):
    trainer = trainer_in(tmp_path)
    trainer.train()
    scores, truth = trainer.attribute(method="label_match"), trainer.retrain(num_subsets=3)
    assert scores.predict(truth.subsets).shape == truth.mean().shape == (7, 3)
    for name in ("train", "query", "task"):
        assert scores.provenance["fingerprints"][name] == truth.provenance["fingerprints"][name]
