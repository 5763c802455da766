"""The measured output of every query, for one model."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from hf_attribution.data import Batch
from hf_attribution.errors import NonFiniteError
from hf_attribution.inputs import evaluating
from hf_attribution.tasks import Task


def measured(model: nn.Module, task: Task, queries: Sequence[Batch], when: str) -> np.ndarray:
    """Measure a model on all queries, in `eval()` mode; its modes are put back.

    Args:
        model: The model.
        task: What to measure.
        queries: All query rows, in batches.
        when: Which model it is, for the message: "after training on subset 3 with seed 0".

    Returns:
        float32 `[Q]`, in the order of the query dataset.

    Raises:
        NonFiniteError: If an output is NaN or infinite; the message names the row.
    """
    device = next(model.parameters()).device
    outputs = np.empty(sum(len(batch.indices) for batch in queries), dtype=np.float32)
    with torch.no_grad(), evaluating(model):
        for batch in queries:
            values = task.measurement(model, batch.to(device).inputs)
            outputs[batch.indices.numpy()] = values.float().cpu().numpy()
    finite = np.isfinite(outputs)
    if not finite.all():
        row = int(np.argmin(finite))
        raise NonFiniteError(
            f"The measured output ({task.measurement_name}) of query row {row} is {outputs[row]} {when}: look at that "
            "row, or train with a lower learning rate."
        )
    return outputs
