"""Trainers of other libraries under the mixin."""

import models
import numpy as np
import pytest
import torch
from datasets import Dataset
from test_data import tokenizer

from hf_attribution import AttributionMixin
from hf_attribution.tasks import CausalLM
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
