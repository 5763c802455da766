"""The problem that a method is given: made of a user's model and data, checked, and tried on two examples of each."""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import default_data_collator

from hf_attribution.bookmark import forget
from hf_attribution.checkpoints import as_checkpoint
from hf_attribution.columns import check_same_columns, used_columns
from hf_attribution.data import Split
from hf_attribution.ensemble import Ensemble
from hf_attribution.errors import ProcessError, UnsupportedError
from hf_attribution.problem import Checkpoint, Problem
from hf_attribution.processes import count, from_main, gather, is_main
from hf_attribution.store.precision import check_dtype
from hf_attribution.streams import StreamColumns, StreamSplit, is_stream
from hf_attribution.tasks import Task, infer_task


class Passes(TypedDict, total=False):
    """How `attribute` and its like pass over the data, and what they keep of it."""

    batch_size: int
    batch_tokens: int | None
    cache_dir: str | Path | None
    store_dtype: str


class Setup(Passes, total=False):
    """What `attribute` and its like take beside data and method."""

    task: Task | None
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None
    checkpoints: Ensemble | Sequence[str | Path | nn.Module | Checkpoint] | None
    remove_unused_columns: bool
    progress: bool


@contextlib.contextmanager
def posed(
    model: nn.Module,
    train_dataset: Any,
    query_dataset: Any,
    task: Task | None = None,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    checkpoints: Ensemble | Sequence[str | Path | nn.Module | Checkpoint] | None = None,
    batch_size: int = 32,
    cache_dir: str | Path | None = None,
    remove_unused_columns: bool = True,
    progress: bool = True,
    store_dtype: str = "float32",
    batch_tokens: int | None = None,
) -> Iterator[tuple[Problem, dict[str, Any]]]:
    """Pose a problem for as long as the block lasts. All processes of a launch do.

    Args:
        model: As for `attribute`, like the other arguments.
        train_dataset: N rows.
        query_dataset: Q rows.
        task: What is learned and measured.
        data_collator: The collator.
        checkpoints: The weights to attribute with.
        batch_size: Rows in a batch.
        cache_dir: Where features are kept.
        remove_unused_columns: Whether to drop columns that the model does not take.
        progress: Whether to show progress bars.
        store_dtype: The number format of features.
        batch_tokens: Tokens in a batch.

    Yields:
        The problem, and which subsets its models were trained on.

    Raises:
        UnsupportedError: If the model is sharded over processes, or a stream is to be sorted.
        ProcessError: If other processes have another problem, or see another folder.
    """
    model = _whole(model)
    check_same_columns(train_dataset, query_dataset)
    collator = data_collator if data_collator is not None else default_data_collator
    splits: list[Split] = []
    for name, dataset in (("train", train_dataset), ("query", query_dataset)):
        kept = used_columns(dataset, model) if remove_unused_columns else dataset
        # Queries are rows to come back to; only where they stand for the training data may they be a stream.
        if is_stream(dataset) and dataset is train_dataset:
            if batch_tokens is not None:
                raise UnsupportedError("A stream is read in its order, without a look at lengths: give batch_size.")
            splits.append(StreamSplit(kept, collator, batch_size, name))
        else:
            splits.append(Split(kept, collator, batch_size, name, batch_tokens=batch_tokens))
    used_subsets: dict[str, Any] = {}
    if isinstance(checkpoints, Ensemble):
        checkpoints.check_trained_on(splits[0])
        used_subsets = {"used_subsets": checkpoints.used_subsets()}
        checkpoints = checkpoints.checkpoints
    with working_folder(cache_dir) as folder:
        problem = Problem(
            model=model,
            task=task if task is not None else infer_task(model),
            train=splits[0],
            query=splits[1],
            train_dataset=StreamColumns("train") if splits[0].streamed else train_dataset,
            query_dataset=query_dataset,
            checkpoints=[as_checkpoint(c) for c in (checkpoints if checkpoints is not None else [model])],
            cache_dir=folder,
            progress=progress and is_main(),
            store_dtype=check_dtype(store_dtype),
            outlasting=from_main(lambda: cache_dir is not None),
        )
        if count() > 1:
            _refuse_differences(problem)
        _try_task(problem)
        if problem.outlasting and not problem.train.streamed:
            _ = problem.fingerprints  # now, while no other copy of the model is there
        yield problem, used_subsets
        from_main(lambda: forget(*problem.begun))


def _refuse_differences(problem: Problem) -> None:
    """Refuse processes that would compute parts of different scores."""
    own = {
        **{f"version of {name}": importlib.metadata.version(name) for name in ("torch", "transformers", "datasets")},
        "version of hf_attribution": importlib.import_module("hf_attribution").__version__,
        "batch_size": problem.train.batch_size,
        "number of rows": problem.shape,
        **problem.fingerprints,
    }
    main, *others = gather(own)
    for rank, other in enumerate(others, start=1):
        different = [
            f"{name} ({other[name]} there, {main[name]} in process 0)" for name in main if other[name] != main[name]
        ]
        if different:
            raise ProcessError(
                f"Process {rank} has another {', '.join(different)}: give all processes of a launch the same model, "
                "data and packages (seed what is random before it is shuffled or initialised)."
            )


def _whole(model: nn.Module) -> nn.Module:
    """The model under the wrapper of a distributed training; refused where no process has all of it."""
    model = model.module if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) else model
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") or hasattr(parameter, "_is_flat_param"):
            raise UnsupportedError(
                f"{name} is sharded over processes (FSDP, DeepSpeed ZeRO or tensor parallelism), and per-example "
                "gradients need all of it: save the model, and load it whole in each process."
            )
    return model


def _try_task(problem: Problem) -> None:
    """Two examples of either split through the task, so that what is missing is said before hours are spent."""
    with torch.no_grad():
        for model, _ in dataclasses.replace(problem, checkpoints=problem.checkpoints[:1]).models():
            problem.task.losses(model, problem.train.probe().to(problem.device).inputs)
            problem.task.measurement(model, problem.query.probe().to(problem.device).inputs)


@contextlib.contextmanager
def working_folder(cache_dir: str | Path | None) -> Iterator[Path]:
    """The folder for what is stored, made by the main process and seen by all.

    Args:
        cache_dir: The folder; `None` for one that is deleted at the end.

    Yields:
        Its path, the same in all processes.

    Raises:
        ProcessError: If a process does not see it.
    """
    with contextlib.ExitStack() as stack:

        def made() -> Path:
            if cache_dir is None:
                return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hf_attribution-")))
            Path(cache_dir).mkdir(parents=True, exist_ok=True)
            return Path(cache_dir).resolve()

        folder = from_main(made)
        blind = [str(rank) for rank, sees in enumerate(gather(folder.is_dir())) if not sees]
        if blind:
            raise ProcessError(
                f"Process {', '.join(blind)} does not see the folder {folder} of process 0, being on another machine: "
                "give a cache_dir that is shared by all machines."
            )
        yield folder
        gather("done")  # before it is deleted
