import gc
import weakref

import models
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_attribution.data import Batch
from hf_attribution.errors import NonFiniteError, UnsupportedError
from hf_attribution.gradients import terms as term_module
from hf_attribution.gradients.checks import chosen_parameters
from hf_attribution.gradients.held import Source
from hf_attribution.gradients.moments import EPSILON, second_moments
from hf_attribution.gradients.per_example import PerExampleGradients
from hf_attribution.gradients.rules import by_example
from hf_attribution.gradients.terms import Dense, Lookup, Outer, dense, inner_products, squared_norms
from hf_attribution.tasks import Classification, infer_task


def as_batch(inputs):
    return Batch(torch.arange(len(next(iter(inputs.values())))), inputs)


def probe_of(inputs):
    return as_batch({key: value[:2] for key, value in inputs.items()})


def brute_force(model, function, inputs, parameters):
    """One backward pass for each example, over the whole batch: `{name: [B, P]}`."""
    rows = []
    for row in range(len(function(model, inputs))):
        value = function(model, inputs)[row]
        rows.append(torch.autograd.grad(value, list(parameters.values()), materialize_grads=True))
    return {name: torch.stack([row[i].flatten() for row in rows]) for i, name in enumerate(parameters)}


def check(model, function, inputs, tolerance=1e-5, modules=None, probe=None, own=None):
    """Compare with brute force, relative to the largest gradient of a parameter (and, `own`, to each one's own)."""
    gradients = PerExampleGradients(model, function, probe or probe_of(inputs), modules=modules)
    found = gradients(as_batch(inputs))
    expected = brute_force(model, function, inputs, gradients.parameters)
    largest = max(value.norm(dim=1).max() for value in expected.values())
    assert largest > 0
    torch.testing.assert_close(found.values, function(model, inputs).detach())
    for name, value in expected.items():
        ours = dense(found.terms[name]) if name in found.terms else torch.zeros_like(value)
        assert ours.shape == value.shape, name
        assert not ours.requires_grad, name
        allowed = tolerance * largest
        if own is not None:
            allowed = torch.minimum(allowed, own * value.norm(dim=1) + 1e-9 * largest)
        error = (ours.to(value) - value).norm(dim=1)
        assert (error <= allowed).all(), f"{name}: {(error / largest).max():.1e}"
    return gradients


def looped(gradients):
    return set(gradients._one_by_one)


class Toy(nn.Module):
    """A model of `build()`'s modules whose output is reduced to one number per example."""

    def __init__(self, *modules):
        super().__init__()
        self.body = nn.Sequential(*modules)
        self.eval()

    def forward(self, x):
        return self.body(x)


def squares(model, inputs):
    """A value that depends on everything a model returns for an example, each part in its own way."""
    out = model(**inputs)
    out = out.flatten(1)
    weights = torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype)
    return (out.square() * weights).sum(1) + out.sin().sum(1)


