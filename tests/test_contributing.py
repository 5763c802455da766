"""The method that CONTRIBUTING.md shows is a whole one, and does what is said of it."""

import dataclasses
import re
import sys
import types
from pathlib import Path

import numpy as np
import torch
from tiny import model, points

from hf_attribution import attribute
from hf_attribution.methods import METHODS

CONTRIBUTING = Path(__file__).parents[1] / ".github" / "CONTRIBUTING.md"


def test_the_method_runs_and_passes_its_test(monkeypatch):
    method, test = re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(encoding="utf-8"), re.DOTALL)
    module = types.ModuleType("kernel_similarity")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    exec(compile(method, "kernel_similarity.py", "exec"), module.__dict__)
    kind = module.KernelSimilarity
    names = {"attribute": attribute, "KernelSimilarity": kind, "np": np}
    exec(compile(test, "test_kernel_similarity.py", "exec"), names)
    trained, train, queries = model(), points().with_format("torch"), points(5, seed=1).with_format("torch")
    names["test_kernel_similarity_is_its_closed_form"](trained, train, queries)
    # Named in METHODS, it is known by its name, and says what it chose.
    monkeypatch.setitem(METHODS, kind.name, kind)
    scores = attribute(trained, train, queries, method="kernel_similarity")
    distances = torch.cdist(torch.stack(list(queries["points"])).double(), torch.stack(list(train["points"])).double())
    assert np.isclose(scores.provenance["choices"]["width"][0], float(distances.median()))
    assert [field.name for field in dataclasses.fields(kind)] == ["width"]
