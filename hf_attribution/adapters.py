"""Models with PEFT's adapters: which weights are the adapters', and how their checkpoints are loaded."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_attribution.errors import MismatchError, UnsupportedError

CONFIG_NAME = "adapter_config.json"

# Settings of an adapter that say where it came from, not what it computes.
_HISTORY = {"base_model_name_or_path", "revision", "inference_mode", "init_lora_weights", "peft_version", "task_type"}
_HISTORY |= {"auto_mapping", "runtime_config"}


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that a model computes with: PEFT's wrapper or transformers' `add_adapter`; or none."""
    if not getattr(model, "peft_config", None):
        return []
    active: Any = model.active_adapters
    return list(active() if callable(active) else active)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model's active adapters, with `modules_to_save`, by name; none without adapters."""
    held = {tensor.data_ptr() for name in active_adapters(model) for tensor in _weights(model, name).values()}
    return {name: parameter for name, parameter in model.named_parameters() if parameter.data_ptr() in held}


@contextlib.contextmanager
def adapters_trainable(model: nn.Module) -> Iterator[None]:
    """The active adapters trainable for a while, where nothing is: PEFT loads adapters frozen.

    Args:
        model: The model, with or without adapters.

    Yields:
        Nothing. Afterwards every parameter requires gradients or not, as before.
    """
    parameters = list(model.parameters())
    frozen = [] if any(p.requires_grad for p in parameters) else list(adapter_parameters(model).values())
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def holds_adapters(folder: Path) -> bool:
    """Whether a folder is a checkpoint of adapters; those of other names than "default" have a folder of their own."""
    return (folder / CONFIG_NAME).exists() or any(folder.glob(f"*/{CONFIG_NAME}"))


def load_adapters(model: nn.Module, folder: Path) -> None:
    """Load the weights of a checkpoint of adapters into those that a model has.

    Args:
        model: A model with adapters of the same settings; its adapters are changed, and nothing else.
        folder: A folder that `save_pretrained` or the Trainer wrote for a model with adapters.

    Raises:
        MismatchError: If the model has no adapters, or the folder's are others; the message names the difference.
        UnsupportedError: If the model trains weights that checkpoints of adapters do not hold.
    """
    names = active_adapters(model)
    if not names:
        raise MismatchError(
            f"{folder} holds adapters and {type(model).__name__} has none: pass the model with adapters "
            "(peft.PeftModel.from_pretrained(model, folder)), of which the checkpoints hold other weights."
        )
    ours = adapter_parameters(model)
    outside = [name for name, p in model.named_parameters() if p.requires_grad and name not in ours]
    if outside:
        raise UnsupportedError(
            f"{outside[0]} is trained and is no part of an adapter, so {folder} does not hold its weights: name its "
            "module in the adapters' modules_to_save, or freeze it."
        )
    for name in names:
        _load_adapter(model, name, folder / name if (folder / name / CONFIG_NAME).exists() else folder)


def refuse_prompt_learning(model: nn.Module) -> None:
    """Refuse a model whose adapter puts virtual tokens before the text.

    Args:
        model: The model, with or without adapters.

    Raises:
        UnsupportedError: The message names the kind of adapter.
    """
    configs: Any = getattr(model, "peft_config", None) or {}
    for config in configs.values():
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedError(
                f"{type(config).__name__} puts virtual tokens before each example, which shift its labels and let "
                "padding change its outputs: use an adapter that leaves the tokens alone, such as LoRA or IA³."
            )


def _weights(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's weights, under the names that its checkpoint gives them."""
    from peft import get_peft_model_state_dict

    # Without the embeddings that PEFT saves for new tokens after a look at the Hub: no adapter changes those.
    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def _load_adapter(model: Any, name: str, folder: Path) -> None:
    from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict

    _refuse_other_settings(model.peft_config[name], PeftConfig.from_pretrained(str(folder)), folder)
    found, own = load_peft_weights(str(folder), device="cpu"), _weights(model, name)
    found = {key.removeprefix("base_model.model."): tensor for key, tensor in found.items()}
    named = {key.removeprefix("base_model.model."): key for key in own}
    base = model.state_dict()
    for key in (*named, *found):
        there = tuple(found[key].shape) if key in found else "absent"
        here = tuple(own[named[key]].shape) if key in named else "absent"
        if here == "absent" and key in found and _is_base_weight(found[key], base, key):
            continue
        if there != here:
            raise MismatchError(
                f"The adapters in {folder} are others than those of the model: {key} is {there} there and {here} here."
            )
    set_peft_model_state_dict(model, {full: found[key] for key, full in named.items()}, adapter_name=name)


def _is_base_weight(tensor: Tensor, base: dict[str, Tensor], key: str) -> bool:
    """Whether it is a weight under the adapters (an embedding with new tokens, say), the same as the model has."""
    own = next((value for name, value in base.items() if name.removeprefix("base_model.model.") == key), None)
    return own is not None and own.shape == tensor.shape and torch.equal(own.cpu(), tensor.to(own.dtype).cpu())


def _refuse_other_settings(own: Any, there: Any, folder: Path) -> None:
    """Settings change what the same weights compute: a scale is no weight."""
    ours, theirs = own.to_dict(), there.to_dict()
    for key in sorted((ours.keys() | theirs.keys()) - _HISTORY):
        if _plain(ours.get(key)) != _plain(theirs.get(key)):
            raise MismatchError(
                f"The adapters in {folder} are others than those of the model: {key} is {theirs.get(key)!r} there and "
                f"{ours.get(key)!r} here."
            )


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset, list, tuple)):
        return sorted(map(str, value))
    return value or None  # what is empty is not saved
