# mypy: disable-error-code="import-not-found"
# (a Space brings gradio, and has this folder on its path)
"""A page that computes recall at k from CSV files: what a Space of this folder shows."""

import csv
import json
from pathlib import Path
from typing import Any

import gradio as gr
from recall_at_k_core import compute_recall_at_k

DESCRIPTION = """# Recall at k
How well does a data attribution find the known sources of queries?
Upload two CSV files without a header, **a row per query**: the positions of the examples with the highest scores, best
first, and those of its sources."""


def read_csv(path: str) -> list[list[int]]:
    """Read rows of numbers.

    Args:
        path: of a CSV file without a header.

    Returns:
        A list of numbers for each line that is not empty.
    """
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        return [[int(value) for value in row] for row in csv.reader(file) if row]


def score(predictions: str | None, references: str | None, k: float) -> str:
    """Compute what the page shows.

    Args:
        predictions: path of a CSV file.
        references: path of a CSV file.
        k: how many of the highest scores are looked at.

    Returns:
        The metric's numbers as JSON.

    Raises:
        Error: a file is missing or not what the metric takes.
    """
    if not predictions or not references:
        raise gr.Error("Upload predictions and references.")
    try:
        tables: list[Any] = [read_csv(path) for path in (predictions, references)]
        result = compute_recall_at_k(*tables, k=int(k))
    except ValueError as error:
        raise gr.Error(str(error)) from error
    return json.dumps(result, indent=1)


with gr.Blocks(title="Recall at k") as demo:
    gr.Markdown(DESCRIPTION)
    with gr.Row():
        files = [gr.File(label=label, file_types=[".csv"]) for label in ("Predictions", "References")]
    top = gr.Number(value=1, precision=0, minimum=1, label="k")
    button = gr.Button("Compute", variant="primary")
    numbers = gr.Code(label="Numbers", language="json")
    button.click(score, inputs=[*files, top], outputs=numbers)

if __name__ == "__main__":
    demo.launch()
