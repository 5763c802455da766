"""What differentiating through a training costs, and what its derivative predicts. Used by benchmark.py.

python scripts/unrolled.py speed    # seconds of sweeps and of recording, in training steps
python scripts/unrolled.py lds      # LDS of unroll and smoothed_unroll under the fixed protocol
python scripts/unrolled.py resampled    # the same under the resampled protocol, beside other methods, on a smaller CNN
python scripts/unrolled.py resampled ViT FOLDER 12    # on a small transformer, with 12 runs, kept in a folder
"""

import contextlib
import dataclasses
import datetime
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedModel,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import logging

from hf_attribution import AttributionTrainer, Influence, SmoothedUnroll, Unroll, evaluate_lds
from hf_attribution.methods import LabelMatch, Method
from hf_attribution.replay.run import RecordedRun
from hf_attribution.replay.sweep import Differentiable
from hf_attribution.seeds import derive_seed
from hf_attribution.tasks import infer_task

QUERIES, FEWER, GROUPS, STEPS = 64, 16, 10, 10


class DigitsConfig(PretrainedConfig):
    """Configuration of a [`DigitsForImageClassification`]."""

    model_type = "digits_cnn"
    num_classes: int = 10
    width: int = 16
    activation: str = "relu"


class DigitsForImageClassification(PreTrainedModel):
    """A residual network without normalisation: 28k parameters with the default width."""

    config_class = DigitsConfig
    main_input_name = "pixel_values"

    def __init__(self, config: DigitsConfig) -> None:
        super().__init__(config)
        narrow, wide = config.width, 2 * config.width
        self.stem, self.down = nn.Conv2d(1, narrow, 3, padding=1), nn.Conv2d(narrow, wide, 3, padding=1, stride=2)
        self.first, self.second = nn.Conv2d(wide, wide, 3, padding=1), nn.Conv2d(wide, wide, 3, padding=1)
        self.classifier = nn.Linear(wide * 16, config.num_classes)
        self.activation = ACT2FN[config.activation]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if hasattr(module, "reset_parameters"):
            cast(nn.Linear, module).reset_parameters()  # torch's own

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Logits `[B, 10]` of images `[B, 1, 8, 8]`, and with labels the mean cross-entropy."""
        act = self.activation
        hidden = act(self.down(act(self.stem(pixel_values))))
        hidden = hidden + self.second(act(self.first(hidden)))
        logits = self.classifier(hidden.flatten(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def digits(rows: slice) -> Dataset:
    """Images and labels, in one fixed random order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))[rows]
    images = (torch.tensor(data.images, dtype=torch.float32)[order, None] / 16 - 0.3) / 0.37
    return Dataset.from_dict({"pixel_values": images.numpy(), "labels": data.target[order.numpy()]}).with_format(
        "torch"
    )


def tokens(rows: slice) -> Dataset:
    """Rows of 32 random tokens of 256."""
    ids = torch.randint(256, (2000, 32), generator=torch.Generator().manual_seed(0))[rows]
    return Dataset.from_dict({"input_ids": ids.numpy(), "labels": ids.numpy()}).with_format("torch")


def cnn() -> PreTrainedModel:
    """The digits CNN."""
    return DigitsForImageClassification(DigitsConfig())


def small_cnn() -> PreTrainedModel:
    """The same with smooth activations and 9k parameters."""
    return DigitsForImageClassification(DigitsConfig(width=8, activation="gelu"))


def vit() -> PreTrainedModel:
    """A small ViT on 16 patches of a digit."""
    shape: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    config = ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, **shape)
    return ViTForImageClassification(config)


def small_vit() -> PreTrainedModel:
    """A smaller one, of one layer on 4 patches, with 10k parameters."""
    shape: dict[str, Any] = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
    dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, **shape, **dropout
    )
    return ViTForImageClassification(config)


def gpt2(**settings: Any) -> PreTrainedModel:
    """A small GPT-2 on 32 tokens, with further settings of its configuration."""
    shape: dict[str, Any] = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **shape, **settings))


def trainer_of(
    model: Any, train: Dataset, folder: str, record: bool, extra: dict[str, Any] | None = None, **settings: Any
) -> AttributionTrainer:
    """A quiet trainer on one core."""
    chosen = {
        "per_device_train_batch_size": 32,
        "max_steps": STEPS,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
        "data_seed": 0,
        **settings,
    }
    given = {**(extra or {}), **({"model": model} if isinstance(model, nn.Module) else {"model_init": model})}
    return AttributionTrainer(
        **given, args=TrainingArguments(output_dir=folder, **chosen), train_dataset=train, record=record
    )


