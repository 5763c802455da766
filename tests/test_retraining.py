import copy
import errno
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from tiny import (
    CountTrainings,
    PointsConfig,
    PointsForSequenceClassification,
    arguments,
    make_counted_trainer,
    make_trainer,
    model,
    plain_training,
    points,
)
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
)

from hf_attribution.counterfactuals import Subsets
from hf_attribution.errors import ArtefactError, MismatchError, NonFiniteError, UnsupportedError
from hf_attribution.retraining import worklist
from hf_attribution.retraining.arguments import run_arguments
from hf_attribution.retraining.weighted import give_weights, weighted_class
from hf_attribution.retraining.worklist import Run, WorkList
from hf_attribution.seeds import derive_seed
from hf_attribution.tasks import Classification
from hf_attribution.trainer import AttributionTrainer
from hf_attribution.weights import load_weights

pytestmark = pytest.mark.usefixtures("quick_garbage_collection", "counted_trainings")


def trainer_in(folder, **kwargs):
    return make_counted_trainer(AttributionTrainer, folder, **kwargs)


def margins(trained, dataset):
    batch = {name: torch.tensor(dataset[name]) for name in ("points", "labels")}
    with torch.no_grad():
        return Classification().measurement(trained.eval(), batch).numpy()


# What a run is


def test_a_run_is_a_plain_training_on_the_subset(tmp_path):
    trainer = trainer_in(tmp_path, model_settings={"hidden": 4, "dropout": 0.2}, optim="adamw_torch")
    truth = trainer.retrain(num_subsets=2, fraction=0.4, seeds=2, seed=5)
    assert truth.outputs.shape == (2, 2, 7)
    for m in range(2):
        for r in range(2):
            data = points().select(truth.subsets.indices(m))
            fresh = model(hidden=4, dropout=0.2)
            trained = plain_training(fresh, trainer.args, data, derive_seed(5, "run", m, r))
            np.testing.assert_array_equal(truth.outputs[m, r], margins(trained, points(rows=7, seed=1)))


def test_every_run_has_an_order_of_its_own_whatever_seeds_the_user_set(tmp_path):
    trainer = trainer_in(tmp_path, seed=1, data_seed=2)
    truth = trainer.retrain(num_subsets=1, seeds=3)
    assert len(np.unique(truth.outputs[0, :, 0])) == 3


def test_the_protocol_says_how_the_numbers_came_about(tmp_path):
    truth = trainer_in(tmp_path).retrain(num_subsets=2, fraction=0.25, seeds=1)
    expected = {"name": "resampled", "fraction": 0.25, "num_subsets": 2, "seeds": 1, "measurement": "margin"}
    assert expected.items() <= truth.protocol.items()
    assert (truth.protocol["initial_weights"], truth.protocol["order"]) == ("shared", "fresh")
    assert truth.protocol["training"]["learning_rate"] == 0.1
    assert set(truth.provenance["fingerprints"]) == {"model", "train", "query", "task"}
    assert truth.provenance["seconds"] > 0


def test_leave_one_out_of_a_convex_model_is_that_of_its_optimum(tmp_path):
    """Logistic regression with an L2 penalty has one optimum, so retraining must land on scipy's."""
    data, decay = points(rows=10), 0.1
    trainer = trainer_in(
        tmp_path,
        trainer_settings={"train_dataset": data},
        max_steps=150,
        per_device_train_batch_size=10,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        weight_decay=decay,
        max_grad_norm=0.0,
    )
    left_out = [0, 3, 7]
    truth = trainer.retrain(data, subsets=Subsets.leave_one_out(10, left_out))
    inputs, labels = np.array(data["points"]), np.array(data["labels"])

    def optimum(kept):
        def objective(parameters):
            logits = inputs[kept] @ parameters[:3] + parameters[3]
            losses = np.logaddexp(0, logits) - labels[kept] * logits
            # The two classes' weights mirror each other, so each carries half of the difference.
            return losses.mean() + decay * (parameters[:3] ** 2).sum() / 4

        found = minimize(objective, np.zeros(4), tol=1e-10).x
        return (2 * labels - 1) * (inputs @ found[:3] + found[3])

    expected = np.stack([optimum(np.delete(np.arange(10), i)) for i in left_out])
    np.testing.assert_allclose(truth.outputs[:, 0], expected, atol=2e-3)
    # Left out, an example no longer helps itself; and by more than the tolerance above.
    change = truth.outputs[:, 0] - optimum(np.arange(10))
    assert (change[np.arange(3), left_out] < -0.02).all()


