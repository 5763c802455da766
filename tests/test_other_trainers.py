"""Trainers of other libraries under the mixin."""

import folders
import models
import numpy as np
import pytest
import torch
from datasets import Dataset
from test_data import tokenizer

from hf_attribution import AttributionMixin, Subsets, evaluate_lds
from hf_attribution.errors import UnsupportedError
from hf_attribution.tasks import CausalLM, Task
from hf_attribution.weights import load_weights


def test_retrained_models_of_sft_compute_with_weights_of_their_own(tmp_path):
    """TRL's trainer puts a forward on the model that holds the model itself: a plain deep copy runs the original."""
    trl = pytest.importorskip("trl")

    class AttributionSFTTrainer(AttributionMixin, trl.SFTTrainer):
        pass

    model, _ = models.make("llama")
    args = trl.SFTConfig(
        str(tmp_path), learning_rate=0.05, optim="sgd", num_train_epochs=2, per_device_train_batch_size=4,
        use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": models.text_batch(batch=8, length=8)["input_ids"].tolist()})
    trainer = AttributionSFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer())
    queries = trainer.train_dataset.select(range(3))
    truth = trainer.retrain(queries, num_subsets=2, keep_checkpoints=True, output_dir=tmp_path / "retrained")
    batch = trainer.data_collator([dict(row) for row in queries])
    with torch.no_grad():
        original = CausalLM().measurement(trainer.model.eval(), batch)
    for subset in range(2):
        folder = tmp_path / "retrained" / "runs" / f"{subset:05d}-0"
        alone = load_weights(models.make("llama", seed=5)[0], folder)
        with torch.no_grad():
            expected = CausalLM().measurement(alone, batch)
        np.testing.assert_allclose(truth.outputs[subset, 0], expected, rtol=1e-5)
        assert (expected - original).abs().max() > 0.1
        found = trainer.attribute(queries, method="grad_dot", checkpoints=[folder]).values
        by_hand = trainer.attribute(queries, method="grad_dot", checkpoints=[alone]).values
        np.testing.assert_allclose(found, by_hand, rtol=1e-5, atol=1e-5)
        assert np.abs(found - trainer.attribute(queries, method="grad_dot").values).max() > 1


class SimilarityOfPairs(Task):
    """The squared error of the cosine of two texts: what `CosineSimilarityLoss` averages over a batch."""

    def losses(self, model, batch):
        return (self.cosines(model, batch) - batch["label"]) ** 2

    def measurement(self, model, batch):
        return self.cosines(model, batch)

    def cosines(self, model, batch):
        embedded = []
        for column in ("first", "second"):
            start = f"{column}_"
            inputs = {key.removeprefix(start): value for key, value in batch.items() if key.startswith(start)}
            embedded.append(model(inputs)["sentence_embedding"])
        return torch.cosine_similarity(*embedded)


def test_a_trainer_of_sentence_transformers(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    class AttributionSentenceTransformerTrainer(AttributionMixin, st.SentenceTransformerTrainer):
        pass

    model = st.SentenceTransformer(folders.save_headless(tmp_path / "bert"), device="cpu")
    pairs = Dataset.from_dict(
        {"first": folders.texts(16), "second": folders.texts(16, seed=1), "label": np.linspace(0, 1, 16).tolist()}
    )
    args = st.SentenceTransformerTrainingArguments(
        str(tmp_path / "out"), learning_rate=0.5, optim="sgd", num_train_epochs=2, per_device_train_batch_size=4,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    loss = CosineSimilarityLoss(model)
    trainer = AttributionSentenceTransformerTrainer(model=model, args=args, train_dataset=pairs, loss=loss)
    queries = pairs.select(range(3))
    with pytest.raises(UnsupportedError, match="pass task="):
        trainer.attribute(queries, method="grad_dot")
    task = SimilarityOfPairs()
    truth = trainer.retrain(queries, num_subsets=6, task=task, output_dir=tmp_path / "retrained")
    assert loss.model is model
    # The loss holds the model: each retraining has a loss that holds its own.
    whole = trainer.retrain(queries, subsets=Subsets.whole(16), task=task, output_dir=tmp_path / "whole")
    given = AttributionSentenceTransformerTrainer(
        model=model, args=args, train_dataset=pairs, loss=CosineSimilarityLoss
    )
    by_class = given.retrain(queries, subsets=Subsets.whole(16), task=task, output_dir=tmp_path / "given")
    np.testing.assert_allclose(whole.outputs, by_class.outputs, rtol=1e-5)
    assert truth.outputs.std(axis=0).min() > 1e-4
    before = model[0].auto_model.embeddings.word_embeddings.weight.clone()
    trainer.train()
    assert not torch.equal(model[0].auto_model.embeddings.word_embeddings.weight, before)
    scores = trainer.attribute(queries, method="grad_dot", task=task)
    assert scores.values.shape == (3, 16)
    evaluate_lds(scores, truth)
