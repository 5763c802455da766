"""EK-FAC influence scores by this library and by kronfluence, on two small tasks: seconds, trainings, peak memory.

Both fit the factors and score, on the same trained model, rows, layers (linear ones and convolutions), damping and,
for the true Fisher matrix, drawn targets: draws of their own would add noise to the comparison. A row of the table is
a curvature and a library. `pip install --no-deps kronfluence==1.0.1 einconv einops opt_einsum`.
"""

import copy
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.memory import Peak
from benchmarks.small_cnn import SmallCNN, load
from benchmarks.small_cnn import train as train_cnn
from hf_attribution import EKFac, KFac, attribute
from hf_attribution.logits import sampled_classes
from hf_attribution.seeds import derive_seed
from hf_attribution.tasks import Classification

DAMPING = 0.1


class Example(NamedTuple):
    """A model, its data, and how it is trained."""

    train: Dataset
    query: Dataset
    fresh: Callable[[], nn.Module]
    fit: Callable[[], nn.Module]


def cnn() -> Example:
    """1,000 x 200 digits and a convolutional network of 28k parameters."""
    images, labels, query_images, query_labels = load()
    train_set, query_set = (
        Dataset.from_dict({"pixel_values": x.numpy(), "labels": y.numpy()}).with_format("torch")
        for x, y in ((images, labels), (query_images, query_labels))
    )
    return Example(train_set, query_set, SmallCNN, lambda: train_cnn(images, labels, seed=0))


def bert() -> Example:
    """640 x 100 sentences and a BERT of two layers, from scratch."""
    from hf_attribution.demo.data import load_film_reviews
    from hf_attribution.demo.models import train_tokenizer

    reviews = load_film_reviews()
    short = [row for row, text in enumerate(reviews["text"]) if 5 <= len(text.split()) <= 24]
    reviews = reviews.select(short).shuffle(seed=0).select(range(740))
    tokenizer = train_tokenizer(reviews["text"][:], vocab_size=1000, max_length=48)
    rows = tokenizer(reviews["text"][:], truncation=True, padding="max_length", max_length=48)
    columns = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"], "labels": reviews["label"][:]}
    dataset = Dataset.from_dict(columns).with_format("torch")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=48, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    train_set = dataset.select(range(640))
    return Example(
        train_set, dataset.select(range(640, 740)), lambda: BertForSequenceClassification(config),
        lambda: train_bert(config, train_set[:]),
    )  # fmt: skip


def train_bert(config: BertConfig, rows: dict[str, Tensor]) -> nn.Module:
    """Ten epochs of AdamW."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for _ in range(10):
        for batch in torch.randperm(len(rows["labels"])).split(16):
            optimizer.zero_grad()
            model(**{key: value[batch] for key, value in rows.items()}).loss.backward()
            optimizer.step()
    return model.eval()


EXAMPLES = {"28k CNN, 1,000 x 200": cnn, "small BERT, 640 x 100": bert}


def layers(model: nn.Module) -> tuple[str, ...]:
    """The layers that kronfluence knows."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d)))


def drawn_targets(model: nn.Module, example: Example, seed: int = 0) -> Tensor:
    """The targets that this library draws from the model for the training examples, `[N]`."""
    columns = example.train[:]
    seeds = torch.tensor([derive_seed("targets", seed, row) for row in range(len(example.train))])
    with torch.no_grad():
        logits = model(**{key: values for key, values in columns.items() if key != "labels"})["logits"]
    return sampled_classes(logits[:, None], columns["labels"][:, None], seeds)[:, 0]


def ours(
    model: nn.Module, example: Example, curvature: str, method: type[EKFac] | type[KFac] = EKFac, seed: int = 0
) -> tuple[np.ndarray, float]:
    """Scores of this library, and the damping per example."""
    settings = method(curvature=curvature, modules=layers(model), damping=DAMPING, per_layer=False, seed=seed)
    scores = attribute(
        model, example.train, example.query, method=settings, task=Classification(), batch_size=100, progress=False
    )
    return scores.values, scores.provenance["choices"]["lambda"][0] / len(example.train)