# Resuming


def test_an_interrupted_call_goes_on_and_gives_the_same_bits(tmp_path):
    settings = {"num_subsets": 3, "seeds": 2}
    whole = trainer_in(tmp_path / "whole").retrain(**settings)
    assert CountTrainings.trainings == 6

    CountTrainings.trainings, CountTrainings.interrupt_at = 0, 4
    with pytest.raises(KeyboardInterrupt):
        trainer_in(tmp_path / "parts").retrain(**settings)
    torch.manual_seed(99)
    CountTrainings.trainings, CountTrainings.interrupt_at = 0, None
    resumed = trainer_in(tmp_path / "parts").retrain(**settings)
    assert CountTrainings.trainings == 3
    np.testing.assert_array_equal(resumed.outputs, whole.outputs)
    assert resumed.fingerprint == whole.fingerprint

    assert trainer_in(tmp_path / "parts").retrain(**settings).fingerprint == whole.fingerprint
    assert CountTrainings.trainings == 3
    (folder,) = (tmp_path / "parts").glob("retraining-*")
    assert [path.name for path in (folder / "work").iterdir()] == []


def test_subsets_and_seeds_are_added_to_what_is_there(tmp_path):
    few = trainer_in(tmp_path).retrain(num_subsets=2, seeds=1)
    many = trainer_in(tmp_path).retrain(num_subsets=3, seeds=2)
    assert CountTrainings.trainings == 6
    np.testing.assert_array_equal(many.outputs[:2, :1], few.outputs)
    few_again = trainer_in(tmp_path).retrain(num_subsets=2, seeds=1)
    assert CountTrainings.trainings == 6
    assert few_again.fingerprint == few.fingerprint


def test_another_training_gets_another_folder_of_its_own(tmp_path):
    one = trainer_in(tmp_path).retrain(num_subsets=2)
    other = trainer_in(tmp_path, learning_rate=0.2).retrain(num_subsets=2)
    assert not np.array_equal(one.outputs, other.outputs)
    assert len(list(tmp_path.glob("retraining-*"))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.2}, r"arguments\.learning_rate: 0\.1 → 0\.2"),
        ({"gradient_accumulation_steps": 2}, r"arguments\.gradient_accumulation_steps: 1 → 2"),
        ({"trainer_settings": {"train_dataset": points(seed=4)}}, r"train_dataset: \w{32} → \w{32}"),
        ({"trainer_settings": {"eval_dataset": points(rows=7, seed=4)}}, r"query_dataset: \w{32} → \w{32}"),
        ({"model_settings": {"seed": 1}}, r"initial_weights: \w{32} → \w{32}"),
        ({"model_settings": {"dropout": 0.5}}, r"model_config\.dropout: 0\.0 → 0\.5"),
    ],
)
def test_a_folder_of_something_else_is_refused_with_what_differs(tmp_path, change, message):
    trainer_in(tmp_path).retrain(num_subsets=1, output_dir=tmp_path / "runs")
    CountTrainings.trainings = 0
    with pytest.raises(MismatchError, match=message) as error:
        trainer_in(tmp_path, **change).retrain(num_subsets=1, output_dir=tmp_path / "runs")
    assert "another output_dir" in str(error.value)
    differing = [line for line in str(error.value).splitlines() if "→" in line]
    assert len(differing) == (2 if "trainer_settings" in change and "train_dataset" in message else 1)
    assert CountTrainings.trainings == 0


