"""One small task, and methods of this library and of others on it: seconds, trainings, LDS.

The others run with the projector they take on a CPU, the same dimension and the same damping, the mean squared norm of
the training features: without any (their default) the kernel of more dimensions than examples cannot be inverted.
`pip install --no-deps traker==0.3.2 dattri==0.3.0`.
"""

import functools
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hf_attribution import Counterfactuals, Influence, Scores, Subsets, Trak, attribute, evaluate_lds
from hf_attribution.methods import Method
from hf_attribution.tasks import Classification

EPOCHS, NUM_TRAIN, NUM_QUERY = 15, 1000, 200
NUM_SUBSETS, SEEDS = 40, 2


class SmallCNN(nn.Module):
    """A convolutional network of 28k parameters with a `forward` as transformers' models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.hidden, self.classifier = nn.Linear(32 * 4, 168), nn.Linear(168, 10)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        """Logits `[B, 10]` of images `[B, 1, 8, 8]`."""
        states = F.max_pool2d(F.relu(self.first(pixel_values)), 2)
        states = F.max_pool2d(F.relu(self.second(states)), 2)
        return {"logits": self.classifier(F.relu(self.hidden(states.flatten(1))))}


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """The logits alone, as the other libraries want them."""
    return model(images)["logits"]


def train(images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """Train a CNN with SGD."""
    torch.manual_seed(seed)
    model = SmallCNN()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(logits_of(model, images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval()


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels for training, images and labels to query."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))[: NUM_TRAIN + NUM_QUERY]
    images = (torch.tensor(digits.images, dtype=torch.float32) / 16 - 0.3)[order, None]
    labels = torch.tensor(digits.target)[order]
    return images[:NUM_TRAIN], labels[:NUM_TRAIN], images[NUM_TRAIN:], labels[NUM_TRAIN:]


Run = Callable[[nn.Module, tuple[Tensor, ...]], np.ndarray]


def ours(model: nn.Module, data: tuple[Tensor, ...], method: Method) -> np.ndarray:
    """A method of this library."""
    train_set, query_set = (
        Dataset.from_dict({"pixel_values": data[i].numpy(), "labels": data[i + 1].numpy()}).with_format("torch")
        for i in (0, 2)
    )
    return attribute(
        model, train_set, query_set, method=method, task=Classification(), batch_size=100, progress=False
    ).values


def traker(model: nn.Module, data: tuple[Tensor, ...], dim: int) -> np.ndarray:
    """TRAK by its authors' library, with the projector it takes on a CPU."""
    from trak import TRAKer
    from trak.modelout_functions import ImageClassificationModelOutput

    images, labels, query_images, query_labels = data
    plain = _Logits(model)
    with tempfile.TemporaryDirectory() as folder:
        tracer = TRAKer(
            plain, ImageClassificationModelOutput(), len(images), save_dir=folder, device="cpu", proj_dim=dim,
            use_half_precision=False, logging_level=40,
        )  # fmt: skip
        tracer.load_checkpoint(plain.state_dict(), model_id=0)
        for rows in torch.arange(len(images)).split(100):
            tracer.featurize((images[rows], labels[rows]), num_samples=len(rows))
        features = torch.as_tensor(np.array(tracer.saver.current_store["grads"]))
        tracer.score_computer.lambda_reg = float(features.square().sum(1).mean())
        tracer.finalize_features()
        tracer.start_scoring_checkpoint("query", plain.state_dict(), model_id=0, num_targets=len(query_images))
        for rows in torch.arange(len(query_images)).split(100):
            tracer.score((query_images[rows], query_labels[rows]), num_samples=len(rows))
        return np.array(tracer.finalize_scores("query")).T


