"""Data debugging, on points whose wrong labels, copies and best rows are known."""

import numpy as np
import pytest
from datasets import Dataset
from folders import save_causal_lm, texts, tokenizer
from sklearn.metrics import roc_auc_score
from tiny import make_trainer
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling

from hf_attribution import AttributionTrainer, Scores, debugging
from hf_attribution.debugging import find_duplicates, find_mislabeled, select_subset
from hf_attribution.errors import MismatchError, UnsupportedError


def noisy_points(rows=200, flipped=0.1, seed=0):
    """Two overlapping clouds, and some labels that are wrong."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, rows)
    inputs = rng.normal(size=(rows, 3)) + 2 * labels[:, None] * [1, 0, 0]
    flags = rng.random(rows) < flipped
    columns = {"points": inputs.astype(np.float32).tolist(), "labels": np.where(flags, 1 - labels, labels).tolist()}
    return Dataset.from_dict({**columns, "row": list(range(rows))}), flags


def trained(folder, dataset):
    trainer = make_trainer(AttributionTrainer, folder, trainer_settings={"train_dataset": dataset}, num_train_epochs=5)
    trainer.train()
    return trainer


@pytest.mark.parametrize("method", ["grad_dot", "influence"])
def test_wrong_labels_rank_first(method, tmp_path):
    dataset, flags = noisy_points()
    suspects = find_mislabeled(trained(tmp_path, dataset), method=method)
    assert suspects.column_names[:3] == ["rank", "train_index", "score"]
    assert suspects["rank"][:] == list(range(1, 201))
    assert suspects["row"][:] == suspects["train_index"][:]
    scores = np.empty(200)
    scores[suspects["train_index"][:]] = suspects["score"][:]
    assert roc_auc_score(flags, scores) > 0.85


def test_only_the_first_suspects(tmp_path):
    dataset, _ = noisy_points(40)
    trainer = trained(tmp_path, dataset)
    suspects = find_mislabeled(trainer, k=3)
    assert suspects.num_rows == 3
    assert suspects[:] == find_mislabeled(trainer).select(range(3))[:]
    halves = trainer.train_ensemble(2, fraction=0.5)
    assert find_mislabeled(trainer, k=3, checkpoints=halves)["score"][:] != suspects["score"][:]
    with pytest.raises(UnsupportedError, match="label_match"):
        find_mislabeled(trainer, method="label_match")


def test_no_labels_no_wrong_labels(tmp_path):
    words = tokenizer(pair_template=False)
    words.pad_token = words.eos_token
    rows = Dataset.from_dict({"text": texts(6)}).map(lambda row: words(row["text"]))
    network = AutoModelForCausalLM.from_pretrained(save_causal_lm(tmp_path / "model"))
    collator = DataCollatorForLanguageModeling(words, mlm=False)
    trainer = make_trainer(
        AttributionTrainer,
        tmp_path,
        trainer_settings={"model": network, "train_dataset": rows, "data_collator": collator},
    )
    with pytest.raises(ValueError, match=r"no labels to be wrong: causal language modelling.*text"):
        find_mislabeled(trainer)


@pytest.mark.parametrize("block", [3, 7, 4096])
def test_copies_are_found_whatever_the_blocks(block, tmp_path, monkeypatch):
    monkeypatch.setattr(debugging, "BLOCK_SIZE", block)
    dataset, _ = noisy_points(20)
    # Row 4 occurs again as 20 and 22, row 11 as 21: 22 is a copy of either.
    dataset = dataset.select([*range(20), 4, 11, 4])
    trainer = make_trainer(
        AttributionTrainer, tmp_path, trainer_settings={"train_dataset": dataset}, model_settings={"hidden": 64}
    )
    copies = find_duplicates(trainer, threshold=0.99999)
    assert sorted(copies["train_index"][:]) == [20, 21, 22]
    found = dict(zip(copies["train_index"][:], copies["duplicate_of"][:], strict=True))
    assert found == {20: 4, 21: 11, 22: 4}
    assert copies["similarity"][:] == pytest.approx([1, 1, 1], abs=1e-5)
    assert set(find_duplicates(trainer, threshold=1)["duplicate_of"][:]) == {4, 11}
    assert find_duplicates(trainer, threshold=-0.999).num_rows == 22


def test_no_copies_is_an_empty_dataset(tmp_path):
    dataset, _ = noisy_points(5)
    trainer = make_trainer(AttributionTrainer, tmp_path, trainer_settings={"train_dataset": dataset})
    assert find_duplicates(trainer, threshold=1).num_rows == 0


def test_what_is_no_cosine_is_refused(tmp_path):
    dataset, _ = noisy_points(8)
    trainer = make_trainer(AttributionTrainer, tmp_path, trainer_settings={"train_dataset": dataset})
    with pytest.raises(ValueError, match="threshold=2"):
        find_duplicates(trainer, threshold=2)
    with pytest.raises(ValueError, match="pooling must be one of"):
        find_duplicates(trainer, pooling="sum")


def test_every_row_goes_through_the_model_once(tmp_path, monkeypatch):
    monkeypatch.setattr(debugging, "BLOCK_SIZE", 3)
    dataset, _ = noisy_points(20)
    trainer = make_trainer(AttributionTrainer, tmp_path, trainer_settings={"train_dataset": dataset})
    rows = []
    trainer.model.register_forward_hook(
        lambda module, args, kwargs, output: rows.append(len(output["logits"])), with_kwargs=True
    )
    trainer.model.train()
    find_duplicates(trainer)
    assert sum(rows) == 20
    assert trainer.model.training


def test_the_best_rows_of_all_and_of_each_group():
    scores = Scores(np.array([[5.0, 4, 3, 2, 1, 0], [5.0, 4, 3, 2, 1, 0]]), method="trak")
    train = Dataset.from_dict({"text": list("abcdef")})
    chosen = select_subset(scores, 3, train)
    assert (chosen["text"][:], chosen["score"][:]) == (["a", "b", "c"], [5, 4, 3])
    balanced = select_subset(scores, 0.5, train, groups=[0, 0, 0, 0, 1, 1])
    assert balanced["train_index"][:] == [0, 1, 4]
    assert balanced["rank"][:] == [1, 2, 5]
    assert select_subset(scores, 6).num_rows == 6
    assert select_subset(scores, 1, groups=list("xxyyzz")).num_rows == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: select_subset(s, 0), ValueError, "budget=0 chooses 0 of 3"),
        (lambda s: select_subset(s, 4), ValueError, "chooses 4 of 3"),
        (lambda s: select_subset(s, 0.01), ValueError, "chooses 0 of 3"),
        (lambda s: select_subset(s, 1, groups=[1]), MismatchError, "1 groups and 3 examples"),
        (lambda s: select_subset(s, 1, Dataset.from_dict({"a": [1]})), MismatchError, "train_dataset has"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(Scores(np.eye(3), method="trak"))
