"""Per-example gradients of losses or measurements, from hooks on one ordinary batched backward pass."""

import contextlib
import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.utils import logging

from hf_attribution.data import Batch
from hf_attribution.errors import NonFiniteError, UnsupportedError
from hf_attribution.gradients.rules import Call, Rule, by_example, output_tensors, rule_for
from hf_attribution.gradients.terms import Dense, Term, dense

logger = logging.get_logger(__name__)

Function = Callable[[nn.Module, Mapping[str, Any]], Tensor]


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Gradients of one value per example with respect to the chosen parameters.

    Args:
        indices: Positions of the examples in their dataset, `[B]`.
        values: The values that were differentiated, `[B]`.
        terms: For each parameter, terms whose sum is its gradient.
    """

    indices: Tensor
    values: Tensor
    terms: dict[str, list[Term]]


class PerExampleGradients:
    """Computes per-example gradients of a function `(model, inputs) -> [B]`, usually a task's.

    Forward hooks note the inputs of every module that owns chosen parameters; one backward pass brings the gradients
    of their outputs; a rule per module type makes per-example gradients of the two. At construction every rule is
    checked on a batch of two: the gradients of the two examples, weighted, must add up to the gradient that plain
    backward gives. Parameters for which no rule passes (weights shared over a batch, or used outside their module)
    are differentiated example by example, exactly but slowly; they are named in a warning.

    Nothing is left on the model. Its mode (`train` or `eval`) is not changed.

    Args:
        model: The model, in `eval()` mode.
        function: What is differentiated, `(model, inputs) -> Tensor [B]`, without mixing of examples.
        probe: A batch of two examples to check the rules on, on the model's device.
        modules: Patterns (`fnmatch`) of module or parameter names to keep; all trainable parameters by default.

    Raises:
        UnsupportedError: If batch normalisation is in training mode, or nothing is trainable.
        ValueError: If a pattern matches nothing.

    Example:
        >>> gradients = PerExampleGradients(model, task.losses, split.probe())  # doctest: +SKIP
        >>> for batch in split.batches():  # doctest: +SKIP
        ...     terms = gradients(batch).terms
    """

    def __init__(
        self, model: nn.Module, function: Function, probe: Batch, modules: Sequence[str] | None = None
    ) -> None:
        refuse_batch_statistics(model)
        self.model, self.function = model, function
        self.parameters = chosen_parameters(model, modules)
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        owned = {module: self._own(module) for module in model.modules()}
        self._own_names = {module: names for module, names in owned.items() if names}
        self._rules: dict[nn.Module, Rule] = {module: rule_for(module) for module in self._own_names}
        self._one_by_one: list[str] = []
        self._check_rules(probe)

    def __call__(self, batch: Batch) -> Gradients:
        """The gradients of a batch.

        Args:
            batch: Rows on the model's device.

        Returns:
            Values and terms; a parameter that the values do not depend on may be absent.

        Raises:
            NonFiniteError: If a value is NaN or infinite; the message names the row.
        """
        return self._compute(batch)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.parameters.values())).device

    @property
    def num_parameters(self) -> int:
        """How many numbers one gradient has."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def _compute(self, batch: Batch, failed: set[str] | None = None) -> Gradients:
        with self._recording(batch) as calls:
            values = self.function(self.model, batch.inputs)
        refuse_non_finite(values, batch.indices, "The differentiated value")
        terms: dict[str, list[Term]] = {}
        for call in _with_gradients(calls, values):
            try:
                with torch.no_grad():
                    self._apply(call, terms)
            except (RuntimeError, IndexError, ValueError) as error:
                if failed is None:
                    raise
                # While rules are tried, one that cannot be applied is one that does not agree.
                failed.update(self._canonical(call.module))
                logger.info(f"{type(call.module).__name__}: {error}")
        return Gradients(batch.indices, values.detach(), {**terms, **self._loop(batch, len(values))})

    def _own(self, module: nn.Module) -> list[str]:
        """Names, within the module, of its own chosen parameters; one shared with a submodule is the submodule's."""
        inner = {id(p) for child in module.children() for p in child.parameters()}
        own = module.named_parameters(recurse=False)
        return [name for name, p in own if id(p) in self._names and id(p) not in inner]

    @contextlib.contextmanager
    def _recording(self, batch: Batch) -> Iterator[list[tuple[Call, list[Any]]]]:
        calls: list[tuple[Call, list[Any]]] = []
        lengths = [v.shape[1] for v in batch.inputs.values() if isinstance(v, Tensor) and v.ndim == 2]

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            # The edge, not the tensor: it stays right if the output is changed in place afterwards.
            edges = [
                torch.autograd.graph.get_gradient_edge(tensor) if tensor.requires_grad else None
                for tensor in output_tensors(output)
            ]
            if any(edges):
                args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
                own = self._own_names[module]
                calls.append((Call(len(batch.indices), max(lengths, default=1), module, args, kwargs, (), own), edges))

        with contextlib.ExitStack() as stack:
            for module in self._rules:
                stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
            stack.enter_context(torch.enable_grad())
            yield calls

    def _apply(self, call: Call, terms: dict[str, list[Term]]) -> None:
        canonical = {name: self._names[id(call.module.get_parameter(name))] for name in call.parameters}
        if all(name in self._one_by_one for name in canonical.values()):
            return
        for name, term in self._rules[call.module](call).items():
            if name in canonical and canonical[name] not in self._one_by_one:
                terms.setdefault(canonical[name], []).append(term)

    def _loop(self, batch: Batch, size: int) -> dict[str, list[Term]]:
        """Gradients of the parameters that no rule covers, by a pass of its own for every example."""
        if not self._one_by_one:
            return {}
        parameters = [self.parameters[name] for name in self._one_by_one]
        examples = []
        for row in range(size):
            inputs = {
                key: value[row : row + 1] if isinstance(value, Tensor) and len(value) == size else value
                for key, value in batch.inputs.items()
            }
            with torch.enable_grad():
                value = self.function(self.model, inputs).sum()
            examples.append(torch.autograd.grad(value, parameters, materialize_grads=True))
        stacked = [torch.stack(column) for column in zip(*examples, strict=True)]
        return {name: [Dense(value)] for name, value in zip(self._one_by_one, stacked, strict=True)}

    def _check_rules(self, probe: Batch) -> None:
        """Find the parameters whose rule does not give what plain backward gives, and fall back for them."""
        weights = torch.tensor([1.0, -0.6])
        with torch.enable_grad():
            total = (self.function(self.model, probe.inputs) * weights.to(self.device)).sum()
            found = torch.autograd.grad(total, list(self.parameters.values()), materialize_grads=True)
        expected = dict(zip(self.parameters, found, strict=True))
        wrong = self._disagreeing(probe, expected, weights)
        for module in self._rules:
            if not wrong.isdisjoint(self._canonical(module)):
                self._rules[module] = by_example
        self._one_by_one = sorted(self._disagreeing(probe, expected, weights)) if wrong else []
        if self._one_by_one:
            logger.warning(
                f"No per-example rule covers {', '.join(self._one_by_one)}: these are differentiated one example at a "
                "time, which is slow. Leave them out with modules=[...] if they do not matter."
            )

    def _disagreeing(self, probe: Batch, expected: dict[str, Tensor], weights: Tensor) -> set[str]:
        wrong: set[str] = set()
        terms = self._compute(probe, failed=wrong).terms
        scale = max(float(gradient.norm()) for gradient in expected.values())
        for name, gradient in expected.items():
            tolerance = 5e-2 if gradient.dtype in (torch.float16, torch.bfloat16) else 1e-3
            ours = dense(terms[name]) if name in terms else gradient.new_zeros(len(weights), gradient.numel())
            if ours.shape != (len(weights), gradient.numel()):
                wrong.add(name)
                continue
            error = (weights.to(ours) @ ours - gradient.flatten().to(ours)).norm()
            # Some gradients are zero but for rounding (a key's bias): judge those against the largest.
            if not error <= tolerance * (gradient.norm() + 1e-2 * scale):
                wrong.add(name)
        return wrong

    def _canonical(self, module: nn.Module) -> list[str]:
        return [self._names[id(module.get_parameter(name))] for name in self._own_names[module]]


