"""Model, data and collator from the names of a model and a dataset: where the command line and the scripts start."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    default_data_collator,
)
from transformers.models.auto import modeling_auto

from hf_attribution import preprocessing
from hf_attribution.arguments import DataArguments, ModelArguments
from hf_attribution.blocks import text_blocks
from hf_attribution.checkpoints import trainer_checkpoints
from hf_attribution.methods import Method
from hf_attribution.problem import Checkpoint
from hf_attribution.splits import draw_rows, load_query, load_train
from hf_attribution.tasks import Task, infer_task
from hf_attribution.team import state
from hf_attribution.weights import quiet_transformers

# Order matters: BART-like classes stand in several tables.
_TASKS: dict[str, tuple[Any, Mapping[str, Any]]] = {
    "seq2seq-lm": (AutoModelForSeq2SeqLM, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "causal-lm": (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked-lm": (AutoModelForMaskedLM, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "text-classification": (
        AutoModelForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "image-classification": (
        AutoModelForImageClassification,
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    ),
}


@dataclasses.dataclass(frozen=True)
class Workspace:
    """What a `Trainer` takes, ready for it: `model` or `model_init`, data, collator and processing class.

    Attributes:
        model: The model, or `None` where its weights, or those of its head, are new: then `model_init` makes it.
        model_init: Makes a model with new weights; `None` where all of them were loaded.
        processing_class: The tokenizer or image processor.
        train: The training data, preprocessed, with all their columns: N rows.
        query: The queries, likewise: Q rows.
        data_collator: The collator.
        task: What is learned and measured.
    """

    model: PreTrainedModel | None
    model_init: Callable[[], PreTrainedModel] | None
    processing_class: Any
    train: Dataset
    query: Dataset
    data_collator: Callable[[list[Any]], Mapping[str, Any]]
    task: Task

    def trained_model(self, checkpoints: Sequence[Any] | None = None) -> PreTrainedModel:
        """The model to attribute with, on the GPU of this process if there is one.

        Args:
            checkpoints: Weights that will be loaded into it, in place of its own.

        Returns:
            The model.

        Raises:
            ValueError: If its weights, or those of its head, are new, and there are no checkpoints.
        """
        if self.model_init is None:
            model: Any = self.model
        elif checkpoints:
            with torch.random.fork_rng():
                torch.manual_seed(0)  # the model's fingerprint goes into the scores
                model = self.model_init()
        else:
            raise ValueError(
                "The model's head, or all of it, has new weights: there is nothing to attribute yet. Give the folder "
                "of a trained model as --model_name_or_path, without --from_scratch, or --checkpoints."
            )
        return model.to(state().device)


def load_workspace(model_args: ModelArguments, data_args: DataArguments) -> Workspace:
    """Load a model and its data, and preprocess the data for the model.

    Args:
        model_args: The model.
        data_args: The data.

    Returns:
        The workspace.

    Raises:
        ValueError: If model, task, split or column are not clear, or a row cannot be used; the message says what to
            pass.
        OSError: If a model, dataset, folder or file is not found.

    Example:
        >>> workspace = load_workspace(
        ...     ModelArguments("me/my-sst2-model"), DataArguments("nyu-mll/glue", "sst2", max_query_examples=50)
        ... )  # doctest: +SKIP
        >>> attribute(
        ...     workspace.trained_model(), workspace.train, workspace.query, data_collator=workspace.data_collator
        ... )  # doctest: +SKIP
    """
    data = load_data(model_args, data_args)
    source = _source(model_args)

    def load() -> PreTrainedModel:
        auto = _TASKS[data.task][0]
        if model_args.from_scratch:
            return auto.from_config(data.config, trust_remote_code=model_args.trust_remote_code)
        return auto.from_pretrained(
            model_args.model_name_or_path, config=data.config, dtype=model_args.dtype, **source
        )

    def load_again() -> PreTrainedModel:
        with quiet_transformers():  # once is enough to say which weights are new
            return load()

    model = load()
    return Workspace(
        model=None if data.new_head else model,
        model_init=load_again if data.new_head else None,
        processing_class=data.processing_class,
        train=data.train,
        query=data.query,
        data_collator=_collator(data.processing_class, data.task),
        task=infer_task(model, model_args.measurement),
    )


@dataclasses.dataclass(frozen=True)
class Data:
    """Training data and queries as a model takes them, without the model.

    Attributes:
        config: The model's, with a head for these labels.
        task: The name of the task.
        new_head: Whether the model, or its head, starts from new weights.
        processing_class: The tokenizer or image processor.
        train: The training data, preprocessed, with all their columns: N rows.
        query: The queries, likewise: Q rows.
    """

    config: Any
    task: str
    new_head: bool
    processing_class: Any
    train: Dataset
    query: Dataset


def load_data(model_args: ModelArguments, data_args: DataArguments) -> Data:
    """Load and preprocess the data as for `load_workspace`, without the model's weights; errors as there."""
    source = _source(model_args)
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, **source)
    task = model_args.task or _task_of(config)
    splits = _splits(data_args, task)
    new_head = model_args.from_scratch
    if task in ("text-classification", "image-classification"):
        new_head = new_head or not _is_classifier(config, task)
        splits = _labelled(splits, data_args, config, new_head)
    else:
        splits = {name: preprocessing.keep_from_collators(dataset) for name, dataset in splits.items()}

    processor_class = AutoImageProcessor if task == "image-classification" else AutoTokenizer
    processor = processor_class.from_pretrained(model_args.model_name_or_path, **source)
    if task != "image-classification":
        _pad_with_something(processor, config)
    splits = _preprocessed(splits, data_args, config, processor, task)
    return Data(config, task, new_head, processor, splits["train"], splits["query"])


