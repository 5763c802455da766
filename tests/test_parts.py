"""Scores of modules and tokens: they add up to the examples', and equal what the factors say."""

import functools

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from tiny import PadTokens

from hf_attribution import PartScores, attribute, attribute_parts
from hf_attribution.curvature import parts as curvature_parts
from hf_attribution.data import Batch as _Batch
from hf_attribution.errors import ArtefactError, NonFiniteError, UnsupportedError
from hf_attribution.gradients.per_example import PerExampleGradients
from hf_attribution.gradients.terms import Outer
from hf_attribution.methods import METHODS
from hf_attribution.tasks import CausalLM

N, Q = 7, 3
METHODS_OF_PARTS = ("grad_dot", "tracin", "diagonal", "kfac", "ekfac", "datainf")


Pad = functools.partial(PadTokens, causal=True)


def rows(count, seed):
    rng = np.random.default_rng(seed)
    return datasets.Dataset.from_list(
        [{"input_ids": rng.integers(5, 30, rng.integers(3, 9)).tolist()} for _ in range(count)]
    )


TRAIN, QUERY = rows(N, 1), rows(Q, 2)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request):
    torch.manual_seed(0)
    config = tf.GPT2Config(
        vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=request.param,
    )  # fmt: skip
    model = tf.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def run(model, function, method, collator=None, **kwargs):
    kwargs = {"batch_size": 4, "progress": False, **kwargs}
    return function(model, TRAIN, QUERY, method=method, data_collator=collator or Pad(), **kwargs)


@pytest.mark.parametrize("granularity", ["module", "token"])
@pytest.mark.parametrize("method", METHODS_OF_PARTS)
def test_parts_add_up_to_the_scores_of_examples(model, method, granularity, monkeypatch):
    expected = run(model, attribute, method)
    found = run(model, attribute_parts, method, granularity=granularity)
    np.testing.assert_allclose(found.sum().values, expected.values, rtol=1e-3,
                               atol=1e-5 * np.abs(expected.values).max())  # fmt: skip
    assert found.sum().method == method
    assert found.provenance["fingerprints"] == expected.provenance["fingerprints"]
    if granularity == "token":
        lengths = [len(row["input_ids"]) for row in TRAIN]
        np.testing.assert_array_equal(found.parts, np.concatenate([np.arange(-1, n) for n in lengths]))
        np.testing.assert_array_equal(found.examples, np.arange(N).repeat(np.array(lengths) + 1))
    else:
        assert {"transformer.wte", "transformer.h.0.mlp.c_fc"} <= set(found.names)
    monkeypatch.setattr(curvature_parts, "_CHUNK", 100)
    again = run(model, attribute_parts, method, granularity=granularity)
    np.testing.assert_allclose(again.values, found.values, rtol=1e-3, atol=1e-5 * np.abs(found.values).max())


@pytest.mark.parametrize("collator", [Pad("left"), Pad(multiple=16), Pad("left", multiple=16)])
def test_padding_does_not_change_a_token(model, collator):
    expected = run(model, attribute_parts, "ekfac")
    found = run(model, attribute_parts, "ekfac", collator)
    np.testing.assert_array_equal(found.parts, expected.parts)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-2, atol=1e-4 * np.abs(expected.values).max())


def test_the_tokens_of_a_linear_layer_equal_its_factors(model):
    name = "transformer.h.0.mlp.c_fc.weight"
    task = CausalLM()

    def factors(row, function):
        batch = Pad()([row])
        gradients = PerExampleGradients(model.eval(), function, _Batch(torch.tensor([0, 0]), {
            key: value.repeat(2, 1) for key, value in batch.items()}), [name])  # fmt: skip
        (term,) = gradients(_Batch(torch.tensor([0]), batch)).terms[name]
        assert isinstance(term, Outer)
        return term

    found = run(model, attribute_parts, METHODS["grad_dot"](modules=(name,)))
    for q in range(Q):
        query = factors(QUERY[q], task.measurement)
        direction = query.left[0].T @ query.right[0]
        for i in range(N):
            train = factors(TRAIN[i], task.gains)
            expected = torch.einsum("tm,mn,tn->t", train.left[0], direction, train.right[0]).numpy()
            mine = found.of(q, i)
            assert list(mine) == list(range(-1, len(expected)))
            assert mine[-1] == 0
            np.testing.assert_allclose(
                list(mine.values())[1:], expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max()
            )


def test_modules_are_those_of_the_method_restricted_to_them(model):
    found = run(model, attribute_parts, "grad_dot", granularity="module")
    for name in ("transformer.h.0.attn.c_attn", "transformer.ln_f"):
        alone = run(model, attribute, METHODS["grad_dot"](modules=(name,))).values
        mine = found.values[:, found.parts == found.names.index(name)]
        np.testing.assert_allclose(mine, alone, rtol=1e-3, atol=1e-5 * np.abs(alone).max())


def test_an_artefact_keeps_everything(model, tmp_path):
    for granularity in ("module", "token"):
        parts = run(model, attribute_parts, "grad_dot", granularity=granularity)
        parts.save(tmp_path / "parts.safetensors")
        for other in (PartScores.load(tmp_path / "parts.safetensors"), PartScores.from_dataset(parts.to_dataset())):
            assert other.fingerprint == parts.fingerprint
            assert other.names == parts.names
            np.testing.assert_array_equal(other.values, parts.values)
    with pytest.raises(ArtefactError, match="part scores"):
        type(parts.sum()).load(tmp_path / "parts.safetensors")


def test_what_has_no_parts_says_so(model):
    for method in ("trak", "influence", "grad_cos", "random", METHODS["grad_dot"](dim=8), METHODS["tracin"](dim=8)):
        with pytest.raises(UnsupportedError, match="are no sums over tokens"):
            run(model, attribute_parts, method)
    with pytest.raises(ValueError, match="'module' or 'token', not 'word'"):
        run(model, attribute_parts, "grad_dot", granularity="word")
    images = datasets.Dataset.from_dict({"pixel_values": np.zeros((3, 1, 8, 8), np.float32), "labels": [0, 1, 1]})
    config = tf.ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    with pytest.raises(UnsupportedError, match="needs text"):
        attribute_parts(tf.ResNetForImageClassification(config).eval(), images, images, progress=False)


def test_bad_parts_are_refused():
    with pytest.raises(ValueError, match="the shapes are"):
        PartScores(np.ones((1, 3)), np.array([0, 1]), np.array([0, 0]), "token")
    with pytest.raises(ValueError, match="at least one part"):
        PartScores(np.ones((1, 2)), np.array([0, 2]), np.array([0, 0]), "token")
    with pytest.raises(NonFiniteError, match="query row 0 and part 4 of train row 1 is nan"):
        PartScores(np.array([[1, np.nan]]), np.array([0, 1]), np.array([0, 4]), "token")
