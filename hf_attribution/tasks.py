"""What a model is trained on and what is measured: the one place that knows labels, -100, token shift and margin.

A task turns a batch into two vectors with one number per example: `losses`, what training minimises (summed over
an example's target tokens), and `measurement`, the output that scores explain. Everything else in the library
works on those two vectors and never looks at a label.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from hf_attribution.adapters import refuse_prompt_learning
from hf_attribution.errors import MismatchError, UnsupportedError
from hf_attribution.inputs import accepts, unwrap, with_positions
from hf_attribution.logits import IGNORE_INDEX, margins, picked, refuse_unknown_classes, sampled_classes, token_sum
from hf_attribution.seeds import generator

Batch = Mapping[str, Any]
Measure = str | Callable[[nn.Module, Batch], Tensor]


@dataclasses.dataclass(frozen=True)
class Task:
    """Per-example losses and measurements of one kind of model.

    Use a subclass, or `infer_task(model)`. To attribute a loss of your own, subclass and override `losses`; to
    measure something of your own, pass a function as `measure`.

    Args:
        measure: What scores explain. A name (`"margin"`, `"log_probability"`, `"loss"`, `"negative_loss"`,
            `"logit"` for the label's logit, `"logit:3"` for class 3's), a function
            `(model, batch) -> Tensor [B]`, or `None` for the task's default.
        label_smoothing: The `label_smoothing_factor` of training, in `[0, 1)`. It enters `losses` only.

    Example:
        >>> task = infer_task(model)  # doctest: +SKIP
        >>> task.losses(model, batch).shape  # doctest: +SKIP
        torch.Size([8])
    """

    measure: Measure | None = None
    label_smoothing: float = 0.0

    name: ClassVar[str] = "task"
    default_measure: ClassVar[str] = "negative_loss"
    measures: ClassVar[tuple[str, ...]] = ("loss", "negative_loss")

    def __post_init__(self) -> None:
        if isinstance(self.measure, str) and not self._knows(self.measure):
            raise ValueError(
                f"{self.name} has no measurement {self.measure!r}: choose one of {', '.join(self.measures)} "
                "or pass a function (model, batch) -> Tensor of shape [B]."
            )
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), not {self.label_smoothing}.")

    def _knows(self, measure: str) -> bool:
        kind, colon, which = measure.partition(":")
        return kind in self.measures and (not colon or (kind == "logit" and which.isdecimal()))

    @property
    def measurement_name(self) -> str:
        """The name under which the measured output is recorded beside every score."""
        measure = self.measure or self.default_measure
        return measure if isinstance(measure, str) else getattr(measure, "__qualname__", repr(measure))

    @property
    def description(self) -> dict[str, Any]:
        """The task as JSON: its name, the measured output and the label smoothing."""
        return {
            "name": self.name,
            "measurement": self.measurement_name,
            "label_smoothing": self.label_smoothing,
        }

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss of each example, summed over its target tokens. Shape `[B]`."""
        return self._losses(self._logits(model, batch), self._targets(batch))

    def gains(self, model: nn.Module, batch: Batch) -> Tensor:
        """What training on an example raises: minus its loss. Shape `[B]`."""
        return -self.losses(model, batch)

    def measurement(self, model: nn.Module, batch: Batch) -> Tensor:
        """The measured output of each example.

        Args:
            model: The model, in whatever mode it is.
            batch: What the data collator returned.

        Returns:
            One number per example, `[B]`.

        Raises:
            ValueError: If a measurement function of the user's returns another shape.
        """
        measure = self.measure or self.default_measure
        if measure in ("loss", "negative_loss"):
            return self.losses(model, batch) if measure == "loss" else self.gains(model, batch)
        if callable(measure):
            values = measure(model, batch)
            if values.ndim != 1:
                raise ValueError(
                    f"The measurement {self.measurement_name} returned shape {tuple(values.shape)}: "
                    "it must return one number per example, shape [B]."
                )
            return values
        logits, targets = self._logits(model, batch), self._targets(batch)
        return self._measure(measure, logits, targets)

    def num_items(self, batch: Batch) -> int:
        """What the mean loss of a batch is a mean over: its examples, or its target tokens."""
        return next(len(value) for value in batch.values() if isinstance(value, Tensor))

    def with_measure(self, measure: Measure | None) -> "Task":
        """The same task measuring something else."""
        return dataclasses.replace(self, measure=measure)

    def margins(self) -> "Task | None":
        """This task measuring the correct-class margin, where an example is one prediction; else `None`."""
        return None

    def curvature_rows(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Values whose gradients r make up the Gauss-Newton matrix of the losses, `Σ_ik r_ik r_ikᵀ`.

        Args:
            model: The model.
            batch: What the data collator returned.

        Returns:
            The K values of each example, `[B, K]`, and the coefficients `[B, K]` with which their gradients add up to
            the gradient of its gain.

        Raises:
            UnsupportedError: If the task has none in closed form.
        """
        raise UnsupportedError(
            f"There is no closed form of the Gauss-Newton matrix for {self.name} (an example has too many outputs, or "
            "the task is your own): use curvature='fisher'."
        )

    def sampled_losses(self, model: nn.Module, batch: Batch, seeds: Tensor) -> Tensor:
        """The loss of each example on targets drawn from the model: its gradients make up the true Fisher matrix.

        Args:
            model: The model.
            batch: What the data collator returned.
            seeds: A seed for each example's targets, `[B]`.

        Returns:
            Minus the log-probability of the drawn targets, up to a constant, `[B]`.

        Raises:
            UnsupportedError: If the task does not say how its targets are distributed.
        """
        raise UnsupportedError(
            f"{type(self).__name__} says nothing of the distribution of its targets: use curvature='fisher', or "
            "override `sampled_losses`."
        )

    def labels(self, dataset: Any) -> np.ndarray | None:
        """The class of each row of a dataset, `[N]` integers, or `None` where rows have no class."""
        return None

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """The model's outputs on a batch, without its own loss: labels stay here."""
        refuse_prompt_learning(model)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if accepts(model, "use_cache"):
            inputs["use_cache"] = False
        return model(**with_positions(model, inputs))

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        outputs = self.forward(model, batch)
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        # Half-precision losses lose the differences between examples: sum in float32 at least.
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def _targets(self, batch: Batch) -> Tensor:
        labels = batch.get("labels")
        if labels is None:
            raise ValueError(
                f"A {self.name} batch has no 'labels' (it has {', '.join(batch)}). {self._how_to_get_labels()}"
            )
        return labels

    def _how_to_get_labels(self) -> str:
        return "Give the dataset a 'label' or 'labels' column that the data collator passes on."

    def _losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        raise UnsupportedError(f"{type(self).__name__} defines no loss: override `losses`.")

    def _measure(self, measure: str, logits: Tensor, targets: Tensor) -> Tensor:
        raise UnsupportedError(f"{type(self).__name__} does not measure {measure!r}: override `measurement`.")


@dataclasses.dataclass(frozen=True)
class PredictionTask(Task):
    """Tasks whose targets are classes: one per example, or one per target token."""

    measures: ClassVar[tuple[str, ...]] = ("margin", "log_probability", "loss", "negative_loss", "logit")

    def sampled_losses(self, model: nn.Module, batch: Batch, seeds: Tensor) -> Tensor:
        """Cross-entropy on classes drawn from the model, one for each target; without label smoothing."""
        if type(self).losses is not Task.losses or type(self)._losses is not PredictionTask._losses:
            # A loss of the user's own need not be cross-entropy.
            return super().sampled_losses(model, batch, seeds)
        logits, targets = self._aligned(self._logits(model, batch), self._targets(batch))
        refuse_unknown_classes(targets, logits.shape[-1])
        drawn = sampled_classes(logits.detach(), targets, seeds)
        return token_sum(-picked(logits.log_softmax(-1), drawn), targets)

    def _aligned(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[B, T, C]` and targets `[B, T]` that belong together."""
        return logits, targets

    def _losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits, targets = self._aligned(logits, targets)
        refuse_unknown_classes(targets, logits.shape[-1])
        losses = token_sum(-picked(logits.log_softmax(-1), targets), targets)
        if self.label_smoothing:
            uniform = token_sum(-logits.log_softmax(-1).mean(-1), targets)
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * uniform
        return losses

    def _measure(self, measure: str, logits: Tensor, targets: Tensor) -> Tensor:
        kind, _, which = measure.partition(":")
        logits, targets = self._aligned(logits, targets)
        refuse_unknown_classes(targets, logits.shape[-1])
        if which and int(which) >= logits.shape[-1]:
            raise MismatchError(f"The measurement is {measure} but the model has {logits.shape[-1]} classes.")
        if kind == "logit":
            values = logits[..., int(which)] if which else picked(logits, targets)
        elif kind == "log_probability":
            values = picked(logits.log_softmax(-1), targets)
        else:
            values = margins(logits, targets)
        return token_sum(values, targets)


@dataclasses.dataclass(frozen=True)
class Classification(PredictionTask):
    """Image, sequence or audio classification: one class per example. Measures the correct-class margin.

    The margin is `log p / (1 - p)` of the label's probability (Park et al. 2023, section 3.2).
    """

    name: ClassVar[str] = "classification"
    default_measure: ClassVar[str] = "margin"

    def margins(self) -> Task:
        """This task measuring the correct-class margin."""
        return self.with_measure("margin")

    def labels(self, dataset: Any) -> np.ndarray | None:
        """The class of each row, from the column `labels` or `label`: `[N]` integers."""
        return label_column(dataset)

    def curvature_rows(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """`√p log p` of every class, p held fixed: cross-entropy has the curvature `diag(p) - p pᵀ` in the logits."""
        logits, targets = self._logits(model, batch), self._targets(batch)
        self._losses(logits.detach(), targets)  # refuses what is no classification
        log_p = logits.log_softmax(-1)
        # A class of probability e⁻³⁰ curves nothing, and its coefficient would be lost in rounding.
        roots = (log_p.detach().clamp(min=-30) / 2).exp()
        smoothed = torch.full_like(roots, self.label_smoothing / roots.shape[1])
        smoothed.scatter_add_(1, targets[:, None], torch.full_like(roots[:, :1], 1 - self.label_smoothing))
        return roots * log_p, smoothed / roots

    def _aligned(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if logits.ndim != 2 or targets.ndim != 1 or targets.is_floating_point():
            raise UnsupportedError(
                f"Classification needs logits [B, C] and integer labels [B], not {tuple(logits.shape)} and "
                f"{tuple(targets.shape)} {targets.dtype}. For several labels per example subclass Task."
            )
        return logits[:, None], targets[:, None]


@dataclasses.dataclass(frozen=True)
class Regression(Task):
    """Sequence or image regression: squared error, averaged over outputs. Measures minus the loss."""

    name: ClassVar[str] = "regression"
    measures: ClassVar[tuple[str, ...]] = ("loss", "negative_loss", "logit")

    def curvature_rows(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The outputs, times the root of the loss' second derivative."""
        outputs = self._logits(model, batch).flatten(1)
        targets = self._targets(batch).to(outputs.dtype).reshape(outputs.shape)
        root = (2 / outputs.shape[1]) ** 0.5
        return root * outputs, root * (targets - outputs.detach())

    def sampled_losses(self, model: nn.Module, batch: Batch, seeds: Tensor) -> Tensor:
        """Squared error against targets drawn around the outputs, of which it is the log-density."""
        if type(self).losses is not Task.losses or type(self)._losses is not Regression._losses:
            return super().sampled_losses(model, batch, seeds)
        outputs = self._logits(model, batch)
        noise = [torch.randn(outputs[0].numel(), generator=generator(seed)) for seed in seeds.tolist()]
        drawn = torch.stack(noise).to(outputs).reshape(outputs.shape) * (outputs[0].numel() / 2) ** 0.5
        return self._losses(outputs, outputs.detach() + drawn)

    def _losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        targets = targets.to(logits.dtype).reshape(logits.shape)
        return (logits - targets).square().flatten(1).mean(1)

    def _measure(self, measure: str, logits: Tensor, targets: Tensor) -> Tensor:
        return logits.reshape(len(logits), -1)[:, int(measure.partition(":")[2] or 0)]


@dataclasses.dataclass(frozen=True)
class TokenPrediction(PredictionTask):
    """Language modelling: a class per target token, summed over an example's tokens."""

    default_measure: ClassVar[str] = "log_probability"

    def num_items(self, batch: Batch) -> int:
        """How many target tokens a batch holds."""
        return int((self._targets(batch) != IGNORE_INDEX).sum())


@dataclasses.dataclass(frozen=True)
class CausalLM(TokenPrediction):
    """Causal language modelling: token t predicts token t + 1. Measures the summed log-probability."""

    name: ClassVar[str] = "causal language modelling"

    def num_items(self, batch: Batch) -> int:
        """How many target tokens a batch holds; the first of an example has none before it."""
        return int((self._targets(batch)[:, 1:] != IGNORE_INDEX).sum())

    def _aligned(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return logits[:, :-1], targets[:, 1:]

    def _targets(self, batch: Batch) -> Tensor:
        targets, mask = super()._targets(batch), batch.get("attention_mask")
        if mask is None or mask.shape != targets.shape:
            return targets
        # A first token behind padding has nothing to be predicted from: without the padding it is no target either.
        return targets.masked_fill(mask.roll(1, dims=1) == 0, IGNORE_INDEX)

    def _how_to_get_labels(self) -> str:
        return "Use DataCollatorForLanguageModeling(tokenizer, mlm=False), or add a 'labels' column."


@dataclasses.dataclass(frozen=True)
class MaskedLM(TokenPrediction):
    """Masked language modelling: targets are the tokens whose label is not -100."""

    name: ClassVar[str] = "masked language modelling"

    def _how_to_get_labels(self) -> str:
        return "Use DataCollatorForLanguageModeling(tokenizer, mlm=True), or add a 'labels' column."


@dataclasses.dataclass(frozen=True)
class Seq2SeqLM(TokenPrediction):
    """Sequence-to-sequence language modelling: targets are the decoder's labels."""

    name: ClassVar[str] = "sequence-to-sequence language modelling"

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """The model's outputs, with decoder inputs made from the labels where the batch has none."""
        if "decoder_input_ids" not in batch and "decoder_inputs_embeds" not in batch:
            shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
            if shift is None:
                raise UnsupportedError(
                    f"{type(model).__name__} cannot make decoder inputs from labels: "
                    "let the collator do it with DataCollatorForSeq2Seq(tokenizer, model=model)."
                )
            batch = {**batch, "decoder_input_ids": shift(labels=self._targets(batch))}
        return super().forward(model, batch)

    def _how_to_get_labels(self) -> str:
        return "Tokenize the targets into a 'labels' column and use DataCollatorForSeq2Seq."


# Order matters: BART's class stands in several of transformers' tables, and XLM's, which shifts nothing, in two.
_TABLES: tuple[tuple[type[Task], tuple[str, ...], tuple[str, ...]], ...] = (
    (
        Seq2SeqLM,
        ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",),
        ("ForConditionalGeneration", "ForSeq2SeqLM"),
    ),
    (MaskedLM, ("MODEL_FOR_MASKED_LM_MAPPING_NAMES",), ("ForMaskedLM",)),
    (CausalLM, ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",), ("ForCausalLM", "LMHeadModel")),
    (
        Classification,
        (
            "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
            "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
            "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
        ),
        ("ForImageClassification", "ForSequenceClassification", "ForAudioClassification"),
    ),
)


def infer_task(model: nn.Module, measure: Measure | None = None, label_smoothing: float = 0.0) -> Task:
    """The task of a model, from its class (and, for classifiers, `config.problem_type`).

    Args:
        model: A model of `transformers`, bare or wrapped by PEFT.
        measure: What to measure, see `Task`.
        label_smoothing: The `label_smoothing_factor` of its training.

    Returns:
        A `Classification`, `Regression`, `CausalLM`, `MaskedLM` or `Seq2SeqLM`.

    Raises:
        UnsupportedError: If the class says nothing about the task; the message says what to pass.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> infer_task(BertForSequenceClassification(config)).name
        'classification'
    """
    base = unwrap(model)
    name = type(base).__name__
    for kind, tables, suffixes in _TABLES:
        known = any(_in_table(name, getattr(modeling_auto, table, {})) for table in tables)
        if known or name.endswith(suffixes):
            if kind is Seq2SeqLM and not getattr(getattr(base, "config", None), "is_encoder_decoder", False):
                kind = CausalLM  # decoders of text behind an image or audio tower have the same suffix
            if kind is Classification:
                kind = _classification_or_regression(base)
            return kind(measure=measure, label_smoothing=label_smoothing)
    raise UnsupportedError(
        f"Cannot tell the task of {name} from its name: pass task=Classification(), Regression(), CausalLM(), "
        "MaskedLM() or Seq2SeqLM() of hf_attribution.tasks, or a subclass of Task with `losses` of your own."
    )


def label_column(dataset: Any) -> np.ndarray | None:
    """The integer class of each row of a dataset from its `labels` or `label` column, `[N]`, or `None`."""
    for column in ("labels", "label"):
        if column in (getattr(dataset, "column_names", None) or ()):
            values = np.asarray(dataset.with_format(None)[column])
            if values.ndim == 1 and np.issubdtype(values.dtype, np.integer):
                return values
    return None


def _in_table(name: str, table: Mapping[str, Any]) -> bool:
    return any(name in (value if isinstance(value, (tuple, list)) else (value,)) for value in table.values())


def _classification_or_regression(model: nn.Module) -> type[Task]:
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        raise UnsupportedError(
            "Multi-label classification has no single margin: pass task= a subclass of hf_attribution.tasks.Task "
            "whose `losses` is the loss you train with."
        )
    # One output and no stated problem type is how transformers itself recognises regression.
    if problem == "regression" or (problem is None and getattr(config, "num_labels", None) == 1):
        return Regression
    return Classification
