"""Models and datasets by name: what is found by itself, what is refused, and that rows stay rows."""

import dataclasses

import datasets
import folders
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_attribution import preprocessing
from hf_attribution.arguments import DataArguments, ModelArguments
from hf_attribution.methods import get_method
from hf_attribution.splits import load_query, load_train
from hf_attribution.tasks import CausalLM, Classification, MaskedLM, Regression, Seq2SeqLM
from hf_attribution.workspace import checkpoints_for, load_workspace


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "classifier": folders.save_classifier(folder / "classifier"),
        "headless": folders.save_headless(folder / "headless"),
        "causal": folders.save_causal_lm(folder / "causal"),
        "masked": folders.save_masked_lm(folder / "masked"),
        "seq2seq": folders.save_seq2seq(folder / "seq2seq"),
        "image": folders.save_image_classifier(folder / "image"),
    }


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    return folders.save_splits(tmp_path_factory.mktemp("data") / "reviews", folders.reviews)


def batch_of(workspace, split="train"):
    from hf_attribution.columns import used_columns
    from hf_attribution.data import Split

    model = workspace.model if workspace.model is not None else workspace.model_init()
    return model, Split(used_columns(getattr(workspace, split), model), workspace.data_collator, 4).probe().inputs


class TestTasks:
    def test_text_classification_keeps_rows_and_columns(self, models, reviews):
        workspace = load_workspace(ModelArguments(models["classifier"]), DataArguments(reviews))
        raw = folders.reviews(12)
        assert type(workspace.task) is Classification
        assert workspace.train["text"][:] == raw["text"][:]
        assert workspace.train["source"][:] == raw["source"][:]
        tokenized = folders.tokenizer()(raw["text"][:])["input_ids"]
        assert workspace.train["input_ids"][:] == tokenized
        model, batch = batch_of(workspace)
        assert workspace.task.losses(model, batch).shape == (2,)
        assert batch["labels"].tolist() == [raw[0]["label"], raw[11]["label"]]

    def test_causal_lm_has_no_labels_but_the_tokens(self, models, reviews):
        workspace = load_workspace(ModelArguments(models["causal"]), DataArguments(reviews))
        assert type(workspace.task) is CausalLM
        assert workspace.train["original_label"][:] == folders.reviews(12)["label"][:]
        model, batch = batch_of(workspace)
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        mask = batch["attention_mask"].bool()
        assert torch.equal(batch["labels"][mask], batch["input_ids"][mask])
        assert (batch["labels"][~mask] == -100).all()
        assert workspace.task.losses(model, batch).isfinite().all()

    def test_masked_lm(self, models, reviews):
        workspace = load_workspace(ModelArguments(models["masked"]), DataArguments(reviews))
        assert type(workspace.task) is MaskedLM
        assert workspace.data_collator.mlm

    def test_seq2seq_lm(self, models, tmp_path):
        rows = Dataset.from_dict({"id": ["1", "2"], "text": ["a good film", "bad"], "summary": ["good", "bad film"]})
        DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "d"))
        workspace = load_workspace(ModelArguments(models["seq2seq"]), DataArguments(str(tmp_path / "d")))
        assert type(workspace.task) is Seq2SeqLM
        tokens = folders.tokenizer()
        assert workspace.train["labels"][:] == tokens(rows["summary"][:])["input_ids"]
        model, batch = batch_of(workspace)
        assert (batch["labels"] == -100).sum() == 1
        assert workspace.task.losses(model, batch).isfinite().all()

    @pytest.mark.parametrize("channels", [1, 3])
    def test_image_classification(self, tmp_path, channels):
        model_folder = folders.save_image_classifier(tmp_path / "model", channels)
        data = folders.save_splits(tmp_path / "pictures", folders.pictures)
        workspace = load_workspace(ModelArguments(model_folder), DataArguments(data))
        assert type(workspace.task) is Classification
        model, batch = batch_of(workspace)
        assert batch["pixel_values"].shape == (2, channels, 8, 8)
        expected = workspace.processing_class(workspace.train[0]["image"].convert("L" if channels == 1 else "RGB"))
        np.testing.assert_allclose(batch["pixel_values"][0], np.asarray(expected["pixel_values"][0]), atol=1e-6)
        assert workspace.train["labels"][:] == [i % 3 for i in range(12)]
        assert workspace.train[0]["image"].size == (10, 10)
        assert workspace.task.losses(model, batch).shape == (2,)

    def test_measurement_is_passed_on(self, models, reviews):
        workspace = load_workspace(ModelArguments(models["classifier"], measurement="loss"), DataArguments(reviews))
        assert workspace.task.measurement_name == "loss"

    def test_a_model_without_a_head_needs_a_task(self, models, reviews):
        with pytest.raises(ValueError, match=r"is a BertModel.*--task"):
            load_workspace(ModelArguments(models["headless"]), DataArguments(reviews))

    def test_texts_are_cut_at_what_the_model_takes(self, models, tmp_path):
        Dataset.from_dict({"text": ["film " * 50]}).to_csv(str(tmp_path / "a.csv"))
        files = DataArguments(str(tmp_path / "a.csv"), query_dataset_name=str(tmp_path / "a.csv"))
        workspace = load_workspace(ModelArguments(models["causal"]), files)
        assert len(workspace.train[0]["input_ids"]) == 16
        workspace = load_workspace(ModelArguments(models["causal"]), dataclasses.replace(files, max_length=5))
        assert len(workspace.train[0]["input_ids"]) == 5


