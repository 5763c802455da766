"""Options of the command line and the scripts: dataclasses for transformers' `HfArgumentParser`."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal


def option(help: str, default: Any = None) -> Any:
    """A field with a help text."""
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    """Which model, and what of it is measured."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str = field(
        metadata={"help": "Model on the Hub, or a folder of save_pretrained, with its tokenizer or image processor."}
    )
    task: Literal["text-classification", "image-classification", "causal-lm", "masked-lm", "seq2seq-lm"] | None = (
        option("What the model does. By default told from the architecture in its config.")
    )
    measurement: str | None = option(
        "Output to explain: margin, log_probability, loss, negative_loss, logit or logit:3 (of class 3). By default "
        "the correct-class margin of a classifier, and the log-probability of a language model."
    )
    from_scratch: bool = option("Start from new weights, drawn for every training; only the config is read.", False)
    model_revision: str = option("Branch, tag or commit on the Hub.", "main")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "Type to load the weights in; auto keeps the type they were saved in.", "auto"
    )
    trust_remote_code: bool = option("Run the model's own code from the Hub. Read it before.", False)


@dataclass
class DataArguments:
    """Which training examples and which queries, and how they are preprocessed."""

    _argument_group_name: ClassVar[str] = "data"

    dataset_name: str | None = option(
        "Dataset on the Hub, folder (of parquet, csv, json or image files, or of save_to_disk), or one such file."
    )
    dataset_config_name: str | None = option("Configuration of the dataset on the Hub.")
    train_split: str | None = option("Split with the training examples. By default train, or the only one.")
    query_split: str | None = option("Split with the queries. By default test or validation.")
    query_dataset_name: str | None = option("Dataset, folder or file with the queries. By default --dataset_name.")
    max_train_examples: int | None = option(
        "Train on this many rows: dataset.shuffle(seed=0).select(range(max_train_examples))."
    )
    max_query_examples: int | None = option("Likewise for the queries.")
    text_column_name: list[str] | None = field(
        default=None, metadata={"help": "Column of the text; two for a pair of texts. By default found."}
    )
    target_column_name: str | None = option("Column of the text that a seq2seq model should write. By default found.")
    image_column_name: str | None = option("Column of the image. By default the only one that holds images.")
    label_column_name: str | None = option("Column of the label. By default label or labels, or the only class label.")
    max_length: int = option("Tokens after which a text is cut off, and no more than the model takes.", 512)
    block_size: int | None = option(
        "For language models: join all texts, and cut them into training examples of so many tokens. By default an "
        "example is a row."
    )


@dataclass
class AttributeArguments:
    """How to attribute, and where the scores go."""

    _argument_group_name: ClassVar[str] = "attribution"

    method: str = option("Attribution method: see `hf-attribution methods`.", "trak")
    method_settings: str | None = option("""Its settings as JSON: '{"dim": 4096, "seed": 1}'.""")
    checkpoints: list[str] | None = field(
        default=None,
        metadata={
            "help": "Folders of weights to average over: independently trained models, say. For tracin, the "
            "output_dir of the training, whose checkpoint-* count by their learning rates. By default the model's own "
            "weights."
        },
    )
    batch_size: int = option("Rows in a batch. It does not change the scores.", 32)
    batch_tokens: int | None = option("Tokens in a batch, padding included, instead of batch_size rows.")
    cache_dir: str | None = option("Folder that keeps projected gradients for the next call. By default deleted.")
    store_dtype: str = option("Number format of projected gradients: float32, float16, bfloat16, int8.", "float32")
    dry_run: bool = option("Only say what would be done, and roughly how long it would take.", False)
    output_file: str = option("Where the scores are written.", "scores.safetensors")

    def __post_init__(self) -> None:
        check_output_file(self.output_file)

    @property
    def settings(self) -> dict[str, Any]:
        """The method's settings.

        Returns:
            Settings by name.
        """
        return _settings(self.method_settings)


@dataclass
class EstimateArguments:
    """What to estimate scores from, and how."""

    _argument_group_name: ClassVar[str] = "estimation"

    counterfactuals: str = field(metadata={"help": "File of retrainings, written by `hf-attribution retrain`."})
    method: str = option("Estimator: datamodel, subsampled_influence, banzhaf, ame, shapley or loo.", "datamodel")
    method_settings: str | None = option("""Its settings as JSON: '{"penalty": "ridge"}'.""")
    group_column: str | None = option(
        "Column of --dataset_name whose classes or sources get effects of their own in a datamodel."
    )
    previous: str | None = option("File of scores of fewer of these subsets, which the fit then starts from.")
    output_file: str = option("Where the scores are written.", "scores.safetensors")

    def __post_init__(self) -> None:
        check_output_file(self.output_file)

    @property
    def settings(self) -> dict[str, Any]:
        """The estimator's settings.

        Returns:
            Settings by name.
        """
        groups = {} if self.group_column is None else {"group_column": self.group_column}
        return {**_settings(self.method_settings), **groups}


