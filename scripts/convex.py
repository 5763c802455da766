"""Where influence functions are exact, and where they stop: predicted against true leave-one-out retraining.

    python scripts/convex.py                      # everything, a few minutes on one core
    python scripts/convex.py --left_out 100       # narrower

Ridge and logistic regression are trained to their optimum on embeddings of a pretrained MiniLM and on digit images; so
is a small convolutional network (the figure of Koh & Liang 2017). Then training goes on from there without one
example, for a sample of examples, and the change of the queries' outputs is compared with what `Influence` predicts.
The last part repeats this for networks of growing depth and width and with ever less weight decay, where the
correlation breaks down (Basu et al. 2021, "Influence functions in deep learning are fragile").

Writes `influence.png` and `results.json` to --output_dir.
"""

import copy
import dataclasses
import datetime
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, HfArgumentParser

from hf_attribution import Influence, attribute
from hf_attribution.demo.data import load_digits, load_film_reviews, minilm_path
from hf_attribution.tasks import Classification, Regression, Task

NUM_TRAIN, NUM_QUERY = 1000, 50

# Training rows of the fragility check: the fewer there are, the more each of them changes.
FEW = 300


@dataclasses.dataclass
class Arguments:
    """Options."""

    left_out: int = dataclasses.field(default=20, metadata={"help": "Examples that are left out, one at a time."})
    output_dir: str = dataclasses.field(default="outputs/convex", metadata={"help": "Where results go."})
    seed: int = dataclasses.field(default=0, metadata={"help": "Seed of initial weights and of the examples."})


class Data(NamedTuple):
    """Training rows and queries, in double precision."""

    inputs: Tensor
    labels: Tensor
    query_inputs: Tensor
    query_labels: Tensor


class Case(NamedTuple):
    """A model to be trained on some data, and how its influence functions are taken."""

    name: str
    model: nn.Module
    data: Data
    task: Task
    weight_decay: float
    curvature: str


class Result(NamedTuple):
    """Predicted and true changes `[Q, left out]`, and how well they agree."""

    predicted: np.ndarray
    true: np.ndarray

    @property
    def correlation(self) -> float:
        """Pearson's r over all pairs of a query and an example left out."""
        return float(np.corrcoef(self.predicted.ravel(), self.true.ravel())[0, 1])

    @property
    def slope(self) -> float:
        """What the true change is per unit of the predicted one, by least squares."""
        return float((self.predicted * self.true).sum() / (self.predicted**2).sum())


