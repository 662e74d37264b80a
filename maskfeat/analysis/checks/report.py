"""The result of a check: text, JSON, and a page that needs no network."""

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from maskfeat.analysis.checks.collect import Collected
from maskfeat.analysis.checks.faults import HARMFUL, Fault, Recipe, summary
from maskfeat.analysis.checks.reading import Facts
from maskfeat.data.bad_samples import UnreadableSample
from maskfeat.data.image_reader import read_image
from maskfeat.data.video.decoder import decode_frames
from maskfeat.text import printable

_BINS = 10
_SHOWN = 200
"""Faults of a kind that the page lists; the JSON file has all."""
_PICTURES = 8
"""Of a kind."""
_SIDE = 112
_WITHOUT_PICTURE = ("unreadable", "missing", "broken link", "not read")

_STYLE = """
:root { color-scheme: light dark; --line: light-dark(#ccc, #444); --bar: light-dark(#0b7285, #3bc9db); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; } th, td { text-align: left; padding: .2rem .8rem .2rem 0;
border-bottom: 1px solid var(--line); vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.bar { background: var(--bar); height: .8rem; min-width: 1px; } .sets { display: flex; flex-wrap: wrap; gap: 0 3rem; }
figure { display: inline-block; width: 9rem; margin: 0 .6rem .6rem 0; vertical-align: top; }
figcaption { font-size: .75rem; } figcaption, code, li { overflow-wrap: anywhere; } h2 { margin-top: 2rem; }
"""


def split_rows(found: Collected) -> list[dict[str, Any]]:
    """Return samples, classes and samples of a class for each split."""
    rows = []
    for split in found.splits:
        samples = found.of(split)
        numbers = Counter(number for sample in samples for number in sample.numbers)
        per_class = sorted(numbers.values())
        rows.append(
            {
                "split": split,
                "samples": len(samples),
                "classes": len(numbers),
                "fewest": per_class[0] if per_class else None,
                "median": float(np.median(per_class)) if per_class else None,
                "most": per_class[-1] if per_class else None,
                "per_class": {_class_of(found, label): number for label, number in sorted(numbers.items())},
                "left_out": found.left_out.get(split, ""),
            }
        )
    return rows


def _class_of(found: Collected, label: int) -> str:
    names = found.classes
    return names[label] if names is not None and label < len(names) else str(label)


def histograms(found: Collected, facts: Iterable[Facts]) -> dict[str, list[tuple[str, int]]]:
    """Return (what, how many) of the properties of all files that can be read."""
    good = [one for one in facts if not one.cause]
    if not good:
        return {}
    tables = {
        ("codec" if found.noun == "video" else "format"): Counter(one.kind for one in good).most_common(),
        "short side, pixels": _binned([min(one.width, one.height) for one in good]),
        "file, kB": _binned([one.size / 1000 for one in good]),
    }
    if found.noun == "video":
        tables["frames a second"] = Counter(f"{one.fps:.4g}" for one in good).most_common(_BINS)
        tables["seconds"] = _binned([one.frames / one.fps for one in good])
        tables["frames"] = _binned([one.frames for one in good])
    return tables


def _binned(values: Sequence[float]) -> list[tuple[str, int]]:
    low, high = min(values), max(values)
    if low == high:
        return [(f"{low:.4g}", len(values))]
    counts, edges = np.histogram(values, bins=min(_BINS, len(set(values))))
    return [(f"{edges[n]:.4g} to {edges[n + 1]:.4g}", int(number)) for n, number in enumerate(counts)]


def as_text(found: Collected, faults: Sequence[Fault], recipe: Recipe, lines: Sequence[str]) -> str:
    """Return the report as lines of text; `lines` are said at its end."""
    said = [f"{found.place}: {len(found.samples)} {found.noun}s", ""]
    said.append(f"{'split':<8}{'samples':>10}{'classes':>10}{'fewest':>10}{'median':>10}{'most':>10}")
    for row in split_rows(found):
        numbers = [row[key] for key in ("samples", "classes", "fewest", "median", "most")]
        cells = "".join(f"{'-' if number is None else f'{number:g}':>10}" for number in numbers)
        said.append(f"{row['split']:<8}{cells}{'   left out: ' if row['left_out'] else ''}{row['left_out']}")
    said.append("")
    for kind, what, number, shown in summary(faults, recipe, found.place):
        said.append(f"{'!' if kind in HARMFUL else ' '} {number:>6} {kind}: {what}: {shown}")
    said += [] if faults else ["nothing is wrong"]
    return "\n".join([*said, *lines])


