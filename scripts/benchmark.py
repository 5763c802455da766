"""What the library costs, as ratios measured side by side in one run. Medians over alternating repeats.

    python scripts/benchmark.py                                  # everything
    python scripts/benchmark.py --sections features trak         # some of it
    python scripts/benchmark.py --sections datamodel --threads 2

`--help` lists the sections; each is a function in `scripts/benchmarks/`.
"""

import argparse
import os

import torch
from rich.console import Console

from benchmarks import estimators, methods, passes, storage, trainings

SECTIONS = {
    "features": passes.benchmark_features,
    "processes": passes.benchmark_processes,
    "memory": passes.benchmark_memory,
    "language_model": passes.benchmark_language_model,
    "trak": methods.benchmark_trak,
    "influence": methods.benchmark_influence,
    "ekfac": methods.benchmark_ekfac,
    "store": storage.benchmark_store,
    "disk": storage.benchmark_disk,
    "search": storage.benchmark_search,
    "scoring": storage.benchmark_scoring,
    "datamodel": estimators.benchmark_datamodel,
    "knn_shapley": estimators.benchmark_knn_shapley,
    "unroll": trainings.benchmark_unroll,
    "bergson": trainings.benchmark_bergson,
    "runner": trainings.benchmark_runner,
}


def parser() -> argparse.ArgumentParser:
    """The options, and in the epilogue the sections."""
    wide = max(map(len, SECTIONS))
    listed = [f"  {name:{wide}}  {(section.__doc__ or '').splitlines()[0]}" for name, section in SECTIONS.items()]
    options = argparse.ArgumentParser(
        description="Ratios of seconds and memory, measured side by side.",
        epilog="\n".join(["sections:", *listed]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--repeats", type=int, default=3, help="of every timing, alternating (3)")
    options.add_argument("--dim", type=int, default=2048, help="of projections (2048)")
    options.add_argument("--work_dir", default=".", help="where large stores are written for a while")
    options.add_argument("--disk_gib", type=float, default=2.0, help="size of the store that `disk` writes (2)")
    options.add_argument("--search_examples", type=int, default=10_000_000, help="that `search` searches (10 million)")
    options.add_argument("--search_queries", type=int, default=100)
    options.add_argument("--search_dim", type=int, default=512)
    options.add_argument("--scoring_examples", type=int, default=1_000_000, help="that `scoring` scores (1 million)")
    options.add_argument("--scoring_queries", type=int, default=1_000)
    options.add_argument("--trainings", type=int, default=40, help="by one and by two workers of `runner` (40)")
    return options


def main() -> None:
    """Run the sections that are asked for."""
    arguments = parser().parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=140)
    console.print(f"torch {torch.__version__}, {os.cpu_count()} cores, {arguments.threads} thread(s) each")
    for section in arguments.sections:
        console.rule(section)
        SECTIONS[section](arguments, console)


if __name__ == "__main__":
    main()
