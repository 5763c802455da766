"""Attention that can be differentiated twice, forward and under vmap, for models of transformers."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from hf_attribution.inputs import unwrap

NAME = "hf_attribution_exact"


def use_exact_attention(model: nn.Module) -> None:
    """Let a model attend by plain matrix products, where its family leaves the choice. The model is changed."""
    base = unwrap(model)
    if isinstance(base, PreTrainedModel) and _chooses(base):
        base.set_attn_implementation(NAME)


def _chooses(model: PreTrainedModel) -> bool:
    own = getattr(model.config, "_attn_implementation", None)
    return own not in (None, "eager") or model._can_set_attn_implementation()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention in the model's own precision: queries `[B, H, T, D]`, keys and values `[B, G, T, D]`."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    if s_aux is not None:  # sinks: a logit per head that takes weight and gives nothing
        sinks = s_aux.reshape(1, -1, 1, 1).expand(len(query), -1, query.shape[-2], -1)
        scores = torch.cat([scores, sinks.to(scores)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[-2]]
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _mask(*args: Any, **kwargs: Any) -> Any:
    """The additive mask, always: whether it can be skipped depends on data, which vmap does not see."""
    wanted = {name: value for name, value in kwargs.items() if name != "allow_is_causal_skip"}
    wanted["allow_is_bidirectional_skip"] = False
    return eager_mask(*args, **wanted)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
