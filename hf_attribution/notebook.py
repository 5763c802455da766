"""What artefacts look like in a notebook: small tables, with everything that came from elsewhere escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_LONGEST = 120


def html_view(
    title: str, facts: Mapping[str, Any], header: Sequence[str] = (), rows: Iterable[Sequence[Any]] = ()
) -> str:
    """A title, facts and a table as HTML.

    Args:
        title: What it is.
        facts: Names and JSON values; long ones are cut, empty ones left out.
        header: Names of the table's columns.
        rows: Its rows.

    Returns:
        HTML for `_repr_html_`.

    Example:
        >>> html_view("<b>", {"a": "&"})
        '<div><p><b>&lt;b&gt;</b></p><table><tbody><tr><th>a</th><td>&amp;</td></tr></tbody></table></div>'
    """
    parts = [f"<div><p><b>{_cell(title)}</b></p>"]
    lines = "".join(
        f"<tr><th>{_cell(name)}</th><td>{_cell(value)}</td></tr>"
        for name, value in facts.items()
        if value not in (None, "", {}, [])
    )
    if lines:
        parts.append(f"<table><tbody>{lines}</tbody></table>")
    body = "".join(f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in row)}</tr>" for row in rows)
    if body:
        names = "".join(f"<th>{_cell(name)}</th>" for name in header)
        parts.append(f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>")
    return "".join([*parts, "</div>"])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        text = f"{value:.4g}"
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return html.escape(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…")
