"""Training arguments of a retraining: what is switched off, and what decides its outcome."""

import copy
import json
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

# Reporting, saving and evaluating: they cost time and change no weight.
_SWITCHED_OFF: dict[str, Any] = {
    "save_strategy": SaveStrategy.NO,
    "eval_strategy": IntervalStrategy.NO,
    "eval_on_start": False,
    "logging_strategy": IntervalStrategy.NO,
    "logging_first_step": False,
    "logging_nan_inf_filter": False,
    "include_num_input_tokens_seen": "no",
    "skip_memory_metrics": True,
    "report_to": [],
    "disable_tqdm": True,
    "log_level": "passive",
    "push_to_hub": False,
    "enable_jit_checkpoint": False,
    "metric_for_best_model": None,
}

# Nor do these: where files go, how data are loaded, who is told, and the seeds, which are ours.
_IMMATERIAL = {
    *_SWITCHED_OFF,
    *("output_dir", "seed", "data_seed", "run_name", "project", "use_cpu", "full_determinism", "debug", "local_rank"),
    *("do_train", "do_eval", "do_predict", "resume_from_checkpoint", "ignore_data_skip", "save_steps", "eval_steps"),
    *("save_total_limit", "save_only_model", "save_on_each_node", "restore_callback_states_from_checkpoint"),
    *("eval_delay", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"),
    *("per_device_eval_batch_size", "bf16_full_eval", "fp16_full_eval", "prediction_loss_only"),
    *(
        "include_for_metrics",
        "batch_eval_metrics",
        "greater_is_better",
        "length_column_name",
        "torch_empty_cache_steps",
    ),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_in_order"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    *("activation_checkpointing", "activation_checkpointing_kwargs"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
}
_IMMATERIAL_PREFIXES = ("hub_", "log_", "logging_", "trackio_", "ddp_")

_DESCRIBED = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing_factor",
)


def run_arguments(args: TrainingArguments, output_dir: Path, seed: int) -> TrainingArguments:
    """The user's arguments for one retraining: the same training, quietly and under a seed of its own.

    Args:
        args: The user's arguments; they are left alone.
        output_dir: Where the run may write.
        seed: Its seed, for weights, dropout and the order of the data.

    Returns:
        A copy with everything switched off that costs time and changes no weight.
    """
    run = copy.copy(args)
    for name, value in _SWITCHED_OFF.items():
        setattr(run, name, value)
    run.output_dir, run.seed, run.data_seed = str(output_dir), seed, seed
    return run


def material_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The arguments that decide what a training comes to, as JSON."""
    material = {
        name: value
        for name, value in args.to_dict().items()
        if name not in _IMMATERIAL and not name.startswith(_IMMATERIAL_PREFIXES)
    }
    return json.loads(json.dumps(material, default=lambda value: type(value).__qualname__))


def described_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The handful of arguments that a reader of the results wants to see, as JSON."""
    material = material_arguments(args)
    return {name: material[name] for name in _DESCRIBED}
