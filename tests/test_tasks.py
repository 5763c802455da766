import math
from types import SimpleNamespace

import datasets
import models
import pytest
import torch
import transformers as tf
from torch import nn
from transformers.trainer_pt_utils import LabelSmoother

from hf_attribution import inputs as model_inputs
from hf_attribution.errors import MismatchError, UnsupportedError
from hf_attribution.inputs import positions, with_positions
from hf_attribution.tasks import (
    CausalLM,
    Classification,
    MaskedLM,
    Regression,
    Seq2SeqLM,
    Task,
    infer_task,
    label_column,
)

# What these compute depends on padding in front of a sequence, in training as well: their tokenizers pad behind it.
READS_FIRST_TOKEN = {
    "bert",
    "bert_regression",
    "roberta",
    "distilbert",
    "deberta",
    "electra",
    "albert",
    "mpnet",
    "modernbert",
}
COUNTS_FROM_LEFT_EDGE = {"bart", "marian"}  # absolute positions, and no `position_ids` to say otherwise
MOVED_BY_LEFT_PADDING = READS_FIRST_TOKEN | COUNTS_FROM_LEFT_EDGE


class Fixed(nn.Module):
    """A classifier whose inputs are its logits."""

    def forward(self, x):
        return (x,)


def logits_batch(logits, labels):
    return {"x": torch.tensor(logits), "labels": torch.tensor(labels)}


def measured(task, logits, labels):
    return task.measurement(Fixed(), logits_batch(logits, labels))


# ---------------------------------------------------------------- losses


def num_targets(task, batch):
    if isinstance(task, (Classification, Regression)):
        return len(batch["labels"])
    labels = batch["labels"][:, 1:] if isinstance(task, CausalLM) else batch["labels"]
    return int((labels != -100).sum())


def without_targets_of_padding(batch):
    """A first token behind padding is predicted by padding: transformers counts that prediction, a task does not."""
    behind_padding = batch["attention_mask"].roll(1, dims=1) == 0
    return {**batch, "labels": batch["labels"].masked_fill(behind_padding, -100)}


