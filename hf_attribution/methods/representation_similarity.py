"""Similarity of hidden states: what the model itself finds alike."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_attribution.data import Split
from hf_attribution.gradients.rules import output_tensors
from hf_attribution.methods.base import Method, Scored
from hf_attribution.problem import Problem


@dataclasses.dataclass(frozen=True)
class RepresentationSimilarity(Method):
    """Cosine of hidden states, averaged over the checkpoints.

    Args:
        layer: Name of the module whose output is the hidden state, averaged over real tokens or pixels. By default
            what goes into the last linear layer: the input of a classifier, or of a language model's head.
    """

    layer: str | None = None

    name: ClassVar[str] = "representation_similarity"
    paper: ClassVar[str] = "Hanawa et al. 2021, Evaluation of similarity-based explanations"

    def score(self, problem: Problem) -> Scored:
        """Compare the hidden states."""
        total = torch.zeros(problem.shape)
        for model, share in problem.models():
            query, train = (self._states(model, problem, split) for split in (problem.query, problem.train))
            total += share * (query @ train.T)
        return Scored(total.numpy())

    def _states(self, model: nn.Module, problem: Problem, split: Split) -> Tensor:
        """Unit hidden states of a split, `[rows, width]`."""
        states: Tensor | None = None
        for batch in split.batches():
            inputs = batch.to(problem.device).inputs
            seen = _capture(model, self.layer, lambda inputs=inputs: problem.task.forward(model, inputs))
            pooled = _pool(seen, inputs).float().cpu()
            states = torch.empty(len(split), pooled.shape[1]) if states is None else states
            states[batch.indices] = torch.nn.functional.normalize(pooled)
        assert states is not None
        return states


def _capture(model: nn.Module, layer: str | None, forward: Any) -> Tensor:
    """Run a forward pass and return the output of a layer, or the input of the last linear layer that ran."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(args[0] if layer is None else output_tensors(output)[0])

    if layer is None:
        hooked: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Linear)]
    else:
        try:
            hooked = [model.get_submodule(layer)]
        except AttributeError as error:
            raise ValueError(f"The model has no module {layer!r}: see model.named_modules().") from error
    handles = [module.register_forward_hook(note) for module in hooked]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError("No linear layer ran: name the module whose output is the hidden state, layer=...")
    return seen[-1]


def _pool(states: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """One vector per example: the mean over real tokens `[B, T, d]`, or over pixels `[B, d, H, W]`."""
    if states.ndim == 4:
        return states.mean((2, 3))
    if states.ndim == 3:
        mask = inputs.get("attention_mask")
        if mask is None or mask.shape != states.shape[:2]:
            return states.mean(1)
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return states.flatten(1)
