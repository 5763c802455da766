"""What differentiating through a training, and retraining, cost beside the trainings themselves."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import Trainer, TrainingArguments, get_linear_schedule_with_warmup

import unrolled
from benchmarks import reference_unroll
from hf_attribution import AttributionTrainer
from hf_attribution.columns import used_columns
from hf_attribution.demo.acts import ACTS

EPOCHS, BATCH, RATE, AT_ONCE = 10, 64, 5e-3, 4


def benchmark_unroll(arguments: Any, console: Console) -> None:
    """Sweeps through a recorded training of a CNN, a ViT and a GPT-2 against its steps, beside double backward."""
    unrolled.speed(console, repeats=arguments.repeats)


def benchmark_bergson(arguments: Any, console: Console) -> None:
    """A sweep through a recorded training of a GPT-2, for one and for many queries, beside `bergson`."""
    try:
        rows = reference_unroll.compare(arguments.repeats)
    except ModuleNotFoundError as error:
        console.print(f"Skipped: {error}. benchmarks/reference_unroll.py says what to install.")
        return
    table = Table("run", "CPU seconds a query", "times", "correlation", "largest difference", "peak memory, MiB more")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def benchmark_runner(arguments: Any, console: Console) -> None:
    """`retrain` against a bare Trainer and a bare PyTorch loop; retrainings by one and by two workers."""
    table = Table("1,000 digits, halves", "CPU seconds a training", "retrain as a multiple")
    for row in runner_overhead(arguments.repeats):
        table.add_row(*row)
    console.print(table)
    table = Table("workers", "seconds", "times faster", title=f"{arguments.trainings} retrainings")
    for row in second_worker(arguments.trainings):
        table.add_row(*row)
    console.print(table)


def runner_overhead(repeats: int) -> Iterator[tuple[str, str, str]]:
    """CPU seconds of a training on half of 1,000 digits: by `retrain`, by a bare Trainer, by a PyTorch loop.

    Args:
        repeats: How often each is timed, in turn; medians are given.

    Yields:
        Rows: what trains, seconds a training, and `retrain`'s seconds as a multiple of them.
    """
    material = ACTS["digits"].prepare()
    half = material.train.select(range(len(material.train) // 2))
    queries = material.queries(50)
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, Callable[[], Any]] = {
            "retrain": lambda: _retrain(material, queries, folder, AT_ONCE, 1),
            "bare Trainer": lambda: _bare_trainer(material, half, folder),
            "PyTorch loop": lambda: _loop(material, half),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(repeats + 1):  # the first one warms up
            for name, run in runs.items():
                started = time.process_time()
                run()
                per_training = (time.process_time() - started) / (AT_ONCE if name == "retrain" else 1)
                if turn:
                    seconds[name].append(per_training)
    ours = statistics.median(seconds["retrain"])
    for name, found in seconds.items():
        median = statistics.median(found)
        yield name, f"{median:.2f} ({min(found):.2f}-{max(found):.2f})", f"{ours / median:.2f}"


def second_worker(trainings: int) -> Iterator[tuple[str, str, str]]:
    """Seconds by the clock of all trainings, one at a time and two, the start of the worker included.

    Args:
        trainings: How many.

    Yields:
        Rows: workers, seconds, and how many times faster than one.
    """
    material = ACTS["digits"].prepare()
    queries, first = material.queries(50), 0.0
    with tempfile.TemporaryDirectory() as folder:
        _retrain(material, queries, folder, 1, 1)  # warms up
        for workers in (1, 2):
            started = time.perf_counter()
            _retrain(material, queries, folder, trainings, workers)
            seconds = time.perf_counter() - started
            first = first or seconds
            yield str(workers), f"{seconds:.1f}", f"{first / seconds:.2f}"


def _arguments(folder: str) -> TrainingArguments:
    return TrainingArguments(
        folder, num_train_epochs=EPOCHS, learning_rate=RATE, per_device_train_batch_size=BATCH, use_cpu=True,
        save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip


def _retrain(material: Any, queries: Any, folder: str, trainings: int, workers: int) -> None:
    trainer = AttributionTrainer(
        model_init=material.model_init, args=_arguments(folder), train_dataset=material.train,
        data_collator=material.data_collator,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=folder) as results:
        trainer.retrain(queries, num_subsets=trainings, output_dir=results, workers=workers)


def _bare_trainer(material: Any, half: Any, folder: str) -> None:
    Trainer(
        model=material.model_init(), args=_arguments(folder), train_dataset=half, data_collator=material.data_collator
    ).train()


def _loop(material: Any, half: Any) -> None:
    """AdamW with a linear schedule and clipping over batches that were collated once."""
    model = material.model_init().train()
    inputs = material.data_collator(list(used_columns(half, model)))
    steps = EPOCHS * -(-len(half) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    generator = np.random.default_rng(0)
    for _ in range(EPOCHS):
        for rows in np.array_split(generator.permutation(len(half)), steps // EPOCHS):
            model(**{name: value[rows] for name, value in inputs.items()}).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