class Net(nn.Module):
    """Any layers, with a `forward` as transformers' models have it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers).double()

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Any:
        """Logits `[B, C]`."""
        return {"logits": self.layers(inputs)}


def main() -> None:
    """Run all cases, print a table and draw the picture."""
    options: Any = Arguments
    (arguments,) = HfArgumentParser(options).parse_args_into_dataclasses()
    console, started = Console(), time.perf_counter()
    table = Table("model", "parameters", "weight decay", "Pearson r", "slope", "gradient left", "seconds")
    results: dict[str, Result] = {}
    rows = []
    for part, cases in (("figure", figure_cases(arguments.seed)), ("fragility", fragility_cases(arguments.seed))):
        for case in cases:
            begun = time.perf_counter()
            result, gradient = examine(case, arguments.left_out, arguments.seed)
            results[case.name] = result
            size = sum(p.numel() for p in case.model.parameters())
            seconds = time.perf_counter() - begun
            rows.append(
                {
                    "part": part, "model": case.name, "parameters": size, "weight_decay": case.weight_decay,
                    "curvature": case.curvature, "correlation": result.correlation, "slope": result.slope,
                    "gradient_norm": gradient, "seconds": seconds,
                }
            )  # fmt: skip
            console.print(f"{case.name}: r = {result.correlation:.4f}, {seconds:.0f} s")
            table.add_row(
                case.name, f"{size:,}", f"{case.weight_decay:g}", f"{result.correlation:.4f}", f"{result.slope:.3f}",
                f"{gradient:.0e}", f"{seconds:.0f}",
            )  # fmt: skip
    console.print(table)
    console.print(
        f"{NUM_TRAIN} training rows ({FEW} from depth 1 on), {NUM_QUERY} queries, {arguments.left_out} rows left out, "
        f"seed {arguments.seed}, "
        f"{datetime.date.today()}, {time.perf_counter() - started:.0f} s"
    )
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"arguments": dataclasses.asdict(arguments), "cases": rows}))
    draw(results, rows, folder / "influence.png")
    console.print(f"Picture: {folder / 'influence.png'}")


def figure_cases(seed: int) -> list[Case]:
    """The convex models, and the small convolutional network of Koh & Liang."""
    texts, pixels, small = embeddings(seed), digits(seed), digits(seed, side=7)
    flat = pixels._replace(inputs=pixels.inputs.flatten(1), query_inputs=pixels.query_inputs.flatten(1))
    targets = texts._replace(labels=2.0 * texts.labels - 1, query_labels=2.0 * texts.query_labels - 1)
    torch.manual_seed(seed)
    return [
        Case("ridge, MiniLM", Net(nn.Linear(384, 1)), targets, Regression("logit"), 100.0, "gauss_newton"),
        Case("logistic, MiniLM", Net(nn.Linear(384, 2)), texts, Classification(), 20.0, "hessian"),
        Case("logistic, digits", Net(nn.Linear(196, 10)), flat, Classification(), 3.0, "hessian"),
        Case("CNN, digits", cnn(), small, Classification(), 10.0, "hessian"),
    ]


def fragility_cases(seed: int) -> list[Case]:
    """Networks in which one thing at a time is changed: depth, width, weight decay."""
    pixels = digits(seed, side=7)
    flat = pixels._replace(
        inputs=pixels.inputs.flatten(1)[:FEW], labels=pixels.labels[:FEW], query_inputs=pixels.query_inputs.flatten(1)
    )

    def case(name: str, depth: int = 1, width: int = 16, weight_decay: float = 10.0) -> Case:
        torch.manual_seed(seed)
        return Case(name, mlp(depth, width), flat, Classification(), weight_decay, "gauss_newton")

    return [
        case("depth 1"),
        # With more weight decay than this four layers shrink to a constant, and a constant's influence is exact.
        *(case(f"depth {depth}, weight decay 3", depth=depth, weight_decay=3.0) for depth in (2, 4)),
        *(case(f"width {width}", width=width) for width in (4, 64)),
        *(case(f"weight decay {decay:g}", weight_decay=decay) for decay in (30.0, 3.0, 1.0, 0.3)),
    ]


def cnn() -> nn.Module:
    """A convolutional network with smooth activations, as Koh & Liang's figure needs it."""
    return Net(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def mlp(depth: int, width: int) -> nn.Module:
    """A network of some hidden layers."""
    sizes = [49] + [width] * depth
    hidden = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.Tanh())]
    return Net(*hidden, nn.Linear(width, 10))


