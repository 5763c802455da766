"""The derivative of an optimiser step, for changes carried forward and for cotangents carried backward.

A step takes a state (the flat parameters and the optimiser's moments, each `[P]`) and a gradient to the next state.
All of it is elementwise but clipping, whose derivative is symmetric. So what is written here once, for each group of
parameters, is a small matrix of coefficients: a row for each part of the state after the step, a column for each part
of the state before it and a last one for the gradient. Each coefficient is one number for all parameters, or `[P]`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Coefficient = float | Tensor
Jacobian = Sequence[Sequence[Coefficient]]

_CLIP_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_


@dataclasses.dataclass(frozen=True)
class Clipping:
    """Multiplication of a gradient with `c = max_norm / (norm + ε)`, where that is below 1.

    Args:
        gradient: The gradient before clipping, `[P]`.
        factor: c, or 1.
        correction: What the norm's own dependence on the gradient subtracts, per product with it.
    """

    gradient: Tensor
    factor: float
    correction: float

    @classmethod
    def of(cls, gradient: Tensor, max_norm: float) -> "Clipping":
        """What clipping to a norm does to a gradient; 0 is for none."""
        norm = float(gradient.norm()) if max_norm > 0 else 0.0
        if max_norm <= 0 or max_norm / (norm + _CLIP_EPSILON) >= 1:
            return cls(gradient, 1.0, 0.0)
        return cls(gradient, max_norm / (norm + _CLIP_EPSILON), max_norm / (norm + _CLIP_EPSILON) ** 2 / norm)

    @property
    def clipped(self) -> Tensor:
        """The gradient after clipping, `[P]`."""
        return self.gradient * self.factor

    def apply(self, vectors: Tensor) -> Tensor:
        """The derivative, which is symmetric, times vectors `[M, P]`; these may be overwritten."""
        if self.factor == 1:
            return vectors
        along = (vectors @ self.gradient) * self.correction
        return vectors.mul_(self.factor).addmm_(along[:, None], self.gradient[None], alpha=-1)


@dataclasses.dataclass(frozen=True)
class StepDerivative:
    """The derivative of one step of an optimiser.

    Args:
        groups: The parameters of each group, and their coefficients.
        clipping: What happens to the gradient first.
    """

    groups: Sequence[tuple[slice, Jacobian]]
    clipping: Clipping

    def push_forward(self, tangents: list[Tensor], of_gradient: Tensor) -> None:
        """Carry changes from before the step to after it.

        Args:
            tangents: Changes of each part of the state before the step, `[M, P]`; overwritten by those after it.
            of_gradient: Changes of the gradient before clipping, `[M, P]`; overwritten.
        """
        inputs = [*tangents, self.clipping.apply(of_gradient)]
        for where, jacobian in self.groups:
            found = _combined(jacobian, [each[:, where] for each in inputs])
            for tangent, part in zip(tangents, found, strict=True):
                tangent[:, where] = part

    def pull_back(self, cotangents: list[Tensor]) -> Tensor:
        """Carry cotangents from after the step to before it, but for the gradient's dependence on the parameters.

        Args:
            cotangents: By each part of the state after the step, `[M, P]`; overwritten by those by the state before.

        Returns:
            Cotangents by the gradient before clipping, `[M, P]`.
        """
        by_gradient = torch.empty_like(cotangents[0])
        for where, jacobian in self.groups:
            found = _combined(list(zip(*jacobian, strict=True)), [each[:, where] for each in cotangents])
            for cotangent, part in zip([*cotangents, by_gradient], found, strict=True):
                cotangent[:, where] = part
        return self.clipping.apply(by_gradient)


def sgd_jacobian(settings: Mapping[str, Any], rate: float, has_momentum: bool) -> Jacobian:
    """`b' = μ b + g + λθ` and `θ' = θ - η b'`; with Nesterov's momentum `θ' = θ - η (g + λθ + μ b')`.

    Args:
        settings: Those of the group.
        rate: η.
        has_momentum: Whether there is a b.

    Returns:
        Coefficients: rows θ' and b', columns θ, b and g.
    """
    momentum, decay = float(settings["momentum"]), float(settings["weight_decay"])
    if not has_momentum:
        return _with_decay([[1.0, -rate]], decay)
    by_moment, by_gradient = (momentum**2, 1 + momentum) if settings["nesterov"] else (momentum, 1.0)
    return _with_decay([[1.0, -rate * by_moment, -rate * by_gradient], [0.0, momentum, 1.0]], decay)


def adam_jacobian(
    settings: Mapping[str, Any],
    rate: float,
    step: int,
    decoupled: bool,
    parameters: Tensor,
    moments: Sequence[Tensor],
    gradient: Tensor,
) -> Jacobian:
    """`m' = β₁m + (1-β₁)g`, `v' = β₂v + (1-β₂)g²`, `θ' = θ - η m̂' / (√v̂' + ε)`; weight decay by θ' or by g.

    Args:
        settings: Those of the group.
        rate: η.
        step: The number of the step, from 1.
        decoupled: Whether weight decay is AdamW's.
        parameters: θ, `[P]`.
        moments: m' and v', each `[P]`.
        gradient: g after clipping, `[P]`.

    Returns:
        Coefficients: rows θ', m' and v', columns θ, m, v and g.
    """
    decay, (beta1, beta2), (first, second) = float(settings["weight_decay"]), settings["betas"], moments
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    if decay and not decoupled:
        gradient = gradient + decay * parameters
    root = (second / correction2).sqrt()
    denominator = root + settings["eps"]
    by_first = -(rate / correction1) / denominator
    # Where v' is 0 no gradient has come yet, m' is 0, too, and θ' does not depend on v'.
    ratio = torch.where(root > 0, first / root, 0)
    by_second = ratio * (rate / correction1 / (2 * correction2)) / denominator.square()
    curved = 2 * (1 - beta2) * gradient
    kept = 1 - rate * decay if decoupled else 1.0
    rows = [
        [kept, by_first * beta1, by_second * beta2, by_first * (1 - beta1) + by_second * curved],
        [0.0, beta1, 0.0, 1 - beta1],
        [0.0, 0.0, beta2, curved],
    ]
    return rows if decoupled else _with_decay(rows, decay)


def _with_decay(rows: Sequence[Sequence[Coefficient]], decay: float) -> Jacobian:
    """Coefficients of a step whose gradient is `g + λθ`."""
    return [[row[0] + decay * row[-1], *row[1:]] for row in rows] if decay else rows


def _combined(rows: Jacobian, vectors: Sequence[Tensor]) -> list[Tensor]:
    """Each row's coefficients times the vectors, added up: `[M, P]` for each row."""
    found = []
    for row in rows:
        total = torch.zeros_like(vectors[0])
        for coefficient, vector in zip(row, vectors, strict=True):
            if isinstance(coefficient, Tensor):
                total.addcmul_(vector, coefficient)
            elif coefficient:
                total.add_(vector, alpha=coefficient)
        found.append(total)
    return found
