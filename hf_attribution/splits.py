"""Training and query rows of a dataset: on the Hub, written by `save_to_disk`, or in files."""

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from hf_attribution.arguments import DataArguments

_FILES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_train(args: DataArguments) -> Dataset:
    """The training rows as they are, all columns, without preprocessing; errors as `load_workspace`."""
    splits = _open(args.dataset_name, args.dataset_config_name)
    default = next(iter(splits)) if len(splits) == 1 else "train"
    return draw_rows(_split(splits, args.train_split, (default,), "train"), args.max_train_examples)


def load_query(args: DataArguments) -> Dataset:
    """The query rows as they are, all columns, without preprocessing; errors as `load_workspace`."""
    if args.query_dataset_name is None:
        splits = _open(args.dataset_name, args.dataset_config_name)
        return draw_rows(_split(splits, args.query_split, ("test", "validation"), "query"), args.max_query_examples)
    splits = _open(args.query_dataset_name, None)
    defaults = tuple(splits) if len(splits) == 1 else ("test", "validation")
    return draw_rows(_split(splits, args.query_split, defaults, "query"), args.max_query_examples)


def draw_rows(dataset: Dataset, size: int | None) -> Dataset:
    """So many rows, drawn: many datasets are sorted by label, and their first rows are of one class; None for all."""
    if size is None or size >= len(dataset):
        return dataset
    return dataset.shuffle(seed=0).select(range(size))


def _open(name: str | None, config_name: str | None) -> DatasetDict:
    if name is None:
        raise ValueError("There is no dataset: give --dataset_name, a dataset on the Hub, a folder or a file.")
    path = Path(name)
    if path.is_file():
        if path.suffix not in _FILES:
            raise ValueError(f"{path} is no dataset file: it should end in {', '.join(_FILES)}.")
        return load_dataset(_FILES[path.suffix], data_files=str(path))
    if (path / "dataset_dict.json").exists():
        return load_from_disk(name)
    if (path / "state.json").exists():
        return DatasetDict({"train": load_from_disk(name)})
    if not path.exists() and (path.suffix in _FILES or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"There is no file or folder {name}.")
    return load_dataset(name, config_name)


def _split(splits: DatasetDict, asked: str | None, defaults: Sequence[str], name: str) -> Dataset:
    for split in (asked,) if asked is not None else defaults:
        if split in splits:
            return splits[split].with_format(None)
    wanted = asked if asked is not None else " or ".join(defaults)
    other = ", or --query_dataset_name" if name == "query" else ""
    raise ValueError(f"The dataset has no {wanted} split, it has {', '.join(splits)}: choose --{name}_split{other}.")