def test_other_subsets_seed_or_protocol_are_refused_too(tmp_path):
    trainer = trainer_in(tmp_path)
    trainer.retrain(num_subsets=1, output_dir=tmp_path / "runs")
    with pytest.raises(MismatchError, match=r"subsets\.fraction: 0\.5 → 0\.25"):
        trainer.retrain(num_subsets=1, fraction=0.25, output_dir=tmp_path / "runs")
    with pytest.raises(MismatchError, match="seed: 0 → 1"):
        trainer.retrain(num_subsets=1, seed=1, output_dir=tmp_path / "runs")
    with pytest.raises(MismatchError, match="protocol: resampled → fixed"):
        trainer.retrain(num_subsets=1, protocol="fixed", output_dir=tmp_path / "runs")


def test_what_changes_no_weight_is_not_refused(tmp_path):
    settings = {"num_subsets": 1, "output_dir": tmp_path / "runs"}
    one = trainer_in(tmp_path / "a").retrain(**settings)
    two = trainer_in(tmp_path / "b", logging_steps=3, seed=7, save_strategy="epoch", run_name="x").retrain(**settings)
    assert CountTrainings.trainings == 1
    assert one.fingerprint == two.fingerprint


def test_keep_checkpoints_keeps_the_weights_that_gave_the_outputs(tmp_path):
    trainer = trainer_in(tmp_path)
    plain = trainer.retrain(num_subsets=2, output_dir=tmp_path / "runs")
    kept = trainer.retrain(num_subsets=2, output_dir=tmp_path / "runs", keep_checkpoints=True)
    np.testing.assert_array_equal(plain.outputs, kept.outputs)
    assert CountTrainings.trainings == 4
    trainer.retrain(num_subsets=2, output_dir=tmp_path / "runs", keep_checkpoints=True)
    assert CountTrainings.trainings == 4
    for m in range(2):
        loaded = load_weights(model(seed=3), tmp_path / "runs" / "runs" / f"{m:05d}-0")
        np.testing.assert_array_equal(margins(loaded, points(rows=7, seed=1)), kept.outputs[m, 0])


def test_saving_a_model_whose_configuration_is_shared_changes_nothing(tmp_path):
    config = PointsConfig()
    settings = {"model_init": lambda: PointsForSequenceClassification(config)}
    for _ in range(2):
        trainer = trainer_in(tmp_path, trainer_settings=settings)
        trainer.retrain(num_subsets=1, keep_checkpoints=True)
    assert config.dtype is not None  # save_pretrained wrote it there
    assert CountTrainings.trainings == 1


# Faults


def test_a_damaged_result_is_named_and_only_that_run_is_trained_again(tmp_path):
    trainer = trainer_in(tmp_path)
    whole = trainer.retrain(num_subsets=3, output_dir=tmp_path)
    damaged = tmp_path / "runs" / "00001-0.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4])
    with pytest.raises(ArtefactError, match=r"Delete .*00001-0\.safetensors and call retrain again"):
        trainer.retrain(num_subsets=3, output_dir=tmp_path)
    damaged.unlink()
    assert trainer.retrain(num_subsets=3, output_dir=tmp_path).fingerprint == whole.fingerprint
    assert CountTrainings.trainings == 4


def test_a_damaged_manifest_is_named(tmp_path):
    trainer = trainer_in(tmp_path)
    trainer.retrain(num_subsets=1, output_dir=tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ArtefactError, match=r"manifest\.json cannot be read"):
        trainer.retrain(num_subsets=1, output_dir=tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ArtefactError, match=r"no manifest\.json"):
        trainer.retrain(num_subsets=1, output_dir=tmp_path)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    trainer = trainer_in(tmp_path)
    whole = trainer.retrain(num_subsets=3, output_dir=tmp_path / "whole")
    write = worklist.write_artefact

    def full_at_the_third(path, *rest):
        if path.name == "00002-0.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(worklist, "write_artefact", full_at_the_third)
        with pytest.raises(OSError, match=r"No space left.*2 of 3 retrainings are finished and stay") as error:
            trainer.retrain(num_subsets=3, output_dir=tmp_path / "full")
    assert error.value.errno == errno.ENOSPC
    CountTrainings.trainings = 0
    assert trainer.retrain(num_subsets=3, output_dir=tmp_path / "full").fingerprint == whole.fingerprint
    assert CountTrainings.trainings == 1


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written there; choose another output_dir"):
        trainer_in(tmp_path).retrain(num_subsets=1, output_dir=tmp_path / "file" / "runs")
    assert CountTrainings.trainings == 0


