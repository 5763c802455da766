"""Checkpoints to attribute with: of folders, models, and the run of a Trainer."""

from pathlib import Path

import torch
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_attribution.problem import Checkpoint


def as_checkpoint(source: str | Path | nn.Module | Checkpoint) -> Checkpoint:
    """A checkpoint from a folder or a model; a Trainer's folder is weighted by its learning rates.

    Args:
        source: A folder, a model, or a checkpoint, which is returned as it is.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, nn.Module):
        return Checkpoint(source)
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"The checkpoint folder {folder} does not exist.")
    return Checkpoint(folder)


def trainer_checkpoints(output_dir: str | Path) -> list[Checkpoint]:
    """The `checkpoint-*` folders of a Trainer, in step order, weighted by the learning rates of their run.

    A checkpoint stands for the steps since the one before it: its weight is the mean of the learning rates at the two
    ends, as the scheduler saved them, times the share of the run's steps between them. (The rate at the checkpoint
    alone, as in Pruthi et al. 2020, is zero for the last checkpoint of a linear schedule.)

    Args:
        output_dir: The Trainer's `output_dir`.

    Returns:
        The checkpoints.

    Raises:
        ValueError: If there are none, or they were saved without their scheduler.
    """
    folders = sorted(
        (p for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.rpartition("-")[2].isdigit()),
        key=lambda p: int(p.name.rpartition("-")[2]),
    )
    if not folders:
        raise ValueError(
            f"There are no checkpoint-* folders in {output_dir}: train with save_strategy='epoch' (or 'steps') and "
            "without save_total_limit, or pass checkpoints=[...]."
        )
    weights, last_rate, last_step = [], None, 0
    for folder in folders:
        try:
            state = torch.load(folder / "scheduler.pt", weights_only=True)
        except FileNotFoundError as error:
            raise ValueError(
                f"{folder} has no scheduler.pt, so its learning rate is not known: train with save_only_model=False, "
                "or pass checkpoints=[Checkpoint(folder, weight=learning_rate), ...]."
            ) from error
        step, rate = int(folder.name.rpartition("-")[2]), float(state["_last_lr"][0])
        before = float(state["base_lrs"][0]) if last_rate is None else last_rate
        weights.append((before + rate) / 2 * (step - last_step))
        last_rate, last_step = rate, step
    return [Checkpoint(f, weight / last_step, weight) for f, weight in zip(folders, weights, strict=True)]
