# mypy: disable-error-code="import-not-found"
# (a Space brings gradio, and has this folder on its path)
"""A page that computes brittleness from CSV files: what a Space of this folder shows."""

import csv
import json
from pathlib import Path
from typing import Any

import gradio as gr
from brittleness_core import compute_brittleness

DESCRIPTION = """# Brittleness
How few examples must be removed to flip predictions?
Upload two CSV files without a header, **one number per query**: the size of the smallest set whose removal flips its
prediction (`nan` where none does), as a data attribution orders the examples and in a random order."""


def read_csv(path: str) -> list[list[float]]:
    """Read rows of numbers.

    Args:
        path: of a CSV file without a header.

    Returns:
        A list of numbers for each line that is not empty.
    """
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        return [[float(value) for value in row] for row in csv.reader(file) if row]


def score(predictions: str | None, references: str | None, max_size: float) -> str:
    """Compute what the page shows.

    Args:
        predictions: path of a CSV file.
        references: path of a CSV file.
        max_size: the largest size that was tried.

    Returns:
        The metric's numbers as JSON.

    Raises:
        Error: a file is missing or not what the metric takes.
    """
    if not predictions or not references:
        raise gr.Error("Upload predictions and references.")
    try:
        tables: list[Any] = [[value for row in read_csv(path) for value in row] for path in (predictions, references)]
        result = compute_brittleness(*tables, max_size=int(max_size))
    except ValueError as error:
        raise gr.Error(str(error)) from error
    return json.dumps(result, indent=1)


with gr.Blocks(title="Brittleness") as demo:
    gr.Markdown(DESCRIPTION)
    with gr.Row():
        files = [gr.File(label=label, file_types=[".csv"]) for label in ("Predictions", "References")]
    largest = gr.Number(value=100, precision=0, minimum=1, label="Largest size that was tried")
    button = gr.Button("Compute", variant="primary")
    numbers = gr.Code(label="Numbers", language="json")
    button.click(score, inputs=[*files, largest], outputs=numbers)

if __name__ == "__main__":
    demo.launch()
