"""Weights of a checkpoint folder, whole or of adapters, loaded into a model."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from hf_attribution.adapters import adapter_parameters, holds_adapters, load_adapters
from hf_attribution.copies import own_copy
from hf_attribution.errors import MismatchError


def load_weights(model: nn.Module, folder: Path) -> nn.Module:
    """Load the weights of a checkpoint folder into a model.

    Some families are saved under other names than they compute with (ViT, Mixtral, ...): those go through
    `from_pretrained`, and so through a second copy of the model.

    Args:
        model: A model of the same architecture; it is changed.
        folder: A folder with `model.safetensors`, its shards, or adapters, as `save_pretrained` and the Trainer write.

    Returns:
        The model.

    Raises:
        FileNotFoundError: If there are no weights in the folder, or not all of them.
        MismatchError: If they are of another architecture; the message names the first difference.
        UnsupportedError: If the folder holds adapters, and the model trains weights outside of them.
    """
    if holds_adapters(folder):
        load_adapters(model, folder)
        return model
    state = _read(folder)
    difference = _difference(model, state)
    if isinstance(model, PreTrainedModel) and (difference or get_model_conversion_mapping(model, add_legacy=False)):
        state, difference = _converted(model, folder)
    if difference:
        raise MismatchError(
            f"The checkpoint {folder} is of another architecture than {type(model).__name__}: {difference}."
        )
    model.load_state_dict(state, strict=False)
    return model


def copy_to_load_into(model: nn.Module, folders: Sequence[Path]) -> nn.Module:
    """A copy of a model for the weights of checkpoint folders, which leave the model as it is.

    Args:
        model: The model.
        folders: The folders. Where all of them hold adapters, the copy shares the weights under these.

    Returns:
        The copy.
    """
    if not all(map(holds_adapters, folders)):
        return own_copy(model)
    changed = adapter_parameters(model)
    return own_copy(model, shared=[p for name, p in model.named_parameters() if name not in changed])


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No warnings and progress bars of transformers for a while."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _read(folder: Path) -> dict[str, Tensor]:
    """The weights under the names of their files."""
    names = [SAFE_WEIGHTS_NAME]
    if not (folder / SAFE_WEIGHTS_NAME).exists():
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        if not index.exists():
            raise FileNotFoundError(f"No {SAFE_WEIGHTS_NAME} in {folder}: give a folder that save_pretrained wrote.")
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    state: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} lacks {name}, a part of its weights: copy or save it again, whole.")
        state.update(load_file(folder / name))
    return state


def _difference(model: nn.Module, state: dict[str, Tensor]) -> str | None:
    """The first weight that a model has and a checkpoint has not, or the other way round, in words."""
    own = model.state_dict()
    # Tied weights are saved once, under one of their names.
    by_pointer: dict[int, list[str]] = {}
    for name, tensor in own.items():
        by_pointer.setdefault(tensor.data_ptr(), []).append(name)
    absent = {n for names in by_pointer.values() if not any(name in state for name in names) for n in names}
    different = [n for n, tensor in state.items() if n not in own or own[n].shape != tensor.shape]
    for name in [*different, *sorted(absent)]:
        there = tuple(state[name].shape) if name in state else "absent"
        here = tuple(own[name].shape) if name in own else "absent"
        return f"{name} is {there} there and {here} in the model"
    return None


def _converted(model: PreTrainedModel, folder: Path) -> tuple[dict[str, Tensor], str | None]:
    """The weights under the names of the model, as transformers converts them, and the first difference."""
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        found: Any = type(model).from_pretrained(
            folder,
            config=model.config,
            dtype=model.dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    loaded, report = found
    for name, there, here in sorted(report["mismatched_keys"]):
        return {}, f"{name} is {tuple(there)} there and {tuple(here)} in the model"
    for kind, where in (("unexpected_keys", "in the model"), ("missing_keys", "there")):
        for name in sorted(report[kind]):
            return {}, f"{name} is absent {where}"
    return loaded.state_dict(), _difference(model, loaded.state_dict())
