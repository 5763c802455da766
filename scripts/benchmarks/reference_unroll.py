"""Scores through a training by this library and by bergson (MAGIC), on the tiny GPT-2 of `unrolled.py`.

Both differentiate the same losses of queries by the weights of the examples, through the same ten steps of AdamW: same
weights at the start, batches, learning rates, clipping and dropout. So that it is one training to both of them,
embeddings are not tied (bergson has moments for each name of a tied matrix, with which AdamW takes other steps), the
first token is no label (transformers would count it in the divisor, bergson does not), and attention is written out.
bergson's epsilon below the square root, which torch's AdamW does not have, is as good as none; with 0 its derivative
is not finite.

    pip install --no-deps bergson==2.5.1 torchopt graphviz optree natsort ml_dtypes jaxtyping wadler-lindig \
        simple-parsing docstring-parser petname
"""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.memory import Peak
from hf_attribution.replay.run import RecordedRun
from hf_attribution.replay.sweep import Differentiable
from hf_attribution.tasks import infer_task
from unrolled import gpt2, tokens, trainer_of

MANY, FEW, ROOT_EPSILON = 64, 4, 1e-30


def rows(where: slice) -> Dataset:
    """Random tokens, the first of which is no label."""
    columns = {name: values.clone() for name, values in tokens(where)[:].items()}
    columns["labels"][:, 0] = -100
    return Dataset.from_dict({name: values.numpy() for name, values in columns.items()}).with_format("torch")


def fresh() -> PreTrainedModel:
    """The model before its training."""
    torch.manual_seed(0)
    return gpt2(tie_word_embeddings=False, attn_implementation="eager")


def prepare(folder: str, train: bool = False) -> Differentiable:
    """The training that is recorded in a folder, ready for sweeps.

    Args:
        folder: The folder.
        train: Whether it is to be recorded first.

    Returns:
        The run.
    """
    trainer = trainer_of(fresh(), rows(slice(1000)), folder, record=train)
    if train:
        trainer.train()
    return Differentiable.prepare(
        RecordedRun.open(Path(folder, "recording"), trainer), infer_task(cast(Any, trainer.model))
    )


def query_gradients(prepared: Differentiable, count: int) -> Tensor:
    """Gradients of the queries' losses by the last parameters, `[M, P]`."""
    model = prepared.load(fresh(), prepared.final()).eval()
    named, found = dict(model.named_parameters()), []
    for query in rows(slice(1000, 1000 + count)):
        loss = model(**{name: values[None] for name, values in query.items()}).loss
        gradients = torch.autograd.grad(loss, [named[name] for name in prepared.flat.names])
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(found)


