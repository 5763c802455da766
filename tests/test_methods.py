"""Every method against a closed form or brute force, and what must not change a score: over all of METHODS."""

import copy
import errno
import os

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from tiny import PadTokens

from hf_attribution.attribution import attribute, self_influence
from hf_attribution.checkpoints import as_checkpoint, trainer_checkpoints
from hf_attribution.errors import ArtefactError, MismatchError, NonFiniteError, UnsupportedError
from hf_attribution.inputs import weights_fingerprint
from hf_attribution.methods import METHODS, GradCos, GradDot, LabelMatch, RepresentationSimilarity, Trak, get_method
from hf_attribution.problem import Checkpoint
from hf_attribution.tasks import Classification

N, Q = 17, 5

# The others need a recorded training: see test_unroll.py.
STATIC = [name for name, method in METHODS.items() if not (method.needs_run or method.needs_trainings)]


def rows(count, seed):
    rng = np.random.default_rng(seed)
    return datasets.Dataset.from_list(
        [
            {"input_ids": rng.integers(5, 50, rng.integers(3, 9)).tolist(), "labels": int(rng.integers(3)), "id": i}
            for i in range(count)
        ]
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, pad_token_id=1, num_labels=3,
    )  # fmt: skip
    model = tf.BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def train():
    return rows(N, 1)


@pytest.fixture(scope="module")
def query():
    return rows(Q, 2)


def scores(model, train, query, method, collator=None, **kwargs):
    collator = collator or PadTokens()
    if method == "source" or method == METHODS["source"](curvature="fisher"):
        # It must know of a run, here of a single step.
        curvature = get_method(method).curvature
        method = METHODS["source"](segments=1, optimizer="sgd", momentum=0.0, curvature=curvature)
        models = kwargs.pop("checkpoints", None) or [model]
        kwargs["checkpoints"] = [Checkpoint(each, learning_rate_sum=1.0) for each in models]
    return attribute(model, train, query, method=method, data_collator=collator, progress=False, **kwargs).values


def brute_force_gradients(model, dataset, function):
    """Gradients by a loop of plain backward passes, `[rows, P]`, and the values."""
    model = copy.deepcopy(model).eval()
    gradients, values = [], []
    for row in dataset:
        value = function(model, PadTokens()([row]))[0]
        found = torch.autograd.grad(value, list(model.parameters()), materialize_grads=True)
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
        values.append(value.detach())
    return torch.stack(gradients).double(), torch.stack(values).double()


@pytest.fixture(scope="module")
def reference(model, train, query):
    """Scores of every method under the plainest circumstances."""
    return {name: scores(model, train, query, name) for name in STATIC}


