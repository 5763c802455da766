"""Which parameters count, and what makes their per-example gradients meaningless."""

import difflib
import fnmatch
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_attribution.errors import NonFiniteError, UnsupportedError
from hf_attribution.finite import all_finite
from hf_attribution.inputs import batch_normalised


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
    canonical = {id(parameter): name for name, parameter in trainable.items()}
    # A tied weight answers to each of its names.
    names = {name: canonical.get(id(p)) for name, p in model.named_parameters(remove_duplicate=False)}
    matched = {pattern: {names[name] for name in names if _matches(name, pattern)} - {None} for pattern in modules}
    for pattern, found in matched.items():
        if not found:
            owners = sorted({name.rpartition(".")[0] for name in trainable})
            close = difflib.get_close_matches(pattern, owners, n=3, cutoff=0.3) or owners[-3:]
            raise ValueError(f"modules={pattern!r} matches no trainable parameter. Close names: {', '.join(close)}.")
    kept = set().union(*matched.values())
    return {name: parameter for name, parameter in trainable.items() if name in kept}


def refuse_batch_statistics(model: nn.Module) -> None:
    """Refuse a model whose normalisation mixes the examples of a batch.

    Args:
        model: The model.

    Raises:
        UnsupportedError: If a batch normalisation is in training mode; the message names it.
    """
    if mixing := batch_normalised(model):
        raise UnsupportedError(
            f"{mixing} uses the statistics of the batch, so an example has no gradient of its own: call model.eval() "
            "(with running statistics), or use GroupNorm."
        )


def refuse_wrong_backward(model: nn.Module) -> None:
    """Refuse quantised layers through which gradients do not come back as they should.

    Some libraries repack quantised weights for inference, and what runs before them learns nothing from then on, or
    something wrong. A layer is linear: `⟨u, f(x + v) - f(x)⟩` must be `⟨uᵀJ, v⟩` for random x, v and u.

    Args:
        model: The model, in the mode in which gradients will be taken.

    Raises:
        UnsupportedError: The message names the first such layer.
    """
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        quantised = isinstance(weight, nn.Parameter) and not weight.is_floating_point() and not weight.is_complex()
        if quantised and hasattr(module, "in_features") and not _carries_gradients(module):
            raise UnsupportedError(
                f"Gradients through the quantised layer {name} ({type(module).__name__}) are wrong on "
                f"{next(module.parameters()).device} with this version of its library: load the model "
                "dequantised (without quantization_config, or model.dequantize()), or run on a GPU."
            )


def _carries_gradients(module: nn.Module) -> bool:
    draw = torch.Generator().manual_seed(0)
    device, width = next(module.parameters()).device, int(module.in_features)  # type: ignore[arg-type]
    x, v = (torch.randn(4, width, generator=draw).to(device) for _ in range(2))
    with torch.no_grad():
        step = module(x + v).float() - module(x).float()
    with torch.enable_grad():
        leaf = x.clone().requires_grad_(True)
        output = module(leaf)
        if not output.requires_grad:
            return False
        (back,) = torch.autograd.grad(output, leaf, step.to(output.dtype))
    expected = step.square().sum()
    return bool((expected - (back.float() * v).sum()).abs() <= 0.05 * expected)


def refuse_non_finite(values: Tensor, indices: Tensor, what: str) -> None:
    """Refuse NaN and infinity.

    Args:
        values: One row per example, `[B, ...]`.
        indices: Positions of the examples in their dataset, `[B]`.
        what: What the values are, for the message.

    Raises:
        NonFiniteError: If there are any; the message names the first row.
    """
    if all_finite(values):
        return
    finite = values.detach().flatten(1).isfinite().all(1) if values.ndim > 1 else values.detach().isfinite()
    row = int(indices[(~finite).nonzero()[0, 0].cpu()])
    raise NonFiniteError(f"{what} is NaN or infinite for row {row}: look at that row, or at the model's weights.")


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
