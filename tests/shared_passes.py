"""What `test_processes.py` runs in several processes: forks of one that has imported everything and computed nothing.

python shared_passes.py worlds|failures|lives|jobs FOLDER
"""

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", ACCELERATE_USE_CPU="1")

import numpy as np
import torch
from test_methods import STATIC, PadTokens, rows
from transformers import BertConfig, BertForSequenceClassification

from hf_attribution import (
    Checkpoint,
    attribute,
    attribute_dry_run,
    attribute_parts,
    attribute_top,
    bookmark,
    dry_run,
    self_influence,
    team,
)
from hf_attribution.curvature import fitting
from hf_attribution.errors import ProcessError
from hf_attribution.gradients import products
from hf_attribution.methods import METHODS, get_method
from hf_attribution.methods.base import Method


class RandomWords(PadTokens):
    """Replaces a word of each row by a random one."""

    def __call__(self, rows):
        changed = [{**row, "input_ids": [int(torch.randint(5, 50, ())), *row["input_ids"][1:]]} for row in rows]
        return super().__call__(changed)


def make_model(seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16, pad_token_id=1, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


VARIANTS = {
    "grad_dot projected": METHODS["grad_dot"](dim=64),
    "trak last layer": METHODS["trak"](dim=64, last_layer=True),
    "kfac fisher": METHODS["kfac"](curvature="fisher"),
    "influence gauss_newton": METHODS["influence"](curvature="gauss_newton", last_layer=True),
    "influence cg": METHODS["influence"](solver="cg", last_layer=True, damping=1.0),
    "influence hessian": METHODS["influence"](curvature="hessian", solver="explicit", last_layer=True, damping=10.0),
    "influence projected": METHODS["influence"](dim=64),
    "influence normalized": METHODS["influence"](normalize="self_influence"),
    "source fisher dual": METHODS["source"](
        segments=1, optimizer="sgd", momentum=0.0, curvature="fisher", solver="dual", last_layer=True
    ),
    "source explicit": METHODS["source"](
        segments=1, optimizer="sgd", momentum=0.0, solver="explicit", last_layer=True
    ),
}  # fmt: skip


PLAIN = {"data_collator": PadTokens(), "batch_size": 3, "progress": False}


def every_score(folder):
    """Scores by what they are of."""
    model, train, query = make_model(), rows(17, 1), rows(5, 2)
    plain = PLAIN
    methods: dict[str, Method] = {name: get_method(name) for name in STATIC if name != "source"}
    methods["source"] = METHODS["source"](segments=1, optimizer="sgd", momentum=0.0)
    found = {}
    for name, method in {**methods, **VARIANTS}.items():
        of_run = {"checkpoints": [Checkpoint(model, learning_rate_sum=1.0)]} if method.name == "source" else {}
        found[name] = attribute(model, train, query, method=method, **plain, **of_run).values
        if method.self_influence.__func__ is not Method.self_influence:
            found[f"{name}: self-influence"] = self_influence(model, train, method=method, **plain, **of_run)
    for granularity in ("token", "module"):
        for name in ("grad_dot", "ekfac", "datainf"):
            parts = attribute_parts(model, train, query, granularity=granularity, method=name, **plain)
            found[f"{name}: {granularity}s"] = parts.values
    for name in ("grad_dot", "trak", "ekfac"):
        found[f"{name}: a collator that draws"] = attribute(
            model, train, query, method=name, **{**plain, "data_collator": RandomWords()}
        ).values
        found[f"{name}: one batch"] = attribute(model, train, query, method=name, **{**plain, "batch_size": 32}).values
        found[f"{name}: one row"] = attribute(model, rows(1, 3), rows(1, 4), method=name, **plain).values
        found[f"{name}: several models"] = attribute(
            model, train, query, method=name, checkpoints=[model, make_model(1)], cache_dir=folder / "cache", **plain
        ).values
    projected = METHODS["trak"](dim=16)
    stream = train.to_iterable_dataset()
    found["trak: a stream"] = attribute(model, stream, query, method=projected, **plain).values
    for what, data in (("rows", train), ("a stream", stream)):
        top = attribute_top(model, data, query, k=3, method=projected, **plain)
        found[f"the top of {what}"], found[f"the places of the top of {what}"] = top.values, top.indices
    dry_run._ENOUGH_SECONDS = 1e-9
    expected = attribute_dry_run(model, train, query, method=projected, **plain)
    found["a dry run"] = np.array([expected.train_passes, expected.query_passes, expected.num_batches])
    whole, products.BLOCK_BYTES, products.TILE_BYTES = (products.BLOCK_BYTES, products.TILE_BYTES), 40_000, 10_000
    for name in ("grad_cos", "influence", "ekfac", "datainf"):
        found[f"{name}: little memory"] = attribute(model, train, query, method=name, **plain).values
    products.BLOCK_BYTES, products.TILE_BYTES = whole
    return found


def fork(function, *args, **environment):
    """Run a function in a process of its own."""
    child = os.fork()
    if child:
        return child
    os.environ.update(environment)
    code = 1
    try:
        function(*args)
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(children):
    """The exit codes of processes; of one that was killed, minus the signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def launch(size, function, *args):
    """Run a function in the processes of a launch; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return ended([fork(function, *args, **world, RANK=str(n), LOCAL_RANK=str(n)) for n in range(size)])


def save_scores(path):
    np.savez(f"{path}-{os.environ.get('RANK', 0)}.npz", **every_score(path.parent / path.name))


def worlds(folder):
    """All scores, computed by one, two and three processes."""
    assert ended([fork(save_scores, folder / "1")]) == [0]
    assert launch(2, save_scores, folder / "2") == [0, 0]
    assert launch(3, save_scores, folder / "3") == [0, 0, 0]


class Failing(PadTokens):
    """Fails at one of the rows."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def __call__(self, rows):
        if len(rows) > 2 and any(row["input_ids"][0] == 49 for row in rows):
            self.how()
        return super().__call__(rows)


def fail():
    raise ZeroDivisionError("a bad row")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def see_failures(folder):
    """What each process learns of the failures of others."""
    team.HEARTBEAT, team.LOOK, team.SILENCE = 0.2, 0.2, 3.0
    rank, seen = int(os.environ["RANK"]), {}
    model, train, query = make_model(), rows(17, 1), rows(5, 2)
    bad = [{**row, "input_ids": [49, *row["input_ids"][1:]]} if n == 0 else row for n, row in enumerate(train)]
    bad = type(train).from_list(bad)  # its first row is in the second batch
    trials = {
        "other data": {"train_dataset": rows(17, rank)},
        "other weights": {"model": make_model(rank)},
        "a failure": {"train_dataset": bad, "data_collator": Failing(fail)},
        "a death": {"train_dataset": bad, "data_collator": Failing(die)},
    }
    for name, changed in trials.items():
        started = time.monotonic()
        given = {"model": model, "train_dataset": train, "query_dataset": query, **PLAIN, **changed}
        try:
            attribute(**given, method=METHODS["trak"](dim=16))
        except (ProcessError, ZeroDivisionError) as error:
            seen[name] = [type(error).__name__, str(error), time.monotonic() - started]
        Path(folder, f"{rank}.json").write_text(json.dumps(seen))


def failures(folder):
    assert sorted(launch(2, see_failures, folder)) == [-signal.SIGKILL, 0]


class Mortal(PadTokens):
    """Kills the process after so many rows."""

    def __init__(self, rows):
        super().__init__()
        self.left = rows

    def __call__(self, rows):
        self.left -= len(rows)
        if self.left < 0:
            die()
        return super().__call__(rows)


def live(folder, lifetime):
    """Features, factors and scores, in one life or in several."""
    settings = {**PLAIN, "data_collator": Mortal(lifetime), "cache_dir": folder / "cache"}
    model, train, query = make_model(), rows(40, 1), rows(5, 2)
    found = {name: attribute(model, train, query, method=name, **settings).values for name in ("trak", "ekfac")}
    np.savez(folder / f"{os.environ.get('RANK', 0)}.npz", **found)


def lives(folder):
    """The same results of processes that are killed at random points, as often as it takes."""
    for size in (1, 2):
        whole, parts = folder / f"{size}-whole", folder / f"{size}-parts"
        whole.mkdir(), parts.mkdir()
        assert launch(size, live, whole, 10**9) == [0] * size
        random.seed(size)
        deaths, left = 0, set()
        while any(launch(size, mortal, parts, 50 + 25 * deaths + random.randrange(25))):
            deaths += 1
            left |= {path.name.split("-")[-1] for path in (parts / "cache" / "unfinished").glob("ekfac-*")}
        (parts / "deaths.json").write_text(json.dumps([deaths, sorted(left)]))


def mortal(folder, lifetime):
    """A life in which the second process, or the only one, dies early."""
    team.HEARTBEAT, team.LOOK, team.SILENCE = 0.2, 0.2, 2.0
    bookmark.EVERY_SECONDS, bookmark.SHARE, fitting.KEPT_BYTES = 0, 1, 0
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    live(folder, lifetime if last else 10**9)


def jobs(folder):
    """Two jobs that know nothing of each other, on one cache_dir."""
    assert ended([fork(live, folder, 10**9, RANK=str(n), WORLD_SIZE="1") for n in range(2)]) == [0, 0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"worlds": worlds, "failures": failures, "lives": lives, "jobs": jobs}[sys.argv[1]](Path(sys.argv[2]))
