"""What the library costs, as ratios measured side by side in one run. Medians over alternating repeats.

    python scripts/benchmark.py                                  # everything
    python scripts/benchmark.py --sections features trak         # some of it
    python scripts/benchmark.py --sections datamodel --threads 2

Sections:
  features   projected gradients of the demo's three models against one plain forward and backward pass over the rows
  processes  features by two processes of a launch against one, each with one thread; for a quiet machine
  memory     peak memory of the same for N and 4 N rows
  trak       TRAK (one model) against one training of a small CNN, beside `traker` and `dattri` where they install
  ekfac      EK-FAC and K-FAC against one training of a small CNN and of a small BERT, beside `kronfluence`
  influence  exact influence functions through kernels against one training of the same CNN
  store      the second `attribute` on an existing store: seconds, and rows read
  disk       the store's writing against writing the same bytes to one file, with both on the disk at the end
  search     the top 100 of 10 million stored examples for 100 queries, exactly, without the matrix
  scoring    queries x examples x dimensions of stored features, in bounded memory
  datamodel  LASSO with cross-validation of 2,000 subsets x 1,000 examples x 200 queries, beside other libraries
  knn_shapley  exact kNN-Shapley of 1,000 queries x 50,000 examples x 384 dimensions
  unroll     sweeps through a recorded training of a CNN, a ViT and a GPT-2 against its steps, beside double backward
  runner     `retrain` against a bare Trainer and a bare PyTorch loop; 40 retrainings by one and by two workers
"""

import contextlib
import dataclasses
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from hf_attribution.counterfactuals import Subsets
from hf_attribution.curvature.ridge import RidgeRegression
from hf_attribution.data import Split, used_columns
from hf_attribution.demo.acts import ACTS
from hf_attribution.estimation.lasso import fit_lasso
from hf_attribution.gradients.features import compute_features
from hf_attribution.gradients.per_example import PerExampleGradients
from hf_attribution.gradients.projections import Projection
from hf_attribution.gradients.stored import StoredProducts, StoredScores
from hf_attribution.methods.knn_shapley import knn_shapley_scores
from hf_attribution.processes import from_main, gather, is_main, sharing
from hf_attribution.store import FeatureStore, FeatureWriter, Manifest
from hf_attribution.tasks import infer_task

SECTIONS = (
    "features",
    "processes",
    "memory",
    "trak",
    "influence",
    "ekfac",
    "store",
    "disk",
    "search",
    "scoring",
    "datamodel",
    "knn_shapley",
    "unroll",
    "runner",
)


@dataclasses.dataclass
class Arguments:
    """Options of the benchmark."""

    sections: list[str] = dataclasses.field(
        default_factory=lambda: list(SECTIONS), metadata={"help": ", ".join(SECTIONS)}
    )
    dim: int = dataclasses.field(default=2048, metadata={"help": "Dimension of the projection."})
    repeats: int = dataclasses.field(default=3, metadata={"help": "Repeats of every timing, alternating."})
    disk_gib: float = dataclasses.field(default=2.0, metadata={"help": "Size of the store that is written."})
    search_examples: int = dataclasses.field(default=10_000_000, metadata={"help": "Stored examples to search."})
    search_queries: int = dataclasses.field(default=100, metadata={"help": "Queries to search them for."})
    search_dim: int = dataclasses.field(default=512, metadata={"help": "Dimension of the features that are searched."})
    work_dir: str = dataclasses.field(default=".", metadata={"help": "Where large stores are written for a while."})
    scoring_examples: int = dataclasses.field(default=1_000_000, metadata={"help": "Stored examples to score."})
    scoring_queries: int = dataclasses.field(default=1_000, metadata={"help": "Queries to score them for."})
    threads: int = dataclasses.field(default=1, metadata={"help": "Threads."})
    trainings: int = dataclasses.field(default=40, metadata={"help": "Retrainings by one and by two workers."})
    memory_of: str | None = dataclasses.field(
        default=None, metadata={"help": "Internal: measure one act in a process."}
    )
    shared_features_of: str | None = dataclasses.field(
        default=None, metadata={"help": "Internal: one process of a launch, for the features of an act."}
    )
    memory_copies: int = dataclasses.field(default=1, metadata={"help": "Internal: how often its rows are repeated."})