def dattri(model: nn.Module, data: tuple[Tensor, ...], dim: int) -> np.ndarray:
    """TRAK by dattri, with the projector it takes on a CPU."""
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask
    from torch.func import functional_call
    from torch.utils.data import DataLoader, TensorDataset

    plain = _Logits(model)

    def margin(parameters: Any, row: Any) -> Tensor:
        logits = functional_call(plain, parameters, row[0][None])
        others = logits.scatter(1, row[1][None, None], -torch.inf).logsumexp(1)
        return (logits.gather(1, row[1][None, None])[:, 0] - others).sum()

    task = AttributionTask(loss_func=margin, model=plain, checkpoints=[plain.state_dict()])
    parameters = dict(plain.named_parameters())
    gradients = torch.func.vmap(torch.func.grad(margin), in_dims=(None, 0))(parameters, data[:2])
    damping = float(sum(gradient.square().flatten(1).sum(1).mean() for gradient in gradients.values()))
    attributor = TRAKAttributor(
        task, lambda parameters, row: margin(parameters, row).sigmoid(), device="cpu", regularization=damping,
        projector_kwargs={"proj_dim": dim, "device": "cpu"},
    )  # fmt: skip
    attributor.cache(DataLoader(TensorDataset(*data[:2]), batch_size=100))
    with torch.no_grad():
        return attributor.attribute(DataLoader(TensorDataset(*data[2:]), batch_size=100)).T.numpy()


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model, images)


def trak_libraries(dim: int) -> dict[str, Run]:
    """TRAK with one dimension of the projection, by the libraries that are installed."""
    others: dict[str, tuple[str, Callable[..., np.ndarray]]] = {
        "traker": ("trak", traker),
        "dattri": ("dattri", dattri),
    }
    return {"hf_attribution": functools.partial(ours, method=Trak(dim=dim))} | {
        name: functools.partial(run, dim=dim)
        for name, (package, run) in others.items()
        if importlib.util.find_spec(package)
    }


def influence_functions() -> dict[str, Run]:
    """The exact influence functions that this library takes through kernels."""
    methods = {
        "fisher": Influence(),
        "fisher, normalize='self_influence'": Influence(normalize="self_influence"),
        "fisher, group_effect=1": Influence(group_effect=1.0),
        "gauss_newton": Influence("gauss_newton"),
    }
    return {name: functools.partial(ours, method=method) for name, method in methods.items()}


def ground_truth(data: tuple[Tensor, ...]) -> Counterfactuals:
    """Margins of models retrained on random halves."""
    images, labels, query_images, query_labels = data
    subsets = Subsets.random(NUM_TRAIN, NUM_SUBSETS, fraction=0.5, seed=1)
    outputs = np.empty((NUM_SUBSETS, SEEDS, NUM_QUERY), dtype=np.float32)
    for m in range(NUM_SUBSETS):
        rows = torch.from_numpy(subsets.indices(m))
        for r in range(SEEDS):
            model = train(images[rows], labels[rows], seed=1000 + SEEDS * m + r)
            with torch.no_grad():
                batch = {"pixel_values": query_images, "labels": query_labels}
                outputs[m, r] = Classification().measurement(model, batch).numpy()
    return Counterfactuals(subsets, outputs, protocol={"name": "resampled", "fraction": 0.5, "seeds": SEEDS})


def compare(runs: dict[str, Run], repeats: int) -> list[tuple[str, str, str, str, str]]:
    """Rows of a table: name, seconds, trainings, LDS and partial LDS; medians over alternating repeats."""
    data = load()
    truth = ground_truth(data)
    labels = Dataset.from_dict({"labels": data[1].numpy()})
    seconds: dict[str, list[float]] = {name: [] for name in ("training", *runs)}
    scores: dict[str, np.ndarray] = {}
    for _ in range(repeats):
        started = time.process_time()
        model = train(data[0], data[1], seed=0)
        seconds["training"].append(time.process_time() - started)
        for name, run in runs.items():
            started = time.process_time()
            scores[name] = run(model, data)
            seconds[name].append(time.process_time() - started)
    training = statistics.median(seconds["training"])
    rows = [("one training", f"{training:.2f}", "1", "", "")]
    for name, values in scores.items():
        report = evaluate_lds(Scores(np.ascontiguousarray(values, dtype=np.float32), method=name), truth, labels)
        assert report.partial_lds is not None
        assert report.partial_confidence_interval is not None
        median = statistics.median(seconds[name])
        rows.append(
            (
                name,
                f"{median:.2f}",
                f"{median / training:.2f}",
                _with_interval(report.lds, report.confidence_interval),
                _with_interval(report.partial_lds, report.partial_confidence_interval),
            )
        )
    return rows


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.3f} [{interval[0]:.2f}, {interval[1]:.2f}]"
