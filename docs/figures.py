"""Draw the figures of the design page: `python docs/figures.py` writes docs/figures/*.svg.

`imports_figure` draws the table of tests/contracts/test_layout.py, which says what each package may import.
tests/test_docs.py compares the committed files with a fresh drawing.
"""

import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
FOLDER = REPO / "docs" / "figures"

_STYLE = """<style>
  text { font: 14px system-ui, "DejaVu Sans", sans-serif; fill: #26323a; }
  .small { font-size: 12px; fill: #4b5b66; }
  .room { font-weight: 600; }
  .card { fill: #ffffff; stroke: #d5dce0; }
  .area { fill: #eef4f5; stroke: none; }
  .box { fill: #ffffff; stroke: #00796b; stroke-width: 1.5; }
  .dot { fill: #00796b; }
  .same { fill: #d5dce0; }
  .line { stroke: #d5dce0; }
  .arrow { stroke: #4b5b66; stroke-width: 1.5; fill: none; marker-end: url(#head); }
</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
  <path d="M0 0 L8 4 L0 8 z" fill="#4b5b66"/></marker></defs>"""


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """Return an SVG file with a white background, so that it can be read on a dark page, too."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">'
    card = f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>'
    return "\n".join([head, f"<title>{title}</title>", _STYLE, card, *parts, "</svg>"]) + "\n"


def in_layers(allowed: Mapping[str, Set[str]]) -> list[str]:
    """Return the packages with every importer before what it imports; ties by name."""
    depth: dict[str, int] = {}

    def depth_of(name: str) -> int:
        if name not in depth:
            depth[name] = max((1 + depth_of(other) for other in allowed[name] if other != name), default=0)
        return depth[name]

    return sorted(allowed, key=lambda name: (-depth_of(name), name))


def imports_figure(allowed: Mapping[str, Set[str]]) -> str:
    """Return a matrix of packages: a dot where the package of the row may import that of the column.

    Args:
        allowed: package -> packages that it may import. `__init__`, which imports nothing, is left out.
    """
    names = [name for name in in_layers(allowed) if name != "__init__"]
    cell, left, top = 32, 130, 130
    size = cell * len(names)
    parts = []
    for i, name in enumerate(names):
        middle = cell * i + cell // 2
        parts += [
            f'<line class="line" x1="{left}" y1="{top + middle}" x2="{left + size}" y2="{top + middle}"/>',
            f'<line class="line" x1="{left + middle}" y1="{top}" x2="{left + middle}" y2="{top + size}"/>',
            f'<text x="{left - 12}" y="{top + middle + 5}" text-anchor="end">{name}</text>',
            f'<text transform="translate({left + middle + 5} {top - 10}) rotate(-60)">{name}</text>',
        ]
    for i, row in enumerate(names):
        y = top + cell * i + cell // 2
        for j, column in enumerate(names):
            x = left + cell * j + cell // 2
            if i == j:
                parts.append(f'<rect class="same" x="{x - 6}" y="{y - 6}" width="12" height="12"/>')
            elif column in allowed[row]:
                parts.append(
                    f'<circle class="dot" cx="{x}" cy="{y}" r="7"><title>{row} imports {column}</title></circle>'
                )
    return _svg(left + size + 60, top + size + 20, "What each package may import", parts)


def _box(x: int, y: int, width: int, lines: Sequence[str], room: str = "") -> list[str]:
    """A box with its text, and above it in bold the file or folder that holds it."""
    height = 18 * len(lines) + 18
    parts = [f'<rect class="box" x="{x}" y="{y}" width="{width}" height="{height}" rx="5"/>']
    for i, line in enumerate(lines):
        parts.append(f'<text x="{x + width // 2}" y="{y + 22 + 18 * i}" text-anchor="middle">{line}</text>')
    if room:
        parts.append(f'<text class="room small" x="{x}" y="{y - 7}">{room}</text>')
    return parts


def _arrow(*points: tuple[int, int]) -> str:
    return '<path class="arrow" d="M' + " L".join(f"{x} {y}" for x, y in points) + '"/>'


def batch_figure() -> str:
    """Return the way of a batch in MaskFeat pre-training, from a file to the step of the optimizer."""
    parts = [
        '<rect class="area" x="16" y="112" width="250" height="320" rx="8"/>',
        '<text class="room small" x="30" y="132">data workers</text>',
        '<rect class="area" x="290" y="112" width="494" height="320" rx="8"/>',
        '<text class="room small" x="304" y="132">training process (engine/loop.py)</text>',
        *_box(30, 40, 160, ["YAML + KEY VALUE"], "configs/"),
        *_box(260, 40, 150, ["frozen config"], "config.load_config"),
        *_box(480, 40, 290, ["loader, objective, optimizer"], "build.py"),
        _arrow((190, 58), (258, 58)),
        _arrow((410, 58), (478, 58)),
        *_box(30, 170, 220, ["decode, crop, resize"], "data/"),
        *_box(30, 250, 220, ["draw the mask"], "masking.py"),
        *_box(
            30,
            330,
            220,
            ["pixels as bytes", "hidden (B, *mask_grid)", "label, index"],
            "data/collate.py: PackedBatch",
        ),
        _arrow((200, 206), (200, 248)),
        _arrow((200, 286), (200, 328)),
        *_box(310, 340, 210, ["flip, normalise"], "data/"),
        _arrow((250, 358), (308, 358)),
        *_box(310, 260, 210, ["ViT or MViTv2 &#8594; Tokens"], "models/"),
        *_box(310, 180, 210, ["linear head: predicted HOG"], "objectives/maskfeat.py"),
        *_box(580, 340, 180, ["HOG of the clip,", "not masked"], "objectives/hog.py"),
        *_box(580, 250, 180, ["loss, metrics"], "mean squared error"),
        *_box(580, 180, 180, ["backward, step"], "optim/"),
        _arrow((480, 340), (480, 298)),
        '<text class="small" x="472" y="322" text-anchor="end">hide patches</text>',
        _arrow((480, 260), (480, 218)),
        _arrow((520, 358), (578, 358)),
        _arrow((520, 198), (550, 198), (550, 268), (578, 268)),
        _arrow((720, 340), (720, 288)),
        '<text class="small" x="712" y="310" text-anchor="end">hidden tokens</text>',
        _arrow((720, 250), (720, 218)),
    ]
    return _svg(800, 448, "The way of a batch", parts)


def figures() -> dict[str, str]:
    """Return file name -> SVG of every figure."""
    sys.path.insert(0, str(REPO))
    from tests.contracts.test_layout import ALLOWED

    return {"batch.svg": batch_figure(), "imports.svg": imports_figure(ALLOWED)}


if __name__ == "__main__":
    for name, svg in figures().items():
        (FOLDER / name).write_text(svg, encoding="utf-8")
