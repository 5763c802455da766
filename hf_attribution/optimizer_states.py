"""What the Trainer saved of its optimiser beside a checkpoint: the momentum of SGD, the second moments of Adam."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_attribution.errors import MismatchError, UnsupportedError


@dataclasses.dataclass(frozen=True)
class OptimizerState:
    """An optimiser at a checkpoint, as far as it says what a gradient does.

    Args:
        kind: `"sgd"` or `"adam"` (AdamW too).
        momentum: Of SGD; 0 for Adam, whose first moment is a mean and not a sum.
        scales: For Adam, what it multiplies the entries of the mean gradient of each parameter with,
            `1 / (sqrt(v̂) + eps)`.
    """

    kind: str
    momentum: float
    scales: dict[str, Tensor]


def read_optimizer_state(folder: Path, model: nn.Module) -> OptimizerState:
    """Read the `optimizer.pt` of a Trainer's checkpoint.

    Args:
        folder: The checkpoint's folder.
        model: The model that was trained, with the same parameters trainable as then.

    Returns:
        The state.

    Raises:
        FileNotFoundError: If the checkpoint was saved without its optimiser.
        UnsupportedError: If the optimiser is neither SGD nor Adam.
        MismatchError: If it is of other parameters than those of the model that are trainable.
    """
    path = folder / "optimizer.pt"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} has no optimizer.pt, so its optimiser is not known: train with save_only_model=False."
        )
    saved = torch.load(path, map_location="cpu", weights_only=True)
    groups, states = saved["param_groups"], saved["state"]
    if all({"momentum", "nesterov"} <= group.keys() for group in groups):
        return OptimizerState("sgd", float(groups[0]["momentum"]), {})
    adam = all({"betas", "eps"} <= group.keys() for group in groups)
    if not adam or not all("exp_avg_sq" in state for state in states.values()):
        raise UnsupportedError(f"{path} is of an optimiser that is neither SGD nor Adam or AdamW.")
    scales: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters())
    for group, names in zip(groups, _names(model, groups, path), strict=True):
        for index, name in zip(group["params"], names, strict=True):
            scales[name] = _scale(states.get(index), group, parameters[name], f"{path}: {name}")
    return OptimizerState("adam", 0.0, scales)


def _scale(state: Mapping[str, Any] | None, group: Mapping[str, Any], parameter: Tensor, what: str) -> Tensor:
    dtype = torch.promote_types(torch.float32, parameter.dtype)
    if state is None:  # it never had a gradient
        return torch.full(parameter.shape, 1 / group["eps"], dtype=dtype, device=parameter.device)
    moments = state.get("max_exp_avg_sq", state["exp_avg_sq"])
    if moments.shape != parameter.shape:
        raise MismatchError(
            f"{what} has second moments {tuple(moments.shape)} for a parameter {tuple(parameter.shape)}: the "
            "optimiser's parameters are not in the Trainer's order, or not those that are trainable now."
        )
    corrected = moments.double() / (1 - group["betas"][1] ** float(state["step"]))
    return (1 / (corrected.sqrt() + group["eps"])).to(parameter.device, dtype)


def _names(model: nn.Module, groups: Sequence[Mapping[str, Any]], path: Path) -> list[list[str]]:
    """The parameters of each group: in the Trainer's order, those with weight decay first; or all in one group."""
    from transformers import Trainer

    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = set(Trainer.get_decay_parameter_names(cast(Trainer, None), model))  # asks nothing of the trainer
    expected = [[name for name in trained if (name in decayed) is with_decay] for with_decay in (True, False)]
    expected = [trained] if len(groups) == 1 else expected
    counts = [len(group["params"]) for group in groups]
    if counts != [len(names) for names in expected]:
        raise MismatchError(
            f"{path} is of groups of {', '.join(map(str, counts))} parameters, and the model's trainable ones make "
            f"groups of {', '.join(str(len(names)) for names in expected)}: it must be of the Trainer's own "
            "optimiser, with the same parameters trainable."
        )
    return expected
