"""Finds wrong labels and duplicates that are known to be there, and trains again without them.

    python scripts/debug_data.py                               # everything: about 15 minutes on a CPU
    python scripts/debug_data.py --parts digits --seed 1

Parts:
  digits      a ResNet-9 on 1,000 digits; 10% of the labels are replaced by another class, drawn at random
  reviews     MiniLM on 512 film reviews; 10% of the labels are flipped, drawn where a model that was trained on other
              reviews is least sure: what people get wrong is not drawn at random either
  duplicates  92 long film reviews that occur two or three times, word for word, among 1,000: as copies to be found in
              the training set, and as known sources of queries

What is measured: the ROC AUC (with DeLong's interval), average precision and precision at k of each score; then the
accuracy, on held-out rows with right labels, of models that were trained again without the suspects. Scores see no
flag, and nothing was chosen by these: their settings are the library's defaults.
"""

import dataclasses
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PrinterCallback,
    ProgressCallback,
    set_seed,
)
from transformers.utils import logging

from hf_attribution import AttributionTrainer, Subsets, find_duplicates, find_mislabeled, metric_path
from hf_attribution.demo.acts import ACTS, Act, Material
from hf_attribution.demo.data import load_film_reviews, minilm_path
from hf_attribution.demo.models import minilm_classifier
from hf_attribution.studies.brittleness import decision_margin
from hf_attribution.studies.removal import RemovalRuns
from hf_attribution.tasks import Classification

PARTS = ("digits", "reviews", "duplicates")
SELF_INFLUENCE = ("grad_dot", "trak", "logra", "influence")
SOURCE_METHODS = ("random", "label_match", "representation_similarity", "grad_cos", "trak", "influence")


@dataclasses.dataclass
class Arguments:
    """Options of the demonstration."""

    parts: list[str] = dataclasses.field(default_factory=lambda: list(PARTS), metadata={"help": ", ".join(PARTS)})
    noise: float = dataclasses.field(default=0.1, metadata={"help": "Share of the labels that are made wrong."})
    models: int = dataclasses.field(default=5, metadata={"help": "Models trained on random halves."})
    seeds: int = dataclasses.field(default=3, metadata={"help": "Trainings on each cleaned training set."})
    seed: int = dataclasses.field(default=0, metadata={"help": "Of the noise, the models and everything else."})
    output_dir: str = dataclasses.field(default="outputs/debug_data", metadata={"help": "Folder for all of it."})


def main(arguments: Arguments) -> dict[str, Any]:
    """Run the parts that are asked for; their numbers are also written to `results.json`."""
    disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console, results = Console(), {}
    for part in arguments.parts:
        folder = Path(arguments.output_dir) / f"{part}-{arguments.seed}"
        started = time.perf_counter()
        console.rule(part)
        if part == "duplicates":
            results[part] = duplicates(arguments, folder, console)
        else:
            results[part] = wrong_labels(ACTS[part], arguments, folder, console)
        console.print(f"{time.perf_counter() - started:.0f} s")
        (folder / "results.json").write_text(json.dumps(results[part], indent=1))
    return results