def test_a_training_that_diverges_is_named(tmp_path):
    with pytest.raises(NonFiniteError, match=r"query row \d is (nan|-?inf) after training on subset 0 with seed 0"):
        trainer_in(tmp_path, learning_rate=3e38, max_grad_norm=0).retrain(num_subsets=2)


def test_a_query_that_is_not_finite_is_named_before_training(tmp_path):
    queries = points(rows=3).map(lambda row, i: {"points": [float("nan")] * 3 if i == 1 else row["points"]}, True)
    with pytest.raises(NonFiniteError, match="query row 1 is nan with the model as it is now"):
        trainer_in(tmp_path).retrain(queries, num_subsets=1)
    assert CountTrainings.trainings == 0


# Sharing the work


def test_a_run_is_claimed_by_one_worker(tmp_path):
    runs = WorkList(tmp_path, ["a", "b"], 1, False)
    with runs.claim(Run(0, 0)) as first, runs.claim(Run(0, 0)) as second, runs.claim(Run(1, 0)) as other:
        assert (first, second, other) == (True, False, True)
    with runs.claim(Run(0, 0)) as again:
        assert again
    runs.write(Run(0, 0), np.zeros(2, np.float32), 1.0)
    with runs.claim(Run(0, 0)) as finished:
        assert not finished


def test_the_claim_of_a_dead_worker_is_taken_over(tmp_path):
    runs = WorkList(tmp_path, ["a"], 1, False)
    claim = tmp_path / "work" / "00000-0.claim"
    claim.parent.mkdir()
    dead = subprocess.Popen([sys.executable, "-S", "-c", ""])
    dead.wait()
    claim.write_text(json.dumps({"host": worklist.socket.gethostname(), "pid": dead.pid}))
    with runs.claim(Run(0, 0)) as mine:
        assert mine

    claim.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with runs.claim(Run(0, 0)) as mine:
        assert not mine
    os.utime(claim, (time.time() - 2 * worklist.STALE_AFTER,) * 2)
    with runs.claim(Run(0, 0)) as mine:
        assert mine


def test_a_claim_is_kept_fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(worklist, "STALE_AFTER", 0.06)
    runs = WorkList(tmp_path, ["a"], 1, False)
    with runs.claim(Run(0, 0)):
        time.sleep(0.3)
        age = time.time() - (tmp_path / "work" / "00000-0.claim").stat().st_mtime
        assert age < 0.2


def test_runs_of_another_worker_are_waited_for(tmp_path, monkeypatch):
    trainer = trainer_in(tmp_path)
    whole = trainer.retrain(num_subsets=2, output_dir=tmp_path / "whole")
    trainer.retrain(num_subsets=1, output_dir=tmp_path / "shared")
    runs = WorkList(tmp_path / "shared", whole.subsets.keys(), 1, False)
    monkeypatch.setattr("hf_attribution.retraining.runs._POLL_SECONDS", 0.01)
    claimed = threading.Event()

    def other_worker():
        with runs.claim(Run(1, 0)):
            claimed.set()
            time.sleep(0.3)
            runs.write(Run(1, 0), whole.outputs[1, 0], 1.0)

    CountTrainings.trainings = 0
    thread = threading.Thread(target=other_worker)
    thread.start()
    claimed.wait()
    shared = trainer.retrain(num_subsets=2, output_dir=tmp_path / "shared")
    thread.join()
    assert CountTrainings.trainings == 0
    np.testing.assert_array_equal(shared.outputs, whole.outputs)


# The fixed protocol


def weighted_training(trainer, weights, seed=3, task=None):
    """The model after a training with weights."""
    args = run_arguments(trainer.args, trainer.args.output_dir, seed)
    fresh = trainer._recipe.build(args, trainer.train_dataset, weighted_class(type(trainer)))
    give_weights(fresh, torch.tensor(weights, dtype=torch.float32), task or trainer._task())
    fresh.train()
    return fresh.model


