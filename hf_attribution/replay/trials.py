"""What is tried on the first recorded step before hours are spent: losses, their scale, second derivatives."""

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_attribution.errors import UnsupportedError
from hf_attribution.inputs import evaluating
from hf_attribution.replay.products import FlatModel, Product
from hf_attribution.replay.run import DENOMINATORS, Part, Replay
from hf_attribution.seeds import random_state_kept

logger = logging.get_logger(__name__)

# How far apart two ways to the same numbers may be, relative to their length. In float64 models some operations
# (eager attention's softmax, RMSNorm) stay in float32.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-5}


def find_rule(replay: Replay, flat: FlatModel) -> str:
    """How the recorded training divided its losses: so that the gradient of the task's losses is the Trainer's.

    Args:
        replay: A replay that is at a step.
        flat: The losses as functions of flat parameters.

    Returns:
        A key of `DENOMINATORS`; the replay follows it from now on.

    Raises:
        UnsupportedError: If there is none; the message says what the training's loss may be instead.
    """
    trained, parameters = replay.gradient(), replay.state()[0]
    nearest, distance, cosine = "", float("inf"), 0.0
    for rule in DENOMINATORS:
        replay.rule = rule
        found = sum(_gradient(flat, parameters, part, replay.example_weights) for part in replay.parts(replay.step))
        apart = float((found - trained).norm() / trained.norm().clamp(min=1e-30))
        if apart < distance:
            nearest, distance = rule, apart
            cosine = float(nn.functional.cosine_similarity(torch.as_tensor(found), trained, dim=0))
    if distance > TOLERANCE[trained.dtype]:
        raise UnsupportedError(
            f"The recorded training did not follow the gradient of the {replay.task.name} loss: they differ by "
            f"{distance:.2g} of its length, at a cosine of {cosine:.4f}. Either the training has a loss of its own "
            "(compute_loss, compute_loss_func, label_smoothing_factor, an auxiliary loss): pass task= a Task whose "
            "`losses` it is; or its fused attention drops out otherwise: load the model with "
            "attn_implementation='eager'."
        )
    replay.rule = nearest
    return nearest


def check_separate(flat: FlatModel, parameters: Tensor, part: Part) -> None:
    """Refuse losses that mix the examples of a batch.

    Args:
        flat: The losses as functions of flat parameters.
        parameters: The parameters.
        part: A micro-batch.

    Raises:
        UnsupportedError: If an example's loss depends on the rest of the batch.
    """
    size = len(part.rows)
    alone = {k: v[:1] if isinstance(v, Tensor) and v.ndim and len(v) == size else v for k, v in part.inputs.items()}
    with torch.no_grad(), evaluating(flat.model):
        together, single = flat.losses(parameters, part.inputs)[:1], flat.losses(parameters, alone)
    if not torch.allclose(together, single, rtol=TOLERANCE[single.dtype], atol=TOLERANCE[single.dtype]):
        raise UnsupportedError(
            f"The loss of an example depends on the other examples of its batch ({float(single[0]):.6g} alone, "
            f"{float(together[0]):.6g} in a batch of {size}): it has no share of its own in the training. Contrastive "
            "losses and batch statistics cannot be differentiated by example."
        )


def choose_product(flat: FlatModel, replay: Replay, curvature: str) -> tuple[Product, str]:
    """The fastest right way to products with the curvature, found out by trying it against double backward.

    Args:
        flat: The losses as functions of flat parameters.
        replay: A replay that is at a step.
        curvature: `"exact"` or `"gauss_newton"`.

    Returns:
        The product, and its name.

    Raises:
        UnsupportedError: If the model has no second derivatives, or `"gauss_newton"` has not the losses' tangents.
    """
    parameters, part = replay.state()[0], replay.parts(replay.step)[0]
    generator = torch.Generator(parameters.device).manual_seed(0)
    vectors = torch.randn(2, len(parameters), generator=generator, dtype=parameters.dtype, device=parameters.device)

    def tried(product: Product) -> tuple[Tensor, Tensor]:
        weights = torch.full((len(part.rows),), 1 / part.denominator, dtype=parameters.dtype, device=parameters.device)
        with random_state_kept():
            part.random.restore()
            return product(parameters, part.inputs, weights, vectors)

    try:
        products, tangents = tried(flat.double_backward)
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedError(
            f"The loss of {_model_name(replay)} cannot be differentiated twice ({error}): load the model "
            "with attn_implementation='eager', or without fused kernels."
        ) from error
    tolerance = TOLERANCE[parameters.dtype]
    if curvature == "gauss_newton":
        if _distance(tried(flat.gauss_newton)[1], tangents) > tolerance:
            raise UnsupportedError(
                f"The Gauss-Newton form of {replay.task.name} does not follow its losses here (embeddings of padding "
                "tokens take part in them): use curvature='exact'."
            )
        return flat.gauss_newton, "gauss_newton"
    try:
        found = tried(flat.forward_over_reverse)
        distance = max(_distance(found[0], products), _distance(found[1], tangents))
        failed = f"it differs by {distance:.2g}" if distance > tolerance else ""
    except (RuntimeError, NotImplementedError, ValueError) as error:
        failed = str(error).splitlines()[0]
    if failed:
        logger.warning(
            f"{_model_name(replay)} has no forward-mode second derivatives ({failed}): one backward "
            "pass per query is taken instead, which is exact and slower."
        )
        return flat.double_backward, "double_backward"
    return flat.forward_over_reverse, "forward_over_reverse"


def _model_name(replay: Replay) -> str:
    return type(replay.run.trainer.model).__name__


def _gradient(flat: FlatModel, parameters: Tensor, part: Part, weights: Tensor) -> Tensor:
    point = parameters.detach().requires_grad_()
    with random_state_kept(), torch.enable_grad():
        part.random.restore()
        losses = flat.losses(point, part.inputs)
        factors = weights[part.rows].to(losses) / part.denominator
        return torch.autograd.grad((losses * factors).sum(), point)[0]


def _distance(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm().clamp(min=1e-30))
