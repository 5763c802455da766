"""Curvature and second moments of the training gradients, kept in a problem's `cache_dir`."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_attribution.artefacts import fingerprint
from hf_attribution.bookmark import forget
from hf_attribution.curvature.fitting import fit_curvature
from hf_attribution.curvature.kronecker import KroneckerCurvature
from hf_attribution.curvature.rows import CurvatureRows
from hf_attribution.gradients.held import Source
from hf_attribution.gradients.moments import SecondMoments, second_moments
from hf_attribution.inputs import weights_fingerprint
from hf_attribution.problem import Problem
from hf_attribution.processes import from_main


def kept_fit(
    problem: Problem,
    model: nn.Module,
    name: str,
    rows: Callable[[], CurvatureRows],
    settings: Mapping[str, Any],
    weights: str,
) -> KroneckerCurvature:
    """A curvature matrix of the training data, fitted if it is not in `cache_dir` yet.

    With a `cache_dir` that outlasts the call, a fit that is killed goes on from where it stood a minute before, or so,
    to the same bits, in the same batches and as many processes; others begin again.

    Args:
        problem: Task and training data.
        model: The model.
        name: How the file's name begins.
        rows: Gives the rows of the matrix.
        settings: All that the rows depend on beside data, task and weights; and `kind`, see `fit_curvature`. JSON.
        weights: The fingerprint of the weights.

    Returns:
        The curvature.
    """
    provenance = _provenance(problem, weights, settings)
    path = problem.cache_dir / "curvature" / f"{name}-{fingerprint(provenance)}.safetensors"
    unfinished = problem.cache_dir / "unfinished" / path.stem if problem.outlasting else None
    if there := from_main(path.exists):
        found = KroneckerCurvature.load(path)
    else:
        with torch.no_grad():
            found = fit_curvature(model, rows(), settings["kind"], provenance, problem.progress, unfinished)

    def keep() -> None:
        if not there:
            found.save(path)
        forget(unfinished)

    from_main(keep)
    return found


def kept_moments(problem: Problem, model: nn.Module, modules: Sequence[str] | None) -> SecondMoments:
    """The second moments of the training gradients, in a pass over them if they are not in `cache_dir` yet.

    Args:
        problem: Task and training data.
        model: The model.
        modules: Patterns of the modules whose parameters count.

    Returns:
        The moments.
    """
    provenance = _provenance(problem, weights_fingerprint(model), {"modules": list(modules or ())})
    path = problem.cache_dir / "moments" / f"{fingerprint(provenance)}.safetensors"
    if from_main(path.exists):
        return SecondMoments.load(path).to(problem.device)
    found = second_moments(Source(problem.gradients(model, problem.task.gains, problem.train, modules), problem.train))
    from_main(lambda: found.save(path))
    return found


def _provenance(problem: Problem, weights: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a fit belongs to."""
    fingerprints = {
        "model": weights,
        "train": problem.train.fingerprint,
        "inputs": problem.train.inputs_fingerprint,
        "task": fingerprint(json.dumps(problem.task.description, sort_keys=True)),
    }
    return {**settings, "fingerprints": fingerprints}