def _source(args: ModelArguments) -> dict[str, Any]:
    return {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}


def checkpoints_for(method: Method, folders: Sequence[str] | None) -> list[Checkpoint] | list[str] | None:
    """The checkpoints that a method is given: folders of weights, or those that a Trainer wrote along its way.

    Args:
        method: The method.
        folders: Folders of weights, or, for a method that follows a training, the `output_dir` of it.

    Returns:
        The checkpoints, or `None` for the model's own weights.

    Raises:
        ValueError: If a method needs checkpoints and there are none.
    """
    if not method.needs_checkpoints:
        return list(folders) if folders else None
    if not folders:
        raise ValueError(f"{method.name} follows a training: give the output_dir of the Trainer as --checkpoints.")
    return [checkpoint for folder in folders for checkpoint in trainer_checkpoints(folder)]


def _task_of(config: Any) -> str:
    architectures = config.architectures or []
    for task, (_, table) in _TASKS.items():
        for known in table.values():
            if set(architectures) & set(known if isinstance(known, (list, tuple)) else (known,)):
                return task
    named = f"is a {architectures[0]}" if architectures else "names no architecture"
    raise ValueError(f"The model's config {named}, which does not tell the task: pass --task {', '.join(_TASKS)}.")


def _splits(args: DataArguments, task: str) -> dict[str, Dataset]:
    """The rows as they are: those that were asked for, or all of a corpus that will be cut into blocks."""
    if args.block_size is not None:
        if task not in ("causal-lm", "masked-lm"):
            raise ValueError(f"--block_size is for language models, and this is {task}: leave it out.")
        args = dataclasses.replace(args, max_train_examples=None, max_query_examples=None)
    return {"train": load_train(args), "query": load_query(args)}


def _is_classifier(config: Any, task: str) -> bool:
    """Whether a checkpoint has a trained head for this task. Models with code of their own say so by `auto_map`."""
    auto = _TASKS[task][0].__name__
    if auto in (getattr(config, "auto_map", None) or {}):
        return True
    kind = auto.removeprefix("AutoModel")
    return any(kind in architecture for architecture in config.architectures or ())


def _labelled(splits: dict[str, Dataset], args: DataArguments, config: Any, new_head: bool) -> dict[str, Dataset]:
    """Number the labels as the model does; a new head is shaped after them."""
    column = preprocessing.label_column(splits["train"], args.label_column_name)
    named = set(config.label2id) != {f"LABEL_{i}" for i in range(config.num_labels)}
    trained = sorted(config.label2id, key=config.label2id.get) if named and not new_head else None
    splits, names = preprocessing.encode_labels(splits, column, trained)
    if new_head:
        _shape_head(config, splits["train"], column, names)
    return {name: preprocessing.keep_from_collators(dataset, column) for name, dataset in splits.items()}


def _shape_head(config: Any, train: Dataset, column: str, names: list[str] | None) -> None:
    if names is not None:
        config.num_labels = len(names)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
    elif "float" in str(train.features[column]):
        config.num_labels = 1
    else:
        config.num_labels = max(train[column]) + 1


def _pad_with_something(tokenizer: Any, config: Any) -> None:
    """Decoders are often trained without padding, and have no token for it."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


def _preprocessed(
    splits: dict[str, Dataset], args: DataArguments, config: Any, processor: Any, task: str
) -> dict[str, Dataset]:
    train = splits["train"]
    if task == "image-classification":
        column = preprocessing.image_column(train, args.image_column_name)
        channels = getattr(config, "num_channels", 3)
        return {n: preprocessing.add_pixels(dataset, processor, column, channels, n) for n, dataset in splits.items()}
    length = _max_length(args.max_length, processor, config)
    if task == "seq2seq-lm":
        pair = preprocessing.source_and_target_columns(train, args.text_column_name, args.target_column_name)
        return {n: preprocessing.tokenize_pairs(dataset, processor, pair, length, n) for n, dataset in splits.items()}
    label = next((name for name in ("label", "labels") if name in train.column_names), None)
    columns = preprocessing.text_columns(train, args.text_column_name, label)
    if args.block_size is not None:
        return _blocks(splits, args, processor, columns, config)
    return {n: preprocessing.tokenize(dataset, processor, columns, length, n) for n, dataset in splits.items()}


def _blocks(
    splits: dict[str, Dataset], args: DataArguments, tokenizer: Any, columns: Sequence[str], config: Any
) -> dict[str, Dataset]:
    most = _max_length(cast(int, args.block_size), tokenizer, config)
    if args.block_size != most or len(columns) > 1:
        raise ValueError(
            f"--block_size {args.block_size} of the column {' and '.join(columns)}: the model takes blocks of at most "
            f"{most} tokens, of one column."
        )
    limits = {"train": args.max_train_examples, "query": args.max_query_examples}
    return {
        name: draw_rows(text_blocks(dataset, tokenizer, columns[0], most, name), limits[name])
        for name, dataset in splits.items()
    }


def _max_length(asked: int, tokenizer: Any, config: Any) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(asked, tokenizer.model_max_length, positions or asked)


def _collator(processor: Any, task: str) -> Any:
    if task == "image-classification":
        return default_data_collator
    if task == "text-classification":
        return DataCollatorWithPadding(processor)
    if task == "seq2seq-lm":
        return DataCollatorForSeq2Seq(processor)
    return DataCollatorForLanguageModeling(processor, mlm=task == "masked-lm")
