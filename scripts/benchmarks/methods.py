"""Methods against one training of a small model, beside other libraries."""

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import reference_ekfac, small_cnn


def benchmark_trak(arguments: Any, console: Console) -> None:
    """TRAK (one model) against one training of a small CNN, beside `traker` and `dattri` where they install."""
    _compare(small_cnn.trak_libraries(arguments.dim), "TRAK, one model, 1,000 x 200 digits", arguments, console)


def benchmark_influence(arguments: Any, console: Console) -> None:
    """Exact influence functions through kernels, against one training of the same CNN."""
    _compare(small_cnn.influence_functions(), "influence, one model, 1,000 x 200 digits", arguments, console)


def _compare(runs: Any, title: str, arguments: Any, console: Console) -> None:
    table = Table("library or setting", "seconds", "trainings", "LDS", "partial LDS", title=title)
    for row in small_cnn.compare(runs, arguments.repeats):
        table.add_row(*row)
    console.print(table)


def benchmark_ekfac(arguments: Any, console: Console) -> None:
    """EK-FAC and K-FAC against one training of a small CNN and of a small BERT, beside `kronfluence`."""
    table = Table("task", "run", "seconds", "trainings", "times faster", "correlation", "peak memory, MiB more")
    for row in reference_ekfac.compare(arguments.repeats):
        table.add_row(*row)
    console.print(table)