@dataclass
class RetrainArguments:
    """How often to retrain, on what, and where the outputs go."""

    _argument_group_name: ClassVar[str] = "retraining"

    num_subsets: int = option("Random subsets of the training data to train on.", 100)
    fraction: float = option("Fraction of the training data in each subset.", 0.5)
    seeds: int = option("Trainings on each subset. Two or more are needed for a noise ceiling.", 1)
    protocol: Literal["resampled", "fixed"] = option(
        "resampled: every training has an order (and new weights) of its own. fixed: one training, in which examples "
        "that are left out weigh nothing.",
        "resampled",
    )
    keep_checkpoints: bool = option("Keep the final weights of every training, in --output_dir.", False)
    workers: str = option(
        "Trainings at a time on this machine; ray for as many as a cluster of Ray has room for.", "1"
    )
    shard: str | None = option(
        "Train this share alone, 3/16, as one of several jobs with the same --output_dir: sbatch --array=1-16 and "
        "--shard $SLURM_ARRAY_TASK_ID/16. The last job collects all outputs."
    )
    dry_run: bool = option("Only say what would be done, and roughly how long it would take.", False)
    output_file: str = option("Where the outputs of all trainings are written.", "counterfactuals.safetensors")

    def __post_init__(self) -> None:
        check_output_file(self.output_file)

    @property
    def crew(self) -> Any:
        """Who trains, as `retrain` takes it: a number of workers, or `"ray"`.

        Returns:
            The number, or whatever else was given.
        """
        return int(self.workers) if self.workers.isdecimal() else self.workers


@dataclass
class EvaluateArguments:
    """What is judged by what."""

    _argument_group_name: ClassVar[str] = "evaluation"

    scores: list[str] = field(metadata={"help": "Files of scores, each written by `hf-attribution attribute`."})
    counterfactuals: str = field(metadata={"help": "File of retrainings, written by `hf-attribution retrain`."})
    group_column: str | None = option(
        "Column of the training data whose counts in a subset are regressed out for the partial LDS. By default the "
        "label."
    )
    confidence_level: float = option("Of the intervals.", 0.95)
    json: bool = option("Print the reports as JSON.", False)


@dataclass
class PushArguments:
    """What goes to the Hub, and where."""

    _argument_group_name: ClassVar[str] = "push"

    artefact: str = field(
        metadata={"help": "File of scores, retrainings or subsets, or the folder of a feature store."}
    )
    repo_id: str = field(metadata={"help": "Dataset repository on the Hub, user/name. It is made if it is missing."})
    private: bool = option("Make the repository private; one that is public is refused.", False)
    revision: str | None = option("Branch. By default main.")
    top_k: int = option("Training examples that are shown for each query of scores.", 10)
    columns: list[str] | None = field(
        default=None,
        metadata={"help": "Columns of --dataset_name to publish beside scores. By default all; none without it."},
    )
    counterfactuals: str | None = option("File of retrainings to measure the LDS of scores by, for the card.")
    model_id: str | None = option("The model on the Hub. By default as recorded, if it came from there.")
    model_revision: str | None = option("Its commit.")
    dataset_id: str | None = option("The training dataset on the Hub. By default as recorded, if it came from there.")
    dataset_revision: str | None = option("Its commit.")
    license: str | None = option("Licence of what is pushed, as the Hub names it: cc-by-4.0.")
    language: str | None = option("Language of the texts: en.")


@dataclass
class PullArguments:
    """What is fetched from the Hub, and where to."""

    _argument_group_name: ClassVar[str] = "pull"

    repo_id: str = field(metadata={"help": "Dataset repository on the Hub that was pushed to."})
    output_file: str = field(
        metadata={"help": "Where what it holds is written: .safetensors, or a new folder for a feature store."}
    )
    revision: str | None = option("Branch, tag or commit. By default main.")

    def __post_init__(self) -> None:
        check_output_file(self.output_file)


@dataclass
class ReportArguments:
    """What the page shows, and where it goes."""

    _argument_group_name: ClassVar[str] = "report"

    scores: list[str] = field(
        metadata={"help": "Files of scores. The page shows the first; the others are compared with it."}
    )
    counterfactuals: str | None = option(
        "File of retrainings, written by `hf-attribution retrain`: how far the scores can be believed."
    )
    tokens: str | None = option("File of scores of tokens (PartScores.save): colours the training texts.")
    self_influence: str | None = option("File of scores of one row: each example's influence on itself.")
    group_column: str | None = option(
        "Column of the data whose agreement is shown and whose counts give the partial LDS. By default the label."
    )
    show_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns that are shown of a row. By default its images and texts."}
    )
    k: int = option("Helpful and harmful examples of each query.", 10)
    max_queries: int = option("The first so many queries are shown.", 200)
    title: str | None = option("What stands above the page.")
    output_file: str = option("Where the page is written.", "report.html")

    def __post_init__(self) -> None:
        check_output_file(self.output_file)


@dataclass
class DemoArguments:
    """Which acts of the demo to play, and how long."""

    _argument_group_name: ClassVar[str] = "demo"

    acts: list[str] = field(
        default_factory=lambda: ["digits", "reviews", "shakespeare"],
        metadata={"help": "Acts to play.", "choices": ["digits", "reviews", "shakespeare"]},
    )
    full: bool = option("More subsets and seeds, for tighter intervals.", False)
    every_method: bool = option("All methods, and ensembles for all that take one, not a few.", False)
    output_dir: str = option("Folder for scores, retrainings and pictures.", "outputs/demo")
    seed: int = option("Seed of everything random.", 0)


def check_output_file(path: str) -> None:
    """Refuse now what could not be written after hours of work; missing folders are made.

    Args:
        path: The file to be written.

    Raises:
        IsADirectoryError: If it is a folder.
        PermissionError: If its folder cannot be written to.
    """
    file = Path(path).absolute()
    if file.is_dir():
        raise IsADirectoryError(f"--output_file {path} is a folder: give the name of a file in it.")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(file.parent, os.W_OK):
        raise PermissionError(f"--output_file {path}: the folder {file.parent} cannot be written to.")


def _settings(text: str | None) -> dict[str, Any]:
    """The settings of a method from an option.

    Returns:
        Settings by name.

    Raises:
        ValueError: If they are not a JSON object.
    """
    try:
        settings = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"--method_settings {text!r} is not JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"""--method_settings must be a JSON object, '{{"dim": 4096}}', not {settings!r}.""")
    return settings
