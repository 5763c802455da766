"""Hidden states of all rows, one vector a row, and how alike two of them are."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_attribution.data import Batch, Split
from hf_attribution.errors import NonFiniteError
from hf_attribution.gradients.rules import output_tensors
from hf_attribution.processes import in_order
from hf_attribution.tasks import Task

POOLINGS = ("mean", "first", "last", "max")


def representations(model: nn.Module, task: Task, split: Split, layer: str | None, pooling: str) -> Tensor:
    """Hidden states of every row of a split.

    Args:
        model: The model, in `eval()` mode.
        task: Runs the model.
        split: The rows.
        layer: Name of the module whose output is taken; by default the input of the last linear layer that runs.
        pooling: One of `POOLINGS`, over the positions of a sequence that are no padding, or the pixels of an image.

    Returns:
        float32 `[rows, width]`, on the CPU.

    Raises:
        NonFiniteError: If a hidden state is NaN or infinite; the message names the row.
        ValueError: If there is no such module, no linear layer ran, or the states cannot be pooled so.
    """
    states, device = torch.empty(0), next(model.parameters()).device

    def pool(batch: Batch) -> Tensor:
        seen = _capture(model, layer, functools.partial(task.forward, model, batch.inputs))
        return _pool(seen, batch.inputs, pooling).float()

    def pooled_states() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in split.batches(shared=True):
            yield batch.indices, torch.cat(split.in_parts(pool, batch.to(device)))

    for indices, pooled in in_order(pooled_states()):
        indices, pooled = indices.cpu(), pooled.cpu()
        finite = pooled.isfinite().all(1)
        if not finite.all():
            row = int(indices[~finite][0])
            raise NonFiniteError(f"The hidden state of {split.name} row {row} is NaN or infinite: look at that row.")
        if not len(states):
            states = torch.empty(len(split), pooled.shape[1])
        states[indices] = pooled
    return states


def cosine(query: Tensor, train: Tensor) -> Tensor:
    """Cosines `[Q, N]` of rows `[Q, d]` and `[N, d]`."""
    return nn.functional.normalize(query) @ nn.functional.normalize(train).T


def dot(query: Tensor, train: Tensor) -> Tensor:
    """Inner products `[Q, N]`."""
    return query @ train.T


def negative_distance(query: Tensor, train: Tensor) -> Tensor:
    """Minus the squared Euclidean distances, `[Q, N]`."""
    center = train.mean(0)  # so that little is lost in the difference of squares
    query, train = query - center, train - center
    return 2 * query @ train.T - query.square().sum(1, keepdim=True) - train.square().sum(1)


SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine,
    "dot": dot,
    "negative_distance": negative_distance,
}


def check_choices(pooling: str, similarity: str) -> None:
    """Refuse names that are not known.

    Args:
        pooling: To be one of `POOLINGS`.
        similarity: To be one of `SIMILARITIES`.

    Raises:
        ValueError: If it is none.
    """
    for setting, value, choices in (("pooling", pooling, POOLINGS), ("similarity", similarity, SIMILARITIES)):
        if value not in choices:
            raise ValueError(f"{setting} must be one of {', '.join(choices)}, not {value!r}.")


def _capture(model: nn.Module, layer: str | None, forward: Callable[[], Any]) -> Tensor:
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
        which = "No linear layer" if layer is None else f"{layer} never"
        raise ValueError(f"{which} ran: name the module whose output is the hidden state, layer=...")
    return seen[-1]


def _pool(states: Tensor, inputs: Mapping[str, Any], pooling: str) -> Tensor:
    """One vector per example, of tokens `[B, T, d]` or pixels `[B, d, H, W]`; a vector is one already.

    Returns:
        `[B, width]`.

    Raises:
        ValueError: If the states have no first or last position.
    """
    if states.ndim == 4:
        if pooling in ("first", "last"):
            raise ValueError(f"pooling={pooling!r} is for sequences and this layer gives images: use 'mean' or 'max'.")
        states = states.flatten(2).transpose(1, 2)
    if states.ndim != 3:
        return states.flatten(1)
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != states.shape[:2]:
        mask = torch.ones(states.shape[:2], device=states.device)
    positions, real = torch.arange(states.shape[1], device=states.device), mask.bool()
    if pooling == "mean":
        return (states * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    if pooling == "max":
        return states.masked_fill(~real[..., None], -torch.inf).amax(1)
    if pooling == "first":
        chosen = torch.where(real, positions, len(positions)).amin(1)
    else:
        chosen = torch.where(real, positions, -1).amax(1)
    return states[torch.arange(len(states), device=states.device), chosen]
