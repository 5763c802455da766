"""How each kind of module turns its input and its output's gradient into per-example gradients of its parameters.

A rule is a function `(call) -> {parameter name: term}`, called without autograd. It applies to modules whose
`forward` is exactly the one it was written for, so a subclass that computes something else never gets it. Modules
without a rule are differentiated on their own, example by example, with `torch.func`. Every rule is checked on the
user's model before it is used (see `hf_attribution.gradients.per_example`).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

from hf_attribution.errors import UnsupportedError
from hf_attribution.gradients.terms import Dense, Lookup, Outer, Term


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a module in a forward pass, and the gradients that came back to its outputs.

    Args:
        batch: Number of examples, B.
        length: Positions per example in the model's inputs, for modules that see `[B * length, ...]`.
        module: The module.
        args: Its positional arguments, as they were given.
        kwargs: Its keyword arguments.
        output_gradients: The gradient of each output tensor, `None` where none came back.
        parameters: Names of the module's own parameters that are asked for.
        shared: Which of the tensors among its arguments have no row per example, as a batch of two has shown. In a
            batch of as many examples as positions their lengths do not tell.
        flat: Which of them have a row for each position of each example, likewise.
    """

    batch: int
    length: int
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output_gradients: Sequence[Tensor | None]
    parameters: Sequence[str]
    shared: Set[int] = frozenset()
    flat: Set[int] = frozenset()

    @property
    def input(self) -> Tensor:
        """The module's first argument, however it was passed."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))

    @property
    def output_gradient(self) -> Tensor:
        """The gradient of the module's first output."""
        gradient = self.output_gradients[0]
        assert gradient is not None
        return gradient

    def positions(self, values: Tensor) -> Tensor:
        """Values `[B, ..., n]` or `[B * T, ..., n]` as `[B, T, n]`, in full precision.

        Args:
            values: The module's input or its output's gradient.

        Returns:
            `[B, T, n]`, with T = 1 where there are no positions.

        Raises:
            UnsupportedError: If rows do not belong to examples in order: tokens routed to an expert, say.
        """
        flattened = values.ndim == 2 and len(values) != self.batch
        if len(values) % self.batch or (flattened and len(values) != self.batch * self.length):
            raise UnsupportedError(
                f"{type(self.module).__name__} saw {len(values)} rows for {self.batch} examples: whose rows are they?"
            )
        return _full(values).reshape(self.batch, -1, values.shape[-1])


Rule = Callable[[Call], dict[str, Term]]


def linear(call: Call) -> dict[str, Term]:
    """`nn.Linear`: the weight's rows are outputs."""
    left, right = call.positions(call.output_gradient), call.positions(call.input)
    return {"weight": Outer(left, right), "bias": Dense(left.sum(1))}


def conv1d(call: Call) -> dict[str, Term]:
    """The `Conv1D` of transformers, a linear layer with its weight transposed."""
    left, right = call.positions(call.input), call.positions(call.output_gradient)
    return {"weight": Outer(left, right), "bias": Dense(right.sum(1))}


def conv2d(call: Call) -> dict[str, Term]:
    """`nn.Conv2d`, as a linear layer over patches (Grosse & Martens 2016)."""
    module = call.module
    assert isinstance(module, nn.Conv2d)
    gradient = _full(call.output_gradient).flatten(2)
    patches = _patches(module, _full(call.input))
    terms: dict[str, Term] = {"bias": Dense(gradient.sum(2))}
    if module.groups == 1:
        terms["weight"] = Outer(gradient.transpose(1, 2), patches.transpose(1, 2))
    else:
        gradient, patches = gradient.unflatten(1, (module.groups, -1)), patches.unflatten(1, (module.groups, -1))
        weight = torch.einsum("bgol,bgpl->bgop", gradient, patches)
        terms["weight"] = Dense(weight.reshape(len(weight), *module.weight.shape))
    return terms


def embedding(call: Call) -> dict[str, Term]:
    """`nn.Embedding`: the output's gradient, at the rows that were looked up."""
    module = call.module
    assert isinstance(module, nn.Embedding)
    ids, gradient = call.input.reshape(call.batch, -1), call.positions(call.output_gradient)
    if module.padding_idx is not None:
        gradient = gradient.masked_fill((ids == module.padding_idx)[..., None], 0.0)
    return {"weight": Lookup(ids, gradient, module.num_embeddings)}


