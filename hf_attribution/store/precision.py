"""The number formats that features are kept in: what is written, what comes back, and what does not fit."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hf_attribution.errors import NonFiniteError, UnsupportedError
from hf_attribution.finite import all_finite

# What numpy and Arrow see of each format. They know no bfloat16, so its bits are kept as integers.
STORED: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int8": np.int8,
}

# Share of a row's length that float16 may lose; rounding alone takes a twentieth of it.
_MAX_LOSS = 0.01


def check_dtype(dtype: str) -> str:
    """A number format of the store, or an error that lists them.

    Args:
        dtype: Its name.

    Returns:
        The name.

    Raises:
        ValueError: If there is none of that name.
    """
    if dtype not in STORED:
        raise ValueError(f"Features are stored as {', '.join(STORED)}, not {dtype!r}.")
    return dtype


def encode(features: Tensor, dtype: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Features as they are written.

    Args:
        features: `[B, dim]`, finite.
        dtype: One of `STORED`. `"int8"` keeps a scale per row: the largest entry becomes 127.
        rows: Positions of the rows in their dataset, `[B]`, for messages.

    Returns:
        `features` `[B, dim]`, and for int8 `scale` float32 `[B]`.

    Raises:
        NonFiniteError: If an entry is NaN or infinite.
        UnsupportedError: If a row does not fit into the format; the message names it and what to use instead.
    """
    if not all_finite(features):
        row = rows[int((~features.isfinite()).any(1).nonzero()[0, 0])]
        raise NonFiniteError(f"A feature of row {row} is NaN or infinite: look at that row.")
    features = features.detach().cpu()
    if dtype == "int8":
        scale = features.abs().amax(1).float() / 127
        _refuse(~scale.isfinite(), rows, dtype, "is too large")
        quantised = (features / torch.where(scale > 0, scale, 1)[:, None]).round().clamp(-127, 127).to(torch.int8)
        return {"features": quantised.numpy(), "scale": scale.numpy()}
    kept = features.to(getattr(torch, dtype))
    if not all_finite(kept):
        _refuse(~kept.isfinite().all(1), rows, dtype, "is too large")
    if dtype == "float16":
        lost = (kept.to(features.dtype) - features).norm(dim=1)
        _refuse(lost > _MAX_LOSS * features.norm(dim=1), rows, dtype, "has entries too small")
    return {"features": kept.view(torch.uint16).numpy() if dtype == "bfloat16" else kept.numpy()}


def decode(columns: Mapping[str, np.ndarray], dtype: str) -> Tensor:
    """Features as they are read.

    Args:
        columns: What `encode` returned.
        dtype: Its format.

    Returns:
        float32 `[B, dim]`, a copy.
    """
    kept = torch.from_numpy(np.array(columns["features"]))
    if dtype == "bfloat16":
        kept = kept.view(torch.bfloat16)
    features = kept.float()
    return features * torch.from_numpy(np.array(columns["scale"]))[:, None] if dtype == "int8" else features


def _refuse(bad: Tensor, rows: np.ndarray, dtype: str, why: str) -> None:
    if bad.any():
        row = rows[int(bad.nonzero()[0, 0])]
        wider = "bfloat16" if dtype == "float16" else "float32"
        remedy = f"keep them as {wider}" if dtype != "float32" else "look at that row, or scale the loss down"
        raise UnsupportedError(f"The gradient of row {row} {why} to be stored as {dtype}: {remedy}.")
