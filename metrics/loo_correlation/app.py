# mypy: disable-error-code="import-not-found"
# (a Space brings gradio, and has this folder on its path)
"""A page that computes leave-one-out correlations from CSV files: what a Space of this folder shows."""

import csv
import json
from pathlib import Path
from typing import Any

import gradio as gr
from loo_correlation_core import compute_loo_correlation

DESCRIPTION = """# Leave-one-out correlation
How well does a data attribution predict the effect of leaving out one example?
Upload two CSV files of numbers without a header, predicted and true effects: **a row per query, a column per
example that was left out**."""


def read_csv(path: str) -> list[list[float]]:
    """Read rows of numbers.

    Args:
        path: of a CSV file without a header.

    Returns:
        A list of numbers for each line that is not empty.
    """
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        return [[float(value) for value in row] for row in csv.reader(file) if row]


def score(predictions: str | None, references: str | None) -> str:
    """Compute what the page shows.

    Args:
        predictions: path of a CSV file.
        references: path of a CSV file.

    Returns:
        The metric's numbers as JSON.

    Raises:
        Error: a file is missing or not what the metric takes.
    """
    if not predictions or not references:
        raise gr.Error("Upload predictions and references.")
    try:
        tables: list[Any] = [read_csv(path) for path in (predictions, references)]
        result = compute_loo_correlation(*tables)
    except ValueError as error:
        raise gr.Error(str(error)) from error
    return json.dumps(result, indent=1)


with gr.Blocks(title="Leave-one-out correlation") as demo:
    gr.Markdown(DESCRIPTION)
    with gr.Row():
        files = [gr.File(label=label, file_types=[".csv"]) for label in ("Predictions", "References")]
    button = gr.Button("Compute", variant="primary")
    numbers = gr.Code(label="Numbers", language="json")
    button.click(score, inputs=[*files], outputs=numbers)

if __name__ == "__main__":
    demo.launch()