class TestNewWeights:
    def test_a_new_head_is_shaped_after_the_labels(self, models, reviews):
        args = ModelArguments(models["headless"], task="text-classification")
        workspace = load_workspace(args, DataArguments(reviews))
        assert workspace.model is None
        model = workspace.model_init()
        assert model.config.id2label == {0: "neg", 1: "pos"}
        assert model.classifier.out_features == 2
        with pytest.raises(ValueError, match="new weights"):
            workspace.trained_model()

    def test_a_new_head_is_drawn_anew_on_the_same_body(self, models, reviews):
        args = ModelArguments(models["headless"], task="text-classification")
        workspace = load_workspace(args, DataArguments(reviews))
        torch.manual_seed(0)
        one, two = workspace.model_init(), workspace.model_init()
        assert torch.equal(one.bert.embeddings.word_embeddings.weight, two.bert.embeddings.word_embeddings.weight)
        assert not torch.equal(one.classifier.weight, two.classifier.weight)

    def test_from_scratch_draws_all_weights(self, models, reviews):
        workspace = load_workspace(ModelArguments(models["causal"], from_scratch=True), DataArguments(reviews))
        torch.manual_seed(0)
        one, two = workspace.model_init(), workspace.model_init()
        assert not torch.equal(one.lm_head.weight, two.lm_head.weight)

    def test_float_labels_make_a_regression(self, models, tmp_path):
        rows = Dataset.from_dict({"text": ["good", "bad"], "label": [0.5, -1.5]})
        rows.to_csv(str(tmp_path / "a.csv"))
        files = DataArguments(str(tmp_path / "a.csv"), query_dataset_name=str(tmp_path / "a.csv"))
        workspace = load_workspace(ModelArguments(models["headless"], task="text-classification"), files)
        assert type(workspace.task) is Regression
        model, batch = batch_of(workspace)
        assert workspace.task.losses(model, batch).shape == (2,)

    def test_a_trained_model_is_there(self, models, reviews):
        workspace = load_workspace(ModelArguments(models["classifier"]), DataArguments(reviews))
        assert workspace.model_init is None
        assert workspace.trained_model() is workspace.model