def wrong_labels(act: Act, arguments: Arguments, folder: Path, console: Console) -> dict[str, Any]:
    """Make labels wrong, find them, and train without the suspects."""
    material = act.prepare()
    half = len(material.held_out) // 2
    others, test = material.held_out.select(range(half)), material.held_out.select(range(half, 2 * half))
    rng = np.random.default_rng(arguments.seed)
    right = np.array(material.train.with_format(None)["label"])
    if act.name == "digits":
        flags = rng.permutation(len(right)) < round(arguments.noise * len(right))
    else:
        flags = mistaken(act, material, others, right, arguments, folder, rng)
    classes = material.train.features["label"].num_classes
    wrong = (right + rng.integers(1, classes, len(right))) % classes
    noisy = with_labels(material.train, np.where(flags, wrong, right))

    trainer = make_trainer(act, material, noisy, test, folder, arguments.seed)
    set_seed(arguments.seed)
    trainer.train()
    suspicions = suspect(trainer, noisy, arguments, folder)
    metric = evaluate.load(metric_path("mislabel_auc"))
    found = {
        name: metric.compute(predictions=scores, references=flags.astype(int), k=[flags.sum() // 2, flags.sum()])
        for name, scores in suspicions.items()
    }
    console.print(auc_table(f"{int(flags.sum())} wrong labels among {len(flags)} ({act.name})", found))

    # As many suspects are dropped as there are wrong labels; who cannot know their number has to look at them.
    def first(name: str) -> np.ndarray:
        return np.argsort(-suspicions[name], kind="stable")[: flags.sum()]

    dropped = {
        "random": first("random"),
        "loss": first("loss"),
        "influence": first("influence"),
        "influence, half models": first("influence, half models"),
        "held-out margin": first("held-out margin"),
        "the wrong labels themselves": np.flatnonzero(flags),
    }
    runs = RemovalRuns(
        trainer, test, folder / "cleaned", arguments.seeds, arguments.seed, Classification(decision_margin)
    )
    accuracy = {"nothing": runs.whole()[0]} | dict(zip(dropped, runs.without(list(dropped.values())), strict=True))
    table = Table("dropped", "accuracy", "by seed", title=f"Trained again, {len(test)} held-out rows")
    per_seed = {name: (outputs > 0).mean(axis=-1) for name, outputs in accuracy.items()}
    for name, shares in per_seed.items():
        table.add_row(name, f"{shares.mean():.3f}", " ".join(f"{share:.3f}" for share in shares))
    console.print(table)
    return {"mislabel_auc": found, "accuracy": {name: shares.tolist() for name, shares in per_seed.items()}}


def suspect(trainer: AttributionTrainer, noisy: Dataset, arguments: Arguments, folder: Path) -> dict[str, np.ndarray]:
    """Scores that are higher for examples whose label may be wrong, `[N]` each."""
    scores = {"random": np.random.default_rng(arguments.seed + 1).random(len(noisy))}
    # The loss of the model that was trained on the wrong labels, too.
    logits = np.asarray(trainer.predict(noisy).predictions)
    labels = np.array(noisy.with_format(None)["label"])
    scores["loss"] = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(labels)), labels]
    halves = trainer.train_ensemble(arguments.models, fraction=0.5, seed=arguments.seed, output_dir=folder / "halves")
    for suffix, checkpoints in (("", None), (", half models", halves)):
        for method in SELF_INFLUENCE:
            ranked = find_mislabeled(trainer, method=method, checkpoints=checkpoints)
            own = np.empty(len(noisy))
            own[ranked["train_index"][:]] = ranked["score"][:]
            scores[f"{method}{suffix}"] = own
    # What models say about an example that was left out of their half, and (Feldman & Zhang 2020, memorisation) how
    # much more they say if it was in. Complementary halves: each example is left out of every other training.
    masks = Subsets.random(len(noisy), arguments.models, 0.5, seed=arguments.seed + 2).masks
    subsets = Subsets(np.concatenate([masks, ~masks]), {"name": "complementary halves"})
    truth = trainer.retrain(noisy, subsets=subsets, seed=arguments.seed, output_dir=folder / "left_out")
    kept, margins = subsets.masks.T, truth.mean()
    left_out = (margins * ~kept).sum(1) / (~kept).sum(1)
    scores["held-out margin"] = -left_out
    scores["memorisation"] = (margins * kept).sum(1) / kept.sum(1) - left_out
    return scores


def mistaken(
    act: Act, material: Material, others: Dataset, right: np.ndarray, arguments: Arguments, folder: Path, rng: Any
) -> np.ndarray:
    """Which labels annotators would get wrong: drawn as often as a model of other rows doubts them."""
    annotator = make_trainer(act, material, others, others, folder / "annotator", arguments.seed)
    set_seed(arguments.seed)
    annotator.train()
    logits = np.asarray(annotator.predict(material.train).predictions)
    doubt = 1 - np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))[np.arange(len(right)), right]
    number = round(arguments.noise * len(right))
    flags = np.zeros(len(right), dtype=bool)
    flags[rng.choice(len(right), number, replace=False, p=doubt / doubt.sum())] = True
    return flags