def shaken(model):
    """Weights away from zeros and ones, and running statistics that are not those of the batch."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator).abs().to(tensor))
    return model


# ---------------------------------------------------------------- model families


@pytest.mark.parametrize("family", models.FAMILIES)
def test_families(family):
    model, batch = models.make(family)
    check(model, infer_task(model).losses, batch)


def moments_overall(gradients, found):
    """The mean square of all entries of all gradients."""
    squares = sum(dense([term]).square().mean(0).sum() for terms in found.terms.values() for term in terms)
    return squares / gradients.num_parameters


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit", "resnet", "t5"])
def test_factored_second_moments_are_the_means_of_squared_gradients(family):
    model, batch = models.make(family)
    gradients = PerExampleGradients(model, infer_task(model).losses, probe_of(batch))

    class Rows:
        def batches(self, only, shared):
            yield as_batch(batch)

        def in_parts(self, function, batch):
            return [function(batch)]

        def __len__(self):
            return len(as_batch(batch).indices)

    moments = second_moments(Source(gradients, Rows()))
    found, divided = gradients(as_batch(batch)), moments.divide(gradients(as_batch(batch)))
    for name, parameter in gradients.parameters.items():
        if len(found.terms.get(name, [])) != 1:
            continue  # of a weight that is used twice each use counts for itself
        matrix = dense(found.terms[name]).view(len(found.values), len(parameter), -1)
        mean = matrix.square().mean(0)
        unit = mean.mean()
        if unit < 1e-8 * moments_overall(gradients, found):
            assert (moments.rows[name] == 1).all()
            continue
        torch.testing.assert_close(moments.rows[name], mean.mean(1) / unit + EPSILON, rtol=1e-4, atol=1e-6)
        expected = mean.mean(0) + EPSILON * unit
        torch.testing.assert_close(moments.columns[name], expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
        whole = moments.rows[name][:, None] * moments.columns[name]
        assert type(divided.terms[name][0]) is type(found.terms[name][0])
        ours = dense(divided.terms[name]).view_as(matrix)
        torch.testing.assert_close(ours, matrix / whole.sqrt(), rtol=1e-3, atol=1e-5 * float(ours.abs().max()))


# Attention of these (or their experts) is written for float32.
FLOAT32_ALONE = {"mixtral", "qwen2_moe", "gpt_oss", "gemma2"}


@pytest.mark.parametrize("family", [name for name in models.FAMILIES if name not in FLOAT32_ALONE])
def test_families_in_double_precision(family):
    model, batch = models.make(family)
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    check(model.double(), infer_task(model).measurement, batch, tolerance=1e-7, own=2e-6)


@pytest.mark.parametrize("family", models.TEXT)
def test_families_padded_on_the_left(family):
    model, batch = models.make(family)
    check(model, infer_task(model).losses, models.moved(batch, left=2, right=1))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit", "resnet"])
def test_families_in_half_precision(family):
    model, batch = models.make(family)
    expected = check(model, infer_task(model).losses, batch)
    reference = expected(as_batch(batch)).terms
    half = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
    found = PerExampleGradients(model.bfloat16(), infer_task(model).losses, probe_of(half))(as_batch(half)).terms
    largest = max(dense(value).norm() for value in reference.values())
    for name, value in reference.items():
        assert dense(found[name]).dtype == torch.float32 or name in looped(expected)
        assert (dense(found[name]).float() - dense(value)).norm() <= 0.2 * largest, name


def test_what_the_rules_cover():
    """Slow paths are for what they are needed for: tables that a whole batch shares, raw parameters of attention."""
    slow = {}
    for family in (
        "bert", "roberta", "distilbert", "gpt2", "llama", "qwen3", "gemma3", "vit", "resnet", "t5", "bart", "mixtral",
        "qwen2_moe", "gpt_oss",
    ):  # fmt: skip
        model, batch = models.make(family)
        gradients = PerExampleGradients(model, infer_task(model).losses, probe_of(batch))
        slow[family] = {name.rpartition(".")[0].rpartition(".")[2] for name in looped(gradients)}
    assert {family: names for family, names in slow.items() if names} == {
        "t5": {"relative_attention_bias"},
        "bart": {"embed_positions"},
        "gpt_oss": {"self_attn"},
    }


@pytest.mark.parametrize("family", ["bert", "gpt2_left", "t5", "mixtral", "bloom"])
@pytest.mark.parametrize("rows", [[0], [1], [2, 0]])
def test_any_batch_gives_a_row_its_gradient(family, rows):
    model, batch = models.make(family)
    gradients = PerExampleGradients(model, infer_task(model).losses, probe_of(batch))
    whole = gradients(as_batch(batch)).terms
    found = gradients(Batch(torch.tensor(rows), {key: value[rows] for key, value in batch.items()}))
    largest = max(dense(value).norm() for value in whole.values())
    assert found.indices.tolist() == rows
    for name, value in whole.items():
        assert (dense(found.terms[name]) - dense(value)[rows]).norm() <= 1e-5 * largest, name


def test_one_position():
    model, batch = models.make("gpt2")
    labels = {"labels": batch["labels"][:, :2]}
    short = {key: value[:, :2] for key, value in batch.items()} | labels
    check(model, infer_task(model).losses, short)
    model, batch = models.make("bert")
    short = {"input_ids": batch["input_ids"][:, :1], "labels": batch["labels"]}
    check(model, infer_task(model).losses, short)


@pytest.mark.parametrize("length", [2, 3, 4])
def test_as_many_rows_as_positions(length):
    """Nothing may be taken for a row per example because it happens to be as long."""
    for family in ("bert", "llama", "gpt2", "bloom", "opt", "t5", "mixtral"):
        model, batch = models.make(family)
        probe = probe_of(batch)
        kind = "decoder" if family == "t5" else "class" if family == "bert" else "tokens"
        square = models.text_batch(labels=kind, batch=length, length=length)
        square["attention_mask"].fill_(1)
        check(model, infer_task(model).losses, square, probe=probe)


def test_frozen_parameters_are_left_out():
    model, batch = models.make("bert")
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].requires_grad_(False)
    gradients = check(model, infer_task(model).losses, batch)
    assert not any("embeddings" in name or "layer.0" in name for name in gradients.parameters)
    assert gradients.num_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_only_a_bias_is_trained():
    model, batch = models.make("bert")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    gradients = check(model, infer_task(model).losses, batch)
    assert all(name.endswith("bias") for name in gradients.parameters)


def test_adapters_of_peft():
    peft = pytest.importorskip("peft")
    model, batch = models.make("bert")
    config = peft.LoraConfig(
        r=2, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS"
    )
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    gradients = check(model, infer_task(model).losses, batch)
    assert not looped(gradients)
    assert all("lora" in name or "classifier" in name for name in gradients.parameters)


# ---------------------------------------------------------------- modules

IMAGE, VECTOR, SEQUENCE = (3, 6, 6), (5,), (4, 5)


def two_linears_tied():
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    second.weight = first.weight
    return first, nn.Tanh(), second


def one_linear_twice():
    layer = nn.Linear(5, 5)
    return layer, nn.Tanh(), layer


class Parallel(nn.Module):
    """A linear layer next to itself transposed, with a raw parameter on top."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(5, 5), nn.Parameter(torch.tensor([1.0, 2.0, 0.5, 1.5, 1.0]))

    def forward(self, x):
        return self.inner(x) * self.scale