def kronfluence(model: nn.Module, example: Example, curvature: str, ridge: float, drawn: Tensor) -> np.ndarray:
    """Scores of kronfluence, with the targets `[N]` of the true Fisher matrix."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**{key: value for key, value in batch.items() if key not in ("labels", "drawn")})["logits"]

    class Task_(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            found = logits(model, batch)
            return F.cross_entropy(found, batch["drawn" if sample else "labels"], reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            found, index = logits(model, batch), batch["labels"][:, None]
            # Minus the margin: scores of losses are minus those of gains.
            return (found.scatter(1, index, -torch.inf).logsumexp(1) - found.gather(1, index)[:, 0]).sum()

        def get_attention_mask(self, batch: Any) -> Tensor | None:
            return batch.get("attention_mask")

        def get_influence_tracked_modules(self) -> list[str]:
            return list(layers_known)

    layers_known = layers(model)
    task = Task_()
    tracked = prepare_model(model, task)
    train_set, query_set = _InMemory(example.train, drawn=drawn), _InMemory(example.query)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("model", tracked, task, cpu=True, output_dir=folder, disable_tqdm=True)
        factor_args = FactorArguments(strategy="ekfac", use_empirical_fisher=curvature == "fisher")
        analyzer.fit_all_factors("factors", train_set, per_device_batch_size=100, factor_args=factor_args)
        analyzer.compute_pairwise_scores(
            "scores", "factors", query_set, train_set, per_device_query_batch_size=len(query_set),
            per_device_train_batch_size=100, score_args=ScoreArguments(damping_factor=ridge),
        )  # fmt: skip
        return analyzer.load_pairwise_scores("scores")["all_modules"].numpy()


class _InMemory(TorchDataset[Any]):
    """Rows that cost nothing to read."""

    def __init__(self, dataset: Dataset, **more: Tensor) -> None:
        self.columns = {**dataset[:], **more}

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: values[index] for key, values in self.columns.items()}


def compare(repeats: int) -> list[tuple[str, ...]]:
    """Rows of a table: what, seconds, trainings, ratio to kronfluence, correlation with it, peak memory."""
    rows: list[tuple[str, ...]] = []
    installed = importlib.util.find_spec("kronfluence") is not None
    for name, make in EXAMPLES.items():
        example = make()
        seconds: dict[str, list[float]] = {}
        scores: dict[str, np.ndarray] = {}
        for _ in range(repeats):  # alternating, so that what else the machine does troubles all alike
            model = _timed(seconds, "training", example.fit)
            drawn = drawn_targets(model, example)
            for curvature in ("true_fisher", "fisher"):
                found, ridge = _timed(seconds, f"ekfac {curvature}", lambda: ours(model, example, curvature))  # noqa: B023
                scores[f"ekfac {curvature}"] = found
                if installed:
                    key = f"kronfluence {curvature}"
                    copied = copy.deepcopy(model)  # it changes what it is given
                    scores[key] = _timed(seconds, key, lambda: kronfluence(copied, example, curvature, ridge, drawn))  # noqa: B023
            scores["kfac true_fisher"], _ = _timed(
                seconds,
                "kfac true_fisher",
                lambda: ours(model, example, "true_fisher", KFac),  # noqa: B023
            )
        medians = {key: statistics.median(values) for key, values in seconds.items()}
        for key, median in medians.items():
            other = medians.get("kronfluence " + key.partition(" ")[2], float("nan"))
            mine = scores.get(key, np.zeros(1)).ravel()
            theirs = scores.get("kronfluence " + key.partition(" ")[2], np.zeros(1)).ravel()
            correlated = key.startswith("ekfac") and installed
            rows.append(
                (
                    name, key, f"{median:.2f}", f"{median / medians['training']:.2f}",
                    f"{other / median:.2f}" if key in scores else "",
                    f"{np.corrcoef(mine, theirs)[0, 1]:.4f}" if correlated else "",
                    f"{peak_memory(name, key):.0f}" if key in scores else "",
                )
            )  # fmt: skip
    return rows


def peak_memory(name: str, key: str) -> float:
    """MiB that a run takes beyond model and data, in a process of its own, on fresh weights."""
    command = [sys.executable, "-m", "benchmarks.reference_ekfac", name, key]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    return json.loads(output.stdout.splitlines()[-1])


def measure(name: str, key: str) -> float:
    """The same, in this process."""
    method, _, curvature = key.partition(" ")
    example = EXAMPLES[name]()

    def run(example: Example) -> None:
        model = example.fresh().eval()
        if method == "kronfluence":
            kronfluence(model, example, curvature, 1e-4, example.train[:]["labels"])
        else:
            ours(model, example, curvature, EKFac if method == "ekfac" else KFac)

    # A few rows first, which load the code of the libraries.
    run(example._replace(train=example.train.select(range(16)), query=example.query.select(range(4))))
    with Peak() as peak:
        run(example)
    return peak.mib


def _timed(seconds: dict[str, list[float]], key: str, run: Callable[[], Any]) -> Any:
    started = time.process_time()
    found = run()
    seconds.setdefault(key, []).append(time.process_time() - started)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(sys.argv[1], sys.argv[2])))