class TestLabels:
    def rows(self, labels, names=None):
        feature = Value("string") if names is None else ClassLabel(names=names)
        return Dataset.from_dict({"y": labels}, features=Features({"y": feature}))

    def test_named_labels_get_the_numbers_of_the_trained_model(self):
        splits = {"train": self.rows(["pos", "neg", "pos"]), "query": self.rows(["neg"])}
        splits, names = preprocessing.encode_labels(splits, "y", ["POS", "NEG"])
        assert names == ["POS", "NEG"]
        assert splits["train"]["y"][:] == [0, 1, 0]
        assert splits["query"]["y"][:] == [1]

    def test_class_labels_in_another_order_are_renumbered(self):
        splits = {"train": self.rows([0, 1, 1], ["neg", "pos"]), "query": self.rows([1], ["neg", "pos"])}
        splits, _ = preprocessing.encode_labels(splits, "y", ["pos", "neg"])
        assert splits["train"]["y"][:] == [1, 0, 0]
        assert splits["query"]["y"][:] == [0]
        assert splits["train"].features["y"].names == ["pos", "neg"]

    def test_splits_with_class_labels_in_different_orders_agree_afterwards(self):
        splits = {"train": self.rows([0, 1], ["neg", "pos"]), "query": self.rows([0, 1], ["pos", "neg"])}
        splits, _ = preprocessing.encode_labels(splits, "y", None)
        assert splits["query"]["y"][:] == [1, 0]

    def test_names_that_differ_in_case_only_stay_apart(self):
        splits, names = preprocessing.encode_labels({"train": self.rows(["a", "A", "a"])}, "y", None)
        assert [names[i] for i in splits["train"]["y"][:]] == ["a", "A", "a"]

    def test_a_label_that_training_has_not_is_refused(self):
        splits = {"train": self.rows(["a", "b"]), "query": self.rows(["c"])}
        with pytest.raises(ValueError, match=r"query dataset has the label 'c'; the classes are a, b"):
            preprocessing.encode_labels(splits, "y", None)

    @pytest.mark.parametrize("missing", [-1, None])
    def test_hidden_labels_are_refused(self, missing):
        splits = {"train": self.rows([0, 1], ["a", "b"]), "query": self.rows([0, missing], ["a", "b"])}
        with pytest.raises(ValueError, match=r"Row 1 of the query dataset has no label.*--query_split"):
            preprocessing.encode_labels(splits, "y", None)

    def test_a_chosen_label_column_wins(self, models, tmp_path):
        rows = folders.reviews(6).add_column("other", [i // 3 for i in range(6)])
        DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "d"))
        args = DataArguments(str(tmp_path / "d"), label_column_name="other")
        workspace = load_workspace(ModelArguments(models["classifier"]), args)
        assert workspace.train["labels"][:] == [0, 0, 0, 1, 1, 1]
        assert workspace.train["original_label"][:] == [0, 1, 0, 1, 0, 1]
        assert batch_of(workspace)[1]["labels"].tolist() == [0, 1]


class TestColumns:
    @pytest.mark.parametrize(
        ("names", "expected"),
        [
            (["text", "title"], ("text",)),
            (["idx", "premise", "hypothesis"], ("premise", "hypothesis")),
            (["question", "sentence"], ("question", "sentence")),
            (["tweet"], ("tweet",)),
        ],
    )
    def test_text_columns_are_found(self, names, expected):
        rows = Dataset.from_dict({name: ["a"] for name in names})
        assert preprocessing.text_columns(rows, None, None) == expected

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["a", "b"], "could be a, b: choose with --text_column_name"),
            (["text", "review"], "could be text, review: choose"),
            ([], "was not found: choose"),
        ],
    )
    def test_unclear_text_columns_are_refused(self, names, message):
        rows = Dataset.from_dict({"number": [1], **{name: ["a"] for name in names}})
        with pytest.raises(ValueError, match=message):
            preprocessing.text_columns(rows, None, None)

    def test_a_chosen_column_must_be_there(self):
        with pytest.raises(ValueError, match=r"--text_column_name nope: the dataset has no such column, it has text"):
            preprocessing.text_columns(Dataset.from_dict({"text": ["a"]}), ["nope"], None)

    def test_the_label_is_no_text(self):
        assert preprocessing.text_columns(Dataset.from_dict({"tweet": ["a"], "y": ["pos"]}), None, "y") == ("tweet",)

    @pytest.mark.parametrize("names", [["text", "title"], ["text"]])
    def test_unclear_targets_are_refused(self, names):
        rows = Dataset.from_dict({name: ["a"] for name in names})
        with pytest.raises(ValueError, match="--text_column_name and --target_column_name"):
            preprocessing.source_and_target_columns(rows, None, None)
        assert preprocessing.source_and_target_columns(rows, ["text"], names[-1]) == ("text", names[-1])

    def test_two_class_labels_are_unclear(self):
        rows = Dataset.from_dict({"fine": [0], "coarse": [0]})
        rows = rows.cast_column("fine", ClassLabel(names=["a"])).cast_column("coarse", ClassLabel(names=["b"]))
        with pytest.raises(ValueError, match=r"could be fine, coarse.*--label_column_name"):
            preprocessing.label_column(rows, None)

    def test_empty_and_missing_texts_are_refused(self, models, tmp_path):
        for texts, message in (
            (["a film", ""], "1 rows of the train dataset have no tokens.*row 1"),
            (["a film", None], "Row 1 of the train dataset has no 'text'"),
        ):
            Dataset.from_dict({"text": texts}).to_json(str(tmp_path / "a.jsonl"))
            files = DataArguments(str(tmp_path / "a.jsonl"), query_dataset_name=str(tmp_path / "a.jsonl"))
            with pytest.raises(ValueError, match=message):
                load_workspace(ModelArguments(models["causal"]), files)