class Functional(nn.Module):
    """Uses the weight of a layer outside of that layer."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x):
        return F.linear(self.inner(x).tanh(), self.inner.weight.T)


class SeveralOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))

    def forward(self, x, *, scale):
        return {"unused": x * 2, "pair": (x @ self.weight, [scale * self.weight.sum(0) * x])}


class UsesSeveral(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        out = self.inner(x, scale=2.0)
        return out["pair"][0].sin() + out["pair"][1][0]


class FusedNorm(nn.Module):
    """A norm by its name, that returns two tensors."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(5))

    def forward(self, x, *, scale):
        return {"pair": (F.layer_norm(x, (5,)) * self.weight, [x + self.weight])}


class OnlySecondOutputNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(5))

    def forward(self, x, *, scale):
        first = (x * self.weight).detach() + 0 * x.sum() * self.weight.sum()
        return {"pair": (first.detach(), [F.layer_norm(x, (5,)) * self.weight])}


class PositionsFirst(nn.Module):
    """Positions in the first dimension, examples in the second."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class Flattened(nn.Module):
    """Examples and positions in one dimension."""

    def __init__(self, ndim):
        super().__init__()
        self.inner, self.ndim = nn.Linear(5, 5), ndim

    def forward(self, x):
        flat = x.reshape(-1, 5) if self.ndim == 2 else x.reshape(-1, 2, 5)
        return self.inner(flat).reshape(x.shape)


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.bilinear = nn.Linear(5, 5), nn.LayerNorm(5), nn.Bilinear(5, 5, 5)

    def forward(self, x):
        h = self.norm(input=self.linear(input=x))
        return self.bilinear(input2=h, input1=x)


class InPlace(nn.Module):
    """Changes its input: a hook sees it after the change."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(5))

    def forward(self, x):
        return x.mul_(2.0) * self.weight


class CopiesThenInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = InPlace()

    def forward(self, x):
        return self.inner(x + 0.0)


