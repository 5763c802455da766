"""Charts of the page: Vega-Lite, drawn by the reader's browser.

Why Vega-Lite: a chart is a description of twenty lines, not code; its scripts come from a Python package
(`vl-convert-python`, which Altair uses for the same), so that nothing is fetched; they take 0.9 MB of a page (plotly's
take 4.5); they draw SVG, follow light and dark, and interpret expressions without `eval`, which the page's content
security policy forbids. Matplotlib's SVG would need a drawing of its own for every query. A page without retrained
models has no charts, and none of these scripts.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from hf_attribution.report.comparison import Entry
from hf_attribution.report.page_data import short
from hf_attribution.report.plots import LEAST_COST

_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"


@functools.cache
def vega_scripts() -> str:
    """The scripts that draw, as one: `vegaEmbed` and what it needs.

    Returns:
        JavaScript.

    Raises:
        ImportError: `vl-convert-python` is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise ImportError("A page with charts needs vl-convert-python: pip install hf-attribution[report].") from error
    scripts = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    # Inside of strings these mean the same, and do not end or hide the <script> they stand in.
    return re.sub(r"<(?=/script|!--)", r"\\x3c", scripts, flags=re.IGNORECASE)


def scatter(measurement: str) -> dict[str, Any]:
    """A point a subset: its predicted against its true output. The page fills in the `points` of a query."""
    return {
        "$schema": _SCHEMA,
        "width": "container",
        "height": 200,
        "data": {"name": "points", "values": []},
        "mark": {"type": "point", "filled": True, "size": 45, "opacity": 0.75, "tooltip": True},
        "encoding": {
            "x": _axis("predicted", "sum of the subset's scores"),
            # Titles become part of expressions, which no line separator may interrupt.
            "y": _axis("true", f"{' '.join(measurement.split())[:60]} after retraining"),
            "tooltip": [
                {"field": "subset", "title": "subset"},
                {"field": "predicted", "title": "predicted", "type": "quantitative"},
                {"field": "true", "title": "true", "type": "quantitative"},
            ],
        },
    }


def cost(entries: Sequence[Entry]) -> dict[str, Any] | None:
    """LDS with its interval against cost, a point a method, below the noise ceiling.

    Args:
        entries: The methods.

    Returns:
        The chart; None where no method has both.
    """
    rows = []
    for entry in entries:
        lds, trainings = short(entry.report.lds), short(entry.trainings)
        if lds is None or trainings is None:
            continue
        low, high = (short(bound) for bound in entry.report.confidence_interval)
        rows.append(
            {"method": entry.label, "lds": lds, "low": low, "high": high, "cost": max(trainings, LEAST_COST)}
            | {"trainings": trainings}
        )
    if not rows:
        return None
    x = {
        "field": "cost",
        "type": "quantitative",
        "scale": {"type": "log"},
        "title": "cost of the scores, in trainings",
        "axis": {"tickCount": 5, "format": "~g", "grid": False},
    }
    layers: list[dict[str, Any]] = [
        {"mark": {"type": "rule", "strokeWidth": 2}, "encoding": {"y": _axis("low", "LDS"), "y2": {"field": "high"}}},
        {
            "mark": {"type": "point", "filled": True, "size": 80, "opacity": 1},
            "encoding": {
                "y": _axis("lds", "LDS"),
                "tooltip": [{"field": name} for name in ("method", "lds", "low", "high", "trainings")],
            },
        },
        {
            "mark": {"type": "text", "align": "left", "dx": 9, "dy": -8, "limit": 180},
            "encoding": {"y": _axis("lds", "LDS"), "text": {"field": "method"}},
        },
    ]
    bounds = [{"value": 0.0, "name": ""}]
    if entries[0].report.ceiling is not None:
        bounds.append({"value": short(entries[0].report.ceiling), "name": "noise ceiling"})
    dashed = {"type": "rule", "strokeDash": [4, 4], "opacity": 0.6}
    where = {"y": {"field": "value", "type": "quantitative"}}
    named = {"type": "text", "align": "right", "baseline": "top", "x": "width", "dx": -4, "dy": 4}
    ceiling = [
        {"data": {"values": bounds}, "mark": dashed, "encoding": where},
        {"data": {"values": bounds}, "mark": named, "encoding": {**where, "text": {"field": "name"}}},
    ]
    return {
        "$schema": _SCHEMA,
        "width": "container",
        "height": 300,
        "layer": [{"data": {"values": rows}, "encoding": {"x": x}, "layer": layers}, *ceiling],
    }


def _axis(field: str, title: str) -> dict[str, Any]:
    return {"field": field, "type": "quantitative", "title": title, "scale": {"zero": False}}
