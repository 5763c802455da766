"""What large models are made of: half precision, checkpointed activations, device maps, experts, quantised weights."""

import functools

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from test_gradients import as_batch, check, looped, probe_of
from torch import nn

from hf_attribution import attribute
from hf_attribution.errors import UnsupportedError
from hf_attribution.gradients.checks import refuse_wrong_backward
from hf_attribution.gradients.per_example import PerExampleGradients
from hf_attribution.methods import Trak
from hf_attribution.tasks import infer_task


def rows_of(batch):
    """Rows without their padding, and a collator that pads them again."""
    kept = [mask.bool() for mask in batch["attention_mask"]]
    rows = {key: [v[k].tolist() for v, k in zip(batch[key], kept, strict=True)] for key in ("input_ids", "labels")}
    return Dataset.from_dict(rows | {"attention_mask": [[1] * int(k.sum()) for k in kept]})


def pad(rows, left=False):
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key, fill):
        missing = [[fill] * (longest - len(row[key])) for row in rows]
        return torch.tensor([m + row[key] if left else row[key] + m for row, m in zip(rows, missing, strict=True)])

    return {key: padded(key, fill) for key, fill in (("input_ids", 1), ("attention_mask", 0), ("labels", -100))}


def scored(model, data, method="grad_dot", **settings):
    return attribute(model, data, data, method=method, data_collator=pad, progress=False, **settings).values


@pytest.fixture(scope="module")
def long_batch():
    return models.text_batch(batch=7, length=9)


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize(
    "method", ["grad_dot", Trak(dim=16), "ekfac", "influence", "datainf", "representation_similarity"]
)
def test_scores_do_not_depend_on_how_rows_are_batched(method, long_batch):
    model, _ = models.make("llama")
    data = rows_of(long_batch)
    expected = scored(model, data, method, batch_size=7)
    for settings in ({"batch_tokens": 20}, {"batch_size": 2}):
        np.testing.assert_allclose(scored(model, data, method, **settings), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["grad_dot", Trak(dim=16), "ekfac", "trackstar"])
def test_scores_where_memory_runs_out_are_the_same(method, long_batch, monkeypatch):
    model, _ = models.make("llama")
    data = rows_of(long_batch)
    expected = scored(model, data, method)
    failures, forward = [], type(model).forward

    @functools.wraps(forward)
    def limited(self, input_ids, **kwargs):
        if len(input_ids) > 2:
            failures.append(len(input_ids))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", limited)
    np.testing.assert_allclose(scored(model, data, method), expected, rtol=1e-3, atol=1e-4)
    assert failures


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_products_of_half_precision_gradients_add_up_in_single_precision(dtype, family):
    """Bounded by what single precision makes of the same rounded weights and activations: no sum is in half."""
    model, batch = models.make(family)
    reference = PerExampleGradients(model, infer_task(model).losses, probe_of(batch))(as_batch(batch))
    model = model.to(dtype)
    gradients = PerExampleGradients(model, infer_task(model).losses, probe_of(batch))
    found = gradients(as_batch(batch))
    assert gradients.dtype == torch.float32
    assert found.values.dtype == torch.float32
    for terms in found.terms.values():
        for term in terms:
            assert all(
                v.dtype in (torch.float32, torch.int64) for v in vars(term).values() if isinstance(v, torch.Tensor)
            )
    torch.testing.assert_close(found.values, reference.values, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["grad_dot", Trak(dim=16), "ekfac", "influence", "diagonal", "trackstar"])
def test_scores_of_half_precision_models_are_near_those_of_single_precision(dtype, method, long_batch):
    model, _ = models.make("llama")
    data = rows_of(long_batch)
    expected = scored(model, data, method)
    found = scored(model.to(dtype), data, method)
    assert found.dtype == np.float32
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.98


# ---------------------------------------------------------------- ways of running


