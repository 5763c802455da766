"""Language modelling: a target for each token."""

import dataclasses
from typing import Any, ClassVar

from torch import Tensor, nn

from hf_attribution.errors import UnsupportedError
from hf_attribution.logits import IGNORE_INDEX
from hf_attribution.tasks.base import Batch, PredictionTask


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