@pytest.mark.parametrize("family", models.FAMILIES)
def test_losses_add_up_to_the_models_own(family):
    model, batch = models.make(family)
    task = infer_task(model)
    if isinstance(task, CausalLM):
        batch = without_targets_of_padding(batch)
    with torch.no_grad():
        # The same positions on both sides: the task gives them, the model alone would count padding.
        own = model(**with_positions(model, batch)).loss * num_targets(task, batch)
        losses = task.losses(model, batch)
    assert losses.shape == (3,)
    torch.testing.assert_close(losses.sum(), own, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("family", ["bert", "bert_mlm", "gpt2", "t5", "vit"])
def test_label_smoothing_is_that_of_transformers(family):
    model, batch = models.make(family)
    task = infer_task(model, label_smoothing=0.3)
    with torch.no_grad():
        outputs = model(**with_positions(model, batch))
        smoother = LabelSmoother(epsilon=0.3)
        own = smoother(outputs, batch["labels"], shift_labels=isinstance(task, CausalLM)) * num_targets(task, batch)
        losses = task.losses(model, batch)
        plain = task.with_measure("loss").measurement(model, batch)
    torch.testing.assert_close(losses.sum(), own, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(losses, plain)  # the measured loss is the smoothed one, too


@pytest.mark.parametrize("family", ["gpt2", "bert_mlm", "t5"])
def test_ignored_labels_count_nothing(family):
    model, batch = models.make(family)
    task = infer_task(model, label_smoothing=0.1)
    nothing = {**batch, "labels": batch["labels"].clone()}
    if family == "t5":
        nothing["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    nothing["labels"][0] = -100
    with torch.no_grad():
        losses, others = task.losses(model, nothing), task.losses(model, batch)
        assert losses[0] == 0
        assert task.measurement(model, nothing)[0] == 0
    torch.testing.assert_close(losses[1:], others[1:])


def test_first_label_of_a_causal_model_is_no_target():
    model, batch = models.make("gpt2")
    changed = {**batch, "labels": batch["labels"].clone()}
    changed["labels"][:, 0] = 7
    with torch.no_grad():
        torch.testing.assert_close(CausalLM().losses(model, batch), CausalLM().losses(model, changed), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "left", "right"),
    [
        (family, left, right)
        for family in models.TEXT
        for left, right in ((0, 0), (0, 3), (3, 0), (2, 1))
        if not (left and family in MOVED_BY_LEFT_PADDING)
    ],
)
def test_padding_changes_no_loss(family, left, right):
    model, batch = models.make(family)
    task = infer_task(model)
    with torch.no_grad():
        alone = torch.cat([task.losses(model, models.moved(batch, only=row)) for row in range(3)])
        padded = task.losses(model, models.moved(batch, left, right))
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(MOVED_BY_LEFT_PADDING))
def test_the_exceptions_are_exceptions(family):
    model, batch = models.make(family)
    with torch.no_grad():
        right = infer_task(model).losses(model, models.moved(batch, 0, 3))
        left = infer_task(model).losses(model, models.moved(batch, 3, 0))
    assert (right - left).abs().max() > 1e-2


def test_a_first_token_behind_padding_is_no_target():
    model, batch = models.make("gpt2_left")
    changed = {**batch, "labels": batch["labels"].clone()}
    changed["labels"][2, 2] = 7  # the first token of the third row
    task = CausalLM("loss")
    with torch.no_grad():
        torch.testing.assert_close(task.losses(model, changed), task.losses(model, batch), rtol=0, atol=0)
        torch.testing.assert_close(task.measurement(model, changed), task.losses(model, batch), rtol=0, atol=0)
    assert changed["labels"][2, 2] == 7


def test_seq2seq_takes_decoder_inputs_from_the_batch():
    model, batch = models.make("t5")
    given = {**batch, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"])}
    with torch.no_grad():
        torch.testing.assert_close(Seq2SeqLM().losses(model, given), Seq2SeqLM().losses(model, batch))
    with pytest.raises(UnsupportedError, match="DataCollatorForSeq2Seq"):
        Seq2SeqLM().losses(Fixed(), batch)


def test_half_precision_losses_are_float32():
    model, batch = models.make("bert")
    assert infer_task(model).losses(model.bfloat16(), batch).dtype == torch.float32


def test_regression_over_several_outputs_is_the_models_own():
    model = tf.BertForSequenceClassification(
        tf.BertConfig(**models._TEXT, num_labels=2, problem_type="regression")
    ).eval()
    batch = {**models.text_batch(labels="class"), "labels": torch.randn(3, 2)}
    task = infer_task(model)
    assert isinstance(task, Regression)
    torch.testing.assert_close(task.losses(model, batch).mean(), model(**batch).loss)


# ---------------------------------------------------------------- measurements


def test_margin_is_the_log_odds_of_the_label():
    logits = torch.randn(5, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0])
    p = logits.softmax(-1)[torch.arange(5), labels]
    margin = Classification().measurement(Fixed(), {"x": logits, "labels": labels})
    torch.testing.assert_close(margin, (p / (1 - p)).log())


def test_margin_is_exact_for_certain_predictions():
    margin = measured(Classification(), [[50.0, 0.0, 0.0], [-50.0, 0.0, 0.0], [1e4, 0.0, 0.0]], [0, 0, 0])
    torch.testing.assert_close(margin, torch.tensor([50.0, -50.0, 1e4]) - math.log(2))


def test_margin_has_a_finite_gradient():
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    Classification().measurement(Fixed(), {"x": logits, "labels": torch.tensor([0])}).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, -0.5, -0.5]]))


def test_named_measurements():
    logits, labels = [[1.0, 2.0, 4.0], [0.0, -1.0, 3.0]], [1, 2]
    log_p = torch.tensor(logits).log_softmax(-1)[[0, 1], labels]
    expected = {
        "logit": torch.tensor([2.0, 3.0]),
        "logit:0": torch.tensor([1.0, 0.0]),
        "log_probability": log_p,
        "loss": -log_p,
        "negative_loss": log_p,
    }
    for name, values in expected.items():
        torch.testing.assert_close(measured(Classification(name), logits, labels), values)
        assert Classification(name).measurement_name == name


def test_regression_measurements():
    logits, labels = [[1.0, 2.0], [0.0, -1.0]], [[1.0, 0.0], [0.0, 0.0]]
    torch.testing.assert_close(measured(Regression(), logits, labels), torch.tensor([-2.0, -0.5]))
    torch.testing.assert_close(measured(Regression("logit:1"), logits, labels), torch.tensor([2.0, -1.0]))
    torch.testing.assert_close(measured(Regression("logit"), logits, labels), torch.tensor([1.0, 0.0]))