def as_json(found: Collected, faults: Sequence[Fault], facts: Mapping[str, Facts], **more: Any) -> dict[str, Any]:
    """Return the report as JSON values."""
    return {
        "place": found.place,
        "media": found.noun,
        "splits": split_rows(found),
        "faults": [{**fault._asdict(), "harmful": fault.kind in HARMFUL} for fault in faults],
        "histograms": histograms(found, facts.values()),
        **more,
    }


def as_page(
    found: Collected, faults: Sequence[Fault], facts: Mapping[str, Facts], recipe: Recipe, lines: Sequence[str]
) -> str:
    """Return the report as an HTML page that holds all that it shows."""
    text = html.escape
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{text(found.place)}</title>",
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>",
        f"<h1>{len(found.samples)} {found.noun}s of <code>{text(printable(found.place))}</code></h1>",
        *(f"<p>{text(line)}" for line in lines),
        "<h2>Splits</h2><table><tr><th>split<th>samples<th>classes<th>fewest<th>median<th>most<th>left out",
    ]
    for row in split_rows(found):
        cells = [row[key] for key in ("samples", "classes", "fewest", "median", "most")]
        shown = "".join(f"<td class=n>{'-' if cell is None else f'{cell:g}'}" for cell in cells)
        parts.append(f"<tr><td>{text(row['split'])}{shown}<td>{text(row['left_out'])}")
    parts.append("</table><h2>Faults</h2>")
    for kind, what, number, _ in summary(faults, recipe):
        of_kind = [fault for fault in faults if fault.kind == kind]
        parts.append(f"<details{' open' if kind in HARMFUL else ''}><summary>{number} {kind}: {text(what)}</summary>")
        parts += _pictures(of_kind, found.noun)
        items = (
            f"<li>{text(printable(f.where))} {text(f.split)} {text(printable(f.detail))}" for f in of_kind[:_SHOWN]
        )
        parts += ["<ul>", *items, "</ul></details>"]
    parts.append("" if faults else "<p>Nothing is wrong.")
    parts.append("<h2>Files</h2><div class=sets>")
    for title, table in histograms(found, facts.values()).items():
        most = max(number for _, number in table)
        parts.append(f"<table><caption>{text(title)}</caption>")
        for name, number in table:
            bar = f"<td style='width:8rem'><div class=bar style='width:{100 * number / most:.1f}%'></div>"
            parts.append(f"<tr><td>{text(name)}<td class=n>{number}{bar}")
        parts.append("</table>")
    return "\n".join([*parts, "</div>"])


def _pictures(faults: Sequence[Fault], noun: str) -> list[str]:
    if faults[0].kind in _WITHOUT_PICTURE:
        return []
    shown = [(fault, _thumbnail(fault.where, noun)) for fault in faults[:_PICTURES]]
    return [
        f"<figure><img src='data:image/jpeg;base64,{data}' alt=''><figcaption>{html.escape(printable(fault.where))} "
        f"{html.escape(printable(fault.detail))}</figcaption></figure>"
        for fault, data in shown
        if data
    ]


def _thumbnail(path: str, noun: str) -> str:
    """Return a small JPEG in base64; "" where there is no picture."""
    try:
        if noun == "image":
            image = read_image(path)
        else:
            image = Image.fromarray(decode_frames(path, lambda info: [info.frames // 2], short_side=_SIDE)[0][0])
    except UnreadableSample:  # what is concerned may be no file
        return ""
    image.thumbnail((_SIDE, _SIDE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return base64.b64encode(content.getvalue()).decode("ascii")
