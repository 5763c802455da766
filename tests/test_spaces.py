"""Every metric is a Space: its card, its page in use, and pushing it."""

import csv
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from hub_server import Hub, environment
from huggingface_hub import SpaceCard

from hf_attribution.metric_cache import metric_core

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.parent.name for path in (ROOT / "metrics").glob("*/app.py"))
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}

RNG = np.random.default_rng(0)
TRUTH = RNG.normal(size=(5, 12))
SIZES = [[3], [5], [float("nan")], [2]]
# What goes into a page: its files, and its other fields.
INPUTS = {
    "lds": ([TRUTH + RNG.normal(size=TRUTH.shape), TRUTH], [None, 0.9]),
    "loo_correlation": ([TRUTH + RNG.normal(size=TRUTH.shape), TRUTH], []),
    "mislabel_auc": ([RNG.normal(size=(12, 1)), [[0], [1]] * 6], []),
    "recall_at_k": ([[[4, 2, 0], [1, 0, 3]], [[2], [0]]], [2]),
    "brittleness": ([SIZES, [[6], [float("nan")], [9], [4]]], [10]),
}


def computed(name):
    """What a page must show, computed by the metric's own mathematics."""
    (predictions, references), fields = INPUTS[name]
    compute = getattr(metric_core(name), f"compute_{name}")
    if name == "lds":
        return compute(predictions, references, confidence_level=0.9)
    if name == "loo_correlation":
        return compute(predictions, references)
    if name == "recall_at_k":
        return compute(predictions, references, k=2)
    flat = [[value for row in table for value in row] for table in (predictions, references)]
    return compute(*flat, max_size=fields[0]) if fields else compute(*flat)


@pytest.mark.parametrize("name", NAMES)
def test_the_card_of_a_space(name):
    card = SpaceCard.load(ROOT / "metrics" / name / "README.md").data.to_dict()
    assert card["sdk"] == "gradio"
    assert (ROOT / "metrics" / name / card["app_file"]).exists()
    assert {card["colorFrom"], card["colorTo"]} <= COLOURS
    assert {"evaluate", "metric"} <= set(card["tags"])
    assert int(card["sdk_version"].split(".")[0]) >= 6
    # Spaces install gradio themselves; the page needs nothing else.
    needed = (ROOT / "metrics" / name / "requirements.txt").read_text()
    assert {"evaluate", "datasets", "numpy", "scipy"} <= {line.partition(">")[0] for line in needed.split()}


@pytest.fixture(scope="module")
def gradio():
    """Looked for without importing it here: an old one breaks on import, and pages run in their own process."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed")
    from importlib.metadata import version

    if int(version("gradio").split(".")[0]) < 6:
        pytest.skip("gradio is too old: the pages are for 6 and later")
    return pytest.importorskip("gradio_client")


@pytest.mark.parametrize("name", NAMES)
def test_a_page_computes_what_the_metric_does(gradio, name, tmp_path):
    files, fields = INPUTS[name]
    paths = []
    for number, rows in enumerate(files):
        paths.append(tmp_path / f"{number}.csv")
        with paths[-1].open("w", newline="") as file:
            csv.writer(file).writerows(np.asarray(rows).tolist())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    page = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT / "metrics" / name, env={**os.environ, **quiet})
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, page)
        client = gradio.Client(url, verbose=False)
        shown = client.predict(*(gradio.handle_file(str(path)) for path in paths), *fields, api_name="/score")
        with pytest.raises(Exception, match="Upload predictions and references"):
            client.predict(None, gradio.handle_file(str(paths[1])), *fields, api_name="/score")
        client.close()
    finally:
        page.terminate()
        page.wait()
    expected = computed(name)
    if name == "lds":
        summary, queries = shown
        assert summary["data"][0][:2] == ["LDS", f"{expected['lds']:.3f}"]
        assert [float(row[1]) for row in queries["data"]] == pytest.approx(expected["lds_per_query"], abs=1e-6)
    else:
        assert json.loads(shown) == json.loads(json.dumps(expected))


def wait_for(url, page):
    for _ in range(600):
        assert page.poll() is None, "the page stopped"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                assert answer.status == 200
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail("the page did not start in two minutes")


def test_pushing_the_metrics(tmp_path):
    with Hub() as hub:

        def push(*options, token="hf_writer"):
            return subprocess.run(
                [sys.executable, ROOT / "scripts" / "push_metrics.py", "--namespace", "ada", *options],
                env=environment(hub.url, tmp_path, token), capture_output=True, text=True,
            )  # fmt: skip

        first = push()
        assert first.returncode == 0, first.stderr
        assert [line.partition(":")[0] for line in first.stdout.splitlines()] == NAMES
        for name in NAMES:
            files = hub.repos[f"spaces/ada/{name}"].files
            held = {".gitattributes", "README.md", "app.py", f"{name}.py", f"{name}_core.py", "requirements.txt"}
            assert set(files) == held
            assert files["app.py"].content == (ROOT / "metrics" / name / "app.py").read_bytes()
        hub.add("spaces/ada/lds", "app.py", b"changed by hand")
        again = push("--metrics", "lds", "brittleness", "--private")
        assert "is public" in again.stderr
        again = push("--metrics", "lds", "brittleness")
        assert again.returncode == 0, again.stderr
        assert len(hub.repos["spaces/ada/brittleness"].titles) == 2  # nothing to do
        assert hub.repos["spaces/ada/lds"].files["app.py"].content != b"changed by hand"
        assert "hf auth login" in push(token=None).stderr