def test_measurements_of_language_models_add_up_over_targets():
    logits = torch.randn(2, 4, 5, dtype=torch.float64)
    labels = torch.tensor([[0, 1, 2, -100], [3, -100, 4, 0]])
    batch, p = {"x": logits, "labels": labels}, logits.softmax(-1)
    causal = torch.stack([p[0, 0, 1].log() + p[0, 1, 2].log(), p[1, 1, 4].log() + p[1, 2, 0].log()])
    masked = torch.stack(
        [p[0, 0, 0].log() + p[0, 1, 1].log() + p[0, 2, 2].log(), p[1, [0, 2, 3], [3, 4, 0]].log().sum()]
    )
    torch.testing.assert_close(CausalLM().measurement(Fixed(), batch), causal)
    torch.testing.assert_close(MaskedLM().measurement(Fixed(), batch), masked)
    torch.testing.assert_close(CausalLM().losses(Fixed(), batch), -causal)
    odds = (p / (1 - p)).log()
    torch.testing.assert_close(
        CausalLM("margin").measurement(Fixed(), batch),
        torch.stack([odds[0, 0, 1] + odds[0, 1, 2], odds[1, 1, 4] + odds[1, 2, 0]]),
    )


def test_a_measurement_of_the_users_own():
    def confidence(model, batch):
        return model(batch["x"])[0].softmax(-1).amax(-1)

    task = Classification(confidence)
    torch.testing.assert_close(measured(task, [[0.0, 0.0]], [0]), torch.tensor([0.5]))
    assert task.measurement_name.endswith("confidence")
    with pytest.raises(ValueError, match=r"one number per example, shape \[B\]"):
        measured(Classification(lambda model, batch: model(batch["x"])[0].mean()), [[0.0, 0.0]], [0])


def test_measure_can_be_replaced():
    task = CausalLM(label_smoothing=0.1)
    assert task.with_measure("loss") == CausalLM("loss", 0.1)
    assert task.margins() is None
    assert Classification("logit").margins() == Classification("margin")
    assert task.description == {
        "name": "causal language modelling",
        "measurement": "log_probability",
        "label_smoothing": 0.1,
    }


# ---------------------------------------------------------------- which task


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("bert", Classification),
        ("bert_regression", Regression),
        ("bert_mlm", MaskedLM),
        ("gpt2", CausalLM),
        ("gpt2_classification", Classification),
        ("mamba", CausalLM),
        ("t5", Seq2SeqLM),
        ("bart", Seq2SeqLM),
        ("marian", Seq2SeqLM),
        ("vit", Classification),
        ("wav2vec2", Classification),
    ],
)
def test_task_of_a_class(family, kind):
    model = models.FAMILIES[family]()[0]
    assert type(infer_task(model)) is kind

    class Wrapper(nn.Module):  # as PEFT wraps: the user's model comes back from `get_base_model`
        def get_base_model(self):
            return model

    assert type(infer_task(Wrapper())) is kind


def named(name, **config):
    return type(name, (nn.Module,), {"config": SimpleNamespace(**config)})()


@pytest.mark.parametrize(
    ("name", "encoder_decoder", "kind"),
    [
        ("LlavaForConditionalGeneration", False, CausalLM),
        ("Gemma3ForConditionalGeneration", False, CausalLM),
        ("Qwen2AudioForConditionalGeneration", False, CausalLM),
        ("WhisperForConditionalGeneration", True, Seq2SeqLM),
        ("EncoderDecoderModel", True, Seq2SeqLM),
        ("MyForConditionalGeneration", True, Seq2SeqLM),
        ("XLMWithLMHeadModel", False, MaskedLM),  # its loss does not shift
    ],
)
def test_task_of_a_name(name, encoder_decoder, kind):
    assert type(infer_task(named(name, is_encoder_decoder=encoder_decoder))) is kind


def test_one_output_with_a_stated_problem_type_is_classification():
    model = named("MyForSequenceClassification", num_labels=1, problem_type="single_label_classification")
    assert type(infer_task(model)) is Classification


def test_tasks_that_cannot_be_told():
    with pytest.raises(UnsupportedError, match=r"Cannot tell the task of Fixed.*pass task="):
        infer_task(Fixed())
    with pytest.raises(UnsupportedError, match=r"subclass of hf_attribution.tasks.Task"):
        infer_task(named("MyForSequenceClassification", problem_type="multi_label_classification", num_labels=3))
    with pytest.raises(UnsupportedError, match="Cannot tell the task"):
        infer_task(named("BertForTokenClassification"))


