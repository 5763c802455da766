"""How much each layer's curvature is damped."""

from collections.abc import Mapping

# A layer's share of the mean squared gradient below which it is rounding, in single precision.
_ROUNDING = 1e-13


def layer_ridges(damping: float, units: Mapping[str, float]) -> dict[str, float]:
    """λ of each layer, in units of its own mean squared gradient length.

    A layer whose gradients are 0 but for rounding (the router of a mixture that chooses one expert, of weight 1) has
    nothing to say, and a λ as small as they are would make noise of it as loud as the other layers. It gets that of
    all layers together.

    Args:
        damping: λ in those units.
        units: The mean squared gradient length of each layer.

    Returns:
        λ by layer; 1 where no layer has a gradient.
    """
    total = sum(units.values())
    return {layer: damping * (unit if unit > _ROUNDING * total else total) or 1.0 for layer, unit in units.items()}