def main() -> None:
    """Run the sections that are asked for."""
    options: Any = Arguments
    (arguments,) = HfArgumentParser(options).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.threads)
    if arguments.shared_features_of is not None:
        time_shared_features(arguments)
        return
    if arguments.memory_of is not None:
        print(json.dumps(measure_memory(arguments)))
        return
    console = Console()
    for section in arguments.sections:
        console.rule(section)
        {
            "features": benchmark_features,
            "processes": benchmark_processes,
            "memory": benchmark_memory,
            "trak": benchmark_trak,
            "influence": benchmark_influence,
            "ekfac": benchmark_ekfac,
            "store": benchmark_store,
            "disk": benchmark_disk,
            "search": benchmark_search,
            "scoring": benchmark_scoring,
            "datamodel": benchmark_datamodel,
            "knn_shapley": benchmark_knn_shapley,
            "unroll": benchmark_unroll,
            "runner": benchmark_runner,
        }[section](arguments, console)


def alternate(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of two functions, called in turn, after one call of each that does not count."""
    first(), second()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for function, found in zip((first, second), seconds, strict=True):
            gc.collect()
            started = time.process_time()
            function()
            found.append(time.process_time() - started)
    return seconds


def prepare(act: str, copies: int = 1) -> tuple[Any, Any, Split]:
    """The model of an act in eval mode, its task, and its training rows."""
    material = ACTS[act].prepare()
    model = material.model_init().eval()
    rows = used_columns(material.train, model)
    rows = rows.select([row for _ in range(copies) for row in range(len(rows))])
    return model, infer_task(model), Split(rows, material.data_collator, batch_size=32)


def features(model: Any, task: Any, split: Split, dim: int) -> None:
    """Projected gradients of all rows, written to a temporary store."""
    with tempfile.TemporaryDirectory() as folder:
        gradients = PerExampleGradients(model, task.gains, split.probe())
        compute_features(
            Path(folder) / "s", split, gradients, Projection(dim), {}, torch.device("cpu"), progress=False
        )


def plain_epoch(model: Any, task: Any, split: Split) -> None:
    """One forward and backward pass over all rows, as training does."""
    for batch in split.batches():
        task.losses(model, batch.inputs).mean().backward()
        model.zero_grad()


def benchmark_features(arguments: Arguments, console: Console) -> None:
    """Projected gradients against a plain epoch, for the demo's models."""
    table = Table("model", "parameters", "rows", "plain epoch, s", "features, s", "ratio")
    for act in ACTS:
        model, task, split = prepare(act)
        plain, ours = alternate(
            lambda: plain_epoch(model, task, split),  # noqa: B023 (called before the next act)
            lambda: features(model, task, split, arguments.dim),  # noqa: B023
            arguments.repeats,
        )
        ratios = [b / a for a, b in zip(plain, ours, strict=True)]
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        table.add_row(
            type(model).__name__, f"{trainable:,}", str(len(split)), f"{statistics.median(plain):.2f}",
            f"{statistics.median(ours):.2f}", f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
        )  # fmt: skip
    console.print(table)


def time_shared_features(arguments: Arguments) -> None:
    """The seconds that the processes of a launch take together for the features of an act, once they are warm."""
    model, task, split = prepare(arguments.shared_features_of or "")
    gradients = PerExampleGradients(model, task.gains, split.probe())
    seconds = []
    with sharing("features"), contextlib.ExitStack() as stack:
        folder = from_main(lambda: stack.enter_context(tempfile.TemporaryDirectory()))
        for turn in range(1 + arguments.repeats):
            gather("ready")
            started = time.perf_counter()
            compute_features(
                Path(folder) / str(turn), split, gradients, Projection(arguments.dim), {}, torch.device("cpu"), False
            )
            seconds.append(time.perf_counter() - started)
        if is_main():
            print(json.dumps(seconds[1:]))
        gather("done")


def benchmark_processes(arguments: Arguments, console: Console) -> None:
    """Features by two processes of `accelerate launch` against one, each with one thread."""
    several = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *several, "--dynamo_backend", "no"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    table = Table("act", "one process, s", "two, s", "times faster")
    for act in ACTS:
        options = [__file__, "--shared_features_of", act, "--repeats", str(arguments.repeats)]
        seconds = []
        for command in ([sys.executable], launch):
            output = subprocess.run(
                [*command, *options, "--dim", str(arguments.dim)], check=True, capture_output=True, text=True,
                env=environment,
            )  # fmt: skip
            found = next(line for line in output.stdout.splitlines() if line.startswith("["))
            seconds.append(statistics.median(json.loads(found)))
        table.add_row(act, f"{seconds[0]:.2f}", f"{seconds[1]:.2f}", f"{seconds[0] / seconds[1]:.2f}")
    console.print(table)


def measure_memory(arguments: Arguments) -> float:
    """Peak memory, in MiB, that features take beyond what is there after a first batch."""
    model, task, split = prepare(arguments.memory_of or "", arguments.memory_copies)
    features(model, task, Split(split.dataset.select(range(64)), split.collator, split.batch_size), arguments.dim)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    features(model, task, split, arguments.dim)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def benchmark_memory(arguments: Arguments, console: Console) -> None:
    """Growth of the peak memory from 64 rows to N and to 4 N, each in a process of its own."""
    table = Table("model", "N rows, MiB more than 64 rows", "4 N rows, MiB more", "features of 4 N rows, MiB")
    for act in ACTS:
        grown = []
        for copies in (1, 4):
            command = [sys.executable, __file__, "--memory_of", act, "--memory_copies", str(copies)]
            output = subprocess.run(
                [*command, "--dim", str(arguments.dim)], check=True, capture_output=True, text=True
            )
            grown.append(float(output.stdout.splitlines()[-1]))
        stored = 4 * len(ACTS[act].prepare().train) * arguments.dim * 4 / 2**20
        table.add_row(act, f"{grown[0]:.0f}", f"{grown[1]:.0f}", f"{stored:.0f}")
    console.print(table)


def benchmark_trak(arguments: Arguments, console: Console) -> None:
    """TRAK against one training of a 28k-parameter CNN; other libraries on the same model where they are installed."""
    import small_cnn

    runs = small_cnn.trak_libraries(arguments.dim)
    _compare(runs, "TRAK, one model, 1,000 x 200 digits", arguments, console)


def benchmark_influence(arguments: Arguments, console: Console) -> None:
    """Exact influence functions through kernels, on the same model."""
    import small_cnn

    _compare(small_cnn.influence_functions(), "influence, one model, 1,000 x 200 digits", arguments, console)


def _compare(runs: Any, title: str, arguments: Arguments, console: Console) -> None:
    import small_cnn

    table = Table("library or setting", "seconds", "trainings", "LDS", "partial LDS", title=title)
    for row in small_cnn.compare(runs, arguments.repeats):
        table.add_row(*row)
    console.print(table)


def benchmark_ekfac(arguments: Arguments, console: Console) -> None:
    """EK-FAC: fit and score, beside kronfluence where it is installed, with the same damping on the same model."""
    import reference_ekfac

    table = Table("task", "run", "seconds", "trainings", "times faster", "correlation", "peak memory, MiB more")
    for row in reference_ekfac.compare(arguments.repeats):
        table.add_row(*row)
    console.print(table)


def benchmark_store(arguments: Arguments, console: Console) -> None:
    """A second `attribute` on an existing store reads no training row but those it tries the task on."""
    from hf_attribution import Trak, attribute

    act = ACTS["digits"]
    material = act.prepare()
    model, rows = material.model_init(), []

    def collate(batch: list[Any]) -> Any:
        rows.append(len(batch))
        return material.data_collator(batch)

    with tempfile.TemporaryDirectory() as folder:
        for turn in ("first", "second"):
            rows.clear()
            started = time.perf_counter()
            attribute(
                model, material.train, material.queries(200), method=Trak(dim=arguments.dim), data_collator=collate,
                cache_dir=folder, progress=False,
            )  # fmt: skip
            console.print(f"{turn} call: {time.perf_counter() - started:.2f} s, {sum(rows)} rows collated")


def benchmark_disk(arguments: Arguments, console: Console) -> None:
    """Seconds to write a store, and to write as many bytes to one file, in turn; both are flushed to the disk."""
    dim, step = arguments.dim, 8192
    block, zeros = torch.randn(step, dim), torch.zeros(step)
    steps = max(1, int(arguments.disk_gib * 2**30 / (4 * dim * step)))
    content = block.numpy().data.cast("B")

    def ours(folder: Path) -> None:
        writer = FeatureWriter(folder / "store", Manifest(dim, "float32", {}, steps * step))
        for number in range(steps):
            writer.write(np.arange(number * step, (number + 1) * step), block, zeros)
        writer.finish()

    def raw(folder: Path) -> None:
        with (folder / "raw").open("wb", buffering=0) as file:
            for _ in range(steps):
                file.write(content)
            os.fsync(file.fileno())

    seconds: dict[str, list[float]] = {"store": [], "raw": []}
    for _ in range(arguments.repeats):
        for name, write in (("raw", raw), ("store", ours)):
            with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
                started = time.perf_counter()
                write(Path(folder))
                seconds[name].append(time.perf_counter() - started)
    size = steps * len(content) / 2**20
    ratios = [a / b for a, b in zip(seconds["raw"], seconds["store"], strict=True)]
    speeds = [f"{name} {size / statistics.median(found):,.0f} MiB/s" for name, found in seconds.items()]
    console.print(
        f"{size / 1024:.1f} GiB: {', '.join(speeds)}; the store at {statistics.median(ratios):.2f} of raw speed "
        f"({min(ratios):.2f}-{max(ratios):.2f})"
    )


def benchmark_search(arguments: Arguments, console: Console) -> None:
    """Write a synthetic store, and search it twice: the first search also compares the checksums."""
    examples, queries, dim = arguments.search_examples, arguments.search_queries, arguments.search_dim
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
        started = time.perf_counter()
        store = synthetic_store(Path(folder) / "train", examples, dim)
        console.print(f"{examples:,} x {dim}: written in {time.perf_counter() - started:.0f} s")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        scores = StoredScores([StoredProducts(torch.randn(queries, dim), store)])
        for turn in ("first", "second"):
            started = time.perf_counter()
            scores.top(100, progress=False)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            console.print(
                f"{turn} search, top 100 of {queries} queries: {time.perf_counter() - started:.0f} s; peak memory "
                f"{peak / 2**10:.0f} MiB, {(peak - before) / 2**10:.0f} MiB more than before"
            )


def synthetic_store(path: Path, rows: int, dim: int) -> FeatureStore:
    """A store of random features, written as real ones are."""
    writer, generator = FeatureWriter(path, Manifest(dim, "float32", {}, rows)), torch.Generator().manual_seed(0)
    for start in range(0, rows, 8192):
        where = np.arange(start, min(start + 8192, rows))
        writer.write(where, torch.randn(len(where), dim, generator=generator), torch.zeros(len(where)))
    return writer.finish()


def benchmark_scoring(arguments: Arguments, console: Console) -> None:
    """TRAK's solve and scores from stored features of many examples, written to disk, in bounded memory."""
    examples, queries, dim = arguments.scoring_examples, arguments.scoring_queries, arguments.dim
    with tempfile.TemporaryDirectory(dir=".") as folder:
        train, query = (
            synthetic_store(Path(folder) / name, rows, dim) for name, rows in (("train", examples), ("query", queries))
        )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        scores = RidgeRegression(train, 1.0, query).scores()
        seconds = time.perf_counter() - started
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    console.print(
        f"{queries:,} queries x {examples:,} examples x {dim:,} dimensions: {seconds:.0f} s, peak memory "
        f"{peak:.1f} GiB more, of which the scores are {scores.nbytes / 2**30:.1f} GiB; features on disk: "
        f"{examples * dim * 4 / 2**30:.1f} GiB."
    )


def benchmark_datamodel(arguments: Arguments, console: Console) -> None:
    """All LASSO paths together against one scikit-learn `LassoCV` a query (and `celer`, where it is installed)."""
    from sklearn.linear_model import LassoCV

    num_subsets, num_examples, num_queries, num_folds, timed = 2000, 1000, 200, 5, 2
    rng = np.random.default_rng(0)
    masks = Subsets.random(num_examples, num_subsets).masks
    truth = 0.1 * rng.standard_t(2.5, size=(num_queries, num_examples))
    truth += rng.normal(size=truth.shape) * (rng.random(truth.shape) < 0.02)
    signal = truth @ masks.T
    outputs = signal + rng.normal(size=signal.shape) * signal.std(axis=1, keepdims=True)
    started = time.perf_counter()
    ours = fit_lasso(masks, outputs, num_folds=num_folds)
    seconds = time.perf_counter() - started
    console.print(f"hf_attribution: {seconds:.1f} s for {num_queries} queries, 2,000 subsets x 1,000 examples")

    rows, design = np.arange(num_subsets), masks.astype(np.float64)
    folds = [(rows[rows % num_folds != fold], rows[rows % num_folds == fold]) for fold in range(num_folds)]
    started = time.perf_counter()
    fits = [LassoCV(cv=folds).fit(design, row) for row in outputs[:timed]]
    library = (time.perf_counter() - started) / timed * num_queries
    differences = [np.abs(fit.coef_ - ours.coefficients[query]).max() for query, fit in enumerate(fits)]
    penalties = [fit.alpha_ for fit in fits] / outputs[:timed].std(axis=1) / ours.penalties[:timed]
    console.print(
        f"scikit-learn's LassoCV: {library:.0f} s ({timed} queries timed), {library / seconds:.0f} times as long; "
        f"largest difference of a coefficient {max(differences):.1e}; ratio of chosen penalties {penalties.min():.4f} "
        f"to {penalties.max():.4f}"
    )
    try:
        from celer import celer_path
    except ImportError:
        console.print("celer is not installed: pip install --no-deps celer")
        return
    # Its own LassoCV does not run with scikit-learn 1.9, so its path of one fold is timed.
    train = folds[0][0]
    x, y = design[train] - design[train].mean(0), outputs[0, train] - outputs[0, train].mean()
    grid = np.abs(x.T @ y).max() / len(x) * np.logspace(0, -3, 100)
    started = time.perf_counter()
    celer_path(np.asfortranarray(x), y, "lasso", alphas=grid, tol=1e-4)
    library = (time.perf_counter() - started) * num_folds * num_queries
    console.print(
        f"celer: {library:.0f} s (the path of one fold of one query timed), {library / seconds:.0f} times as long"
    )


def benchmark_knn_shapley(arguments: Arguments, console: Console) -> None:
    """Exact values from given hidden states, as the method computes them: in blocks of queries."""
    queries, examples, dim = 1000, 50_000, 384
    rng = np.random.default_rng(0)
    query, train = (torch.from_numpy(rng.standard_normal((rows, dim), np.float32)) for rows in (queries, examples))
    query_labels, train_labels = rng.integers(10, size=queries), rng.integers(10, size=examples)
    started = time.perf_counter()
    values = knn_shapley_scores(query, train, query_labels, train_labels, 5, "negative_distance")
    seconds = time.perf_counter() - started
    console.print(
        f"{queries:,} queries x {examples:,} examples x {dim} dimensions: {seconds:.1f} s, "
        f"{values.nbytes / 2**20:.0f} MiB of scores."
    )


def benchmark_unroll(arguments: Arguments, console: Console) -> None:
    """Exact unrolled differentiation: a sweep per query and step, and what recording adds to a training."""
    import unrolled

    unrolled.speed(console, repeats=arguments.repeats)


def benchmark_runner(arguments: Arguments, console: Console) -> None:
    """What the runner adds to a training, and what a second worker saves, each with one thread."""
    import retraining_costs

    table = Table("1,000 digits, halves", "CPU seconds a training", "retrain as a multiple")
    for row in retraining_costs.runner_overhead(arguments.repeats):
        table.add_row(*row)
    console.print(table)
    table = Table("workers", "seconds", "times faster", title=f"{arguments.trainings} retrainings")
    for row in retraining_costs.second_worker(arguments.trainings):
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
