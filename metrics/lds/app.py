# mypy: disable-error-code="import-not-found"
# (a Space brings gradio, and has this folder on its path)
"""A page that computes the LDS from CSV files: what a Space of this folder shows."""

import csv
from pathlib import Path
from typing import Any

import gradio as gr
from lds_core import compute_lds

DESCRIPTION = """# Linear datamodeling score
How well does a data attribution predict what models retrained on other subsets of the data would say?
Upload two CSV files of numbers without a header: **a row per query, a column per subset**. With covariates
(a row per subset, for example how many examples of each class it holds) the partial LDS is shown too."""


def read_csv(path: str) -> list[list[float]]:
    """Read rows of numbers.

    Args:
        path: of a CSV file without a header.

    Returns:
        A list of floats for each line that is not empty.
    """
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        return [[float(value) for value in row] for row in csv.reader(file) if row]


def score(
    predictions: str | None, references: str | None, covariates: str | None, confidence_level: float
) -> tuple[list[list[str]], list[list[Any]]]:
    """Compute what the page shows.

    Args:
        predictions: path of a CSV file.
        references: path of a CSV file.
        covariates: path of a CSV file, if any.
        confidence_level: of the intervals.

    Returns:
        The rows of the summary and of the table of queries.

    Raises:
        Error: a file is missing or not what the metric takes.
    """
    if not predictions or not references:
        raise gr.Error("Upload predictions and references.")
    try:
        tables = [read_csv(path) if path else None for path in (predictions, references, covariates)]
        result = compute_lds(*tables, confidence_level=confidence_level)
    except ValueError as error:
        raise gr.Error(str(error)) from error
    summary = []
    for name, prefix in (("LDS", ""), ("partial LDS", "partial_")):
        if f"{prefix}lds" in result:
            low, high = result[f"{prefix}confidence_interval"]
            undefined = str(result[f"{prefix}num_undefined"])
            summary.append([name, f"{result[f'{prefix}lds']:.3f}", f"{low:.3f} to {high:.3f}", undefined])
    partial = result.get("partial_lds_per_query", [None] * len(result["lds_per_query"]))
    columns = zip(result["lds_per_query"], result["p_values"], partial, strict=True)
    return summary, [[query, *values] for query, values in enumerate(columns)]


with gr.Blocks(title="LDS") as demo:
    gr.Markdown(DESCRIPTION)
    with gr.Row():
        files = [gr.File(label=label, file_types=[".csv"]) for label in ("Predictions", "References")]
        files.append(gr.File(label="Covariates (optional)", file_types=[".csv"]))
    level = gr.Slider(0.5, 0.99, value=0.95, step=0.01, label="Confidence level")
    button = gr.Button("Compute", variant="primary")
    totals = gr.Dataframe(headers=["", "mean", "interval", "undefined queries"], label="Score")
    queries = gr.Dataframe(headers=["query", "LDS", "p-value", "partial LDS"], label="By query")
    button.click(score, inputs=[*files, level], outputs=[totals, queries])

if __name__ == "__main__":
    demo.launch()
