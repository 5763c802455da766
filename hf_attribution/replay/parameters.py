"""A model's trainable parameters and an optimiser's moments as flat vectors, and checksums of them."""

from collections.abc import Collection, Sequence

import torch
import xxhash
from torch import Tensor, nn

from hf_attribution.errors import UnsupportedError


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name.

    Args:
        model: The model.

    Returns:
        The parameters.

    Raises:
        UnsupportedError: If they are not all float32 or all float64.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kinds = {p.dtype for p in parameters.values()}
    if len(kinds) != 1 or not kinds <= {torch.float32, torch.float64}:
        names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds)) or "none at all"
        raise UnsupportedError(
            "A training can be differentiated if all trainable parameters are float32, or all float64; these are "
            f"{names}: load the model with dtype=torch.float32."
        )
    return parameters


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors as one new vector."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def put_flat(model: nn.Module, names: Sequence[str], values: Tensor) -> None:
    """Copy flat parameters `[P]` into a model's parameters of these names, one after the other."""
    named = dict(model.named_parameters())
    sizes = [named[name].numel() for name in names]
    with torch.no_grad():
        for name, part in zip(names, values.split(sizes), strict=True):
            named[name].copy_(part.view_as(named[name]))


def flat_moments(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], names: Sequence[str]
) -> list[Tensor]:
    """An optimiser's moments as vectors; zeros where it has none yet."""
    state = getattr(optimizer, "optimizer", optimizer).state  # under accelerate's wrapper
    found = []
    for name in names:
        moments = [state.get(parameter, {}).get(name) for parameter in parameters]
        pairs = zip(moments, parameters, strict=True)
        found.append(flat([torch.zeros_like(p) if moment is None else moment for moment, p in pairs]))
    return found


def checksum(parameters: Sequence[Tensor]) -> int:
    """A checksum of tensors' bits, taken on their device: 63 bits."""
    parts = [part.detach() for part in parameters]
    if parts[0].device.type != "cpu":
        parts = [torch.stack([torch.hash_tensor(part).view(torch.int64) for part in parts]).cpu()]
    found = xxhash.xxh3_64()
    for part in parts:
        found.update(part.contiguous().numpy().data)
    return found.intdigest() >> 1


def frozen_checksum(model: nn.Module, trained: Collection[str]) -> int:
    """A checksum of what training leaves alone: frozen parameters, and buffers."""
    state = model.state_dict(keep_vars=True)
    kept = [tensor for name, tensor in sorted(state.items()) if name not in trained and not tensor.requires_grad]
    return checksum([tensor.to("cpu", torch.float64) for tensor in kept]) if kept else 0
