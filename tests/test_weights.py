"""Checkpoints of every kind, whole and of adapters, and copies that compute with weights of their own."""

import copy
import functools
import types

import models
import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from torch import nn

from hf_attribution import AttributionTrainer, attribute
from hf_attribution.adapters import (
    active_adapters,
    adapter_parameters,
    adapters_trainable,
    holds_adapters,
    refuse_prompt_learning,
)
from hf_attribution.checkpoints import trainer_checkpoints
from hf_attribution.copies import own_copy
from hf_attribution.errors import MismatchError, UnsupportedError
from hf_attribution.weights import copy_to_load_into, load_weights

# These are saved under other names than they compute with.
CONVERTED = ["vit", "deit", "swin", "beit", "dinov2", "gpt_neox", "mixtral"]


def states_equal(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("family", [*CONVERTED, "gpt2", "llama", "bert", "t5", "resnet"])
@pytest.mark.parametrize("shard_size", ["5GB", "8KB"])
def test_what_save_pretrained_wrote_is_loaded(family, shard_size, tmp_path):
    saved, _ = models.make(family)
    other, _ = models.make(family, seed=1)
    saved.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (shard_size == "5GB") == (tmp_path / "model.safetensors").exists()
    state = torch.get_rng_state()
    assert load_weights(other, tmp_path) is other
    assert states_equal(saved, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_fixed_position_tables_are_not_saved_and_not_missed(tmp_path):
    saved, _ = models.FAMILIES["marian"]()
    other, _ = models.FAMILIES["marian"]()
    saved.save_pretrained(tmp_path)
    assert not states_equal(saved, other)
    assert states_equal(saved, load_weights(other, tmp_path))


@pytest.mark.parametrize("family", ["vit", "mixtral"])
def test_converted_weights_of_another_architecture_are_refused(family, tmp_path):
    saved, _ = models.make(family)
    saved.save_pretrained(tmp_path)
    for changes, named in (
        ({"num_hidden_layers": 3}, r"layers\.2.* absent there"),
        ({"num_hidden_layers": 1}, "absent in the model"),
        ({"intermediate_size": 32}, r"\(.*24.*\) there and \(.*32.*\) in the model"),
    ):
        config = copy.deepcopy(saved.config)
        config.update(changes)
        with pytest.raises(MismatchError, match=named):
            load_weights(type(saved)(config), tmp_path)


def test_half_precision_models_take_single_precision_checkpoints(tmp_path):
    for family in ("vit", "gpt2"):
        saved, _ = models.make(family)
        saved.save_pretrained(tmp_path / family)
        half = load_weights(models.make(family, seed=1)[0].bfloat16(), tmp_path / family)
        assert states_equal(half, saved.bfloat16())


def test_a_lost_shard_is_named(tmp_path):
    models.make("gpt2")[0].save_pretrained(tmp_path, max_shard_size="20KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=lost.name):
        load_weights(models.make("gpt2")[0], tmp_path)


def test_shards_of_an_earlier_save_are_left_out(tmp_path):
    saved, _ = models.make("gpt2")
    models.make("gpt2", seed=2)[0].save_pretrained(tmp_path, max_shard_size="20KB")
    kept = {path: path.read_bytes() for path in tmp_path.glob("model-*.safetensors")}
    saved.save_pretrained(tmp_path)
    for path, content in kept.items():
        path.write_bytes(content)
    assert states_equal(saved, load_weights(models.make("gpt2", seed=1)[0], tmp_path))


def test_checkpoints_of_a_vision_transformer_score_as_their_models(tmp_path):
    saved, batch = models.make("vit")
    model, _ = models.make("vit", seed=1)
    saved.save_pretrained(tmp_path)
    data = Dataset.from_dict({k: v.tolist() for k, v in batch.items()}).with_format("torch")
    found = attribute(model, data, data, method="grad_dot", checkpoints=[tmp_path], progress=False).values
    expected = attribute(saved, data, data, method="grad_dot", progress=False).values
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- copies


def holding(model):
    """A forward such as libraries put on a model: a method over a closure over the original."""
    original = model.forward
    also = functools.partial(lambda module, x: module.weight.sum() * x.sum(), model)

    def recursive(depth):
        return recursive(depth - 1) if depth else original

    def forward(self, x, *, factor=1.0):
        return recursive(2)(x) * factor + also(x)

    model.forward = types.MethodType(forward, model)
    return model


def test_a_copy_computes_with_its_own_weights():
    model, x = holding(nn.Linear(2, 2)), torch.ones(1, 2)
    before = model(x)
    copied = own_copy(own_copy(model))
    torch.testing.assert_close(copied(x, factor=2.0), model(x, factor=2.0))
    with torch.no_grad():
        copied.weight.add_(1.0)
    plain = copied.weight @ x[0] + copied.bias + copied.weight.sum() * x.sum()
    torch.testing.assert_close(copied(x)[0], plain)
    torch.testing.assert_close(model(x), before)
    copied(x).sum().backward()
    assert copied.weight.grad is not None
    assert model.weight.grad is None


def test_hooks_of_accelerate_follow_the_copy():
    from accelerate import dispatch_model

    model, batch = models.make("gpt2")
    expected = model(**batch).logits
    model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    copied = own_copy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    torch.testing.assert_close(model(**batch).logits, expected)
    assert not copied(**batch).logits.any()


# ---------------------------------------------------------------- adapters


def adapted(family="gpt2", seed=0, name="default", wrap=True, base_seed=0, **settings):
    """A tiny model with random adapters of rank 2."""
    peft = pytest.importorskip("peft")
    model, batch = models.make(family, base_seed)
    targets = {"gpt2": ["c_attn"], "bert": ["query", "value"]}[family]
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": targets} | settings)
    if wrap:
        model = peft.get_peft_model(model, config, adapter_name=name)
    else:
        model.add_adapter(config, adapter_name=name)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval(), batch


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("name", ["default", "mine"])
def test_adapters_are_loaded(wrap, name, tmp_path):
    saved, batch = adapted(seed=0, name=name, wrap=wrap)
    other, _ = adapted(seed=1, name=name, wrap=wrap)
    saved.save_pretrained(tmp_path)
    assert active_adapters(saved) == [name]
    assert not states_equal(saved, other)
    assert states_equal(saved, load_weights(other, tmp_path))
    torch.testing.assert_close(saved(**batch).logits, other(**batch).logits)


def test_saved_modules_belong_to_the_adapters(tmp_path):
    saved, _ = adapted("bert", modules_to_save=["classifier"], task_type="SEQ_CLS")
    other, _ = adapted("bert", seed=1, modules_to_save=["classifier"], task_type="SEQ_CLS")
    saved.save_pretrained(tmp_path)
    assert states_equal(saved, load_weights(other, tmp_path))
    trainable = {name for name, p in saved.named_parameters() if p.requires_grad}
    assert adapter_parameters(saved).keys() == trainable
    assert any("classifier" in name for name in trainable)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lora_alpha": 8}, "lora_alpha is 4 there and 8 here"),
        ({"r": 3}, "r is 2 there and 3 here"),
        ({"target_modules": ["c_attn", "c_fc"]}, "target_modules"),
        ({"use_rslora": True}, "use_rslora"),
    ],
)
def test_other_adapters_are_refused(settings, named, tmp_path):
    adapted()[0].save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match=named):
        load_weights(adapted(**settings)[0], tmp_path)