def assert_same_weights(one, two, tolerance):
    for (name, left), right in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        np.testing.assert_allclose(left.numpy(), right.numpy(), rtol=0, atol=tolerance, err_msg=name)


def difference(one, two):
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return max(float((left - right).abs().max()) for left, right in pairs)


def test_with_all_weights_one_it_is_the_plain_training_of_a_classifier(tmp_path):
    settings = {"model_settings": {"hidden": 4, "dropout": 0.2}, "optim": "adamw_torch", "learning_rate": 0.01}
    trainer = trainer_in(tmp_path, **settings)
    weighted = weighted_training(trainer, np.ones(24))
    plain = plain_training(model(hidden=4, dropout=0.2), trainer.args, points(), 3)
    assert_same_weights(weighted, plain, 1e-6)
    assert difference(plain, model(hidden=4, dropout=0.2)) > 0.01


def language_model_trainer(folder, **settings):
    torch.manual_seed(0)
    tiny = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    generator = np.random.default_rng(0)
    rows = [{"input_ids": generator.integers(1, 20, size=length).tolist()} for length in (3, 7, 5, 9, 4, 8, 6, 2)]
    data = points(1).from_list(rows)
    vocabulary = {f"t{i}": i for i in range(20)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t1")), pad_token="t0", unk_token="t1"
    )
    return AttributionTrainer(
        model=tiny,
        args=arguments(folder, optim="adamw_torch", learning_rate=0.01, **settings),
        train_dataset=data,
        eval_dataset=data.select(range(2)),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )


@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_with_all_weights_one_it_is_the_plain_training_of_a_language_model(tmp_path, order):
    trainer = language_model_trainer(tmp_path, train_sampling_strategy=order)
    weighted = weighted_training(trainer, np.ones(8))
    fresh = language_model_trainer(tmp_path).model
    plain = plain_training(fresh, trainer.args, trainer.train_dataset, 3, data_collator=trainer.data_collator)
    assert_same_weights(weighted, plain, 1e-6)