def _with_gradients(calls: list[tuple[Call, list[Any]]], values: Tensor) -> Iterator[Call]:
    """The calls whose outputs the values depend on, with the gradients of those outputs."""
    edges = [edge for _, call_edges in calls for edge in call_edges if edge is not None]
    found = iter(torch.autograd.grad(values.sum(), edges, allow_unused=True) if edges else ())
    for call, call_edges in calls:
        gradients = [None if edge is None else next(found) for edge in call_edges]
        if any(gradient is not None for gradient in gradients):
            yield dataclasses.replace(call, output_gradients=gradients)


def chosen_parameters(model: nn.Module, modules: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The trainable parameters of the modules whose names match.

    Args:
        model: The model.
        modules: `fnmatch` patterns; a parameter is kept if one matches its name or the name of a module around it.
            `None` keeps all.

    Returns:
        Parameters by name, tied ones once.

    Raises:
        ValueError: If a pattern matches no trainable parameter.
        UnsupportedError: If nothing is trainable.

    Example:
        >>> layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> list(chosen_parameters(layers, ["1"]))
        ['1.weight', '1.bias']
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise UnsupportedError(f"{type(model).__name__} has no trainable parameter: set requires_grad on some.")
    if modules is None:
        return trainable
    if isinstance(modules, str):
        modules = [modules]
    matched = {pattern: [name for name in trainable if _matches(name, pattern)] for pattern in modules}
    for pattern, names in matched.items():
        if not names:
            owners = sorted({name.rpartition(".")[0] for name in trainable})
            close = difflib.get_close_matches(pattern, owners, n=3, cutoff=0.3) or owners[-3:]
            raise ValueError(f"modules={pattern!r} matches no trainable parameter. Close names: {', '.join(close)}.")
    kept = {name for names in matched.values() for name in names}
    return {name: parameter for name, parameter in trainable.items() if name in kept}


def refuse_batch_statistics(model: nn.Module) -> None:
    """Refuse a model whose normalisation mixes the examples of a batch.

    Args:
        model: The model.

    Raises:
        UnsupportedError: If a batch normalisation is in training mode; the message names it.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise UnsupportedError(
                f"{name} ({type(module).__name__}) uses the statistics of the batch, so an example has no gradient of "
                "its own: call model.eval() (with running statistics), or use GroupNorm."
            )


def refuse_non_finite(values: Tensor, indices: Tensor, what: str) -> None:
    """Refuse NaN and infinity.

    Args:
        values: One row per example, `[B, ...]`.
        indices: Positions of the examples in their dataset, `[B]`.
        what: What the values are, for the message.

    Raises:
        NonFiniteError: If there are any; the message names the first row.
    """
    finite = values.detach().flatten(1).isfinite().all(1) if values.ndim > 1 else values.detach().isfinite()
    if not finite.all():
        row = int(indices[(~finite).nonzero()[0, 0].cpu()])
        raise NonFiniteError(f"{what} is NaN or infinite for row {row}: look at that row, or at the model's weights.")


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
