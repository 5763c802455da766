"""Figures and notebook views: what they draw is what the artefacts hold, and data never become markup."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from hf_attribution import Counterfactuals, Scores, Subsets, compare, plot_cost, plot_lds, plot_top
from hf_attribution.errors import MismatchError
from hf_attribution.report.examples import ranked

pytest.importorskip("matplotlib")


@pytest.fixture
def scores():
    return Scores(np.random.default_rng(0).normal(size=(5, 30)), method="oracle", provenance={"seconds": 3.0})


@pytest.fixture
def truth(scores):
    subsets = Subsets.random(30, 40)
    noise = np.random.default_rng(1).normal(size=(40, 2, 5))
    outputs = (subsets.masks @ scores.values.T)[:, None] + noise
    return Counterfactuals(subsets, outputs, {"name": "resampled", "measurement": "margin"}, {"seconds": 160.0})


def test_compare_says_lds_and_cost_in_trainings(scores, truth):
    flipped = Scores(-scores.values, method="flipped")
    one, two = compare({"a": scores, "b": flipped}, truth)
    assert (one.label, two.label) == ("a", "b")
    assert one.report.lds == pytest.approx(-two.report.lds)
    # 80 trainings on halves took 160 s: a whole one takes 4.
    assert one.trainings == pytest.approx(3 / 4)
    assert np.isnan(two.trainings)
    other = Scores(scores.values[:2], method="few")
    with pytest.raises(MismatchError, match="few one: "):
        compare({"few one": other}, truth)


def test_plot_lds_draws_the_queries_points(scores, truth):
    figure = plot_lds(scores, truth, query=2)
    points, counts = figure.axes
    (line,) = [line for line in points.lines if line.get_marker() == "o"]
    assert np.allclose(line.get_xdata(), scores.predict(truth.subsets)[2])
    assert np.allclose(line.get_ydata(), truth.mean()[2])
    assert sum(bar.get_height() for bar in counts.patches[:20]) == 5
    with pytest.raises(IndexError, match="no query 5"):
        plot_lds(scores, truth, query=5)


def test_plot_cost_draws_a_point_a_method_that_has_both(scores, truth, tmp_path):
    entries = compare({"$a_$": scores, "b": Scores(-scores.values, method="b")}, truth)
    figure = plot_cost(entries)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["$a_$", "noise ceiling"]
    figure.savefig(tmp_path / "cost.svg")
    with pytest.raises(ValueError, match="nothing to compare"):
        plot_cost([])


def test_plot_top_draws_images_and_texts(scores, tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["a$_", "b"])})
    pictures = [np.full((4, 4), row, np.uint8) for row in range(29)]
    images = Dataset.from_dict({"image": [*pictures, None], "label": [0] * 30}, features=features)
    figure = plot_top(scores, images, images, queries=[1, 4], k=3)
    assert len(figure.axes) == 2 * 7
    helpful, _ = ranked(scores, 4, 3)
    (shown,) = figure.axes[8].images
    assert np.all(np.asarray(shown.get_array()) == helpful[0][0])
    figure.savefig(tmp_path / "images.png")

    rows = {"text": [f"text {row} $x_" for row in range(30)], "label": [0] * 30}
    texts = Dataset.from_dict(rows, features=Features({"text": Value("string"), "label": features["label"]}))
    figure = plot_top(scores, texts, texts, queries=[1], k=3)
    (axes,) = figure.axes
    assert f"text {ranked(scores, 1, 3)[0][0][0]} $x_" in axes.texts[0].get_text()
    figure.savefig(tmp_path / "texts.png")
    with pytest.raises(ValueError, match="no query 9"):
        plot_top(scores, texts, texts, queries=[9])
    with pytest.raises(ValueError, match="no column body"):
        plot_top(scores, texts, texts, column="body")


def test_ranked_takes_the_ends(scores):
    values = Scores(np.array([[1.0, 3.0, 3.0, -2.0, 0.0]]), "oracle")
    assert ranked(values, 0, 2) == ([(1, 3.0), (2, 3.0)], [(3, -2.0), (4, 0.0)])
    assert [len(end) for end in ranked(values, 0, 99)] == [5, 5]


def test_notebook_views_escape_and_are_short(scores, truth):
    attack = "<script>alert(1)</script>"
    hostile = Scores(scores.values, attack, {attack: attack * 100}, {"measurement": attack})
    protocol = Counterfactuals(truth.subsets, truth.outputs, {"name": attack, attack: [attack]})
    subsets = Subsets(truth.subsets.masks, {"name": attack})
    for view in (each._repr_html_() for each in (hostile, protocol, subsets)):
        assert "<script" not in view
        assert "&lt;script&gt;" in view
        assert len(view) < 10_000
    best = int(scores.values[0].argmax())
    assert f"<td>{best} ({scores.values[0, best]:+.3g})</td>" in scores._repr_html_()
    assert "15 to 15 of 30 examples" in truth.subsets._repr_html_()