def test_a_model_without_adapters_is_refused(tmp_path):
    adapted()[0].save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match="has none: pass the model with adapters"):
        load_weights(models.make("gpt2")[0], tmp_path)


def test_weights_trained_outside_of_the_adapters_are_refused(tmp_path):
    model, _ = adapted()
    model.save_pretrained(tmp_path)
    next(p for name, p in model.named_parameters() if "ln_f" in name).requires_grad_(True)
    with pytest.raises(UnsupportedError, match=r"ln_f.*modules_to_save"):
        load_weights(model, tmp_path)


def test_embeddings_saved_along_must_be_those_of_the_model(tmp_path):
    model, _ = adapted()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    other, _ = adapted(seed=1)
    assert states_equal(model, load_weights(other, tmp_path))
    with pytest.raises(MismatchError, match="lm_head"):
        load_weights(adapted(base_seed=3)[0], tmp_path)


def test_copies_share_what_lies_under_the_adapters(tmp_path):
    model, _ = adapted()
    model.save_pretrained(tmp_path / "adapters")
    models.make("gpt2")[0].save_pretrained(tmp_path / "whole")
    copied, own = copy_to_load_into(model, [tmp_path / "adapters"]), adapter_parameters(model)
    for (name, theirs), ours in zip(copied.named_parameters(), model.parameters(), strict=True):
        assert (theirs is ours) == (name not in own), name
    whole = copy_to_load_into(model, [tmp_path / "adapters", tmp_path / "whole"])
    assert not {p.data_ptr() for p in whole.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_adapters_that_were_loaded_frozen_are_attributed_over(tmp_path):
    peft = pytest.importorskip("peft")
    trained, batch = adapted()
    trained.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(models.make("gpt2")[0], tmp_path).eval()
    assert not any(p.requires_grad for p in loaded.parameters())
    data = Dataset.from_dict({k: v.tolist() for k, v in batch.items()}).with_format("torch")
    expected = attribute(trained, data, data, method="grad_dot", progress=False).values
    found = attribute(loaded, data, data, method="grad_dot", progress=False).values
    np.testing.assert_array_equal(found, expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    with adapters_trainable(models.make("gpt2")[0].requires_grad_(False)) as nothing:
        assert nothing is None


def test_checkpoints_of_adapters_score_as_their_models(tmp_path):
    model, batch = adapted(seed=0)
    data = Dataset.from_dict({k: v.tolist() for k, v in batch.items()}).with_format("torch")
    folders, values = [], []
    for seed in (1, 2):
        other, _ = adapted(seed=seed)
        other.save_pretrained(tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
        values.append(attribute(other, data, data, method="grad_dot", progress=False).values)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = attribute(model, data, data, method="grad_dot", checkpoints=folders, progress=False).values
    np.testing.assert_allclose(found, np.mean(values, axis=0), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture
def adapter_trainer(tmp_path):
    """A trainer of adapters on a tiny BERT, which saves every four steps."""
    model, _ = adapted("bert", modules_to_save=["classifier"], task_type="SEQ_CLS", lora_dropout=0.1)
    batch = models.text_batch(labels="class", batch=10, length=12)
    data = Dataset.from_dict({k: v.tolist() for k, v in batch.items()})
    args = tiny.arguments(tmp_path / "out", save_strategy="steps", save_steps=3, num_train_epochs=3)
    model.get_base_model().set_attn_implementation("eager")  # whose dropout can be repeated
    return AttributionTrainer(model=model, args=args, train_dataset=data, eval_dataset=data.select(range(3)))


def test_a_training_of_adapters_is_attributed_and_retrained(adapter_trainer):
    trainer = adapter_trainer
    trainer.train()
    checkpoints = trainer_checkpoints(trainer.args.output_dir)
    assert len(checkpoints) > 1
    assert all(holds_adapters(checkpoint.source) for checkpoint in checkpoints)
    tracin = trainer.attribute(method="tracin")
    assert tracin.values.shape == (3, 10)
    by_hand = 0.0
    for checkpoint in checkpoints:
        loaded = load_weights(own_copy(trainer.model), checkpoint.source)
        by_hand = by_hand + checkpoint.weight * trainer.attribute(method="grad_dot", checkpoints=[loaded]).values
    np.testing.assert_allclose(tracin.values, by_hand, rtol=1e-4, atol=1e-6)
    ensemble = trainer.train_ensemble(2, fraction=0.5)
    first = load_weights(own_copy(trainer.model), ensemble.checkpoints[0])
    assert not states_equal(first, trainer.model)
    assert trainer.attribute(method="trak", checkpoints=ensemble).values.shape == (3, 10)
    truth = trainer.retrain(num_subsets=2, fraction=0.5, keep_checkpoints=True)
    assert truth.outputs.shape == (2, 1, 3)


def test_a_training_of_adapters_is_recorded_and_unrolled(adapter_trainer, tmp_path):
    trainer = adapter_trainer
    trainer.recording_dir = tmp_path / "recording"
    trainer.train()
    scores = trainer.attribute(method="unroll")
    assert scores.values.shape == (3, 10)
    assert np.abs(scores.values).max() > 0


def test_virtual_tokens_are_refused():
    peft = pytest.importorskip("peft")
    model, batch = models.make("gpt2")
    model = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    data = Dataset.from_dict({k: v.tolist() for k, v in batch.items()}).with_format("torch")
    with pytest.raises(UnsupportedError, match="PromptTuningConfig"):
        attribute(model, data, data, method="grad_dot", progress=False)
    with pytest.raises(UnsupportedError, match="PrefixTuningConfig"):
        refuse_prompt_learning(
            peft.get_peft_model(
                models.make("gpt2")[0], peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
            )
        )
