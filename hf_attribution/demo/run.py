"""The demo: each act trains, attributes with every method, retrains on subsets, and shows who predicted it best."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from rich.console import Console
from transformers import ProgressCallback, set_seed
from transformers.utils import logging

from hf_attribution.demo.acts import ACTS, Act, Effort, Material, accuracy
from hf_attribution.ensemble import Ensemble
from hf_attribution.evaluation import evaluate_lds
from hf_attribution.methods import METHODS, GradientMethod, Method, get_method
from hf_attribution.report.comparison import Entry, comparison_table
from hf_attribution.report.examples import text_examples
from hf_attribution.report.plots import plot_cost, plot_top
from hf_attribution.scores import Scores
from hf_attribution.trainer import AttributionTrainer

# The method that ensembles are shown with, and whose examples are shown.
SHOWN = "trak"

# A baseline or method of every kind, for the minutes that a demo has.
REPRESENTATIVE = (
    "random",
    "label_match",
    "representation_similarity",
    "grad_dot",
    "grad_cos",
    "tracin",
    "logra",
    "influence",
    "ekfac",
    "trak",
)
NUM_SHOWN = 4


class Scored(NamedTuple):
    """Scores, and the seconds they took: those of the trainings of an ensemble, too."""

    scores: Scores
    seconds: float


def run_demo(
    acts: Sequence[str] | None = None,
    full: bool = False,
    every_method: bool = False,
    output_dir: str | Path = "outputs/demo",
    seed: int = 0,
    console: Console | None = None,
) -> None:
    """Play acts of the demo. Interrupted and called again, it goes on where retraining stopped.

    Args:
        acts: Names in `ACTS`; all by default.
        full: Retrain more, for narrower intervals: an hour instead of minutes.
        every_method: Attribute with all methods, and with ensembles for all that can take one. Otherwise with a few.
        output_dir: Where checkpoints, scores, retrained outputs, tables and pictures go.
        seed: Seed of training, subsets and methods.
        console: Where to print.

    Raises:
        ValueError: If there is no act of a name.
    """
    console = console or Console()
    unknown = [name for name in acts or () if name not in ACTS]
    if unknown:
        raise ValueError(f"There is no act {unknown[0]!r}: choose from {', '.join(ACTS)}.")
    # Its own bars are enough: those of training and retraining stay.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    started = time.perf_counter()
    for name in acts or ACTS:
        _play(ACTS[name], full, every_method, Path(output_dir) / name, seed, console)
    console.print(f"\nAll of it took {(time.perf_counter() - started) / 60:.1f} minutes.")


def _play(act: Act, full: bool, every_method: bool, folder: Path, seed: int, console: Console) -> None:
    console.rule(f"[bold]{act.title}")
    effort = act.full if full else act.quick
    material = act.prepare()
    query = material.queries(effort.num_queries)
    set_seed(seed)
    trainer = _trainer(act, material, folder, seed)
    trainer.train()
    console.print(f"Trained on {len(material.train)} rows: {_quality(trainer)}.")
    ensembles = {
        name: trainer.train_ensemble(act.ensemble, fraction, seed, folder / f"ensemble-{name}-{seed}")
        for name, fraction in (("full", 1.0), ("half", 0.5))
    }
    # The unit of cost is the mean of several trainings: the first one of a process takes longer.
    training_seconds = ensembles["full"].provenance["seconds"] / act.ensemble
    console.print(f"Trained {act.ensemble} more, and {act.ensemble} on halves. One takes {training_seconds:.1f} s.")
    every = [name for name, kind in METHODS.items() if not (kind.needs_run or kind.needs_trainings)]
    names = [name for name in (every if every_method else REPRESENTATIVE) if name not in act.without]
    scored = _attribute(act, names, trainer, query, folder, console)
    ensembled = [name for name in names if takes_ensemble(METHODS[name])] if every_method else [SHOWN]
    scored |= _attribute_with_ensembles(act, ensembled, trainer, ensembles, query, folder, console)
    console.print(f"Retraining on {effort.num_subsets} random halves of the rows, {effort.seeds} seeds each.")
    truth = trainer.retrain(
        query, num_subsets=effort.num_subsets, fraction=0.5, seeds=effort.seeds, seed=seed,
        output_dir=folder / f"retraining-{seed}",
    )  # fmt: skip
    truth.save(folder / "counterfactuals.safetensors")
    entries = []
    for label, (scores, seconds) in scored.items():
        report = evaluate_lds(scores, truth, material.train, group_column=act.group_column)
        entries.append(Entry(label, report, seconds, seconds / training_seconds))
    _show(act, entries, scored[_label(act, SHOWN, "half")].scores, material, query, folder, console)
    _record(act, effort, training_seconds, entries, folder)


def _trainer(act: Act, material: Material, folder: Path, seed: int) -> AttributionTrainer:
    trainer = AttributionTrainer(
        model_init=material.model_init,
        args=act.training_arguments(
            folder / "run", seed=seed, data_seed=seed, disable_tqdm=False, logging_strategy="no"
        ),
        train_dataset=material.train,
        eval_dataset=material.held_out,
        data_collator=material.data_collator,
        processing_class=material.processing_class,
        compute_metrics=accuracy if act.group_column == "label" else None,
    )
    # The bar over retrainings is wanted; one over a training of seconds only gets in its way.
    trainer.remove_callback(ProgressCallback)
    return trainer


def _quality(trainer: AttributionTrainer) -> str:
    metrics = trainer.evaluate()
    if "eval_accuracy" in metrics:
        return f"accuracy {metrics['eval_accuracy']:.2f} on new rows"
    return f"loss {metrics['eval_loss']:.2f} per token on new rows"


def takes_ensemble(method: type[Method]) -> bool:
    """Whether a method compares gradients at given weights, whatever training led to them."""
    return issubclass(method, GradientMethod) and not method.needs_checkpoints


def _attribute(
    act: Act, names: Sequence[str], trainer: AttributionTrainer, query: Any, folder: Path, console: Console
) -> dict[str, Scored]:
    scored = {}
    for name in names:
        scores = trainer.attribute(query, method=_method(name, act))
        scores.save(folder / f"{name}.safetensors")
        scored[name] = Scored(scores, scores.provenance["seconds"])
        console.print(f"  {name}: {scored[name].seconds:.1f} s")
    return scored


def _attribute_with_ensembles(
    act: Act,
    names: Sequence[str],
    trainer: AttributionTrainer,
    ensembles: dict[str, Ensemble],
    query: Any,
    folder: Path,
    console: Console,
) -> dict[str, Scored]:
    """The same methods with several models: all trained on all rows, or each on a random half of them."""
    scored = {}
    for name in names:
        for kind, ensemble in ensembles.items():
            scores = trainer.attribute(query, method=name, checkpoints=ensemble)
            scores.save(folder / f"{name}-{kind}.safetensors")
            label, seconds = _label(act, name, kind), scores.provenance["seconds"] + ensemble.provenance["seconds"]
            scored[label] = Scored(scores, seconds)
            console.print(f"  {label}: {seconds:.1f} s with the trainings")
    return scored


def _label(act: Act, name: str, kind: str) -> str:
    return f"{name} ({act.ensemble} {kind})"


def _method(name: str, act: Act) -> str | Method:
    # Where rows have no label, what a baseline can match is the group they come from.
    return get_method(name, column=act.group_column) if name in ("label_match", "knn_shapley") else name


def _show(
    act: Act, entries: list[Entry], shown: Scores, material: Material, query: Any, folder: Path, console: Console
) -> None:
    console.print(comparison_table(entries, title=f"{act.title}: how well scores predict retraining"))
    console.print(str(next(entry.report for entry in entries if entry.label == _label(act, SHOWN, "half"))))
    picture = folder / "lds_against_cost.png"
    plot_cost(entries, act.title).savefig(picture)
    console.print(f"Picture: {picture}")
    queries = range(NUM_SHOWN)
    if act.shown_column == "image":
        examples = folder / "examples.png"
        plot_top(shown, material.train, query, queries).savefig(examples)
        console.print(f"What shaped some queries, as images: {examples}")
    else:
        console.print(text_examples(shown, material.train, query, queries, act.shown_column))


def _record(act: Act, effort: Effort, training_seconds: float, entries: list[Entry], folder: Path) -> None:
    record = {
        "act": act.name,
        "effort": dataclasses.asdict(effort),
        "training_seconds": training_seconds,
        "methods": [dataclasses.asdict(entry) for entry in entries],
    }
    (folder / "results.json").write_text(json.dumps(record, indent=2))
