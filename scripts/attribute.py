"""Which training examples made a model say what it says?

    python scripts/attribute.py \
        --model_name_or_path me/my-sst2-model \
        --dataset_name nyu-mll/glue \
        --dataset_config_name sst2 \
        --max_query_examples 100 \
        --method trak \
        --output_file trak.safetensors

`hf-attribution methods` lists the methods and their settings; `--dry_run` says what the scores would cost.
"""

from typing import Any

from accelerate import PartialState
from transformers import HfArgumentParser

from hf_attribution import attribute, attribute_dry_run
from hf_attribution.arguments import AttributeArguments, DataArguments, ModelArguments
from hf_attribution.methods import get_method
from hf_attribution.workspace import checkpoints_for, load_workspace


def main(model_args: ModelArguments, data_args: DataArguments, attribute_args: AttributeArguments) -> None:
    """Score every training example for every query, and write the scores. Or `accelerate launch scripts/...`."""
    method = get_method(attribute_args.method, **attribute_args.settings)
    checkpoints = checkpoints_for(method, attribute_args.checkpoints)

    # The model, and both datasets with its inputs beside their own columns.
    workspace = load_workspace(model_args, data_args)
    model = workspace.trained_model(checkpoints)
    settings: dict[str, Any] = {
        "method": method,
        "task": workspace.task,
        "data_collator": workspace.data_collator,
        "checkpoints": checkpoints,
        "batch_size": attribute_args.batch_size,
        "batch_tokens": attribute_args.batch_tokens,
        "cache_dir": attribute_args.cache_dir,
        "store_dtype": attribute_args.store_dtype,
    }
    if attribute_args.dry_run:
        print(attribute_dry_run(model, workspace.train, workspace.query, **settings))
        return

    # One row per query, one column per training example; positive where the example raises the measured output.
    scores = attribute(model, workspace.train, workspace.query, **settings)
    if not PartialState().is_main_process:  # of `accelerate launch`: the processes shared the work, and all have it
        return
    scores.save(attribute_args.output_file)

    # What helped most, with the text or image of each example: a datasets.Dataset.
    print(scores.top(k=3, train_dataset=workspace.train).select_columns(["query", "rank", "train_index", "score"])[:9])


if __name__ == "__main__":
    options: tuple[Any, ...] = (ModelArguments, DataArguments, AttributeArguments)
    main(*HfArgumentParser(options).parse_args_into_dataclasses())
