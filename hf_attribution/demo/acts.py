"""The three acts of the demo: what is trained, on which rows, with which recipe, and how much is retrained.

An act only describes. `prepare()` reads its data and says how to make its model; everything else (training,
attributing, retraining) goes through the public face, as it would for anybody's own model.
"""

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from torch import Tensor
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_attribution.demo.data import load_digits, load_film_reviews, load_shakespeare, minilm_path
from hf_attribution.demo.models import (
    ResNet9Config,
    ResNet9ForImageClassification,
    minilm_classifier,
    small_gpt2,
    train_tokenizer,
)

_PLAYS = ("Hamlet", "Henry V", "Romeo and Juliet", "The Merchant of Venice")
_SHUFFLE_SEED = 0
_PRETRAINING_SEED = 7


@dataclass(frozen=True)
class Effort:
    """How much is retrained: the more, the narrower the interval around an LDS.

    Args:
        num_subsets: Random halves of the training set.
        seeds: Trainings on each of them; with at least two, the noise ceiling can be measured.
        num_queries: Rows of the held-out set that are explained.
    """

    num_subsets: int
    seeds: int
    num_queries: int


@dataclass(frozen=True, eq=False)
class Material:
    """What an act hands to a `Trainer`.

    Args:
        train: Training rows: the model's inputs beside columns for human readers.
        held_out: Rows never trained on, in an order that any first k of them represent. Queries are the first.
        model_init: Makes a model to train. Weights that are not pretrained come from torch's global generator.
        data_collator: Makes batches.
        processing_class: The tokenizer, if there is one.
    """

    train: Dataset
    held_out: Dataset
    model_init: Callable[[], PreTrainedModel]
    data_collator: Callable[[list[Any]], dict[str, Any]]
    processing_class: PreTrainedTokenizerBase | None = None

    def queries(self, num_queries: int) -> Dataset:
        """Take the first `num_queries` held-out rows.

        Args:
            num_queries: How many; at most as many as there are.

        Returns:
            The rows.
        """
        return self.held_out.select(range(num_queries))


@dataclass(frozen=True)
class Act:
    """One act of the demo.

    Args:
        name: Short name, for folders and the command line.
        title: What people read.
        prepare: Reads the data; the language model is also pretrained here. Takes up to ten seconds.
        training: Arguments of `TrainingArguments` that make the recipe.
        quick: How much is retrained by default.
        full: How much is retrained for narrow intervals.
        ensemble: Models in each ensemble to attribute with.
        shown_column: The column of a row that people look at.
        group_column: The column whose counts in a subset explain much of its effect: the label, or the play.
        without: Methods that its rows are not made for.

    Example:
        >>> ACTS["digits"].training_arguments("outputs/digits").num_train_epochs
        10
    """

    name: str
    title: str
    prepare: Callable[[], Material]
    training: Mapping[str, Any]
    quick: Effort
    full: Effort
    ensemble: int
    shown_column: str
    group_column: str
    without: tuple[str, ...] = ()

    def training_arguments(self, output_dir: str | Path, **changes: Any) -> TrainingArguments:
        """Make the act's `TrainingArguments`, with a checkpoint after every epoch (TracIn reads them).

        Args:
            output_dir: Where checkpoints go.
            changes: Arguments to replace, such as `save_strategy="no"`.

        Returns:
            The arguments.
        """
        settings: dict[str, Any] = {
            "output_dir": str(output_dir),
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.1,  # below 1: a share of all steps
            "per_device_eval_batch_size": 64,
            "seed": 0,
            "data_seed": 0,
            "save_strategy": "epoch",
            "logging_strategy": "epoch",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        return TrainingArguments(**{**settings, **self.training, **changes})


def accuracy(prediction: Any) -> dict[str, float]:
    """Compute accuracy, for `Trainer(compute_metrics=accuracy)`.

    Args:
        prediction: An `EvalPrediction` with logits `[N, C]` and labels `[N]`.

    Returns:
        `{"accuracy": ...}`.
    """
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


def _prepare_digits() -> Material:
    digits = load_digits().shuffle(seed=_SHUFFLE_SEED).select(range(2000)).flatten_indices()
    # A flat list of fixed length reads five times faster than `Array3D`.
    features = Features({**digits.features, "pixel_values": List(Value("float32"), length=28 * 28)})
    digits = digits.map(_pixel_values, batched=True, features=features)
    digits = digits.with_format("torch", columns=["pixel_values", "label"], output_all_columns=True)
    config = ResNet9Config(id2label=dict(enumerate(digits.features["label"].names)))
    return Material(
        train=digits.select(range(1000)),
        held_out=digits.select(range(1000, 2000)),
        model_init=lambda: ResNet9ForImageClassification(config),
        data_collator=_collate_digits,
    )


def _pixel_values(rows: dict[str, list[Any]]) -> dict[str, np.ndarray]:
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in rows["image"]])
    return {"pixel_values": ((pixels / 255 - 0.1307) / 0.3081).reshape(len(pixels), -1)}