def test_grad_dot_and_grad_cos_equal_brute_force(model, train, query, reference):
    task = Classification()
    measured, _ = brute_force_gradients(model, query, task.measurement)
    gained, _ = brute_force_gradients(model, train, lambda m, b: -task.losses(m, b))
    products = measured @ gained.T
    np.testing.assert_allclose(reference["grad_dot"], products, rtol=1e-4, atol=1e-5 * products.abs().max())
    cosines = products / measured.norm(dim=1)[:, None] / gained.norm(dim=1)
    np.testing.assert_allclose(reference["grad_cos"], cosines, atol=1e-5)


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_trak_with_a_lossless_projection_equals_its_closed_form(model, train, query, damping):
    task = Classification()
    # One weight matrix, sketched to as many dimensions as it has entries: that only permutes them and changes signs.
    head = torch.cat([
        torch.full((p.numel(),), name == "classifier.weight") for name, p in model.named_parameters()
    ])  # fmt: skip
    phi_query = brute_force_gradients(model, query, task.measurement)[0][:, head]
    phi, margins = brute_force_gradients(model, train, task.measurement)
    phi = phi[:, head]
    # Woodbury: φ(q) (ΦᵀΦ + λI)⁻¹ Φᵀ = φ(q) Φᵀ (ΦΦᵀ + λI)⁻¹, with a kernel of N × N.
    ridge = damping * phi.square().sum(1).mean() * torch.eye(N)
    expected = torch.linalg.solve(phi @ phi.T + ridge, phi @ phi_query.T).T * torch.sigmoid(-margins)
    found = scores(model, train, query, Trak(dim=int(head.sum()), damping=damping, modules=("classifier.weight",)))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_trak_averages_features_and_probabilities_separately(model, train, query):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    both = scores(model, train, query, Trak(dim=256), checkpoints=[model, other])
    first = scores(model, train, query, Trak(dim=256, seed=0), checkpoints=[model])
    second = scores(model, train, query, Trak(dim=256, seed=1), checkpoints=[other])
    _, margins = brute_force_gradients(model, train, Classification().measurement)
    _, other_margins = brute_force_gradients(other, train, Classification().measurement)
    p, other_p = torch.sigmoid(-margins).numpy(), torch.sigmoid(-other_margins).numpy()
    expected = (first / p + second / other_p) / 2 * (p + other_p) / 2
    np.testing.assert_allclose(both, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_label_match_is_equality_of_labels(model, train, query, reference):
    expected = np.array(query["labels"])[:, None] == np.array(train["labels"])[None]
    np.testing.assert_array_equal(reference["label_match"], expected)
    assert 0 < expected.mean() < 1
    by_id = scores(model, train, query, LabelMatch(column="id"))
    np.testing.assert_array_equal(by_id, np.eye(Q, N))


def test_representation_similarity_is_the_cosine_of_the_heads_inputs(model, train, query, reference):
    def states(dataset):
        with torch.no_grad():
            pooled = [
                model.eval().bert(**{k: v for k, v in PadTokens()([row]).items() if k != "labels"})[1]
                for row in dataset
            ]
        return torch.nn.functional.normalize(torch.cat(pooled))

    np.testing.assert_allclose(reference["representation_similarity"], states(query) @ states(train).T, atol=1e-5)
    layer = scores(model, train, query, RepresentationSimilarity(layer="bert.encoder"))
    assert layer.shape == (Q, N)
    assert np.abs(layer).max() <= 1 + 1e-6


def test_random_scores_are_reproducible_and_depend_on_the_seed(model, train, query, reference):
    np.testing.assert_array_equal(reference["random"], scores(model, train, query, "random"))
    assert not np.array_equal(reference["random"], scores(model, train, query, METHODS["random"](seed=1)))


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("change", ["batch_size", "padding", "order", "training_mode", "store"])
def test_what_must_not_change_a_score(name, change, model, train, query, reference, tmp_path):
    expected, kwargs, changed_train = reference[name], {}, train
    if change == "batch_size":
        kwargs = {"batch_size": 3}
    elif change == "padding":
        kwargs = {"collator": PadTokens(multiple=16)}
    elif change == "order":
        if name == "random":
            return  # by definition drawn by position
        if hasattr(METHODS[name], "curvature") and METHODS[name]().curvature == "true_fisher":
            name = METHODS[name](curvature="fisher")  # targets are drawn by position
            expected = scores(model, train, query, name)
        order = np.random.default_rng(0).permutation(N)
        changed_train, expected = train.select(order), expected[:, order]
    elif change == "store":
        kwargs = {"cache_dir": tmp_path}
        scores(model, changed_train, query, name, **kwargs)  # the second call finds what the first one stored
    model.train(change == "training_mode")
    found = scores(model, changed_train, query, name, **kwargs)
    assert all(module.training == (change == "training_mode") for module in model.modules())
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "name", ["representation_similarity", "grad_dot", "grad_cos", "trak", "diagonal", "kfac", "ekfac", "datainf"]
)
def test_language_models_score_alike_with_padding_on_either_side(name, train, query):
    class Labelled(PadTokens):
        def __call__(self, rows):
            batch = super().__call__(rows)
            return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = tf.GPT2LMHeadModel(config)
    expected = scores(model, train, query, name, Labelled())
    for collator in (Labelled("left"), Labelled("left", multiple=16)):
        found = scores(model, train, query, name, collator)
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", STATIC)
def test_the_model_is_left_as_it_was(name, model, train, query):
    before = weights_fingerprint(model)
    gradients = [parameter.grad for parameter in model.parameters()]
    scores(model, train, query, name, checkpoints=[copy.deepcopy(model)])
    assert weights_fingerprint(model) == before
    assert all(a is b for a, b in zip(gradients, (p.grad for p in model.parameters()), strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("method", [Trak(dim=512), GradDot(dim=512)], ids=["trak", "grad_dot"])
def test_an_existing_store_is_not_computed_again(method, model, train, query, tmp_path):
    calls = []

    def counting(batch):
        calls.append(len(batch))
        return PadTokens()(batch)

    first = scores(model, train, query, method, counting, cache_dir=tmp_path)
    with_store, calls[:] = len(calls), []
    second = scores(model, train, query, method, counting, cache_dir=tmp_path)
    np.testing.assert_array_equal(first, second)
    # What is left is the first look at either end of the data, never a pass over them.
    assert len(calls) < with_store
    assert max(calls) <= 2


def test_projected_products_are_close_to_exact_ones(model, train, query, reference):
    for exact, projected in (("grad_dot", GradDot(dim=4096)), ("grad_cos", GradCos(dim=4096))):
        found = scores(model, train, query, projected)
        assert np.corrcoef(found.ravel(), reference[exact].ravel())[0, 1] > 0.99


def test_modules_restrict_the_gradients(model, train, query):
    task = Classification()
    measured, _ = brute_force_gradients(model, query, task.measurement)
    gained, _ = brute_force_gradients(model, train, lambda m, b: -task.losses(m, b))
    head = torch.cat([
        torch.full((p.numel(),), name.startswith("classifier")) for name, p in model.named_parameters()
    ])  # fmt: skip
    expected = measured[:, head] @ gained[:, head].T
    found = scores(model, train, query, GradDot(modules=("classifier",)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


def test_tracin_follows_the_trainers_checkpoints(model, train, query, tmp_path):
    arguments = tf.TrainingArguments(
        tmp_path, num_train_epochs=2, per_device_train_batch_size=8, save_strategy="steps", save_steps=2,
        learning_rate=1e-2, report_to="none", disable_tqdm=True, use_cpu=True, seed=0, data_seed=0,
    )  # fmt: skip
    trainer = tf.Trainer(copy.deepcopy(model), arguments, train_dataset=train, data_collator=PadTokens())
    trainer.train()
    checkpoints = trainer_checkpoints(tmp_path)
    steps = [int(checkpoint.source.name.split("-")[1]) for checkpoint in checkpoints]
    assert steps == [2, 4, 6]
    # A linear schedule from .01 to 0 over 6 steps; each checkpoint stands for a third of the run.
    np.testing.assert_allclose([c.weight for c in checkpoints], np.array([5, 3, 1]) / 6 * 1e-2 / 3, rtol=1e-6)
    found = scores(model, train, query, "tracin", checkpoints=checkpoints)
    expected = sum(
        c.weight * scores(tf.BertForSequenceClassification.from_pretrained(c.source), train, query, "grad_dot")
        for c in checkpoints
    )
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(ValueError, match="save_strategy"):
        trainer_checkpoints(tmp_path / "elsewhere")
    (tmp_path / "checkpoint-2" / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match=r"no scheduler\.pt"):
        trainer_checkpoints(tmp_path)


def test_a_checkpoint_of_another_architecture_is_refused(model, train, query, tmp_path):
    config = copy.deepcopy(model.config)
    config.hidden_size = 8
    tf.BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match=r"another architecture.*embeddings"):
        scores(model, train, query, "grad_dot", checkpoints=[tmp_path])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        as_checkpoint(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"No model\.safetensors"):
        scores(model, train, query, "grad_dot", checkpoints=[tmp_path / "empty"])


def test_tied_weights_are_loaded_from_a_checkpoint(tmp_path):
    config = tf.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    one, other = tf.GPT2LMHeadModel(config), tf.GPT2LMHeadModel(config)
    one.save_pretrained(tmp_path)
    data = datasets.Dataset.from_list(
        [{"input_ids": [i, i + 1, i + 2], "labels": [i, i + 1, i + 2]} for i in range(6)]
    )
    kwargs = {"method": "grad_dot", "progress": False}
    expected = attribute(one, data, data, **kwargs).values
    np.testing.assert_allclose(
        attribute(other, data, data, checkpoints=[tmp_path], **kwargs).values, expected, rtol=1e-5
    )


@pytest.mark.parametrize("name", STATIC)
def test_one_training_example_is_enough(name, model, train, query):
    assert scores(model, train.select([3]), query.select([0]), name).shape == (1, 1)


@pytest.mark.parametrize("name", [name for name in STATIC if name not in ("random", "label_match", "bm25")])
def test_a_model_with_nan_weights_is_refused_by_row(name, model, train, query):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.bert.embeddings.word_embeddings.weight[train[4]["input_ids"][0]] = torch.nan
    with pytest.raises(NonFiniteError, match=r"(row|query) \d+"):
        scores(broken, train, query, name)


def test_bad_input_is_named_before_work(model, train, query):
    with pytest.raises(MismatchError, match="no column labels"):
        scores(model, train, query.remove_columns("labels"), "trak")
    unlabelled = [dataset.remove_columns("labels") for dataset in (train, query)]
    with pytest.raises(ValueError, match="labels"):
        attribute(model, *unlabelled, method="trak", data_collator=lambda rows: {
            "input_ids": torch.tensor([row["input_ids"][:3] for row in rows])})  # fmt: skip
    with pytest.raises(ValueError, match="is empty"):
        scores(model, train.select([]), query, "trak")
    with pytest.raises(KeyError, match="Did you mean 'trak'"):
        get_method("track")
    with pytest.raises(TypeError, match=r"no setting 'dims'.*dim"):
        get_method("trak", dims=3)
    with pytest.raises(ValueError, match="damping must be positive"):
        Trak(damping=0.0)
    with pytest.raises(ValueError, match="matches no trainable parameter"):
        scores(model, train, query, GradDot(modules=("clasifier",)))
    with pytest.raises(MismatchError, match="set `num_labels`"):
        scores(model, train.map(lambda row: {"labels": 7}), query, "grad_dot")


def test_a_damaged_or_foreign_store_is_refused(model, train, query, tmp_path):
    scores(model, train, query, "trak", cache_dir=tmp_path)
    store = next((tmp_path / "features").glob("train-*[!k]"))
    shard = store / "features-00000.arrow"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtefactError, match=r"damaged: features-00000.arrow has \d+ bytes"):
        scores(model, train, query, "trak", cache_dir=tmp_path)
    (store / "manifest.json").write_text('{"schema_version": 99, "kind": "features"}')
    with pytest.raises(ArtefactError, match=r"delete the folder.*schema version 99"):
        scores(model, train, query, "trak", cache_dir=tmp_path)


def test_stored_gradients_depend_on_the_collator(model, train, query, tmp_path):
    found = scores(model, train, query, Trak(dim=64), cache_dir=tmp_path)
    longer = train.map(lambda row: {"input_ids": [*row["input_ids"], 7]})

    class Longer(PadTokens):
        def __call__(self, rows):
            return super().__call__([{**row, "input_ids": [*row["input_ids"], 7]} for row in rows])

    other = scores(model, train, query, Trak(dim=64), Longer(), cache_dir=tmp_path)
    fresh = scores(model, longer, query.map(lambda row: {"input_ids": [*row["input_ids"], 7]}), Trak(dim=64))
    np.testing.assert_allclose(other, fresh, rtol=1e-3, atol=1e-5)
    assert not np.allclose(found, other, rtol=1e-2)


@pytest.mark.parametrize(("dtype", "closeness"), [("float16", 0.9999), ("bfloat16", 0.999), ("int8", 0.999)])
def test_shorter_numbers_give_nearly_the_same_scores(dtype, closeness, model, train, query, tmp_path):
    exact = scores(model, train, query, Trak(dim=256))
    found = scores(model, train, query, Trak(dim=256), cache_dir=tmp_path, store_dtype=dtype)
    assert not np.array_equal(found, exact)
    assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > closeness
    with pytest.raises(ValueError, match="stored as float32, float16"):
        scores(model, train, query, Trak(dim=256), store_dtype="float8")


def test_new_training_rows_are_appended_to_a_store(model, train, query, tmp_path):
    expected = scores(model, train, query, Trak(dim=256))
    scores(model, train.select(range(11)), query, Trak(dim=256), cache_dir=tmp_path)
    seen = []

    def noting(batch):
        seen.extend(row["input_ids"] for row in batch if len(batch) > 2)
        return PadTokens()(batch)

    # `id` is no argument of the model: rows are told apart by what the model is given.
    found = scores(model, train, query, Trak(dim=256), noting, cache_dir=tmp_path, batch_size=3)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert len(seen) < N
    whole, beginning = sorted((tmp_path / "features").glob("train-*[!k]"), key=lambda p: -len(list(p.glob("*.arrow"))))
    assert [len(list(folder.glob("*.arrow"))) for folder in (whole, beginning)] == [2, 1]
    other = train.map(lambda row, i: {"labels": (row["labels"] + (i == 3)) % 3}, with_indices=True)
    changed = scores(model, other, query, Trak(dim=256), cache_dir=tmp_path)
    np.testing.assert_allclose(changed, scores(model, other, query, Trak(dim=256)), rtol=1e-4, atol=1e-6)


def test_an_interrupted_store_is_resumed(model, train, query, tmp_path):
    expected = scores(model, train, query, "trak", batch_size=4)
    calls = 0

    def failing(batch):
        nonlocal calls
        calls += len(batch) > 2
        if calls == 3:
            raise KeyboardInterrupt
        return PadTokens()(batch)

    with pytest.raises(KeyboardInterrupt):
        scores(model, train, query, "trak", failing, cache_dir=tmp_path, batch_size=4)
    assert list((tmp_path / "features").glob("*.part"))
    calls = 10
    found = scores(model, train, query, "trak", failing, cache_dir=tmp_path, batch_size=4)
    assert calls < 10 + -(-N // 4) + -(-Q // 4)
    np.testing.assert_array_equal(found, expected)


def test_a_full_disk_and_an_unwritable_folder_are_named_before_work(model, train, query, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left.*smaller dim"):
        scores(model, train, query, "trak", cache_dir=tmp_path)
    assert not list((tmp_path / "features").glob("*.part"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        scores(model, train, query, "trak", cache_dir=tmp_path / "file")


def test_scores_carry_what_they_belong_to(model, train, query):
    result = attribute(model, train, query, method=Trak(dim=64), data_collator=PadTokens(), progress=False)
    assert result.method == "trak"
    assert result.settings["dim"] == 64
    assert result.provenance["choices"] == {"damping": 1.0}
    assert result.provenance["measurement"] == "margin"
    other = attribute(model, train.select(range(4)), query, method="random", data_collator=PadTokens())
    assert other.provenance["fingerprints"]["train"] != result.provenance["fingerprints"]["train"]
    assert other.provenance["fingerprints"]["query"] == result.provenance["fingerprints"]["query"]
    assert Checkpoint(model).name == "BertForSequenceClassification"


@pytest.mark.parametrize("name", ["grad_dot", "grad_dot projected", "tracin", "trak", "logra", "influence",
                                  "diagonal", "kfac", "ekfac", "datainf"])  # fmt: skip
def test_self_influence_is_the_diagonal_of_the_scores(name, model, train):
    settings = {"dim": 16} if name in ("grad_dot projected", "trak", "logra") else {}
    method = get_method(name.split()[0], **settings)
    # The score of an example as a query whose measurement is its own gain; TRAK's features are of the margin.
    task = Classification() if name == "trak" else Classification("negative_loss")
    own = self_influence(model, train, method=method, task=task, data_collator=PadTokens(), progress=False)
    expected = attribute(model, train, train, method=method, task=task, data_collator=PadTokens(), progress=False)
    np.testing.assert_allclose(own, expected.values.diagonal(), rtol=1e-4, atol=1e-6)
    assert own.dtype == np.float32
    assert own.std() > 0


@pytest.mark.parametrize(
    "name", ["random", "label_match", "representation_similarity", "grad_cos", "trackstar", "source"]
)
def test_methods_without_self_influence_say_so(name, model, train):
    with pytest.raises(UnsupportedError, match=f"{name} gives no example an influence on itself"):
        self_influence(model, train, method=name, data_collator=PadTokens(), progress=False)


@pytest.mark.parametrize(
    "name", ["grad_dot", "grad_cos", "tracin", "trak", "logra", "influence", "diagonal", "kfac", "ekfac", "datainf"]
)
def test_only_the_last_layer_counts_if_asked(name, model, train, query):
    last = scores(model, train, query, get_method(name, last_layer=True))
    named = scores(model, train, query, get_method(name, modules=("classifier",)))
    np.testing.assert_array_equal(last, named)
    assert not np.array_equal(last, scores(model, train, query, get_method(name)))
    with pytest.raises(ValueError, match="either last_layer=True or modules="):
        get_method(name, last_layer=True, modules=("classifier",))


def test_trackstar_with_a_lossless_projection_equals_its_closed_form(model, train, query):
    # One weight matrix, sketched to as many dimensions as it has entries: that only permutes them and changes signs.
    task, weight = Classification(), model.classifier.weight
    names = [name for name, _ in model.named_parameters()]
    columns = slice(*(sum(p.numel() for p in list(model.parameters())[: names.index("classifier.weight") + k])
                      for k in (0, 1)))  # fmt: skip
    gains, measured = (brute_force_gradients(model, rows, f)[0][:, columns].view(-1, *weight.shape)
                       for rows, f in ((train, task.gains), (query, task.measurement)))  # fmt: skip
    squares = gains.square().mean(0)
    row, column, mean = squares.mean(1), squares.mean(0), squares.mean()
    moments = (row / mean + 1e-3)[:, None] * (column + 1e-3 * mean)
    gains, measured = (g.div(moments.sqrt()).flatten(1) for g in (gains, measured))
    mixed = sum(share * g.T @ g / g.square().sum() for share, g in ((0.3, measured), (0.7, gains)))
    inverse = torch.linalg.inv(mixed + 0.2 * mixed.trace() / len(mixed) * torch.eye(len(mixed)))
    lengths = [torch.einsum("ip,pq,iq->i", g, inverse, g).sqrt() for g in (measured, gains)]
    expected = measured @ inverse @ gains.T / lengths[0][:, None] / lengths[1]
    method = get_method("trackstar", dim=weight.numel(), mix=0.3, damping=0.2, modules=("classifier.weight",))
    np.testing.assert_allclose(scores(model, train, query, method), expected.numpy(), rtol=1e-3, atol=1e-4)