def embeddings(seed: int) -> Data:
    """Sentences of film reviews as mean hidden states of a pretrained MiniLM, and whether they praise."""
    rows = load_film_reviews().shuffle(seed=seed).filter(lambda row: len(row["text"].split()) <= 40)
    rows = rows.select(range(NUM_TRAIN + NUM_QUERY))
    tokenizer, encoder = AutoTokenizer.from_pretrained(minilm_path()), AutoModel.from_pretrained(minilm_path())
    states = []
    with torch.no_grad():
        for batch in rows.iter(batch_size=50):
            tokens = tokenizer(batch["text"], padding=True, truncation=True, return_tensors="pt")
            mask = tokens["attention_mask"][..., None]
            states.append((encoder(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1))
    return _split(torch.cat(states).double(), torch.tensor(rows["label"]))


def digits(seed: int, side: int = 14) -> Data:
    """Digit images, reduced to `side` times `side` pixels."""
    rows = load_digits().shuffle(seed=seed).select(range(NUM_TRAIN + NUM_QUERY))
    images = torch.stack([torch.tensor(np.asarray(image, dtype=np.float64) / 255) for image in rows["image"]])
    return _split(nn.functional.avg_pool2d(images[:, None], 28 // side), torch.tensor(rows["label"]))


def _split(inputs: Tensor, labels: Tensor) -> Data:
    return Data(inputs[:NUM_TRAIN], labels[:NUM_TRAIN], inputs[NUM_TRAIN:], labels[NUM_TRAIN:])


def examine(case: Case, left_out: int, seed: int) -> tuple[Result, float]:
    """Train, predict, leave out; also the norm of the gradient that was left at the optimum."""
    gradient = descend(case, case.model, torch.ones(len(case.data.labels), dtype=torch.float64))
    chosen = np.random.default_rng(seed).permutation(len(case.data.labels))[:left_out]
    predicted = influence(case)[:, chosen]
    return Result(predicted, leave_one_out(case, chosen)), gradient


def descend(case: Case, model: nn.Module, weights: Tensor) -> float:
    """Minimise the weighted sum of losses with weight decay from where the model is; the gradient's final norm."""
    parameters = list(model.parameters())
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=1000, history_size=50, tolerance_grad=1e-7, tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> Tensor:
        optimizer.zero_grad()
        losses = case.task.losses(model, {"inputs": case.data.inputs, "labels": case.data.labels})
        decay = sum(parameter.square().sum() for parameter in parameters)
        total = (weights * losses).sum() + case.weight_decay / 2 * decay
        total.backward()
        return total

    optimizer.step(objective)
    objective()
    return float(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm())


def influence(case: Case) -> np.ndarray:
    """What leaving out each training row is predicted to take from each query's output, `[Q, N]`."""
    labels, query_labels = case.data.labels.tolist(), case.data.query_labels.tolist()
    rows = range(len(labels) + len(query_labels))
    train = Dataset.from_dict({"row": rows[: len(labels)], "labels": labels})
    query = Dataset.from_dict({"row": rows[len(labels) :], "labels": query_labels})
    inputs = torch.cat([case.data.inputs, case.data.query_inputs])

    def collate(rows: Sequence[Any]) -> dict[str, Tensor]:
        return {
            "inputs": inputs[[row["row"] for row in rows]],
            "labels": torch.tensor([row["labels"] for row in rows]),
        }

    def scores(damping: float) -> Any:
        return attribute(
            case.model, train, query, method=Influence(case.curvature, damping=damping), task=case.task,
            data_collator=collate, batch_size=100, remove_unused_columns=False, progress=False,
        )  # fmt: skip

    # The damping's unit depends on the model: ask for one, and then for the weight decay.
    (unit,) = scores(1.0).provenance["choices"]["lambda"]
    return scores(case.weight_decay / unit).values


def leave_one_out(case: Case, chosen: np.ndarray) -> np.ndarray:
    """What training on without each chosen row takes from each query's output, `[Q, chosen]`."""
    batch = {"inputs": case.data.query_inputs, "labels": case.data.query_labels}

    def measured(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return case.task.measurement(model, batch)

    full, changes = measured(case.model), []
    for row in chosen:
        model, weights = copy.deepcopy(case.model), torch.ones(len(case.data.labels), dtype=torch.float64)
        weights[row] = 0
        descend(case, model, weights)
        changes.append(full - measured(model))
    return torch.stack(changes, dim=1).numpy()


def draw(results: dict[str, Result], rows: list[dict[str, Any]], path: Path) -> None:
    """Predicted against true changes for the figure's models, and the correlations of the fragility check."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 5, figsize=(21, 4.2), constrained_layout=True)
    shown = [row for row in rows if row["part"] == "figure"]
    for axis, row in zip(axes, shown, strict=False):
        result = results[row["model"]]
        axis.scatter(result.predicted.ravel(), result.true.ravel(), s=4, alpha=0.4, linewidths=0)
        ends = [result.true.min(), result.true.max()]
        axis.plot(ends, ends, color="black", linewidth=0.8)
        axis.set(
            xlabel="predicted change", ylabel="true change", title=f"{row['model']}: r = {result.correlation:.4f}"
        )
    checked = [row for row in rows if row["part"] == "fragility"]
    axes[-1].barh([row["model"] for row in checked], [row["correlation"] for row in checked])
    axes[-1].invert_yaxis()
    axes[-1].set(xlabel="Pearson r", xlim=(min(0, *(row["correlation"] for row in checked)), 1), title="Fragility")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