def test_checkpointed_activations_change_nothing(long_batch):
    model, _ = models.make("llama")
    data = rows_of(long_batch)
    expected = scored(model, data)
    model.gradient_checkpointing_enable()
    np.testing.assert_allclose(scored(model, data), expected, rtol=1e-5, atol=1e-6)
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_models_with_a_device_map(family, long_batch, tmp_path):
    from accelerate import dispatch_model

    model, _ = models.make(family)
    data = rows_of(long_batch)
    model.save_pretrained(tmp_path)
    expected = scored(model, data, Trak(dim=16))
    mapped = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    np.testing.assert_allclose(scored(mapped, data, Trak(dim=16)), expected, rtol=1e-5, atol=1e-6)
    found = scored(mapped, data, Trak(dim=16), checkpoints=[tmp_path])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_tied_embeddings_have_one_gradient():
    model, batch = models.make("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    gradients = check(model, infer_task(model).losses, batch)
    assert "lm_head.weight" not in gradients.parameters
    assert not looped(gradients)
    for pattern in ("lm_head", "transformer.wte"):
        only = check(model, infer_task(model).losses, batch, modules=[pattern])
        assert list(only.parameters) == ["transformer.wte.weight"]


@pytest.mark.parametrize("method", ["grad_dot", "ekfac", "datainf"])
def test_routers_without_a_gradient_make_no_noise(method, long_batch):
    """The only expert that is chosen has weight 1, whatever the router says: its gradient is rounding."""
    model, _ = models.make("mixtral")
    data = rows_of(long_batch)
    expected = scored(model, data, method, batch_size=7)
    np.testing.assert_allclose(
        scored(model, data, method, batch_size=1), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
    )


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_experts_and_their_routers_are_exact(family):
    """Each is differentiated on its own; gpt-oss has besides a raw parameter within its attention."""
    model, batch = models.make(family)
    for rows in (batch, models.moved(batch, left=2, right=1)):
        gradients = check(model, infer_task(model).losses, rows)
        assert all(name.endswith("self_attn.sinks") for name in looped(gradients))
    assert any(".experts." in name for name in gradients.parameters)


# ---------------------------------------------------------------- quantised weights


def quantised(make, family="llama"):
    """A tiny model with adapters over quantised linear layers, and the same model with the weights they stand for."""
    peft = pytest.importorskip("peft")
    bnb = pytest.importorskip("bitsandbytes")
    model, _ = models.make(family)
    reference, _ = models.make(family)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            layer = make(bnb, module).to("cpu")
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
            with torch.no_grad():
                eye = torch.eye(module.in_features)
                weight = layer.train()(eye.requires_grad_(True)).detach().T
            reference.get_submodule(name).weight.data = weight.float().contiguous()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    adapted = [peft.get_peft_model(each.requires_grad_(False), config).eval() for each in (model, reference)]
    with torch.no_grad():
        for name, parameter in adapted[0].named_parameters():
            if "lora" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
                adapted[1].get_parameter(name).copy_(parameter)
    return adapted


def four_bit(kind):
    def make(bnb, module):
        layer = bnb.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, quant_type=kind, compute_dtype=torch.float32
        )
        layer.load_state_dict(module.state_dict())
        return layer

    return make


def eight_bit(bnb, module):
    layer = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias=False, has_fp16_weights=False)
    layer.load_state_dict(module.state_dict())
    return layer


@pytest.mark.parametrize("make", [four_bit("nf4"), four_bit("fp4"), eight_bit], ids=["nf4", "fp4", "int8"])
def test_adapters_over_quantised_weights(make, long_batch):
    """Right, as the weights that the quantised ones stand for give it, or refused by name; never silently wrong."""
    model, reference = quantised(make)
    data = rows_of(long_batch)
    try:
        refuse_wrong_backward(model)
    except UnsupportedError:
        with pytest.raises(UnsupportedError, match="Linear"):
            scored(model, data)
        return
    expected = scored(reference, data)
    np.testing.assert_allclose(scored(model, data), expected, rtol=0, atol=2e-3 * np.abs(expected).max())


class Packed(nn.Module):
    """A quantised layer whose gradients are lost once it has been run for inference, as some kernels pack weights."""

    def __init__(self, wrong):
        super().__init__()
        self.in_features = 4
        self.weight = nn.Parameter(torch.randint(-5, 5, (3, 4), dtype=torch.int8), requires_grad=False)
        self.wrong, self.packed = wrong, False

    def forward(self, x):
        self.packed |= not x.requires_grad
        if self.packed and self.wrong == "lost":
            x = x.detach()
        if self.packed and self.wrong == "scaled":
            x = x * 2 - x.detach()
        return F.linear(x, self.weight.to(x.dtype))


@pytest.mark.parametrize("wrong", ["lost", "scaled", None])
def test_wrong_gradients_of_quantised_weights_are_refused(wrong):
    model = nn.Sequential(nn.Linear(4, 4), Packed(wrong)).eval()
    if wrong is None:
        refuse_wrong_backward(model)
        return
    with pytest.raises(UnsupportedError, match=r"1 \(Packed\).*dequantise"):
        refuse_wrong_backward(model)
    with pytest.raises(UnsupportedError, match="Packed"):
        PerExampleGradients(model, lambda m, i: m(i["x"]).sum(1), as_batch({"x": torch.randn(2, 4)}))
