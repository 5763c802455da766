"""Direct estimation and nearest neighbours, beside other libraries."""

import time
from typing import Any

import numpy as np
import torch
from rich.console import Console

from hf_attribution.estimation.lasso import fit_lasso
from hf_attribution.methods.knn_shapley import knn_shapley_scores
from hf_attribution.subsets import Subsets


def benchmark_datamodel(arguments: Any, console: Console) -> None:
    """All LASSO paths together against one scikit-learn `LassoCV` a query (and `celer`, where it is installed)."""
    from sklearn.linear_model import LassoCV

    num_subsets, num_examples, num_queries, num_folds, timed = 2000, 1000, 200, 5, 2
    rng = np.random.default_rng(0)
    masks = Subsets.random(num_examples, num_subsets).masks
    truth = 0.1 * rng.standard_t(2.5, size=(num_queries, num_examples))
    truth += rng.normal(size=truth.shape) * (rng.random(truth.shape) < 0.02)
    signal = truth @ masks.T
    outputs = signal + rng.normal(size=signal.shape) * signal.std(axis=1, keepdims=True)
    started = time.perf_counter()
    ours = fit_lasso(masks, outputs, num_folds=num_folds)
    seconds = time.perf_counter() - started
    console.print(f"hf_attribution: {seconds:.1f} s for {num_queries} queries, 2,000 subsets x 1,000 examples")

    rows, design = np.arange(num_subsets), masks.astype(np.float64)
    folds = [(rows[rows % num_folds != fold], rows[rows % num_folds == fold]) for fold in range(num_folds)]
    started = time.perf_counter()
    fits = [LassoCV(cv=folds).fit(design, row) for row in outputs[:timed]]
    library = (time.perf_counter() - started) / timed * num_queries
    differences = [np.abs(fit.coef_ - ours.coefficients[query]).max() for query, fit in enumerate(fits)]
    penalties = [fit.alpha_ for fit in fits] / outputs[:timed].std(axis=1) / ours.penalties[:timed]
    console.print(
        f"scikit-learn's LassoCV: {library:.0f} s ({timed} queries timed), {library / seconds:.0f} times as long; "
        f"largest difference of a coefficient {max(differences):.1e}; ratio of chosen penalties {penalties.min():.4f} "
        f"to {penalties.max():.4f}"
    )
    try:
        from celer import celer_path
    except ImportError:
        console.print("celer is not installed: pip install --no-deps celer")
        return
    # Its own LassoCV does not run with scikit-learn 1.9, so its path of one fold is timed.
    train = folds[0][0]
    x, y = design[train] - design[train].mean(0), outputs[0, train] - outputs[0, train].mean()
    grid = np.abs(x.T @ y).max() / len(x) * np.logspace(0, -3, 100)
    started = time.perf_counter()
    celer_path(np.asfortranarray(x), y, "lasso", alphas=grid, tol=1e-4)
    library = (time.perf_counter() - started) * num_folds * num_queries
    console.print(
        f"celer: {library:.0f} s (the path of one fold of one query timed), {library / seconds:.0f} times as long"
    )


def benchmark_knn_shapley(arguments: Any, console: Console) -> None:
    """Exact values from given hidden states, as the method computes them: in blocks of queries."""
    queries, examples, dim = 1000, 50_000, 384
    rng = np.random.default_rng(0)
    query, train = (torch.from_numpy(rng.standard_normal((rows, dim), np.float32)) for rows in (queries, examples))
    query_labels, train_labels = rng.integers(10, size=queries), rng.integers(10, size=examples)
    started = time.perf_counter()
    values = knn_shapley_scores(query, train, query_labels, train_labels, 5, "negative_distance")
    seconds = time.perf_counter() - started
    console.print(
        f"{queries:,} queries x {examples:,} examples x {dim} dimensions: {seconds:.1f} s, "
        f"{values.nbytes / 2**20:.0f} MiB of scores."
    )
