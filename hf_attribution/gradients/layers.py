"""Layers of a model by what they are for."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_attribution.errors import UnsupportedError


def last_linear(model: nn.Module) -> str:
    """The name of the last linear layer with trainable parameters.

    Args:
        model: The model.

    Returns:
        Its name.

    Raises:
        UnsupportedError: If there is none.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    if not names:
        raise UnsupportedError(f"{type(model).__name__} has no trainable linear layer: name a layer, modules=[...].")
    return names[-1]