def training_seconds(model: Any, train: Dataset, record: bool, steps: int) -> float:
    """CPU seconds of a step of the Trainer."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(model, train, folder, record, max_steps=steps)
        started = time.process_time()
        trainer.train()
        return (time.process_time() - started) / steps


def bare_seconds(model: Any, train: Dataset) -> float:
    """CPU seconds of a forward and backward pass, without data loading, optimiser and Trainer."""
    batch, seconds = train[:32], []
    for _ in range(10):
        started = time.process_time()
        model(**batch).loss.backward()
        seconds.append(time.process_time() - started)
    return sorted(seconds)[2]


def speed(console: Console, *names: str, repeats: int = 2) -> None:
    """Time of a sweep per query (or group) and step, in the Trainer's steps, beside double backward."""
    table = Table(
        "model",
        f"{QUERIES} queries",
        "1 query",
        f"double backward, {FEWER} queries",
        f"{GROUPS} groups",
        "recording",
        title="Trainer steps (bare forward and backward passes)",
    )
    models: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[slice], Dataset]]] = {
        "CNN": (cnn, digits),
        "ViT": (vit, digits),
        "GPT-2": (gpt2, tokens),
    }
    for name in names or models:
        make, data = models[name]
        train = data(slice(1000))
        # In turn, so that what else the machine does troubles both alike.
        steps = [
            [training_seconds(make(), train, record, 20 * STEPS) for record in (False, True)] for _ in range(repeats)
        ]
        plain, recorded = map(min, zip(*steps, strict=True))
        with tempfile.TemporaryDirectory() as folder:
            model: nn.Module = make()
            trainer = trainer_of(model, train, folder, True)
            trainer.train()
            prepared = Differentiable.prepare(RecordedRun.open(Path(folder, "recording"), trainer), infer_task(model))
            size, chunk = sum(prepared.flat.sizes), prepared.fastest_chunk(QUERIES)
            slow = dataclasses.replace(prepared, product=prepared.flat.double_backward)
            found = []
            for way, queries in ((prepared, QUERIES), (prepared, 1), (slow, FEWER)):
                started = time.process_time()
                way.sweep(torch.randn(queries, size), chunk=chunk)
                found.append((time.process_time() - started) / queries / STEPS)
            started = time.process_time()
            members = (torch.arange(len(train)) % GROUPS == torch.arange(GROUPS)[:, None]).float()
            prepared.push(members, chunk=chunk)
            found.append((time.process_time() - started) / GROUPS / STEPS)
        bare = bare_seconds(make(), train)
        cells = [f"{value / plain:.2f} ({value / bare:.2f})" for value in found]
        console.print(
            name,
            f"step {1000 * plain:.1f} ms, forward and backward {1000 * bare:.1f} ms",
            *cells,
            f"recording {recorded / plain - 1:+.1%}",
        )
        table.add_row(f"{name} ({size:,}; chunk {chunk})", *cells, f"{recorded / plain - 1:+.1%}")
    console.print(table)