# ---------------------------------------------------------------- errors


def test_no_labels():
    for family, remedy in (("bert", "'label'"), ("gpt2", "mlm=False"), ("bert_mlm", "mlm=True"), ("t5", "Seq2Seq")):
        model, batch = models.make(family)
        batch.pop("labels")
        with pytest.raises(ValueError, match=f"no 'labels'.*{remedy}"):
            infer_task(model).losses(model, batch)


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_outside_of_the_classes(label):
    # -1 is how GLUE marks rows without a label.
    with pytest.raises(MismatchError, match=f"label is {label} but the model has 3 classes"):
        Classification().losses(Fixed(), logits_batch([[0.0, 1.0, 2.0]] * 2, [0, label]))


@pytest.mark.parametrize("label", [5, -1])
def test_a_token_outside_of_the_vocabulary(label):
    batch = {"x": torch.zeros(1, 3, 5), "labels": torch.tensor([[0, label, 2]])}
    with pytest.raises(MismatchError, match=f"label is {label} but the model has 5 classes"):
        CausalLM().losses(Fixed(), batch)


def test_several_labels_per_example():
    with pytest.raises(UnsupportedError, match="subclass Task"):
        Classification().losses(Fixed(), {"x": torch.zeros(2, 3), "labels": torch.zeros(2, 3)})


@pytest.mark.parametrize("measure", ["accuracy", "margin:3", "logit:cat", "logit:-1", ""])
def test_unknown_measurements(measure):
    with pytest.raises(ValueError, match=r"no measurement.*margin, log_probability.*or pass a function"):
        Classification(measure)


def test_a_chosen_class_that_the_model_does_not_have():
    with pytest.raises(MismatchError, match=r"logit:7.*3 classes"):
        measured(Classification("logit:7"), [[0.0, 1.0, 2.0]], [0])


@pytest.mark.parametrize("factor", [1.0, -0.1])
def test_label_smoothing_outside_of_its_range(factor):
    with pytest.raises(ValueError, match="label_smoothing"):
        CausalLM(label_smoothing=factor)


def test_a_task_without_a_loss():
    with pytest.raises(UnsupportedError, match="override `losses`"):
        Task().losses(Fixed(), logits_batch([[0.0]], [0]))


# ---------------------------------------------------------------- labels of datasets


def test_labels_of_a_dataset():
    rows = datasets.Dataset.from_dict({"label": [2, 0, 1], "x": [0.0, 1.0, 2.0]})
    assert Classification().labels(rows).tolist() == [2, 0, 1]
    assert Classification().labels(rows.with_format("torch")).tolist() == [2, 0, 1]
    assert Classification().labels(rows.select([2, 0])).tolist() == [1, 2]
    assert CausalLM().labels(rows) is None
    assert label_column(rows.remove_columns("label")) is None
    assert label_column(datasets.Dataset.from_dict({"label": [0.5]})) is None
    assert label_column([1, 2]) is None


# ---------------------------------------------------------------- positions


def test_positions_count_real_tokens():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    assert positions(mask, mask).tolist() == [[0, 1, 2, 2], [0, 0, 0, 1]]
    assert positions(mask, None).tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("family", "given"),
    [("bert", True), ("gpt2", True), ("llama", True), ("roberta", False), ("mpnet", False), ("t5", False)],
)
def test_positions_are_given_where_the_model_counts_from_zero(family, given):
    model, batch = models.make(family)
    assert ("position_ids" in with_positions(model, batch)) is given


def test_given_positions_are_kept():
    model, batch = models.make("bert")
    given = {**batch, "position_ids": torch.zeros(3, 6, dtype=torch.long)}
    assert with_positions(model, given)["position_ids"] is given["position_ids"]
    assert "position_ids" not in batch


def test_trying_positions_leaves_the_modes_of_all_modules():
    model, batch = models.make("bert")
    model.train()
    model.bert.encoder.eval()  # a frozen part
    before = {name: module.training for name, module in model.named_modules()}
    with_positions(model, batch)
    assert model in model_inputs._COUNTS_FROM_ZERO
    assert {name: module.training for name, module in model.named_modules()} == before
