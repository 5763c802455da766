"""Passes over training data: seconds and memory of projected gradients, in units of plain passes.

What needs a process of its own is run as `python -m benchmarks.passes WHAT ...`, in this folder's parent.
"""

import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator

from benchmarks.memory import Peak
from hf_attribution.columns import used_columns
from hf_attribution.data import Split
from hf_attribution.demo.acts import ACTS
from hf_attribution.gradients.features import compute_features
from hf_attribution.gradients.per_example import PerExampleGradients
from hf_attribution.gradients.projections import Projection
from hf_attribution.processes import from_main, gather, is_main, sharing
from hf_attribution.tasks import infer_task

LAUNCH = [
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip


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


def benchmark_features(arguments: Any, console: Console) -> None:
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


def benchmark_processes(arguments: Any, console: Console) -> None:
    """Features by two processes of `accelerate launch` against one, each with one thread. For a quiet machine."""
    table = Table("act", "one process, s", "two, s", "times faster")
    for act in ACTS:
        what = ["-m", "benchmarks.passes", "shared", act, str(arguments.dim), str(arguments.repeats)]
        one, two = (statistics.median(_in_process(launch, what)) for launch in ([], LAUNCH))
        table.add_row(act, f"{one:.2f}", f"{two:.2f}", f"{one / two:.2f}")
    console.print(table)


def shared_features(act: str, dim: str, repeats: str) -> list[float] | None:
    """Seconds that the processes of a launch take together for the features of an act, once they are warm."""
    model, task, split = prepare(act)
    gradients = PerExampleGradients(model, task.gains, split.probe())
    seconds = []
    with sharing("features"), contextlib.ExitStack() as stack:
        folder = from_main(lambda: stack.enter_context(tempfile.TemporaryDirectory()))
        for turn in range(1 + int(repeats)):
            gather("ready")
            started = time.perf_counter()
            projection, cpu = Projection(int(dim)), torch.device("cpu")
            compute_features(Path(folder) / str(turn), split, gradients, projection, {}, cpu, False)
            seconds.append(time.perf_counter() - started)
        gather("done")
        return seconds[1:] if is_main() else None


def benchmark_memory(arguments: Any, console: Console) -> None:
    """Growth of the peak memory of features from 64 rows to N and to 4 N, each in a process of its own."""
    table = Table("model", "N rows, MiB more than 64 rows", "4 N rows, MiB more", "features of 4 N rows, MiB")
    for act in ACTS:
        what = ["-m", "benchmarks.passes", "memory", act, str(arguments.dim)]
        once, often = (_in_process([], [*what, copies]) for copies in ("1", "4"))
        stored = 4 * len(ACTS[act].prepare().train) * arguments.dim * 4 / 2**20
        table.add_row(act, f"{once:.0f}", f"{often:.0f}", f"{stored:.0f}")
    console.print(table)


def growth(act: str, dim: str, copies: str) -> float:
    """Peak memory, in MiB, that features take beyond that of 64 rows."""
    model, task, split = prepare(act, int(copies))
    with Peak() as few:
        features(model, task, Split(split.dataset.select(range(64)), split.collator, split.batch_size), int(dim))
    with Peak() as all_rows:
        features(model, task, split, int(dim))
    return all_rows.mib - few.mib


def benchmark_language_model(arguments: Any, console: Console) -> None:
    """Features of a causal LM of 135M parameters against forward and backward passes, and against training steps."""
    batch, length, batches = 4, 128, 6
    model, task, split = language_model(batch, length, batches)
    plain, ours = alternate(
        lambda: plain_epoch(model, task, split), lambda: features(model, task, split, arguments.dim), arguments.repeats
    )
    ratios = [b / a for a, b in zip(plain, ours, strict=True)]
    what = ["-m", "benchmarks.passes"]
    size = [str(number) for number in (batch, length, batches)]
    training, featurising = (
        _in_process([], [*what, kind, *size]) for kind in ("language_model_training", "language_model_features")
    )
    console.print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, batches of {batch} x {length} tokens: forward "
        f"and backward {statistics.median(plain) / batches:.1f} s a batch, features "
        f"{statistics.median(ours) / batches:.1f} s: {statistics.median(ratios):.2f} times "
        f"({min(ratios):.2f}-{max(ratios):.2f}). Peak memory with the weights: training by AdamW {training:,.0f} MiB, "
        f"features {featurising:,.0f} MiB: {featurising / training:.2f} times."
    )


def language_model(batch: int, length: int, batches: int) -> tuple[Any, Any, Split]:
    """A Llama of the shape of SmolLM-135M with random weights, and rows of random tokens."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).eval()
    tokens = torch.randint(shape.vocab_size, (batch * batches, length))
    rows = Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist()})
    return model, infer_task(model), Split(rows, default_data_collator, batch_size=batch)


def training_memory(*size: str) -> float:
    """Peak memory, in MiB, of training steps with AdamW, with the weights."""
    with Peak() as peak:
        model, task, split = language_model(*map(int, size))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        for batch in split.batches():
            task.losses(model, batch.inputs).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return peak.mib


def features_memory(*size: str) -> float:
    """Peak memory, in MiB, of features of the same batches, with the weights."""
    with Peak() as peak:
        model, task, split = language_model(*map(int, size))
        features(model, task, split, 2048)
    return peak.mib


def _in_process(launch: list[str], what: list[str]) -> Any:
    """What a part of this file returns in a process of its own, or in the first process of a launch."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, *what]
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parents[1]
    )
    return json.loads(next(line for line in output.stdout.splitlines() if line.startswith("result: "))[8:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts: dict[str, Callable[..., Any]] = {
        "shared": shared_features,
        "memory": growth,
        "language_model_training": training_memory,
        "language_model_features": features_memory,
    }
    result = parts[sys.argv[1]](*sys.argv[2:])
    if result is not None:
        print(f"result: {json.dumps(result)}")
