"""What is refused before any work is done."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_utils import SchedulerType

from hf_attribution.errors import UnsupportedError
from hf_attribution.inputs import batch_normalised


def check_trainer(trainer: Trainer) -> None:
    """Refuse a training that cannot be repeated: by itself, without its evaluations.

    Args:
        trainer: The user's trainer.

    Raises:
        UnsupportedError: The message names the setting.
    """
    args = trainer.args
    sharded = {"FSDP": trainer.is_fsdp_enabled, "DeepSpeed": trainer.is_deepspeed_enabled}
    for name, used in sharded.items():
        if used:
            raise UnsupportedError(
                f"Retraining with {name} is not supported: each process holds a part of the weights, and fresh models "
                "are not sharded alike. Launch with plain data parallelism, or let each training have one device: "
                "start with python and retrain(workers=...)."
            )
    if args.load_best_model_at_end:
        raise UnsupportedError(
            "load_best_model_at_end chooses the weights by evaluations, which retrainings leave out: set it to False."
        )
    if any(isinstance(callback, EarlyStoppingCallback) for callback in trainer.callback_handler.callbacks):
        raise UnsupportedError(
            "EarlyStoppingCallback stops by evaluations, which retrainings leave out: remove it, and set "
            "num_train_epochs or max_steps to where training should end."
        )
    if args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        raise UnsupportedError(
            f"lr_scheduler_type={SchedulerType(args.lr_scheduler_type).value!r} follows evaluations, which "
            "retrainings leave out: choose another schedule."
        )
    if args.auto_find_batch_size:
        raise UnsupportedError("auto_find_batch_size may train subsets differently: set per_device_train_batch_size.")


def check_optimizers(optimizers: Any) -> None:
    """Refuse an optimiser or schedule that belongs to the user's own model.

    Args:
        optimizers: What the trainer's constructor was given.

    Raises:
        UnsupportedError: If there is one.
    """
    if optimizers is not None and any(each is not None for each in optimizers):
        raise UnsupportedError(
            "optimizers=(...) belongs to the parameters of one model, so a retraining cannot use it: set `optim` and "
            "`lr_scheduler_type` in the training arguments, pass optimizer_cls_and_kwargs, or override "
            "create_optimizer."
        )


def check_weighted(trainer: Trainer, model: nn.Module, train_dataset: Any, task_given: bool) -> None:
    """Refuse a training in which removing an example is more than giving it weight 0.

    Args:
        trainer: The user's trainer.
        model: The model before training, or one like it.
        train_dataset: The training data.
        task_given: Whether the user said what the loss is.

    Raises:
        UnsupportedError: The message names the module or setting.
    """
    if mixing := batch_normalised(model, training=True):
        raise UnsupportedError(
            f"{mixing} normalises by the whole batch, so examples of weight 0 would still count: use "
            'protocol="resampled", or GroupNorm.'
        )
    own_loss = type(trainer).compute_loss is not Trainer.compute_loss
    if (own_loss or trainer.compute_loss_func is not None) and not task_given:
        where = f"{type(trainer).__name__}.compute_loss" if own_loss else "compute_loss_func"
        raise UnsupportedError(
            f'{where} is a loss of your own, and protocol="fixed" needs it for each example: pass task= a Task whose '
            '`losses` is it, or use protocol="resampled".'
        )
    if trainer.args.n_gpu > 1:
        raise UnsupportedError(
            f'protocol="fixed" trains on one GPU and sees {trainer.args.n_gpu}: set CUDA_VISIBLE_DEVICES=0.'
        )
    if not isinstance(train_dataset[0], Mapping):
        raise UnsupportedError(
            f'protocol="fixed" needs rows that are dicts, not {type(train_dataset[0]).__name__}: they carry a row '
            'number. Use a datasets.Dataset, or protocol="resampled".'
        )


def check_writable(folder: Path) -> None:
    """Refuse a folder that results cannot be written to.

    Args:
        folder: The folder; it is made.

    Raises:
        OSError: The message names the folder; of the class and `errno` that the system gave.
    """
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        message = f"{error.strerror}: retrainings cannot be written there; choose another output_dir"
        raise OSError(error.errno, message, str(folder)) from error
