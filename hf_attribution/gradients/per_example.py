"""Per-example gradients of losses or measurements, from hooks on one ordinary batched backward pass."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.utils import logging

from hf_attribution.data import Batch, runs_out_of_memory
from hf_attribution.errors import NonFiniteError, UnsupportedError
from hf_attribution.finite import all_finite
from hf_attribution.gradients.checks import (
    chosen_parameters,
    refuse_batch_statistics,
    refuse_non_finite,
    refuse_wrong_backward,
)
from hf_attribution.gradients.rules import (
    Call,
    Rule,
    apart,
    by_example,
    flat_arguments,
    output_tensors,
    rule_for,
    shared_arguments,
)
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
        UnsupportedError: If batch normalisation is in training mode, nothing is trainable, or a value depends on the
            other examples of a batch or on chance.
        NonFiniteError: If a value or gradient of the probe is NaN or infinite.
        ValueError: If a pattern matches nothing, or the function does not return one number per example.

    Example:
        >>> gradients = PerExampleGradients(model, task.losses, split.probe())  # doctest: +SKIP
        >>> for batch in split.batches():  # doctest: +SKIP
        ...     terms = gradients(batch).terms
    """

    def __init__(
        self, model: nn.Module, function: Function, probe: Batch, modules: Sequence[str] | None = None
    ) -> None:
        refuse_batch_statistics(model)
        refuse_wrong_backward(model)
        self.model, self.function = model, function
        self.parameters = chosen_parameters(model, modules)
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        owned = {module: self._own(module) for module in model.modules()}
        self._own_names = {module: names for module, names in owned.items() if names}
        self._rules: dict[nn.Module, Rule] = {module: rule_for(module) for module in self._own_names}
        self._shared: dict[nn.Module, set[int]] = {}
        self._flat: dict[nn.Module, set[int]] = {}
        self._reached: set[str] = set()
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
        unchecked: set[str] = set()
        gradients = self._compute(batch, failed=unchecked)
        # What the probe never reached was never checked.
        unchecked |= gradients.terms.keys() - self._reached
        self._differentiate_one_by_one(unchecked)
        return dataclasses.replace(gradients, terms={**gradients.terms, **self._loop(batch)})

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.parameters.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """In which inner products of the gradients are taken: single precision, or that of the parameters if more."""
        return torch.promote_types(torch.float32, next(iter(self.parameters.values())).dtype)

    @property
    def num_parameters(self) -> int:
        """How many numbers one gradient has."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def _compute(self, batch: Batch, failed: set[str]) -> Gradients:
        with self._recording(batch) as calls:
            values = self._values(batch)
        terms: dict[str, list[Term]] = {}
        for call in _with_gradients(calls, values):
            try:
                with torch.no_grad():
                    self._apply(call, terms)
            except Exception as error:
                if isinstance(error, RuntimeError) and runs_out_of_memory(error):
                    raise
                # A rule that cannot be applied is one that does not agree: tokens routed to an expert, say.
                failed.update(self._canonical(call.module))
                logger.info(f"{type(call.module).__name__}: {error}")
        return Gradients(batch.indices, values.detach(), terms)

    def _values(self, batch: Batch) -> Tensor:
        values = self.function(self.model, batch.inputs)
        if values.shape != batch.indices.shape:
            raise ValueError(
                f"The differentiated function returned shape {tuple(values.shape)} for {len(batch.indices)} examples: "
                f"it must return one number per example, shape [{len(batch.indices)}]."
            )
        refuse_non_finite(values, batch.indices, "The differentiated value")
        return values

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
                if len(args) == 1 and isinstance(args[0], Tensor):  # nearly all modules, and much faster
                    args = (args[0].detach(),)
                else:
                    args = pytree.tree_map_only(Tensor, Tensor.detach, args)
                kwargs = pytree.tree_map_only(Tensor, Tensor.detach, kwargs) if kwargs else kwargs
                size, length, own = len(batch.indices), max(lengths, default=1), self._own_names[module]
                shared, flat = self._shared.get(module, set()), self._flat.get(module, set())
                calls.append((Call(size, length, module, args, kwargs, (), own, shared, flat), edges))

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

    def _differentiate_one_by_one(self, names: set[str]) -> None:
        names = names.difference(self._one_by_one)
        if not names:
            return
        self._one_by_one = sorted({*self._one_by_one, *names})
        logger.warning_once(
            f"No per-example rule covers {', '.join(sorted(names))}: these are differentiated one example at a "
            "time, which is slow. Leave them out with modules=[...] if they do not matter."
        )

    def _loop(self, batch: Batch) -> dict[str, list[Term]]:
        """Gradients of the parameters that no rule covers, by a pass of its own for every example."""
        if not self._one_by_one:
            return {}
        parameters = [self.parameters[name] for name in self._one_by_one]
        examples = []
        for row in range(len(batch.indices)):
            with torch.enable_grad():
                value = self._values(batch.part(slice(row, row + 1))).sum()
            examples.append(torch.autograd.grad(value, parameters, materialize_grads=True))
        stacked = [torch.stack(column) for column in zip(*examples, strict=True)]
        return {name: [Dense(value)] for name, value in zip(self._one_by_one, stacked, strict=True)}

    def _check_rules(self, probe: Batch) -> None:
        """Find the parameters whose rule does not give what plain backward gives, and fall back for them."""
        weights = torch.tensor([1.0, -0.6])
        with self._recording(probe) as calls:
            values = self._values(probe)
            total = (values * weights.to(self.device)).sum()
            found = torch.autograd.grad(total, list(self.parameters.values()), materialize_grads=True)
        for call, _ in calls:
            self._shared.setdefault(call.module, set()).update(shared_arguments(call))
            self._flat.setdefault(call.module, set()).update(flat_arguments(call))
        expected = dict(zip(self.parameters, found, strict=True))
        for name, gradient in expected.items():
            if not all_finite(gradient):
                rows = " or ".join(map(str, probe.indices.tolist()))
                raise NonFiniteError(f"The gradient of {name} is NaN or infinite for row {rows}: look at those rows.")
        wrong = self._disagreeing(probe, expected, weights)
        if not wrong:
            return
        for rule in (by_example, apart):
            for module in self._rules:
                if not wrong.isdisjoint(self._canonical(module)):
                    self._rules[module] = rule
            wrong = self._disagreeing(probe, expected, weights)
        self._differentiate_one_by_one(wrong)
        if self._one_by_one:
            self._refuse_mixed_examples(probe, values.detach())

    def _refuse_mixed_examples(self, probe: Batch, together: Tensor) -> None:
        """Refuse examples whose values depend on which others are in the batch, or on chance."""
        with torch.no_grad():
            alone = torch.cat([self._values(probe.part(slice(row, row + 1))) for row in range(len(together))])
        if (alone - together).abs().max() > (5e-2 if self._in_half_precision else 1e-3) * together.abs().max():
            raise UnsupportedError(
                f"The value of row {int(probe.indices[0])} is {float(together[0]):.6g} in a batch of two and "
                f"{float(alone[0]):.6g} alone: the model draws random numbers (dropout: call model.eval()), or its "
                "examples influence each other, so that none has a gradient of its own."
            )

    @property
    def _in_half_precision(self) -> bool:
        return any(p.dtype in (torch.float16, torch.bfloat16) for p in self.model.parameters())

    def _disagreeing(self, probe: Batch, expected: dict[str, Tensor], weights: Tensor) -> set[str]:
        wrong: set[str] = set()
        terms = self._compute(probe, failed=wrong).terms
        self._reached |= terms.keys()
        tolerance, rounding = (5e-2, 5e-4) if self._in_half_precision else (1e-3, 1e-6)
        # Some gradients are zero but for rounding (a key's bias): judge those against the largest.
        rounding *= max(float(gradient.norm()) for gradient in expected.values())
        for name, gradient in expected.items():
            if name not in terms:
                if gradient.any():  # used outside of its module, where no hook sees it
                    wrong.add(name)
                continue
            ours = dense(terms[name])
            if ours.shape != (len(weights), gradient.numel()):
                wrong.add(name)
                continue
            error = (weights.to(ours) @ ours - gradient.flatten().to(ours)).norm()
            if not error <= tolerance * gradient.norm() + rounding:
                wrong.add(name)
        return wrong

    def _canonical(self, module: nn.Module) -> list[str]:
        return [self._names[id(module.get_parameter(name))] for name in self._own_names[module]]


def _with_gradients(calls: list[tuple[Call, list[Any]]], values: Tensor) -> Iterator[Call]:
    """The calls whose outputs the values depend on, with the gradients of those outputs."""
    edges = [edge for _, call_edges in calls for edge in call_edges if edge is not None]
    found = iter(torch.autograd.grad(values, edges, torch.ones_like(values), allow_unused=True) if edges else ())
    for call, call_edges in calls:
        gradients = [None if edge is None else next(found) for edge in call_edges]
        if any(gradient is not None for gradient in gradients):
            yield dataclasses.replace(call, output_gradients=gradients)