class Shared(nn.Module):
    """A table `[positions, n]` handed to a module next to the examples: as long as the batch, now and then."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(5))

        def forward(self, x, table):
            return (x + table) * self.weight

    def __init__(self):
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x):
        return self.inner(x, torch.linspace(-1, 1, x.shape[1])[:, None].expand(-1, 5))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.first, self.second, self.use_reentrant = nn.Linear(5, 5), nn.Linear(5, 5), use_reentrant

    def forward(self, x):
        x = self.first(x)
        return checkpoint(lambda h: self.second(h.tanh()), x, use_reentrant=self.use_reentrant)


def scaled_gradient_embedding():
    return nn.Embedding(7, 5, scale_grad_by_freq=False, padding_idx=2)


MODULES = {
    "linear": (lambda: (nn.Linear(5, 4),), VECTOR),
    "linear of a sequence": (lambda: (nn.Linear(5, 4, bias=False),), SEQUENCE),
    "linear of an image": (lambda: (nn.Linear(6, 4),), IMAGE),
    "conv1d of transformers": (lambda: (tf.pytorch_utils.Conv1D(4, 5),), SEQUENCE),
    "tied": (two_linears_tied, SEQUENCE),
    "twice": (one_linear_twice, SEQUENCE),
    "in-place relu": (lambda: (nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 2)), IMAGE),
    "in-place relu of a linear": (lambda: (nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)), VECTOR),
    "in-place relu of a norm": (lambda: (nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 2)), IMAGE),
    "strided conv": (lambda: (nn.Conv2d(3, 4, 3, stride=2, padding=1),), IMAGE),
    "dilated conv": (lambda: (nn.Conv2d(3, 4, (2, 3), dilation=2, bias=False),), IMAGE),
    "grouped conv": (lambda: (nn.Conv2d(3, 6, 3, groups=3),), IMAGE),
    "grouped strided conv": (lambda: (nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=2)), IMAGE),
    "conv padded the same": (lambda: (nn.Conv2d(3, 4, 3, padding="same"),), IMAGE),
    "conv padded by reflection": (lambda: (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),), IMAGE),
    "conv one-dimensional": (lambda: (nn.Conv1d(4, 3, 2),), SEQUENCE),
    "conv transposed": (lambda: (nn.ConvTranspose2d(3, 2, 3),), IMAGE),
    "group norm": (lambda: (nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), IMAGE),
    "group norm of vectors": (lambda: (nn.Linear(5, 6), nn.GroupNorm(2, 6)), VECTOR),
    "instance norm": (lambda: (nn.InstanceNorm2d(3, affine=True),), IMAGE),
    "batch norm": (lambda: (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), IMAGE),
    "batch norm of vectors": (lambda: (nn.BatchNorm1d(5),), VECTOR),
    "batch norm of sequences": (lambda: (nn.BatchNorm1d(4),), SEQUENCE),
    "layer norm": (lambda: (nn.LayerNorm(5),), SEQUENCE),
    "layer norm without bias": (lambda: (nn.LayerNorm(5, bias=False),), VECTOR),
    "layer norm over two dimensions": (lambda: (nn.LayerNorm((6, 6)),), IMAGE),
    "layer norm over all dimensions": (lambda: (nn.LayerNorm((4, 5)),), SEQUENCE),
    "rms norm": (lambda: (nn.RMSNorm(5),), SEQUENCE),
    "prelu": (lambda: (nn.Linear(5, 5), nn.PReLU()), VECTOR),
    "raw parameter": (lambda: (Parallel(), nn.Linear(5, 2)), SEQUENCE),
    "functional": (lambda: (Functional(),), SEQUENCE),
    "several outputs": (lambda: (UsesSeveral(SeveralOutputs()),), VECTOR),
    "norm of two outputs": (lambda: (nn.Linear(5, 5), UsesSeveral(FusedNorm())), VECTOR),
    "norm whose second output counts": (lambda: (nn.Linear(5, 5), UsesSeveral(OnlySecondOutputNorm())), VECTOR),
    "positions first": (lambda: (PositionsFirst(),), SEQUENCE),
    "flattened": (lambda: (Flattened(2),), SEQUENCE),
    "flattened by halves": (lambda: (Flattened(3),), SEQUENCE),
    "by keyword": (lambda: (ByKeyword(),), VECTOR),
    "input changed in place": (lambda: (nn.Linear(5, 5), CopiesThenInPlace()), VECTOR),
    "shared table": (lambda: (nn.Linear(5, 5), Shared()), SEQUENCE),
    "weight norm": (lambda: (nn.utils.parametrizations.weight_norm(nn.Linear(5, 2)),), VECTOR),
    "transformer layer": (lambda: (nn.TransformerEncoderLayer(5, 1, 6, batch_first=True),), SEQUENCE),
    "bag": (lambda: (nn.Linear(5, 5), nn.Flatten(), nn.Unflatten(1, (1, 20)), nn.Linear(20, 2)), SEQUENCE),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("rows", [2, 3, 4, 5])
def test_modules(name, rows):
    build, shape = MODULES[name]
    torch.manual_seed(0)
    model = shaken(Toy(*build())).double()
    x = torch.randn(5, *shape, dtype=torch.float64)
    check(model, squares, {"x": x[:rows]}, tolerance=1e-10, probe=probe_of({"x": x[3:]}))


def test_common_modules_need_no_loop():
    slow = {}
    for name, (build, shape) in MODULES.items():
        if name == "transformer layer":
            continue
        gradients = PerExampleGradients(shaken(Toy(*build())), squares, probe_of({"x": torch.randn(2, *shape)}))
        if looped(gradients):
            slow[name] = looped(gradients)
    assert set(slow) == {
        "functional",
        "positions first",
        "flattened",
        "input changed in place",
        "weight norm",
    }


def test_recurrent_layers():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.LSTM(5, 3, batch_first=True)

        def forward(self, x):
            out, (hidden, _) = self.inner(x)
            return out[:, -1] + hidden[0]

    check(Recurrent().double().eval(), squares, {"x": torch.randn(3, 4, 5, dtype=torch.float64)}, tolerance=1e-10)


@pytest.mark.parametrize("layer", [scaled_gradient_embedding(), nn.Embedding(7, 5), nn.Embedding(7, 5, max_norm=1.0)])
def test_embeddings(layer):
    model = Toy(shaken(layer), nn.Linear(5, 3)).double()
    check(model, squares, {"x": torch.tensor([[1, 2, 2, 1], [0, 6, 2, 3], [2, 2, 2, 2]])}, tolerance=1e-10)


def test_an_embedding_of_one_id_per_example():
    check(Toy(nn.Embedding(7, 5)).double(), squares, {"x": torch.tensor([1, 0, 1])}, tolerance=1e-10)


@pytest.mark.parametrize("family", ["gemma", "bart"])
def test_scaled_embeddings_have_the_cheap_form(family):
    model, batch = models.make(family)
    gradients = check(model, infer_task(model).losses, batch)
    table = model.get_input_embeddings()
    assert gradients._rules[table] is not by_example
    assert type(table) is not nn.Embedding


def test_a_subclass_that_computes_something_else():
    class Halved(nn.Linear):
        def forward(self, x):
            return super().forward(x / 2) + self.bias.sum()

    check(Toy(Halved(5, 4)).double(), squares, {"x": torch.randn(3, 5, dtype=torch.float64)}, tolerance=1e-10)


def test_experts_that_see_some_of_the_tokens():
    class Experts(nn.Module):
        """Each token goes to one of two linear layers, which see rows of no fixed number."""

        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])

        def forward(self, x):
            flat = x.reshape(-1, 5)
            chosen = (flat[:, 0] > 0).long()
            out = torch.zeros_like(flat)
            for number, expert in enumerate(self.experts):
                rows = (chosen == number).nonzero()[:, 0]
                if len(rows):
                    out = out.index_add(0, rows, expert(flat[rows]))
            return out.reshape(x.shape)

    model = Toy(Experts()).double()
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    for sign in (x, x.abs(), torch.cat([-x[:1].abs(), x[1:].abs()])):
        check(model, squares, {"x": x}, tolerance=1e-10, probe=probe_of({"x": sign[:2]}))
        one = -x.abs()
        one[0, 0, 0] = one[0, 1, 0] = one[3, 2, 0] = one[3, 1, 0] = 1.0  # as many rows as examples, of two of them
        check(model, squares, {"x": one}, tolerance=1e-10, probe=probe_of({"x": sign[:2]}))


# ---------------------------------------------------------------- checkpointing


def test_gradient_checkpointing():
    check(Toy(Checkpointed(False)).double(), squares, {"x": torch.randn(3, 5, dtype=torch.float64)}, tolerance=1e-10)


def test_gradient_checkpointing_with_reentry_is_refused_by_torch():
    with pytest.raises(RuntimeError, match="use_reentrant"):
        PerExampleGradients(Toy(Checkpointed(True)), squares, probe_of({"x": torch.randn(2, 5)}))


@pytest.mark.parametrize("training", [False, True])
def test_gradient_checkpointing_of_transformers(training):
    model, batch = models.make("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train(training)  # checkpointing is for training alone; a Llama has no dropout
    check(model, infer_task(model).losses, batch)


# ---------------------------------------------------------------- refusals


def test_batch_statistics_are_refused():
    x = {"x": torch.randn(2, *IMAGE)}
    with pytest.raises(UnsupportedError, match=r"body\.0 \(BatchNorm2d\).*model\.eval"):
        PerExampleGradients(Toy(nn.BatchNorm2d(3)).train(), squares, probe_of(x))
    with pytest.raises(UnsupportedError, match=r"BatchNorm2d.*running statistics"):
        PerExampleGradients(Toy(nn.BatchNorm2d(3, track_running_stats=False)), squares, probe_of(x))


def test_nan_weights_name_the_row():
    model, batch = models.make("bert")
    gradients = PerExampleGradients(model, infer_task(model).losses, probe_of(batch))
    lonely = {**batch, "input_ids": batch["input_ids"].clone()}
    lonely["input_ids"][1, 0] = 3  # no other row has this token
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match="row 41"):
        gradients(Batch(torch.tensor([40, 41, 42]), lonely))
    with pytest.raises(NonFiniteError, match="row 1"):
        PerExampleGradients(model, infer_task(model).losses, probe_of(lonely))


def test_a_gradient_that_is_not_finite_is_refused():
    model = Toy(nn.Linear(1, 1, bias=False))

    def root(model, inputs):
        return model(**inputs).abs().sqrt()[:, 0]

    with pytest.raises(NonFiniteError, match=r"body\.0\.weight"):
        PerExampleGradients(model, root, as_batch({"x": torch.tensor([[1.0], [0.0]])}))


def test_examples_that_influence_each_other():
    class Contrast(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 5)

        def forward(self, x):
            h = self.inner(x)
            return h @ h.T.mean(1, keepdim=True)

    with pytest.raises(UnsupportedError, match="influence each other"):
        PerExampleGradients(Contrast(), squares, probe_of({"x": torch.randn(2, 5)}))
    layer = Toy(nn.TransformerEncoderLayer(5, 1, 6, batch_first=False))
    with pytest.raises(UnsupportedError, match="influence each other"):
        PerExampleGradients(layer, squares, probe_of({"x": torch.randn(2, 4, 5)}))


def test_dropout_is_refused():
    model, batch = models.make("bert")
    with pytest.raises(UnsupportedError, match=r"model\.eval\(\)"):
        PerExampleGradients(model.train(), infer_task(model).losses, probe_of(batch))


@pytest.mark.parametrize("wrong", [lambda v: v.mean(), lambda v: v[:, None], lambda v: v[:1]])
def test_one_value_per_example_is_asked_for(wrong):
    model, batch = models.make("bert")
    with pytest.raises(ValueError, match=r"one number per example, shape \[2\]"):
        PerExampleGradients(model, lambda m, b: wrong(Classification().losses(m, b)), probe_of(batch))


def test_nothing_to_train():
    model, batch = models.make("bert")
    with pytest.raises(UnsupportedError, match="no trainable parameter"):
        PerExampleGradients(model.requires_grad_(False), infer_task(model).losses, probe_of(batch))


# ---------------------------------------------------------------- chosen modules


def test_modules_are_chosen_by_pattern():
    model, batch = models.make("bert")
    for patterns, number in (
        (["classifier"], 2),
        ("classifier", 2),
        (["bert.encoder.layer.1"], 16),
        (["*.attention.*"], 20),
        (["*.query", "classifier.bias"], 5),
        (["bert.encoder.layer.?.output.dense.weight"], 2),
    ):
        gradients = check(model, infer_task(model).losses, batch, modules=patterns)
        assert len(gradients.parameters) == number, patterns
        assert set(gradients(as_batch(batch)).terms) <= set(gradients.parameters)
    assert len(chosen_parameters(model, ["*"])) == len(list(model.parameters()))


def test_a_pattern_that_matches_nothing():
    model, _ = models.make("bert")
    with pytest.raises(ValueError, match=r"modules='clasifier' matches no.*Close names: classifier"):
        chosen_parameters(model, ["classifier", "clasifier"])
    with pytest.raises(ValueError, match="matches no trainable parameter"):
        chosen_parameters(model, ["query"])
    model.classifier.requires_grad_(False)
    with pytest.raises(ValueError, match="matches no trainable parameter"):
        chosen_parameters(model, ["classifier"])


def test_tied_weights_are_counted_once_under_either_name():
    model, batch = models.make("gpt2")
    names = list(chosen_parameters(model, None))
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names
    check(model, infer_task(model).losses, batch, modules=["transformer.wte"])
    assert list(chosen_parameters(model, ["lm_head"])) == ["transformer.wte.weight"]


# ---------------------------------------------------------------- the model afterwards


@pytest.mark.parametrize("family", ["gpt2", "t5", "vit", "mobilenet"])
def test_nothing_is_left_on_the_model(family):
    model, batch = models.make(family)
    frozen = next(iter(model.parameters())).requires_grad_(False)
    model.get_submodule(next(name for name, m in model.named_modules() if isinstance(m, nn.Dropout))).train()

    def state():
        modules = {
            name: (module.training, len(module._forward_hooks), len(module._forward_pre_hooks), set(vars(module)))
            for name, module in model.named_modules()
        }
        flags = [(p.requires_grad, p.grad is None, p._version) for p in model.parameters()]
        return modules, flags, str(getattr(model.config, "use_cache", None))

    before = state()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    model.get_submodule(next(name for name, m in model.named_modules() if isinstance(m, nn.Dropout))).p = 0.0
    gradients = PerExampleGradients(model, infer_task(model).losses, probe_of(batch))
    with torch.no_grad():
        gradients(as_batch(batch))
        assert not torch.is_grad_enabled()
    broken = {**batch, "labels": batch["labels"] + 1000}
    with pytest.raises((ValueError, IndexError)):
        gradients(as_batch(broken))
    assert state() == before
    assert not frozen.requires_grad
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, values[name], rtol=0, atol=0)


def test_no_batch_is_kept():
    model, batch = models.make("bert")
    gradients = PerExampleGradients(model, infer_task(model).losses, probe_of(batch))
    found = gradients(as_batch(batch))
    kept = weakref.ref(found.terms["classifier.weight"][0].right)
    assert kept().grad_fn is None
    del found
    gc.collect()
    assert kept() is None


# ---------------------------------------------------------------- terms

ROWS, COLUMNS = 11, 4


def make_terms(kinds, batch, positions, seed):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made = {
        "dense": lambda: Dense(randn(batch, ROWS, COLUMNS)),
        "outer": lambda: Outer(randn(batch, positions, ROWS), randn(batch, positions, COLUMNS)),
        "lookup": lambda: Lookup(
            torch.randint(0, 3, (batch, positions), generator=generator), randn(batch, positions, COLUMNS), ROWS
        ),
    }
    return [made[kind]() for kind in kinds]


def explicit(terms):
    total = 0
    for term in terms:
        if isinstance(term, Dense):
            total = total + term.values
        elif isinstance(term, Outer):
            total = total + torch.einsum("btm,btn->bmn", term.left, term.right)
        else:
            total = total + torch.einsum("btm,btn->bmn", F.one_hot(term.ids, term.rows).double(), term.right)
    return total.flatten(1)


KINDS = [("dense",), ("outer",), ("lookup",), ("lookup", "outer"), ("lookup", "outer", "dense"), ("lookup", "lookup")]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kinds", KINDS)
def test_terms_against_explicit_gradients(kinds, large, monkeypatch):
    if large:
        monkeypatch.setattr(term_module, "_LARGE_TABLE", 1)
    # Other numbers of examples and positions on either side.
    left, right = make_terms(kinds, 3, 5, seed=0), make_terms(kinds[::-1], 2, 7, seed=1)
    assert term_module.is_large_table(left) is (large and "lookup" in kinds)
    torch.testing.assert_close(dense(left), explicit(left))
    torch.testing.assert_close(inner_products(left, right), explicit(left) @ explicit(right).T)
    torch.testing.assert_close(squared_norms(left), explicit(left).square().sum(1))
    assert [len(term) for term in left] == [3] * len(kinds)


def test_large_tables_are_never_formed(monkeypatch):
    monkeypatch.setattr(term_module, "_LARGE_TABLE", 1)
    left, right = make_terms(("lookup", "outer"), 3, 5, seed=0), make_terms(("lookup", "outer"), 2, 7, seed=1)
    for kind in (Lookup, Outer):
        monkeypatch.setattr(kind, "dense", lambda self: pytest.fail("formed"))
    inner_products(left, right)
    squared_norms(left)


def test_a_tied_table_of_a_model(monkeypatch):
    model, batch = models.make("gpt2")
    terms = PerExampleGradients(model, infer_task(model).losses, probe_of(batch))(as_batch(batch)).terms
    table = terms["transformer.wte.weight"]
    assert {type(term) for term in table} == {Lookup, Outer}
    expected = dense(table) @ dense(table).T
    monkeypatch.setattr(term_module, "_LARGE_TABLE", 1)
    torch.testing.assert_close(inner_products(table, table), expected)
    torch.testing.assert_close(squared_norms(table), expected.diagonal())