class TestSplits:
    @pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
    def test_one_file_is_a_training_set(self, tmp_path, kind):
        path = str(tmp_path / f"rows.{kind}")
        rows = folders.reviews(5)
        getattr(rows, f"to_{kind.removesuffix('l')}")(path)
        assert load_train(DataArguments(path))["text"][:] == rows["text"][:]
        assert load_query(DataArguments("other", query_dataset_name=path))["text"][:] == rows["text"][:]

    def test_a_folder_of_files_has_their_splits(self, tmp_path):
        folders.reviews(5).to_parquet(str(tmp_path / "train.parquet"))
        folders.reviews(3, seed=1).to_parquet(str(tmp_path / "test.parquet"))
        args = DataArguments(str(tmp_path))
        assert (len(load_train(args)), len(load_query(args))) == (5, 3)

    def test_one_saved_dataset_is_a_training_set_without_queries(self, tmp_path):
        folders.reviews(5).with_format("numpy").save_to_disk(str(tmp_path / "d"))
        args = DataArguments(str(tmp_path / "d"))
        assert load_train(args).format["type"] is None
        with pytest.raises(ValueError, match=r"no test or validation split, it has train.*--query_dataset_name"):
            load_query(args)
        assert len(load_query(dataclasses.replace(args, query_split="train"))) == 5

    def test_a_missing_split_is_named(self, reviews):
        with pytest.raises(ValueError, match=r"no dev split, it has train, test: choose --train_split"):
            load_train(DataArguments(reviews, train_split="dev"))

    def test_fewer_rows_are_drawn_and_not_cut(self, reviews):
        few = load_train(DataArguments(reviews, max_train_examples=4))
        everything = load_train(DataArguments(reviews))
        assert few["text"][:] == everything.shuffle(seed=0).select(range(4))["text"][:]
        assert len(load_train(DataArguments(reviews, max_train_examples=99))) == 12

    @pytest.mark.parametrize(
        ("name", "error", "message"),
        [
            (None, ValueError, "give --dataset_name"),
            ("./nowhere", FileNotFoundError, "There is no file or folder ./nowhere"),
            ("nowhere.csv", FileNotFoundError, "There is no file or folder nowhere.csv"),
            (__file__, ValueError, "is no dataset file"),
        ],
    )
    def test_what_is_no_dataset_is_refused_at_once(self, name, error, message):
        with pytest.raises(error, match=message):
            load_train(DataArguments(name))


class TestCheckpoints:
    def test_folders_are_passed_on(self):
        assert checkpoints_for(get_method("trak"), ["a", "b"]) == ["a", "b"]
        assert checkpoints_for(get_method("trak"), None) is None

    def test_tracin_needs_the_folder_of_a_training(self, tmp_path):
        with pytest.raises(ValueError, match="output_dir of the Trainer as --checkpoints"):
            checkpoints_for(get_method("tracin"), None)
        with pytest.raises(ValueError, match=r"no checkpoint-\* folders"):
            checkpoints_for(get_method("tracin"), [str(tmp_path)])
