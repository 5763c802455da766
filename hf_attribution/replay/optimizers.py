"""The optimisers whose steps have a written derivative.

A state is the flat parameters and the optimiser's moments, each `[P]`: `(θ,)` or `(θ, momentum)` for SGD,
`(θ, m, v)` for Adam. Parameters lie in the order of the optimiser's groups, so that a group is a slice.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_attribution.errors import UnsupportedError
from hf_attribution.replay.jacobians import Clipping, StepDerivative, adam_jacobian, sgd_jacobian

State = tuple[Tensor, ...]

OPTIMIZERS = {kind.__name__: kind for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)}

# What torch's optimisers call the moments in their state.
MOMENTS = {"SGD": ("momentum_buffer",), "Adam": ("exp_avg", "exp_avg_sq"), "AdamW": ("exp_avg", "exp_avg_sq")}

_MUST_BE_OFF = ("maximize", "amsgrad", "differentiable", "dampening", "capturable")


@dataclasses.dataclass(frozen=True)
class Group:
    """A parameter group.

    Args:
        where: Its slice of the flat parameters.
        settings: Its settings, without parameters and learning rate.
    """

    where: slice
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimiser whose steps can be differentiated.

    Args:
        name: `"SGD"`, `"Adam"` or `"AdamW"`.
        groups: Its parameter groups.
        max_norm: The norm that gradients are clipped to; 0 for none.
    """

    name: str
    groups: tuple[Group, ...]
    max_norm: float

    @property
    def moments(self) -> tuple[str, ...]:
        """The moments that it keeps, as torch calls them."""
        groups = [{"settings": group.settings} for group in self.groups]
        return moments_of({"class": self.name, "groups": groups})

    def derivative(
        self, step: int, rates: Sequence[float], before: State, after: State, gradient: Tensor
    ) -> StepDerivative:
        """The derivative of one step, without the gradient's own dependence on the parameters.

        Args:
            step: The number of the step, from 0.
            rates: The learning rate of each group.
            before: The state before the step.
            after: The state after it.
            gradient: The gradient before clipping, `[P]`.

        Returns:
            The derivative.
        """
        clipping = Clipping.of(gradient, self.max_norm)
        clipped, groups = clipping.clipped, []
        for group, rate in zip(self.groups, rates, strict=True):
            part = group.where
            if self.name == "SGD":
                jacobian = sgd_jacobian(group.settings, rate, has_momentum=len(before) > 1)
            else:
                moments = [moment[part] for moment in after[1:]]
                decoupled = self.name == "AdamW"
                jacobian = adam_jacobian(
                    group.settings, rate, step + 1, decoupled, before[0][part], moments, clipped[part]
                )
            groups.append((part, jacobian))
        return StepDerivative(groups, clipping)


def describe_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """What is needed to build an optimiser again, as JSON.

    Args:
        optimizer: The optimiser of the training.
        names: The name of every trainable parameter by its `id`.

    Returns:
        Its class and its groups: settings, and the names of their parameters.

    Raises:
        UnsupportedError: If its steps have no written derivative; the message names class or setting.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    kind = type(optimizer).__name__
    if OPTIMIZERS.get(kind) is not type(optimizer):
        raise UnsupportedError(
            f"Steps of the optimiser {kind} cannot be differentiated: train with optim='sgd', 'adamw_torch' or "
            "'adamw_torch_fused' (torch's SGD, Adam and AdamW)."
        )
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        settings = group_settings(group)
        wrong = next((name for name in _MUST_BE_OFF if settings.get(name)), None)
        if wrong is not None:
            raise UnsupportedError(f"{kind} with {wrong}={settings[wrong]} cannot be differentiated: leave it off.")
        unknown = [tuple(p.shape) for p in group["params"] if id(p) not in names]
        if unknown:
            raise UnsupportedError(
                f"{kind} holds a parameter of shape {unknown[0]} that is none of the model's trainable ones: give it "
                "the model's own."
            )
        groups.append({"settings": settings, "parameters": [names[id(p)] for p in group["params"]]})
    if kind == "SGD" and len({bool(group["settings"]["momentum"]) for group in groups}) > 1:
        raise UnsupportedError("SGD with momentum in some parameter groups only: give all of them momentum, or none.")
    return {"class": kind, "groups": groups}


def moments_of(described: Mapping[str, Any]) -> tuple[str, ...]:
    """The moments that a described optimiser keeps, as torch calls them."""
    if described["class"] == "SGD" and not any(group["settings"]["momentum"] for group in described["groups"]):
        return ()
    return MOMENTS[described["class"]]


def group_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one of torch's parameter groups, without parameters and learning rate."""
    left_out = ("params", "param_names", "lr", "initial_lr")
    settings = {name: value for name, value in group.items() if name not in left_out}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
