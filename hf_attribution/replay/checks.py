"""What cannot be repeated or differentiated, refused by name before training starts."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_utils import SchedulerType

from hf_attribution.data import Split
from hf_attribution.errors import UnsupportedError
from hf_attribution.inputs import batch_normalised

_FLOAT32 = "train in float32 (fp16=False, bf16=False)."


def check_recordable(trainer: Trainer, train: Split) -> None:
    """Refuse a training that could not be repeated and differentiated later.

    Args:
        trainer: The trainer.
        train: Its training data.

    Raises:
        UnsupportedError: The message names the setting, module or callback, and the remedy.
    """
    args: Any = trainer.args
    stops_early = any(isinstance(each, EarlyStoppingCallback) for each in trainer.callback_handler.callbacks)
    workers_draw = args.dataloader_num_workers and train.draws_random_numbers
    reasons = {
        f"fp16=True scales the loss and skips steps: {_FLOAT32}": args.fp16,
        f"bf16=True computes in mixed precision, whose rounding has no derivative: {_FLOAT32}": args.bf16,
        "load_best_model_at_end chooses the weights by evaluations: set it to False.": args.load_best_model_at_end,
        f"lr_scheduler_type={SchedulerType(args.lr_scheduler_type).value!r} follows evaluations, which depend on the "
        "weights: choose another schedule.": args.lr_scheduler_type
        in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY),
        "EarlyStoppingCallback stops by evaluations: remove it, and set num_train_epochs or max_steps.": stops_early,
        "auto_find_batch_size may begin several times: set per_device_train_batch_size.": args.auto_find_batch_size,
        "neftune_noise_alpha adds noise that cannot be repeated: leave it out.": args.neftune_noise_alpha is not None,
        "torch_compile rounds otherwise than the repeated steps: set it to False.": args.torch_compile,
        "use_liger_kernel has no second derivatives: set it to False.": args.use_liger_kernel,
        f"This process is one of {args.world_size} of a distributed launch: record in one process.": (
            args.world_size > 1
        ),
        f"The Trainer would use {args.n_gpu} GPUs: set CUDA_VISIBLE_DEVICES=0.": args.n_gpu > 1,
        f"Its rows must be dicts, not {type(train.dataset[0]).__name__}: they carry a row number. Use a "
        "datasets.Dataset.": not isinstance(train.dataset[0], Mapping),
        "Rows or data collator draw random numbers in other processes: set dataloader_num_workers=0.": workers_draw,
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedError(f"This training cannot be recorded. {reason}")
    if isinstance(trainer.model, nn.Module):
        refuse_batch_norm(trainer.model)


def refuse_batch_norm(model: nn.Module) -> None:
    """Refuse batch normalisation in training mode, which mixes the examples of a batch.

    Args:
        model: The model.

    Raises:
        UnsupportedError: The message names the module.
    """
    if mixing := batch_normalised(model, training=True):
        raise UnsupportedError(
            f"This training cannot be recorded. {mixing} normalises by the whole batch, so an example has no loss of "
            "its own: use GroupNorm, or keep it in eval() mode."
        )
