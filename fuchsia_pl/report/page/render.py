"""Joins template, styles, scripts and data into one HTML text that opens without a network."""

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
STYLES = ("vendor/uPlot.min.css", "css/base.css", "css/curves.css", "css/rollouts.css", "css/tables.css")
# In this order: the first makes the whole script strict, a file uses constants of those before it, the last starts the page.
SCRIPTS = (
    "js/dom.js",
    "vendor/uPlot.iife.min.js",
    *(f"js/{name}.js" for name in ("text", "data", "theme", "status", "chart", "legend", "curves")),
    *(f"js/{name}.js" for name in ("evaluations", "config", "tokens", "card", "group", "filters", "list")),
    *(f"js/{name}.js" for name in ("browser", "keys", "reload", "main")),
)
COMPRESSION = 5  # level 9 takes several times as long for 3 % less
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


def render_page(title: str, summary: Mapping[str, Any], rollouts: Mapping[str, Any]) -> str:
    """HTML text of a report.

    Neither the title nor the data can become markup or code: the title is escaped, and the data are JSON without `<` and
    base64. A content security policy allows exactly the scripts and styles of this folder and no request.

    Args:
        title: Title of the browser's tab.
        summary: Status, curves, evaluations and configuration of one or several runs. Plain JSON values.
        rollouts: Texts and figures of the rollouts of the first run. Plain JSON values.

    Raises:
        ValueError: A number is not finite. A value that was not logged is None.
    """
    styles, scripts = _joined(STYLES), _joined(SCRIPTS)
    values = {
        "title": html.escape(title.encode("utf-8", "replace").decode()),
        "style_hash": _hash(styles),
        "script_hash": _hash(scripts),
        "css": styles,
        "js": scripts,
        "summary": _json(summary).replace("<", "\\u003c"),
        "rollouts": _packed(rollouts),
    }
    # All in one pass: text of the data that looks like a placeholder stays as it is.
    return PLACEHOLDER.sub(lambda match: values[match[1]], _text("page.html"))


def _packed(rollouts: Mapping[str, Any]) -> str:
    """Rollouts as base64 of compressed JSON."""
    rows = [_with_packed_tokens(row) for row in rollouts["rows"]]
    data = gzip.compress(_json({**rollouts, "rows": rows}).encode(), COMPRESSION, mtime=0)
    return base64.b64encode(data).decode()


def _with_packed_tokens(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose tokens are one JSON text, `token_data`. The page parses that text when it shows the row. A packed row stays.

    Ten thousand texts are read in a fraction of the time that millions of tokens would take, and need less memory.

    >>> _with_packed_tokens({"id": "a", "parts": [{"text": "ab", "tokens": ["a", "b"], "gaps": [0, 1]}, {"text": "c"}]})
    {'id': 'a', 'parts': [{'text': 'ab'}, {'text': 'c'}], 'token_data': '[[["a","b"],null,[0,1]],[null,null,null]]'}
    """
    if "token_data" in row:
        return dict(row)
    parts: Sequence[Mapping[str, Any]] = row["parts"]
    columns = ("tokens", "advantages", "gaps")
    texts = [{key: value for key, value in part.items() if key not in columns} for part in parts]
    return {**row, "parts": texts, "token_data": _json([[part.get(key) for key in columns] for part in parts])}


def _json(value: object) -> str:
    """ASCII: a lone surrogate of a completion cannot be encoded otherwise."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


@cache
def _text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _joined(names: Sequence[str]) -> str:
    return "\n".join(_text(name) for name in names)


def _hash(text: str) -> str:
    """Hash by which a content security policy admits an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