def scaled_embedding(call: Call) -> dict[str, Term]:
    """Subclasses of `nn.Embedding` that multiply what they look up by a constant."""
    term = embedding(call)["weight"]
    assert isinstance(term, Lookup)
    looked_up = F.embedding(call.input, call.module.weight)  # type: ignore[arg-type]
    scaled = call.module(*call.args, **call.kwargs)
    scale = (_full(scaled) * _full(looked_up)).sum() / _full(looked_up).square().sum()
    return {"weight": Lookup(term.ids, term.right * scale, term.rows)}


def affine(call: Call) -> dict[str, Term]:
    """Norms of any kind: the output is the normalised input times a weight, plus a bias, per channel.

    Where torch has no function for it, the normalised input is taken from the module itself, as what a weight of one
    adds to its output: right whatever the epsilon or the way of writing the weight (`weight` or `1 + weight`).

    Args:
        call: The call of the norm.

    Returns:
        The terms of `weight` and `bias`.
    """
    module, gradient = call.module, _full(call.output_gradient)
    shape = module.get_parameter("weight").shape
    if type(module).forward is nn.LayerNorm.forward:
        normalised = F.layer_norm(_full(call.input), shape, eps=module.eps)  # type: ignore[arg-type]
    elif type(module).forward is nn.GroupNorm.forward:
        normalised = F.group_norm(_full(call.input), module.num_groups, eps=module.eps)  # type: ignore[arg-type]
    else:
        zeros = {name: torch.zeros_like(p) for name, p in module.named_parameters(recurse=False)}
        ones = {**zeros, "weight": torch.ones_like(zeros["weight"])}
        normalised = _full(functional_call(module, ones, call.args, dict(call.kwargs)))
        normalised = normalised - _full(functional_call(module, zeros, call.args, dict(call.kwargs)))
    return {
        name: Dense(_per_channel(values, call, shape))
        for name, values in (("weight", normalised * gradient), ("bias", gradient))
    }


def by_example(call: Call) -> dict[str, Term]:
    """Any module: its own vector-Jacobian product, vmapped over the examples of the batch.

    Args:
        call: The call of the module, with a batch dimension in front of its outputs.

    Returns:
        The terms of the module's own parameters.

    Raises:
        UnsupportedError: If an output has no row per example.
    """
    module, batch = call.module, call.batch
    parameters = {name: module.get_parameter(name).detach() for name in call.parameters}
    leaves, spec = pytree.tree_flatten((call.args, dict(call.kwargs)))
    shared = call.shared | shared_arguments(call)
    in_batch = [isinstance(leaf, Tensor) and number not in shared for number, leaf in enumerate(leaves)]
    gradients = [gradient for gradient in call.output_gradients if gradient is not None]
    wanted = [gradient is not None for gradient in call.output_gradients]
    if any(len(gradient) != batch for gradient in gradients):
        raise UnsupportedError(f"{type(module).__name__} has outputs without a row per example.")

    def example(batched: list[Tensor], cotangents: list[Tensor]) -> dict[str, Tensor]:
        given = iter(batched)
        mine = [next(given)[None] if is_in else leaf for leaf, is_in in zip(leaves, in_batch, strict=True)]

        def outputs(parameters: dict[str, Tensor]) -> list[Tensor]:
            args, kwargs = pytree.tree_unflatten(mine, spec)
            tensors = output_tensors(functional_call(module, parameters, args, kwargs))
            return [tensor for tensor, want in zip(tensors, wanted, strict=True) if want]

        return vjp(outputs, parameters)[1]([cotangent[None] for cotangent in cotangents])[0]

    batched = [leaf for leaf, is_in in zip(leaves, in_batch, strict=True) if is_in]
    values = vmap(example)(batched, gradients)
    return {name: Dense(_full(value)) for name, value in values.items()}


