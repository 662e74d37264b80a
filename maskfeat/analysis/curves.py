"""Line charts of several runs over time, drawn with matplotlib: their mean and spread, and levels to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from maskfeat.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]
LONG = 50
"""Points above which the first twentieth of a run does not set the scale."""
_SIZE = 4.5, 3.5
"""Inches of one chart, at 100 dots per inch."""


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: in the legend; "" leaves the line out of it.
        runs: the points of each run; their mean is drawn at every x that all of them have.
        level: whether it is only a level to compare with, drawn dashed.
    """

    name: str
    runs: Sequence[Sequence[Point]]
    level: bool = False


@dataclass(frozen=True)
class Chart:
    """One chart: its title, the label of its x axis, and its lines."""

    title: str
    x: str
    lines: Sequence[Line]


def figure_type() -> type[Figure]:
    """Return matplotlib's `Figure`, which keeps no global state, unlike pyplot.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("charts need matplotlib, which is not installed: pip install '.[plots]'") from error
    return Figure


def chart_figure(charts: Sequence[Chart], columns: int = 2) -> Figure:
    """Return a figure of charts, `columns` in a row.

    Several runs of a line are drawn thin and their mean thick. The legend is below the axes, so that it covers no line.

    Raises:
        UserError: matplotlib is not installed.
    """
    rows, across = -(-len(charts) // columns), min(columns, len(charts))
    figure = figure_type()(figsize=(_SIZE[0] * across, _SIZE[1] * rows), dpi=100, layout="constrained")
    every = figure.subplots(rows, across, squeeze=False).flat
    for axes, chart in zip(every, charts, strict=False):
        _draw(axes, chart)
    for axes in every[len(charts) :]:
        axes.remove()
    return figure


def _limits(low: float, high: float) -> tuple[float, float]:
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _draw(axes: Axes, chart: Chart) -> None:
    runs = [run for line in chart.lines for run in line.runs]
    xs = [x for run in runs for x, _ in run]
    assert xs, f"the chart {chart.title!r} has no points"
    x_low, x_high = min(xs), max(xs)
    # Early values of a long run may be far off: they are cut off at the edge, so that the rest can be told apart.
    settled = x_low + 0.05 * (x_high - x_low)
    ys = [y for run in runs for x, y in run if x >= settled or len(run) <= LONG]
    axes.set_xlim(x_low, x_high if x_high > x_low else x_low + 1)
    axes.set_ylim(*_limits(min(ys), max(ys)))
    for number, line in enumerate(chart.lines):
        _draw_line(axes, line, f"C{number % 10}")
    axes.set_title(chart.title, loc="left", fontsize="medium")
    axes.set_xlabel(chart.x)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if any(line.name for line in chart.lines):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False, fontsize="small")


def _draw_line(axes: Axes, line: Line, colour: str) -> None:
    if len(line.runs) > 1 and not line.level:
        for run in line.runs:
            axes.plot(*np.transpose(run), color=colour, linewidth=0.8, alpha=0.4)
    tables = [dict(run) for run in line.runs]
    shared = [x for x in tables[0] if all(x in table for table in tables)]
    mean = np.array([(x, np.mean([table[x] for table in tables])) for x in shared]).reshape(-1, 2)
    style, width = ("--", 1.2) if line.level else ("-", 2.2)
    # matplotlib takes a label that begins with _ as none.
    axes.plot(*mean.T, color=colour, label=line.name or "_unnamed", linestyle=style, linewidth=width)
