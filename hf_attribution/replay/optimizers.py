"""Optimiser steps and gradient clipping as functions with a known vector-Jacobian product.

A state is the flat parameters and the optimiser's moments, each `[P]`: `(θ,)` or `(θ, momentum)` for SGD,
`(θ, m, v)` for Adam. Cotangents are the derivatives of M measurements by such a state, each `[M, P]`. Parameters lie
in the order of the optimiser's groups, so that a group is a slice.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_attribution.errors import UnsupportedError

State = tuple[Tensor, ...]

OPTIMIZERS = {kind.__name__: kind for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)}

# What torch's optimisers call the moments in their state.
MOMENTS = {"SGD": ("momentum_buffer",), "Adam": ("exp_avg", "exp_avg_sq"), "AdamW": ("exp_avg", "exp_avg_sq")}

_MUST_BE_OFF = ("maximize", "amsgrad", "differentiable", "dampening", "capturable")
_CLIP_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_


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
    """An optimiser with a written vector-Jacobian product.

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

    def pull_back(
        self,
        step: int,
        rates: Sequence[float],
        before: State,
        after: State,
        gradient: Tensor,
        cotangents: list[Tensor],
    ) -> Tensor:
        """One step backward, without the gradient's own dependence on the parameters.

        Args:
            step: The number of the step, from 0.
            rates: The learning rate of each group.
            before: The state before the step.
            after: The state after it.
            gradient: The gradient before clipping, `[P]`.
            cotangents: By the state after the step; overwritten by those by the state before it.

        Returns:
            Cotangents by the gradient before clipping, `[M, P]`.
        """
        norm = gradient.norm() if self.max_norm > 0 else gradient.new_zeros(())
        clip = self.max_norm / (norm + _CLIP_EPSILON) if self.max_norm > 0 else torch.ones_like(norm)
        clips = bool(clip < 1)
        clipped = gradient * clip if clips else gradient
        found = torch.empty_like(cotangents[0])
        pull = _pull_back_sgd if self.name == "SGD" else _pull_back_adam
        for group, rate in zip(self.groups, rates, strict=True):
            part = group.where
            pull(
                {**group.settings, "rate": rate, "step": step + 1, "decoupled": self.name == "AdamW"},
                before[0][part],
                [moment[part] for moment in after[1:]],
                clipped[part],
                [each[:, part] for each in cotangents],
                found[:, part],
            )
        if clips:
            # The norm depends on the gradient, too: a correction of rank one.
            along = (found @ gradient) * (self.max_norm / (norm + _CLIP_EPSILON).square() / norm)
            found.mul_(clip).addmm_(along[:, None], gradient[None], alpha=-1)
        return found


def describe_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """What is needed to build an optimiser again, as JSON.

    Args:
        optimizer: The optimiser of the training.
        names: The name of every trainable parameter by its `id`.

    Returns:
        Its class and its groups: settings, and the names of their parameters.

    Raises:
        UnsupportedError: If its steps have no written vector-Jacobian product; the message names class or setting.
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


def _pull_back_sgd(
    group: Mapping[str, Any],
    parameters: Tensor,
    moments: Sequence[Tensor],
    gradient: Tensor,
    cotangents: Sequence[Tensor],
    found: Tensor,
) -> None:
    """`b' = μ b + g + λθ` and `θ' = θ - η b'` (with Nesterov's momentum `θ' = θ - η (g + λθ + μ b')`)."""
    rate, momentum, decay = group["rate"], group["momentum"], group["weight_decay"]
    by_parameters = cotangents[0]
    if not moments:
        torch.mul(by_parameters, -rate, out=found)
    else:
        by_momentum = cotangents[1]
        by_momentum.add_(by_parameters, alpha=-rate * (momentum if group["nesterov"] else 1))
        found.copy_(by_momentum)
        if group["nesterov"]:
            found.add_(by_parameters, alpha=-rate)
        by_momentum.mul_(momentum)
    if decay:
        by_parameters.add_(found, alpha=decay)


def _pull_back_adam(
    group: Mapping[str, Any],
    parameters: Tensor,
    moments: Sequence[Tensor],
    gradient: Tensor,
    cotangents: Sequence[Tensor],
    found: Tensor,
) -> None:
    """`m' = β₁m + (1-β₁)g`, `v' = β₂v + (1-β₂)g²`, `θ' = θ - η m̂' / (√v̂' + ε)`; weight decay by θ' or by g."""
    rate, decay, (beta1, beta2) = group["rate"], group["weight_decay"], group["betas"]
    correction1, correction2 = 1 - beta1 ** group["step"], 1 - beta2 ** group["step"]
    by_parameters, by_first, by_second = cotangents
    first, second = moments
    if decay and not group["decoupled"]:
        gradient = gradient + decay * parameters
    root = (second / correction2).sqrt()
    denominator = root + group["eps"]
    by_first.sub_(by_parameters * (rate / correction1 / denominator))
    # Where v is 0 no gradient has come yet, m is 0, too, and θ does not depend on v.
    ratio = torch.where(root > 0, first / root, 0)
    by_second.add_(by_parameters * (ratio * (rate / correction1 / (2 * correction2)) / denominator.square()))
    torch.mul(by_first, 1 - beta1, out=found)
    found.addcmul_(by_second, gradient.expand_as(found), value=2 * (1 - beta2))
    if decay and group["decoupled"]:
        by_parameters.mul_(1 - rate * decay)
    elif decay:
        by_parameters.add_(found, alpha=decay)
    by_first.mul_(beta1)
    by_second.mul_(beta2)