class Bergson:
    """The recorded training, taken by bergson.

    Args:
        prepared: The recorded training.
        folder: For bergson's checkpoints.
    """

    def __init__(self, prepared: Differentiable, folder: str) -> None:
        import torchopt
        from bergson.magic.data_stream import DataStream
        from bergson.magic.trainer import Trainer
        from bergson.utils.math import weighted_causal_lm_ce

        recording, replay = prepared.run.recording, prepared.replay()
        steps = [recording.step(step) for step in range(len(recording))]
        self.order = torch.from_numpy(np.concatenate([step.batches[0].rows for step in steps]))
        settings = recording.optimizer.groups[0].settings
        optimizer = torchopt.adamw(
            lambda step: steps[step].rates[0], betas=tuple(settings["betas"]), eps=settings["eps"],
            eps_root=ROOT_EPSILON, weight_decay=settings["weight_decay"],
        )  # fmt: skip
        model = fresh().train()
        model.loss_function = weighted_causal_lm_ce
        self.trainer, self.state = Trainer.initialize(model, optimizer)
        replay.load(0, recording.state(0))
        self.state.cpu_rng_state = torch.from_numpy(replay.parts(0)[0].random.torch_cpu.copy())
        examples = rows(slice(1000))[:]
        batches = Dataset.from_dict({name: values[self.order].tolist() for name, values in examples.items()})
        self.stream = DataStream(batches, len(self.order) // len(steps))
        self.prepared, self.folder, self.max_norm = prepared, folder, recording.optimizer.max_norm

    def train(self) -> Tensor:
        """Take the steps, with checkpoints.

        Returns:
            The last parameters, `[P]`.
        """
        self.state = self.trainer.train(
            self.state, self.stream, inplace=True, save_dir=self.folder, max_grad_norm=self.max_norm
        )
        return torch.cat([self.state.params[name].detach().flatten() for name in self.prepared.flat.names])

    def scores(self, target: Tensor) -> Tensor:
        """Derivatives `[N]` of the measurement whose gradient by the last parameters is `[P]`."""
        from bergson.magic.trainer import BackwardState
        from torchopt.pytree import tree_iter

        parts = dict(zip(self.prepared.flat.names, target.split(self.prepared.flat.sizes), strict=True))
        start = BackwardState(
            {name: parts[name].view_as(parameter).clone() for name, parameter in self.state.params.items()},
            [torch.zeros_like(each) for each in tree_iter(self.state.opt_state) if each.is_floating_point()],
            torch.zeros_like(self.stream.weights),
        )
        end = self.trainer.backward(
            self.folder, self.stream, start, self.state, cleanup=False, inplace=True, max_grad_norm=self.max_norm
        )
        found = torch.zeros(self.prepared.run.recording.header["num_examples"])
        found[self.order] = end.weight_grads.detach()
        return found


def ways(prepared: Differentiable) -> dict[str, tuple[Differentiable, int]]:
    """This library's sweeps: what is swept through, and for how many queries."""
    slow = dataclasses.replace(prepared, product=prepared.flat.double_backward)
    return {
        f"unroll, {MANY} queries": (prepared, MANY),
        "unroll, 1 query": (prepared, 1),
        f"double backward, {FEW} queries": (slow, FEW),
    }


BERGSON = "bergson, 1 query"


def compare(repeats: int) -> list[tuple[str, ...]]:
    """Rows of a table: what, seconds a query, times that of the first, correlation, difference, peak memory.

    Correlation and the largest difference, as a share of the largest score, are those to bergson's scores.

    Args:
        repeats: How often each is timed, in turn; medians are given.

    Returns:
        The rows.

    Raises:
        ModuleNotFoundError: If bergson or what it imports is not installed.
        RuntimeError: If bergson's training is another one.
    """
    importlib.import_module("bergson.magic.trainer")  # before anything takes time
    with tempfile.TemporaryDirectory() as folder, quiet():
        prepared = prepare(folder, train=True)
        chunk, targets = prepared.fastest_chunk(MANY), query_gradients(prepared, MANY)
        bergson = Bergson(prepared, str(Path(folder, "bergson")))
        apart = float((bergson.train() - prepared.final()).abs().max())
        if apart > 1e-5:
            raise RuntimeError(f"The two trainings end {apart:.1e} apart: they cannot be compared.")
        seconds: dict[str, list[float]] = {}
        scores: dict[str, Tensor] = {}

        def timed(key: str, queries: int, run: Callable[[], Tensor]) -> None:
            started = time.process_time()
            scores[key] = run()
            seconds.setdefault(key, []).append((time.process_time() - started) / queries)

        for _ in range(repeats):
            for key, (way, queries) in ways(prepared).items():
                timed(key, queries, lambda: way.sweep(targets[:queries].clone(), chunk=chunk)[0])  # noqa: B023
            timed(BERGSON, FEW, lambda: torch.stack([bergson.scores(target) for target in targets[:FEW]]))
        medians = {key: statistics.median(values) for key, values in seconds.items()}
        first = next(iter(medians.values()))
        found: list[tuple[str, ...]] = []
        for key, median in medians.items():
            name = key if key == BERGSON else f"{key} (chunk {chunk})"
            close = agreement(scores[key], scores[BERGSON])
            memory = peak_memory(folder, key, chunk)
            found.append((name, f"{median:.2f}", f"{median / first:.2f}", *close, f"{memory:.0f}"))
        return found


def agreement(ours: Tensor, theirs: Tensor) -> tuple[str, str]:
    """Lowest correlation of the scores of a query, and the largest difference as a share of the largest score."""
    both = min(len(ours), len(theirs))
    pairs = list(zip(ours[:both].numpy(), theirs[:both].numpy(), strict=True))
    correlation = min(np.corrcoef(mine, other)[0, 1] for mine, other in pairs)
    difference = max(np.abs(mine - other).max() / np.abs(other).max() for mine, other in pairs)
    return f"{correlation:.8f}", f"{difference:.1e}"


def peak_memory(folder: str, key: str, chunk: int) -> float:
    """MiB that a way takes beyond model and data, in a process of its own, on a training that is recorded."""
    command = [sys.executable, "-m", "benchmarks.reference_unroll", folder, key, str(chunk)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed before is not used again unseen
    output = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment
    )
    return float(json.loads(output.stdout.splitlines()[-1]))


def measure(folder: str, key: str, chunk: int) -> float:
    """The same, in this process."""
    prepared = prepare(folder)
    if key == BERGSON:
        bergson, target = Bergson(prepared, str(Path(folder, "bergson"))), torch.randn(sum(prepared.flat.sizes))
        with Peak() as peak:
            bergson.scores(target)
    else:
        way, queries = ways(prepared)[key]
        targets = torch.randn(queries, sum(prepared.flat.sizes))
        with Peak() as peak:
            way.sweep(targets, chunk=chunk)
    return peak.mib


@contextlib.contextmanager
def quiet() -> Any:
    """Without bergson's progress bars, which have no switch."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