def apart(call: Call) -> dict[str, Term]:
    """Modules that choose what to do by what they see (experts, their router): on their own, an example at a time.

    They see all positions of all examples side by side, as `[B * T, ...]`, or as `[B, T, ...]`.

    Args:
        call: The call of the module, whose outputs have the rows of the examples, in their order.

    Returns:
        The terms of the module's own parameters.

    Raises:
        UnsupportedError: If the rows are not those of the examples in order: tokens routed to one expert, say.
    """
    module, batch, length = call.module, call.batch, call.length
    gradients = [gradient for gradient in call.output_gradients if gradient is not None]
    wanted = [gradient is not None for gradient in call.output_gradients]
    kinds = {(gradient.ndim > 2, len(gradient)) for gradient in gradients}
    if not (kinds <= {(True, batch)} or kinds <= {(False, batch * length)}) or length == 1:
        raise UnsupportedError(f"{type(module).__name__} has outputs without the rows of all examples.")
    parameters = {name: module.get_parameter(name).detach().requires_grad_() for name in call.parameters}
    leaves, spec = pytree.tree_flatten((call.args, dict(call.kwargs)))

    def rows(number: int, leaf: Any, example: int) -> Any:
        if number in call.flat:
            return leaf[example * length : (example + 1) * length]
        return leaf if not isinstance(leaf, Tensor) or number in call.shared else leaf[example : example + 1]

    found = []
    for example in range(batch):
        args, kwargs = pytree.tree_unflatten([rows(n, leaf, example) for n, leaf in enumerate(leaves)], spec)
        with torch.enable_grad():
            tensors = output_tensors(functional_call(module, parameters, args, kwargs))
        outputs = [tensor for tensor, want in zip(tensors, wanted, strict=True) if want]
        own = [gradient.chunk(batch)[example] for gradient in gradients]
        for number in reversed(range(len(outputs) - 1)):
            # What came back to a router's logits came back through its weights, too, and is counted there.
            later = torch.autograd.grad(
                outputs[number + 1 :], outputs[number], own[number + 1 :], retain_graph=True, materialize_grads=True
            )
            own[number] = own[number] - later[0]
        found.append(torch.autograd.grad(outputs, list(parameters.values()), own, materialize_grads=True))
    stacked = [torch.stack(column) for column in zip(*found, strict=True)]
    return {name: Dense(_full(value)) for name, value in zip(parameters, stacked, strict=True)}


def flat_arguments(call: Call) -> set[int]:
    """Which of a call's arguments are tensors with a row for each position of each example."""
    leaves = enumerate(pytree.tree_leaves((call.args, dict(call.kwargs))))
    rows = (call.batch * call.length,)
    return {n for n, leaf in leaves if isinstance(leaf, Tensor) and call.length > 1 and leaf.shape[:1] == rows}


def shared_arguments(call: Call) -> set[int]:
    """Which of a call's arguments (counted with those inside of others) are tensors without a row per example."""
    leaves = enumerate(pytree.tree_leaves((call.args, dict(call.kwargs))))
    return {number for number, leaf in leaves if isinstance(leaf, Tensor) and leaf.shape[:1] != (call.batch,)}


def rule_for(module: nn.Module) -> Rule:
    """The rule for a module: its type's own, or example by example."""
    for kind, rule in _EXACT.items():
        # A subclass with a forward of its own computes something else.
        if isinstance(module, kind) and type(module).forward is kind.forward and _regular(module):
            return rule
    if isinstance(module, nn.Embedding) and _regular(module):
        return scaled_embedding
    return affine if _is_norm(module) else by_example


def output_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in what a module returned, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


_EXACT: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    Conv1D: conv1d,
    nn.Conv2d: conv2d,
    nn.Embedding: embedding,
}

_CHANNELS_SECOND = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def _regular(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if isinstance(module, nn.Embedding):
        return module.max_norm is None and not module.scale_grad_by_freq
    return True


def _is_norm(module: nn.Module) -> bool:
    own = {name for name, _ in module.named_parameters(recurse=False)}
    named = isinstance(module, (nn.LayerNorm, *_CHANNELS_SECOND)) or "Norm" in type(module).__name__
    return named and "weight" in own and own <= {"weight", "bias"}


def _full(values: Tensor) -> Tensor:
    """Half precision widened: sums over positions would lose digits in it."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _patches(module: nn.Conv2d, inputs: Tensor) -> Tensor:
    """The patches a convolution sees: `[B, channels * kernel, positions]`."""
    assert not isinstance(module.padding, str)
    return F.unfold(inputs, module.kernel_size, module.dilation, module.padding, module.stride)


def _per_channel(values: Tensor, call: Call, shape: torch.Size) -> Tensor:
    """Values summed over all but examples and the dimensions of the norm's weight."""
    if isinstance(call.module, _CHANNELS_SECOND):
        return values.flatten(2).sum(2) if values.ndim > 2 else values
    return call.positions(values.flatten(values.ndim - len(shape))).sum(1).unflatten(1, shape)
