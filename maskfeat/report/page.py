"""The report as one HTML page, which loads nothing: its style, its script, its data and its pictures are in it."""

import base64
import io
import json
import logging
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from maskfeat.report.run_log import Curves
from maskfeat.report.runs import Run, metric_names, summary
from maskfeat.text import printable

logger = logging.getLogger(__name__)

BUCKETS = 1000
"""Points of a curve at most; each stands for the mean, the lowest and the highest of as many entries in a row."""
_WIDEST = 1200, 1600
"""Pixels of a picture."""
_MOST_WARNINGS = 100
_HERE = Path(__file__).parent


def write_page(runs: Sequence[Run]) -> str:
    """Return the page."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    about, machine = metric_names(runs)
    data = {"runs": [_curves(run) for run in runs], "charts": [about, machine]}
    head = f"<title>{escape(title)} - maskfeat report</title><style>{(_HERE / 'page.css').read_text()}</style>"
    body = "\n".join(
        [
            f"<h1>{escape(title)}</h1>",
            "<section><h2>Summary</h2>",
            _summary(runs),
            "</section>",
            _charts() if about or machine else "<p>No curves: nothing has been trained.</p>",
            *map(_details, runs),
        ]
    )
    # Inside a script only "</" and "<!--" could end it or change how it is read.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    script = (_HERE / "page.js").read_text()
    return printable(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{head}</head>\n<body><main>\n{body}\n</main>\n"
        f'<script type="application/json" id="data">{text}</script>\n<script>{script}</script></body></html>\n'
    )


# ------------------------------------------------------------------------ curves


def _curves(run: Run) -> dict[str, Any]:
    kinds = {"training": run.log.train, "validation": run.log.validation}
    return {"name": run.name, "kinds": {kind: _thinned(curves) for kind, curves in kinds.items() if curves.step}}


def _thinned(curves: Curves) -> dict[str, Any]:
    """Return curves of at most BUCKETS points, as JSON can hold them; None for values that are not finite."""
    size = math.ceil(len(curves.step) / BUCKETS)
    places = {name: getattr(curves, name) for name in ("step", "epoch", "hour")}
    return {
        "of": size,
        **{name: [_short(part[-1]) for part in _parts(column, size)] for name, column in places.items()},
        "values": {name: _buckets(column, size) for name, column in curves.values.items()},
    }


def _parts(column: "array[float]", size: int) -> "Iterator[array[float]]":
    return (column[start : start + size] for start in range(0, len(column), size))


def _buckets(column: "array[float]", size: int) -> dict[str, list[float | None]]:
    if size == 1:
        return {"mean": [_short(value) for value in column]}
    parts = [[value for value in part if math.isfinite(value)] for part in _parts(column, size)]
    return {
        "mean": [_short(math.fsum(part) / len(part)) if part else None for part in parts],
        "low": [_short(min(part)) if part else None for part in parts],
        "high": [_short(max(part)) if part else None for part in parts],
    }


def _short(value: float) -> float | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.6g}")
    return int(short) if short.is_integer() else short


# ------------------------------------------------------------------------ tables and texts


def _summary(runs: Sequence[Run]) -> str:
    head = "".join(f'<th scope="col">{escape(run.name)}</th>' for run in runs)
    rows = [_row(name, values, differ=len(set(values)) > 1) for name, values in summary(runs).items()]
    return _scrolled("Summary", f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>")


def _row(name: str, values: Iterable[str], differ: bool) -> str:
    cells = "".join(f"<td>{escape(value)}</td>" for value in values)
    return f'<tr{" class=differs" if differ else ""}><th scope="row">{escape(name)}</th>{cells}</tr>'


def _scrolled(name: str, table: str) -> str:
    """A table that may be wider than the page; it takes the focus so that a keyboard can scroll it."""
    return f'<div class="wide" role="region" tabindex="0" aria-label="{escape(name)}">{table}</div>'


def _charts() -> str:
    axes = "".join(
        f'<label><input type="radio" name="axis" value="{axis}"{" checked" if axis == "epoch" else ""}>{axis}</label>'
        for axis in ("step", "epoch", "hour")
    )
    return (
        '<section id="curves"><h2>Curves</h2><noscript><p>The charts need JavaScript.</p></noscript>'
        f"<form><fieldset><legend>x axis</legend>{axes}</fieldset>"
        '<fieldset><legend>from, to</legend><input type="number" step="any" id="from" aria-label="from">'
        '<input type="number" step="any" id="to" aria-label="to">'
        '<button type="button" id="reset">all</button></fieldset>'
        "<fieldset><legend>smoothed</legend>"
        '<input type="range" id="smooth" min="0" max="0.99" step="0.01" value="0" aria-label="smoothing"></fieldset>'
        '<fieldset><legend>y axis</legend><label><input type="checkbox" id="log">logarithmic</label></fieldset>'
        '<fieldset id="runs"><legend>runs</legend></fieldset></form>'
        "<p>Drag to zoom all charts, double-click for all. Keys in a chart: arrows move, + and - zoom, Escape shows "
        "all. Validation is drawn with dots. A band spans the lowest and the highest of the values that one point "
        'stands for.</p><div class="charts"></div><h3>Optimiser and speed</h3><div class="charts"></div></section>'
    )


def _details(run: Run) -> str:
    name = escape(run.name)
    parts = [f"<section><h2>{name}</h2>"]
    if run.problems:
        parts.append(_texts(run.problems, "problems"))
    if run.pictures:
        parts.append(f'<div class="pictures">{"".join(map(_picture, run.pictures))}</div>')
    if run.log.weights:
        parts.append(f"<h3>Weights that it began with</h3><pre tabindex=0>{escape(run.log.weights)}</pre>")
    if run.log.warnings:
        counted = [f"{text} ({count} times)" if count > 1 else text for text, count in run.log.warnings.items()]
        if len(counted) > _MOST_WARNINGS:
            counted = [*counted[:_MOST_WARNINGS], f"and {len(counted) - _MOST_WARNINGS} more, see stdout.log"]
        parts.append("<h3>Warnings</h3>" + _texts(counted, "warnings"))
    if run.config:
        rows = "".join(_row(key, [value], differ=False) for key, value in sorted(run.config.items()))
        table = _scrolled(f"Config of {run.name}", f"<table><tbody>{rows}</tbody></table>")
        parts.append(f"<details><summary>Whole config of {name}</summary>{table}</details>")
    return "\n".join([*parts, "</section>"]) if len(parts) > 1 else ""


def _texts(texts: Iterable[str], kind: str) -> str:
    return f'<ul class="{kind}">' + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def _picture(path: Path) -> str:
    """A picture, reduced; a line where it cannot be read."""
    name = escape(path.name)
    try:
        with Image.open(path) as image:
            image.thumbnail(_WIDEST)
            content = io.BytesIO()
            image.convert("RGB").save(content, "WEBP", quality=80)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"<p>{name} cannot be read: {escape(str(error))}</p>"
    data = base64.b64encode(content.getvalue()).decode()
    width, height = image.size
    return (
        f'<figure><img src="data:image/webp;base64,{data}" width="{width}" height="{height}" decoding="async" '
        f'alt="Predictions beside what is true, {name}"><figcaption>{name}</figcaption></figure>'
    )