def _collate_digits(rows: list[Any]) -> dict[str, Tensor]:
    batch = default_data_collator(rows)
    return {**batch, "pixel_values": batch["pixel_values"].view(-1, 1, 28, 28)}


def _prepare_reviews() -> Material:
    path = minilm_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    reviews = load_film_reviews()
    short = [row for row, text in enumerate(reviews["text"]) if 5 <= len(text.split()) <= 16]
    reviews = reviews.select(short).shuffle(seed=_SHUFFLE_SEED).select(range(912))
    reviews = reviews.map(lambda rows: tokenizer(rows["text"]), batched=True)
    return Material(
        train=reviews.select(range(512)),
        held_out=reviews.select(range(512, 912)),
        model_init=lambda: minilm_classifier(path),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )


def _prepare_shakespeare() -> Material:
    speeches = load_shakespeare()
    middling = [row for row, text in enumerate(speeches["text"]) if 16 <= len(text.split()) <= 34]
    speeches = speeches.select(middling).shuffle(seed=_SHUFFLE_SEED)
    others = [row for row, play in enumerate(speeches["play"]) if play not in _PLAYS]
    train, held_out = _split_by_play(speeches, num_train=120, num_held_out=50)
    tokenizer = train_tokenizer(speeches.select(others)["text"], vocab_size=512, max_length=48)

    def tokenize(rows: Dataset) -> Dataset:
        return rows.map(lambda batch: tokenizer(batch["text"], truncation=True), batched=True)

    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    pretrained = _pretrain(tokenizer, tokenize(speeches.select(others)), collator)
    return Material(
        train=tokenize(train),
        held_out=tokenize(held_out),
        model_init=lambda: copy.deepcopy(pretrained),
        data_collator=collator,
        processing_class=tokenizer,
    )


def _pretrain(tokenizer: PreTrainedTokenizerFast, rows: Dataset, collator: Any) -> PreTrainedModel:
    # From fresh weights, so small a model ends so differently from seed to seed that the effect of a subset
    # drowns: trainings on the same half did not agree on which halves suit a query.
    set_seed(_PRETRAINING_SEED)
    model = small_gpt2(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=32,
            learning_rate=4e-3,
            weight_decay=0.1,
            warmup_steps=0.1,
            data_seed=_PRETRAINING_SEED,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model.cpu()


def _split_by_play(speeches: Dataset, num_train: int, num_held_out: int) -> tuple[Dataset, Dataset]:
    """Take as many rows of each play for training, and as many others, the plays in turn."""
    plays = np.array(speeches["play"])
    rows = np.stack([np.flatnonzero(plays == play)[: num_train + num_held_out] for play in _PLAYS], axis=1)
    return speeches.select(rows[:num_train].reshape(-1)), speeches.select(rows[num_train:].reshape(-1))


ACTS: Mapping[str, Act] = MappingProxyType(
    {
        "digits": Act(
            name="digits",
            title="A ResNet-9 reads handwritten digits",
            prepare=_prepare_digits,
            training={"num_train_epochs": 10, "per_device_train_batch_size": 64, "learning_rate": 5e-3},
            quick=Effort(num_subsets=32, seeds=2, num_queries=200),
            full=Effort(num_subsets=200, seeds=5, num_queries=200),
            ensemble=5,
            shown_column="image",
            group_column="label",
            without=("bm25",),
        ),
        "reviews": Act(
            name="reviews",
            title="MiniLM judges film reviews",
            prepare=_prepare_reviews,
            training={"num_train_epochs": 2, "per_device_train_batch_size": 16, "learning_rate": 3e-4},
            quick=Effort(num_subsets=12, seeds=2, num_queries=100),
            full=Effort(num_subsets=100, seeds=3, num_queries=200),
            ensemble=3,
            shown_column="text",
            group_column="label",
        ),
        "shakespeare": Act(
            name="shakespeare",
            title="A small GPT-2 learns four plays of Shakespeare",
            prepare=_prepare_shakespeare,
            training={
                "num_train_epochs": 4,
                "per_device_train_batch_size": 16,
                "learning_rate": 2e-3,
                "weight_decay": 0.1,
            },
            quick=Effort(num_subsets=20, seeds=2, num_queries=100),
            full=Effort(num_subsets=200, seeds=4, num_queries=200),
            ensemble=5,
            shown_column="text",
            group_column="play",
            without=("representer",),
        ),
    }
)
