"""Computes everything that passes over data, for `test_processes.py`: alone, or as one process of a launch.

    python shared_passes.py FOLDER
"""

import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

import numpy as np
import torch
from test_methods import STATIC, PadTokens, rows
from transformers import BertConfig, BertForSequenceClassification

from hf_attribution import AttributionTrainer, Checkpoint, attribute, attribute_parts, self_influence
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


def every_score(folder):
    """Scores by what they are of."""
    model, train, query = make_model(), rows(17, 1), rows(5, 2)
    plain = {"data_collator": PadTokens(), "batch_size": 3, "progress": False}
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
    whole, products.BLOCK_BYTES, products.TILE_BYTES = (products.BLOCK_BYTES, products.TILE_BYTES), 40_000, 10_000
    for name in ("grad_cos", "influence", "ekfac", "datainf"):
        found[f"{name}: little memory"] = attribute(model, train, query, method=name, **plain).values
    products.BLOCK_BYTES, products.TILE_BYTES = whole
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    number = os.environ.get("RANK", "alone")
    np.savez(target / f"{number}.npz", **every_score(target))
