"""One training by all processes of a launch: who decides, and that they are at the same thing."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed
from transformers import TrainingArguments

from hf_attribution.errors import MismatchError
from hf_attribution.retraining.manifest import differences

Result = TypeVar("Result")


def agreed(args: TrainingArguments, function: Callable[[], Result]) -> Result:
    """Call a function in the main process alone; what it returns or raises, all processes return or raise.

    Args:
        args: The training arguments, which know of the launch. Of a single process the function is called in it.
        function: What only one of them may do, such as writing a file.

    Returns:
        What the function returned.

    Raises:
        Exception: What it raised.
    """
    if args.world_size == 1:
        return function()
    told: list[Any] = [None, None]
    if args.process_index == 0:
        try:
            told = [function(), None]
        except Exception as error:
            told = [None, error]
    torch.distributed.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    return told[0]


def check_alike(args: TrainingArguments, manifest: dict[str, Any]) -> None:
    """Refuse processes that were given different things to do, before they wait for each other.

    Args:
        args: The training arguments.
        manifest: What this process is to do.

    Raises:
        MismatchError: In all processes, if one has another manifest; the message lists what differs.
    """
    if args.world_size == 1:
        return
    manifests: list[Any] = [None] * args.world_size
    torch.distributed.all_gather_object(manifests, manifest)
    for rank, other in enumerate(manifests):
        lines = differences(manifests[0], other)
        if lines:
            raise MismatchError(
                f"Process {rank} was given something else to retrain than process 0. What differs:\n"
                + "\n".join(f"  {line}" for line in lines)
                + "\nGive all processes the same data, model and arguments."
            )
