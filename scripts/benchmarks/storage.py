"""Stores of features: what they save, how fast they are written, searched and scored."""

import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from hf_attribution.curvature.ridge import RidgeRegression
from hf_attribution.demo.acts import ACTS
from hf_attribution.gradients.stored import StoredProducts, StoredScores
from hf_attribution.store import FeatureStore, FeatureWriter, Manifest


def benchmark_store(arguments: Any, console: Console) -> None:
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


def benchmark_disk(arguments: Any, console: Console) -> None:
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


def benchmark_search(arguments: Any, console: Console) -> None:
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


def benchmark_scoring(arguments: Any, console: Console) -> None:
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
