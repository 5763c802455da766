"""Products of a batch loss' Hessian with many vectors at once, and every example's part in them.

For the loss `L = Σ_i c_i l_i(θ)` of a batch and vectors u these are `∇²L u`, and the tangents `u·∇l_i`. Both come from
one forward-mode derivative of the gradient (forward-over-reverse), under vmap over vectors, which shares the gradient
itself. The other order, reverse-over-forward, is silently wrong through `layer_norm` and `batch_norm` in torch 2.13.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.activations import NewGELUActivation

from hf_attribution.copies import own_copy
from hf_attribution.replay.attention import use_exact_attention
from hf_attribution.seeds import RandomState
from hf_attribution.tasks import Batch, Task

# `(θ [P], batch, c [B], vectors [M, P])` to products `[M, P]` and tangents `[M, B]`.
Product = Callable[[Tensor, Batch, Tensor, Tensor], tuple[Tensor, Tensor]]


class _Outputs(nn.Module):
    """A function `(model, batch)` as a module, for `functional_call`."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Batch], Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch: Batch) -> Any:
        return self.function(self.model, batch)


def _fuse_gelu(model: nn.Module) -> None:
    """Let GPT-2's GELU be torch's own, the same function: written out, its second derivatives take many operations."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


class FlatModel:
    """A task's losses as functions of a flat vector of parameters.

    Args:
        model: The model; it is left alone, and its parameters that are not named are used as they are.
        task: What is learned.
        names: The parameters that the vector holds, in order.
    """

    def __init__(self, model: nn.Module, task: Task, names: Sequence[str]) -> None:
        # A copy, for its attention is another; the tensors are the same ones.
        self.model, self.task = own_copy(model, (*model.parameters(), *model.buffers())), task
        use_exact_attention(self.model)
        _fuse_gelu(self.model)
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False  # type: ignore[assignment]
        parameters = dict(model.named_parameters())
        self.names, self.shapes = list(names), [parameters[name].shape for name in names]
        self.sizes = [shape.numel() for shape in self.shapes]

    def __call__(self, function: Callable[[nn.Module, Batch], Any], parameters: Tensor, batch: Batch) -> Any:
        """A function of model and batch at other parameters `[P]`."""
        parts = zip(self.names, parameters.split(self.sizes), self.shapes, strict=True)
        named = {f"model.{name}": part.view(shape) for name, part, shape in parts}
        return functional_call(_Outputs(self.model, function), named, (batch,))

    def losses(self, parameters: Tensor, batch: Batch) -> Tensor:
        """The examples' losses `[B]`."""
        return self(self.task.losses, parameters, batch)

    def saved_bytes(self, parameters: Tensor, batch: Batch) -> int:
        """The memory of what one forward pass keeps for the backward pass."""
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        point = parameters.detach().requires_grad_()
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.losses(point, batch)
        return sum(kept.values())

    def gradients(self, parameters: Tensor, batch: Batch, coefficients: Tensor) -> Tensor:
        """Gradients `[M, P]` of weighted sums of the losses, coefficients `[M, B]`: a backward pass for each sum."""
        point, total = parameters.detach().requires_grad_(), parameters.new_zeros(len(coefficients), len(parameters))
        with torch.enable_grad():
            losses = self.losses(point, batch)
            for number in coefficients.any(1).nonzero()[:, 0].tolist():
                (total[number],) = torch.autograd.grad(losses, point, coefficients[number], retain_graph=True)
        return total

    def forward_over_reverse(
        self, parameters: Tensor, batch: Batch, weights: Tensor, vectors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Products by the forward-mode derivative of the gradient, all vectors at once."""
        if len(vectors) == 1:  # nothing is shared, and then a second backward pass is the faster way
            return self.double_backward(parameters, batch, weights, vectors)

        def weighted(point: Tensor) -> tuple[Tensor, Tensor]:
            losses = self.losses(point, batch)
            return (losses * weights).sum(), losses

        def one(vector: Tensor) -> tuple[Tensor, Tensor]:
            return jvp(grad(weighted, has_aux=True), (parameters,), (vector,))[1]

        return vmap(one, randomness="same")(vectors)

    def double_backward(
        self, parameters: Tensor, batch: Batch, weights: Tensor, vectors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Products by a second backward pass for every vector, through one graph."""
        point, factors = parameters.detach().requires_grad_(), weights.detach().requires_grad_()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss = (self.losses(point, batch) * factors).sum()
            (gradient,) = torch.autograd.grad(loss, point, create_graph=True)
            found = [
                torch.autograd.grad(gradient, (point, factors), vector, retain_graph=True, materialize_grads=True)
                for vector in vectors
            ]
        products, tangents = zip(*found, strict=True)
        return torch.stack(products), torch.stack(tangents)

    def gauss_newton(
        self, parameters: Tensor, batch: Batch, weights: Tensor, vectors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Products with the Gauss-Newton matrix `Σ_i c_i J_iᵀ J_i` in place of the Hessian."""
        outputs: list[Tensor] = []

        def rows(point: Tensor) -> Tensor:
            values, coefficients = self(self.task.curvature_rows, point, batch)
            outputs[:] = [coefficients]
            return values

        state = RandomState.now()
        _, backward = vjp(rows, parameters)[:2]
        state.restore()  # the same dropout in both passes
        coefficients = outputs[0].detach()

        def one(vector: Tensor) -> tuple[Tensor, Tensor]:
            _, tangents = jvp(rows, (parameters,), (vector,))[:2]
            (product,) = backward(weights[:, None] * tangents)
            # The rows add up to the gradient of what training raises, minus the loss.
            return product, -(coefficients * tangents).sum(1)

        return vmap(one, randomness="same")(vectors)


def in_chunks(product: Product, size: int) -> Product:
    """A product of any number of vectors, so many at a time."""

    def chunked(parameters: Tensor, batch: Batch, weights: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        state = RandomState.now()
        parts = []
        for chunk in vectors.split(size):
            state.restore()  # dropout's masks are those of the step, for all vectors
            parts.append(product(parameters, batch, weights, chunk))
        products, tangents = zip(*parts, strict=True)
        return torch.cat(products), torch.cat(tangents)

    return chunked