def duplicates(arguments: Arguments, folder: Path, console: Console) -> dict[str, Any]:
    """Find texts that occur more than once: in the training set, and as the source of a query."""
    reviews = load_film_reviews("imdb")
    counts = Counter(reviews["text"])
    where: dict[str, list[int]] = {}
    for row, text in enumerate(reviews["text"]):
        if counts[text] > 1:
            where.setdefault(text, []).append(row)
    once = np.array([row for row, text in enumerate(reviews["text"]) if counts[text] == 1])
    rng = np.random.default_rng(arguments.seed)
    copies = [row for rows in where.values() for row in rows]
    chosen = rng.permutation([*copies, *rng.choice(once, 1000 - len(copies), replace=False)])

    tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    tokenized = reviews.select(chosen).map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=96), batched=True
    )
    act = ACTS["reviews"]
    material = Material(
        tokenized, tokenized, lambda: minilm_classifier(minilm_path()), DataCollatorWithPadding(tokenizer), tokenizer
    )
    trainer = make_trainer(act, material, tokenized, tokenized, folder, arguments.seed)
    set_seed(arguments.seed)
    trainer.train()
    texts = tokenized["text"][:]
    first_row = {text: row for row, text in reversed(list(enumerate(texts)))}
    is_copy = np.array([first_row[text] < row for row, text in enumerate(texts)])
    table = Table("threshold", "found", "of them copies", f"of the {is_copy.sum()} copies", title="Copies in the data")
    results: dict[str, Any] = {"thresholds": {}}
    for threshold in (0.99, 0.999, 0.9999):
        found = find_duplicates(trainer, threshold)["train_index"][:]
        hits = int(is_copy[found].sum()) if len(found) else 0
        results["thresholds"][threshold] = {"found": len(found), "copies": hits, "of": int(is_copy.sum())}
        table.add_row(str(threshold), str(len(found)), f"{hits}", f"{hits / is_copy.sum():.2f}")
    console.print(table)
    return {**results, "sources": known_sources(act, material, texts, arguments, folder, console)}


def known_sources(
    act: Act, material: Material, texts: list[str], arguments: Arguments, folder: Path, console: Console
) -> dict[str, Any]:
    """Take the first of each text that occurs again out of the training set, as a query whose source is known."""
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        rows.setdefault(text, []).append(row)
    queries = [found[0] for found in rows.values() if len(found) > 1]
    rest = sorted(set(range(len(texts))) - set(queries))
    position = {row: number for number, row in enumerate(rest)}
    sources = [[position[row] for row in rows[texts[query]][1:]] for query in queries]
    train, query = material.train.select(rest), material.train.select(queries)
    trainer = make_trainer(act, material, train, query, folder / "sources", arguments.seed)
    set_seed(arguments.seed)
    trainer.train()
    metric = evaluate.load(metric_path("recall_at_k"))
    table = Table("method", "recall@1", "recall@10", "MRR", title=f"Sources of {len(queries)} queries in {len(train)}")
    results = {}
    for method in SOURCE_METHODS:
        ranked = trainer.attribute(query, method=method).top(k=len(train))
        ranked = np.reshape(ranked["train_index"][:], (len(queries), -1))
        results[method] = metric.compute(predictions=ranked, references=sources, k=[1, 10])
        low, high = results[method]["mrr_confidence_interval"]
        recall = results[method]["recall_at_k"]
        table.add_row(
            method, f"{recall[1]:.2f}", f"{recall[10]:.2f}", f"{results[method]['mrr']:.2f} [{low:.2f}, {high:.2f}]"
        )
    console.print(table)
    return results


def make_trainer(
    act: Act, material: Material, train: Dataset, test: Dataset, folder: Path, seed: int
) -> AttributionTrainer:
    """A trainer with the act's recipe."""
    trainer = AttributionTrainer(
        model_init=material.model_init,
        args=act.training_arguments(
            folder / "run", seed=seed, data_seed=seed, save_strategy="no", logging_strategy="no"
        ),
        train_dataset=train,
        eval_dataset=test,
        data_collator=material.data_collator,
        processing_class=material.processing_class,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def with_labels(dataset: Dataset, labels: np.ndarray) -> Dataset:
    """The dataset with other labels, its features and format as they were."""
    features, format = dataset.features["label"], dataset.format
    column = Dataset.from_dict({"label": labels.tolist()}).cast_column("label", features)
    changed = concatenate_datasets([dataset.with_format(None).remove_columns("label"), column], axis=1)
    return changed.with_format(**format)


def auc_table(title: str, found: dict[str, dict[str, Any]]) -> Table:
    """A table of scores, best first."""
    table = Table("score", "ROC AUC", "average precision", "precision at k", title=title)
    for name, numbers in sorted(found.items(), key=lambda item: -item[1]["roc_auc"]):
        low, high = numbers["confidence_interval"]
        precision = ", ".join(f"{k}: {value:.2f}" for k, value in numbers["precision_at_k"].items())
        auc = f"{numbers['roc_auc']:.3f} [{low:.2f}, {high:.2f}]"
        table.add_row(name, auc, f"{numbers['average_precision']:.2f}", precision)
    return table


if __name__ == "__main__":
    options: Any = Arguments
    main(*HfArgumentParser(options).parse_args_into_dataclasses())
