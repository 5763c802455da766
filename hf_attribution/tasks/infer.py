"""The task of a model, from its class."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.models.auto import modeling_auto

from hf_attribution.errors import UnsupportedError
from hf_attribution.inputs import unwrap
from hf_attribution.tasks.base import Measure, Task
from hf_attribution.tasks.labelled import Classification, Regression
from hf_attribution.tasks.language import CausalLM, MaskedLM, Seq2SeqLM

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
