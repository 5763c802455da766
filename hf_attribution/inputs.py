"""What a model's `forward` takes, the positions of its tokens, its mode and its identity."""

import contextlib
import inspect
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn


def unwrap(model: nn.Module) -> nn.Module:
    """The user's model under PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's `forward` names this argument."""
    return name in forward_arguments(model)


def forward_arguments(model: nn.Module) -> list[str]:
    """The names of the arguments of the model's `forward`, in order."""
    return list(inspect.signature(unwrap(model).forward).parameters)


def with_positions(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a text model with `position_ids`, where the model would count the positions itself.

    Args:
        model: The model the inputs are for.
        inputs: Its inputs, with `input_ids` and perhaps an `attention_mask`.

    Returns:
        The inputs; with `position_ids` `[B, T]` added where that changes nothing for an unpadded sequence.
    """
    wants = "input_ids" in inputs and "position_ids" not in inputs and accepts(model, "position_ids")
    if not wants or not _positions_count_from_zero(model):
        return dict(inputs)
    return {**inputs, "position_ids": positions(inputs["input_ids"], inputs.get("attention_mask"))}


def positions(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Position of every token among its example's real tokens, `[B, T]`, the same under any padding.

    One row per example also gives a position table's gradient per example: models that build the positions
    themselves do it once for the whole batch.

    Args:
        input_ids: Token ids `[B, T]`.
        attention_mask: 1 on real tokens, 0 on padding, `[B, T]`, or `None`.

    Returns:
        Positions `[B, T]`, counted from 0; padding in front of an example has position 0, too.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return torch.arange(input_ids.shape[1], device=input_ids.device).repeat(len(input_ids), 1)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in `eval()` mode for a while; afterwards every module is in the mode it was in."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def batch_normalised(model: nn.Module, training: bool = False) -> str | None:
    """The first module that normalises an example by the others in its batch.

    Args:
        model: The model.
        training: Whether to ask of the model in `train()` mode, rather than in the mode that it is in.

    Returns:
        Its name and class; `None` if there is no such module.
    """
    with evaluating(model) if training else contextlib.nullcontext():
        # A module that keeps itself in eval() mode stays there.
        for name, module in (model.train() if training else model).named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
                module.training or module.running_mean is None
            ):
                return f"{name} ({type(module).__name__})"
    return None


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of a model's parameters and buffers, by name. 32 hex digits."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


_COUNTS_FROM_ZERO: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


def _positions_count_from_zero(model: nn.Module) -> bool:
    """Whether the model numbers an unpadded sequence 0, 1, 2, ... when it is given no positions.

    Found out by trying, because some families (RoBERTa's) count from elsewhere: those count per example
    themselves, and are left alone.

    Args:
        model: A text model whose `forward` takes `position_ids`.

    Returns:
        Whether explicit positions 0, 1, 2 leave its outputs as they are.
    """
    if model not in _COUNTS_FROM_ZERO:
        device = next(model.parameters()).device
        ids = torch.ones(1, 3, dtype=torch.long, device=device)
        try:
            with torch.no_grad(), evaluating(model):
                left_alone = model(input_ids=ids)[0]
                counted = model(input_ids=ids, position_ids=torch.arange(3, device=device)[None])[0]
            _COUNTS_FROM_ZERO[model] = torch.equal(left_alone, counted)
        except (TypeError, ValueError, RuntimeError):
            # The model wants more than token ids (a second tower, say): it keeps its own positions.
            _COUNTS_FROM_ZERO[model] = False
    return _COUNTS_FROM_ZERO[model]
