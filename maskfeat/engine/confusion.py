"""What a test says of each class: accuracies, a confusion matrix, and the pairs that are confused most.

Shape legend: K classes.
"""

import csv
import io
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskfeat.errors import naming
from maskfeat.file_io import replace_bytes

LARGEST = 2000
"""Classes above which no matrix is written: its file would have millions of lines of zeros."""
LABELLED = 60
"""Classes up to which the picture has their names at its edges; more would not be legible."""
_LISTED, _LETTERS = 25, 28
"""Pairs beside the picture, and letters of a name in it."""

Rows = Sequence[dict[str, Any]]
"""Samples as a test lists them: "label", "predicted" (best first) and "read"."""


class Confusion:
    """Which classes the samples of a test were taken for. Those that could not be read count as wrong, and as no class.

    Args:
        details: JSON text of `evaluate.multi_view_test`.
        num_classes: K.
        names: of the first classes by their numbers; the others are called by their number.
    """

    def __init__(self, details: str, num_classes: int, names: Sequence[str] | None) -> None:
        self.rows: Rows = json.loads(details)["samples"]
        self.names = all_names(num_classes, names)
        self.taken = Counter((row["label"], row["predicted"][0]) for row in self.rows if row["read"])

    @property
    def matrix(self) -> np.ndarray:
        """(K, K) int64: how many samples of a class (row) were taken for which (column)."""
        counts = np.zeros((len(self.names), len(self.names)), dtype=np.int64)
        for pair, number in self.taken.items():
            counts[pair] = number
        return counts

    def confused(self) -> list[tuple[int, int, int]]:
        """Return (class, class that it was taken for, how often), the most frequent first."""
        wrong = [(label, taken, number) for (label, taken), number in self.taken.items() if label != taken]
        return sorted(wrong, key=lambda pair: (-pair[2], pair[:2]))

    def class_table(self) -> str:
        """Return as CSV a line for each class: its samples, top-1 and top-5 in percent, and what it was taken for most
        often where it was not recognised.
        """
        samples, top1, top5, unread = (Counter[int]() for _ in range(4))
        for row in self.rows:
            label = row["label"]
            samples[label] += 1
            unread[label] += not row["read"]
            top1[label] += row["read"] and label == row["predicted"][0]
            top5[label] += row["read"] and label in row["predicted"]
        worst: dict[int, tuple[str, int]] = {}
        for label, taken, number in self.confused():
            worst.setdefault(label, (self.names[taken], number))

        def line(label: int, name: str) -> list[Any]:
            shares = [f"{100 * hits[label] / samples[label]:.2f}" if samples[label] else "" for hits in (top1, top5)]
            return [label, name, samples[label], *shares, unread[label], *worst.get(label, ("", ""))]

        head = ("number", "class", "samples", "top1", "top5", "unreadable", "most_often_taken_for", "times")
        return csv_text([head, *(line(*each) for each in enumerate(self.names))])

    def matrix_table(self) -> str:
        """Return the matrix as CSV: a row for each class, a column for each that it was taken for."""
        lines = ([name, *counts] for name, counts in zip(self.names, self.matrix.tolist(), strict=True))
        return csv_text([["class", *self.names], *lines])

    def picture(self, title: str) -> bytes | None:
        """Return the matrix as a PNG file: for each class the shares of its samples; None without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return None
        few = len(self.names) <= LABELLED
        side = max(4.0, 0.2 * len(self.names)) if few else 9.0
        figure = Figure(figsize=(side + 4.5, side + 1), dpi=110, layout="constrained")
        axes, beside = figure.subplots(1, 2, width_ratios=(side, 3.5))
        counts = self.matrix
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        # The square root makes single samples of a large class visible, too.
        image = axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1, interpolation="nearest" if few else "none")
        if few:
            short = [*map(_short, self.names)]
            axes.set_xticks(range(len(short)), short, rotation=90, fontsize=7, parse_math=False)
            axes.set_yticks(range(len(short)), short, fontsize=7, parse_math=False)
        axes.set(xlabel="taken for", ylabel="class" if few else "number of the class")
        axes.set_title(title, loc="left", fontsize="medium")
        bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.5, label="share of the samples of a class")
        marks = (0, 0.01, 0.1, 0.25, 0.5, 1)
        bar.set_ticks([mark**0.5 for mark in marks], labels=[f"{mark:.0%}" for mark in marks])
        beside.axis("off")
        beside.text(0, 1, self._listed(), va="top", fontsize=7, transform=beside.transAxes, parse_math=False)
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # of names in a script that the font lacks: drawn as boxes
            figure.savefig(file, format="png")
        return file.getvalue()

    def _listed(self) -> str:
        pairs = self.confused()
        lines = [
            f"{number} x  {_short(self.names[label])} \u2192 {_short(self.names[taken])}"
            for label, taken, number in pairs[:_LISTED]
        ]
        return "\n".join(["Most often confused:", *lines] if lines else ["Nothing was confused."])


def _short(name: str) -> str:
    name = name.encode("utf-8", "replace").decode()
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS - 3]}..."


def all_names(num_classes: int, names: Sequence[str] | None) -> list[str]:
    """Return the names of all classes; those without one are called by their number."""
    known = list(names or ())[:num_classes]
    return [*known, *map(str, range(len(known), num_classes))]


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as the text of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_class_results(folder: str, what: str, found: Confusion) -> str:
    """Write test_classes_WHAT.csv, test_confusion_WHAT.csv and its PNG into a folder.

    Args:
        folder: OUTPUT_DIR.
        what: was tested: the views, and `_ema` for averaged weights.

    Returns:
        a line that says what was written, and what was not.

    Raises:
        UserFileError: a file cannot be written.
    """
    texts = {f"test_classes_{what}.csv": found.class_table()}
    note = ""
    if len(found.names) <= LARGEST:
        texts[f"test_confusion_{what}.csv"] = found.matrix_table()
        picture = found.picture(f"Confusion matrix ({what.replace('_', ', ')})")
        if picture is None:
            note = "; no picture of the matrix without matplotlib: pip install '.[plots]'"
    else:
        picture, note = None, f"; no matrix of more than {LARGEST} classes"
    names = [*texts, *([f"test_confusion_{what}.png"] if picture is not None else [])]
    with naming(f"{Path(folder) / names[0]} cannot be written; the scores are in the log"):
        for name, text in texts.items():
            replace_bytes(Path(folder) / name, text.encode("utf-8", "surrogateescape"))  # as folders may be named
        if picture is not None:
            replace_bytes(Path(folder) / names[-1], picture)
    return f"accuracy of each class: {', '.join(names)} in {folder}{note}"