def lds(console: Console, queries: int = 16, num_subsets: int = 24, runs: int = 4) -> None:
    """LDS under the fixed protocol at three fractions, of one training with SGD and momentum of 100 steps."""
    train, query = digits(slice(1000)), digits(slice(1000, 1000 + queries))
    table = Table("fraction kept", "method", "LDS", "partial", "seconds")
    seed = derive_seed(1, "run", 0)  # of the one training that retrain(protocol="fixed", seed=1) repeats
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(
            cnn, train, folder, True, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})},
            learning_rate=0.05, max_steps=100, per_device_train_batch_size=100, max_grad_norm=0.0, seed=seed,
            data_seed=seed,
        )  # fmt: skip
        started = time.process_time()
        trainer.train()
        console.print(f"one training: {time.process_time() - started:.1f} s")
        methods: list[Method] = [LabelMatch(), Unroll(), Unroll(at="mean", fraction=0.5)]
        scores = [trainer.attribute(query, method=method) for method in methods]
        for fraction in (0.99, 0.95, 0.5):
            started = time.process_time()
            truth = trainer.retrain(query, num_subsets, fraction, protocol="fixed", seed=1)
            console.print(f"{num_subsets} trainings at {fraction}: {time.process_time() - started:.0f} s")
            smooth = SmoothedUnroll(runs=runs, fraction=fraction, vary="masks", seed=1)
            now = scores if fraction == 0.99 else [*scores, trainer.attribute(query, method=smooth)]
            for each in now:
                report = evaluate_lds(each, truth, train)
                choices = {k: v for k, v in each.provenance["choices"].items() if k in ("linearity", "reliability")}
                seconds = f"{each.provenance['seconds']:.0f}"
                console.print(
                    fraction, each.method, each.settings.get("at", ""), report.lds, report.partial_lds, choices
                )
                table.add_row(str(fraction), each.method, f"{report.lds:.2f}", str(report.partial_lds), seconds)
    console.print(table)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model and its training, for 1,000 digits under the resampled protocol."""

    model_init: Callable[[], PreTrainedModel]
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]]
    max_steps: int


SETTINGS = {
    "CNN": Setting(small_cnn, (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}), 100),
    "ViT": Setting(small_vit, (torch.optim.AdamW, {"lr": 2e-3, "eps": 1e-4, "weight_decay": 0.0}), 200),
}


def resampled(
    console: Console,
    name: str = "CNN",
    folder: str = "",
    runs: int = 20,
    num_subsets: int = 60,
    seeds: int = 4,
) -> None:
    """LDS on random halves that are trained on afresh: initial weights, order and examples all new.

    With a folder, what is finished in it is not done again.
    """
    train, query = digits(slice(1000)), digits(slice(1000, 1000 + FEWER))
    setting = SETTINGS[name]
    with contextlib.ExitStack() as stack:
        trainer = trainer_of(
            setting.model_init, train, folder or stack.enter_context(tempfile.TemporaryDirectory()), True,
            {"optimizer_cls_and_kwargs": setting.optimizer}, learning_rate=setting.optimizer[1]["lr"],
            max_steps=setting.max_steps, per_device_train_batch_size=100, max_grad_norm=0.0,
        )  # fmt: skip
        trainer.train()
        predicted = cast(Any, trainer.predict(query)).predictions.argmax(-1)
        console.print(f"{name}: {(predicted == np.array(query['labels'])).mean():.0%} of the queries right")
        full, half = (trainer.train_ensemble(6, fraction) for fraction in (1.0, 0.5))
        training = full.provenance["seconds"] / 6
        found: dict[str, tuple[Any, float]] = {}

        def score(name: str, method: Method, ensemble: Any = None) -> None:
            scores = trainer.attribute(query, method=method, checkpoints=ensemble)
            before = ensemble.provenance["seconds"] if ensemble is not None else 0.0
            found[name] = scores, (scores.provenance["seconds"] + before) / training
            console.print(f"{name}: {found[name][1]:.1f} trainings")

        score("label_match", LabelMatch())
        score("influence", Influence())
        score("influence, 6 full models", Influence(), full)
        score("influence, 6 half models", Influence(), half)
        score("unroll", Unroll(radius=None))
        for curvature in ("exact", "gauss_newton"):
            seconds = 0.0
            for some in sorted({number for number in (1, 2, 6, 12, runs) if number <= runs}):
                smooth = trainer.attribute(query, method=SmoothedUnroll(runs=some, curvature=curvature))
                seconds += smooth.provenance["seconds"]  # fewer runs are the first of more, and found again
                found[f"smoothed_unroll, {curvature}, {some} runs"] = smooth, seconds / training
                console.print(f"{some} runs: {seconds / training:.1f} trainings; {smooth.provenance['choices']}")
        truth = trainer.retrain(query, num_subsets, 0.5, seeds=seeds)
    table = Table("method", "LDS", "partial LDS", "trainings")
    for name, (scores, cost) in found.items():
        report = evaluate_lds(scores, truth, train)
        intervals = [
            f"{value:.3f} [{low:.2f}, {high:.2f}]"
            for value, (low, high) in (
                (report.lds, report.confidence_interval),
                (report.partial_lds, report.partial_confidence_interval or (math.nan, math.nan)),
            )
        ]
        table.add_row(name, *intervals, f"{cost:.1f}")
    console.print(table)
    console.print(f"{report}\n{FEWER} queries; one training {training:.2f} s; {datetime.date.today()}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    if sys.argv[1] == "speed":
        speed(Console(width=140), *sys.argv[2:])
    elif sys.argv[1] == "resampled":
        name, folder, runs = (*sys.argv[2:], *("CNN", "", "20")[len(sys.argv) - 2 :])
        resampled(Console(width=140), name, folder, int(runs))
    else:
        lds(Console(width=140))
