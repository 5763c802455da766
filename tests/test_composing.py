"""With the pieces of other libraries: `evaluate.combine`, maps and filters of `datasets`, pipelines."""

import folders
import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, pipeline

from hf_attribution import Scores, attribute


def test_lds_is_combined_with_another_metric():
    import evaluate

    predictions, references = np.random.default_rng(0).normal(size=(2, 4, 30))
    apart = {name: evaluate.load(name) for name in ("lds", "loo_correlation")}
    together = evaluate.combine(list(apart.values())).compute(predictions=predictions, references=references)
    for name, metric in apart.items():
        for key, value in metric.compute(predictions=predictions, references=references).items():
            # `combine` puts the metric's name before what both have.
            assert together.get(f"{name}_{key}", together.get(key)) == value


def test_top_examples_are_mapped_filtered_and_joined_as_any_dataset():
    values = np.random.default_rng(0).normal(size=(3, 20))
    train = Dataset.from_dict({"text": [f"text {row}" for row in range(20)], "label": [row % 2 for row in range(20)]})
    labels = [0, 1, 1]
    top = Scores(values, "trak").top(k=5, train_dataset=train)
    same = top.filter(lambda row: row["label"] == labels[row["query"]])
    by_hand = [(q, i) for q in range(3) for i in np.argsort(-values[q])[:5] if i % 2 == labels[q]]
    assert list(zip(same["query"], same["train_index"], strict=True)) == by_hand
    shouted = top.map(lambda rows: {"text": [text.upper() for text in rows["text"]]}, batched=True)
    assert shouted["text"] == [f"TEXT {row}" for row in top["train_index"]]
    named = top.to_pandas().groupby("query")["text"].first().tolist()
    assert named == [f"text {row}" for row in values.argmax(axis=1)]


@pytest.mark.parametrize("method", ["grad_dot", "representation_similarity"])
def test_the_model_and_tokenizer_of_a_pipeline_are_attributed(tmp_path, method):
    name = folders.save_classifier(tmp_path / "classifier")  # or the name of a model on the Hub
    classify = pipeline("text-classification", model=name)
    rows = {split: folders.reviews(size, seed=size) for split, size in (("train", 12), ("query", 4))}
    tokens = {
        split: each.map(lambda row: classify.tokenizer(row["text"]), remove_columns=["text", "source"])
        for split, each in rows.items()
    }
    found = attribute(
        classify.model, tokens["train"], tokens["query"], method=method,
        data_collator=DataCollatorWithPadding(classify.tokenizer),
    )  # fmt: skip
    alone = attribute(
        AutoModelForSequenceClassification.from_pretrained(name), tokens["train"], tokens["query"], method=method,
        data_collator=DataCollatorWithPadding(classify.tokenizer),
    )  # fmt: skip
    np.testing.assert_allclose(found.values, alone.values, rtol=1e-4, atol=1e-6)
    assert classify(rows["query"]["text"][:])[0]["label"] in ("neg", "pos")  # it goes on as it was
