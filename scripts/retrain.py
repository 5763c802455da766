"""What would a model say, had it been trained on other subsets of its data? Train it on them, and ask.

    python scripts/retrain.py \
        --model_name_or_path google-bert/bert-base-uncased \
        --task text-classification \
        --dataset_name nyu-mll/glue \
        --dataset_config_name sst2 \
        --max_train_examples 2000 \
        --max_query_examples 100 \
        --num_subsets 50 \
        --seeds 2 \
        --num_train_epochs 3 \
        --output_dir retrained \
        --output_file truth.safetensors

Interrupted, the same command goes on where it stopped. With `--workers 4` four trainings go on at a time, with
`--workers ray` as many as a cluster has room for; under `accelerate launch` all processes do each training together.
As jobs of a Slurm array, `--shard $SLURM_ARRAY_TASK_ID/16` does one share of the trainings, and the job that finishes
last collects them. `--dry_run` says what all of it would take. Every option of `TrainingArguments` is taken.
"""

import dataclasses
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from hf_attribution import AttributionTrainer, Counterfactuals
from hf_attribution.arguments import DataArguments, ModelArguments, RetrainArguments
from hf_attribution.workspace import load_workspace


def main(
    model_args: ModelArguments,
    data_args: DataArguments,
    retrain_args: RetrainArguments,
    training_args: TrainingArguments,
) -> None:
    """Train on random subsets, and write what each trained model says about the queries."""
    # The model, and both datasets with its inputs beside their own columns.
    workspace = load_workspace(model_args, data_args)

    # Any Trainer will do: `class MyTrainer(AttributionMixin, TheirTrainer)`.
    trainer = AttributionTrainer(
        model=workspace.model,
        model_init=workspace.model_init,
        args=training_args,
        train_dataset=workspace.train,
        eval_dataset=workspace.query,
        data_collator=workspace.data_collator,
        processing_class=workspace.processing_class,
    )

    # One output per subset, seed and query. Finished trainings are kept in `output_dir`.
    truth = trainer.retrain(
        num_subsets=retrain_args.num_subsets,
        fraction=retrain_args.fraction,
        seeds=retrain_args.seeds,
        protocol=retrain_args.protocol,
        task=dataclasses.replace(workspace.task, label_smoothing=training_args.label_smoothing_factor),
        seed=training_args.seed,
        keep_checkpoints=retrain_args.keep_checkpoints,
        workers=retrain_args.crew,
        shard=retrain_args.shard,
        dry_run=retrain_args.dry_run,
    )
    print(truth)
    if isinstance(truth, Counterfactuals) and trainer.is_world_process_zero():
        truth.save(retrain_args.output_file)


if __name__ == "__main__":
    options: tuple[Any, ...] = (ModelArguments, DataArguments, RetrainArguments, TrainingArguments)
    main(*HfArgumentParser(options).parse_args_into_dataclasses())