def test_accumulation_changes_nothing_for_a_language_model(tmp_path):
    weights = [1, 0, 1, 1, 0, 1, 0, 1]
    one = language_model_trainer(tmp_path, per_device_train_batch_size=8)
    two = language_model_trainer(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trained = []
    for trainer in (one, two):
        for module in trainer._recipe.initial_model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        trained.append(weighted_training(trainer, weights))
    assert_same_weights(*trained, 1e-6)


def test_accumulation_changes_nothing_for_a_classifier(tmp_path):
    weights = np.arange(24) % 3 > 0
    one = weighted_training(trainer_in(tmp_path, per_device_train_batch_size=8), weights)
    two = weighted_training(
        trainer_in(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2), weights
    )
    assert_same_weights(one, two, 1e-6)


def by_hand(weights, batches, rate):
    """Gradient descent on `sum(w * loss) / B`, in a loop that knows nothing of the Trainer."""
    trained = model()
    data = {name: torch.tensor(points()[name]) for name in ("points", "labels")}
    for batch in batches:
        logits = trained.head(data["points"][batch])
        losses = nn.functional.cross_entropy(logits, data["labels"][batch], reduction="none")
        loss = (torch.as_tensor(weights)[batch] * losses).sum() / len(batch)
        gradients = torch.autograd.grad(loss, list(trained.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(trained.parameters(), gradients, strict=True):
                parameter -= rate * gradient
    return trained


def test_removed_examples_count_nothing_and_the_denominator_stays(tmp_path):
    trainer = trainer_in(tmp_path, max_grad_norm=0, lr_scheduler_type="constant")
    truth = trainer.retrain(num_subsets=2, seeds=2, protocol="fixed", seed=1)
    assert (truth.protocol["initial_weights"], truth.protocol["order"]) == ("shared", "fixed")
    for r in range(2):
        seed = derive_seed(1, "run", r)
        orders = [torch.randperm(24, generator=torch.Generator().manual_seed(seed + epoch)) for epoch in range(2)]
        batches = [batch for order in orders for batch in order.split(4)]
        for m in range(2):
            trained = by_hand(truth.subsets.masks[m].astype(np.float32), batches, 0.1)
            np.testing.assert_allclose(truth.outputs[m, r], margins(trained, points(rows=7, seed=1)), atol=1e-5)


def only_points_and_labels(rows):
    """A collator that knows its own columns, and takes no others."""
    assert all(set(row) <= {"points", "labels", "note"} for row in rows)
    return {name: torch.tensor([row[name] for row in rows]) for name in ("points", "labels")}


@pytest.mark.parametrize("remove_unused_columns", [True, False])
@pytest.mark.parametrize("transformed", [True, False])
def test_any_collator_and_any_columns_will_do(tmp_path, remove_unused_columns, transformed):
    def noted(dataset):
        dataset = dataset.add_column("note", ["x"] * len(dataset))
        return dataset.with_transform(lambda rows: dict(rows)) if transformed else dataset

    settings = {"num_subsets": 2, "protocol": "fixed"}
    plain = trainer_in(tmp_path / "a").retrain(**settings)
    own = trainer_in(
        tmp_path / "b",
        remove_unused_columns=remove_unused_columns,
        trainer_settings={
            "data_collator": only_points_and_labels,
            "train_dataset": noted(points()),
            "eval_dataset": noted(points(rows=7, seed=1)),
        },
    ).retrain(**settings)
    np.testing.assert_allclose(own.outputs, plain.outputs, atol=1e-6)


class OwnLoss(AttributionTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = 3 * super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return (loss, {}) if return_outputs else loss


class TripleLoss(Classification):
    def losses(self, model, batch):
        return 3 * super().losses(model, batch)


def test_a_loss_of_the_users_own_must_be_given_as_a_task(tmp_path):
    trainer = make_trainer(OwnLoss, tmp_path)
    with pytest.raises(UnsupportedError, match=r"OwnLoss\.compute_loss is a loss of your own.*pass task="):
        trainer.retrain(num_subsets=1, protocol="fixed")
    truth = trainer.retrain(num_subsets=1, protocol="fixed", task=TripleLoss())
    weighted = weighted_training(trainer, truth.subsets.masks[0], derive_seed(0, "run", 0), TripleLoss())
    np.testing.assert_array_equal(truth.outputs[0, 0], margins(weighted, points(rows=7, seed=1)))
    with_function = trainer_in(tmp_path, trainer_settings={"compute_loss_func": lambda *args, **kwargs: 0.0})
    with pytest.raises(UnsupportedError, match="compute_loss_func is a loss of your own"):
        with_function.retrain(num_subsets=1, protocol="fixed")


def test_batch_normalisation_is_refused_where_it_mixes_examples(tmp_path):
    trainer = trainer_in(tmp_path, model_settings={"norm": "batch"})
    with pytest.raises(UnsupportedError, match=r"body\.0 \(BatchNorm1d\) normalises by the whole batch"):
        trainer.retrain(num_subsets=1, protocol="fixed")
    assert CountTrainings.trainings == 0
    assert trainer.retrain(num_subsets=1).outputs.shape == (1, 1, 7)


def test_ordinary_training_is_the_users_own(tmp_path):
    mine = trainer_in(tmp_path / "a")
    mine.train()
    theirs = make_trainer(Trainer, tmp_path / "b")
    theirs.train()
    assert_same_weights(mine.model, theirs.model, 0)


def test_a_model_init_without_chance_is_reported_as_shared_weights(tmp_path):
    pretrained = model()
    inits = {
        "fresh": lambda: PointsForSequenceClassification(PointsConfig()),
        "shared": lambda: copy.deepcopy(pretrained),
    }
    for expected, model_init in inits.items():
        trainer = AttributionTrainer(
            model_init=model_init, args=arguments(tmp_path / expected), train_dataset=points(), eval_dataset=points(4)
        )
        assert trainer.retrain(num_subsets=1).protocol["initial_weights"] == expected
