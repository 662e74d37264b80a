"""Line charts as pictures, on Pillow alone: mean and spread of several runs over time, with levels to compare with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]
LONG = 50
"""Points above which the first twentieth of a run does not set the scale."""
COLOURS = ((31, 90, 180), (214, 84, 30), (34, 139, 84), (150, 70, 160), (120, 120, 120))
_PAPER, _INK, _GRID = (255, 255, 255), (20, 20, 20), (225, 225, 225)
_WIDTH, _HEIGHT = 460, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 34, 46


@dataclass(frozen=True)
class Line:
    """One line: its name, the points of each run, and whether it is only a level (dashed).

    Runs of one line have the same x.
    """

    name: str
    runs: Sequence[Sequence[Point]]
    level: bool = False


@dataclass(frozen=True)
class Chart:
    """One chart: lines over one x."""

    title: str
    x: str
    lines: Sequence[Line]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    span = max(high - low, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if span / (power * factor) <= most - 1)
    return [step * n for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart_figure(charts: Sequence[Chart], columns: int = 2) -> Image.Image:
    """Charts side by side, `columns` in a row. Several runs of a line are drawn thin, with their mean thick."""
    rows = -(-len(charts) // columns)
    canvas = Image.new("RGB", (_WIDTH * min(columns, len(charts)), _HEIGHT * rows), _PAPER)
    for number, chart in enumerate(charts):
        canvas.paste(_drawn(chart), (number % columns * _WIDTH, number // columns * _HEIGHT))
    return canvas


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _drawn(chart: Chart) -> Image.Image:
    image = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
    pen = ImageDraw.Draw(image)
    font, large = ImageFont.load_default(size=11), ImageFont.load_default(size=14)
    points = [point for line in chart.lines for run in line.runs for point in run]
    assert points, f"the chart {chart.title!r} has no points"
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    x_high = x_high if x_high > x_low else x_low + 1
    # The first moments of a long run may be far off: they leave the picture at its edge, so that the rest can be seen.
    settled = x_low + 0.05 * (x_high - x_low)
    runs = [run for line in chart.lines for run in line.runs]
    y_low, y_high = _bounds([y for run in runs for x, y in run if x >= settled or len(run) <= LONG])

    def place(point: Point) -> Point:
        point = point[0], min(max(point[1], y_low), y_high)
        x = _LEFT + (point[0] - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        return x, _HEIGHT - _BOTTOM - (point[1] - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    for y in ticks(y_low, y_high):
        level = place((x_low, y))[1]
        pen.line([(_LEFT, level), (_WIDTH - _RIGHT, level)], fill=_GRID)
        pen.text((_LEFT - 6, level), f"{y:.4g}", fill=_INK, font=font, anchor="rm")
    for x in ticks(x_low, x_high):
        across = place((x, y_low))[0]
        pen.line([(across, _HEIGHT - _BOTTOM), (across, _HEIGHT - _BOTTOM + 4)], fill=_INK)
        pen.text((across, _HEIGHT - _BOTTOM + 6), f"{x:.4g}", fill=_INK, font=font, anchor="ma")
    pen.line([(_LEFT, _TOP), (_LEFT, _HEIGHT - _BOTTOM), (_WIDTH - _RIGHT, _HEIGHT - _BOTTOM)], fill=_INK)
    pen.text((_LEFT, 8), chart.title, fill=_INK, font=large)
    pen.text((_WIDTH - _RIGHT, _HEIGHT - 8), chart.x, fill=_INK, font=font, anchor="rs")
    for number, line in enumerate(chart.lines):
        colour = COLOURS[number % len(COLOURS)]
        _draw_line(pen, line, [[place(point) for point in run] for run in line.runs], colour)
        width = max(font.getlength(other.name) for other in chart.lines)
        top, left = _TOP + 4 + 15 * number, _WIDTH - _RIGHT - width - 34
        _stroke(pen, [(left, top + 6), (left + 24, top + 6)], colour, 3, line.level)
        pen.text((left + 30, top), line.name, fill=_INK, font=font)
    return image


def _draw_line(pen: ImageDraw.ImageDraw, line: Line, runs: list[list[Point]], colour: tuple[int, int, int]) -> None:
    pale = tuple(int(value + (255 - value) * 0.6) for value in colour)
    if len(runs) > 1 and not line.level:
        for run in runs:
            _stroke(pen, run, pale, 1, False)
    mean = np.mean([run[: min(map(len, runs))] for run in runs], axis=0)
    _stroke(pen, [(float(x), float(y)) for x, y in mean], colour, 1 if line.level else 3, line.level)


def _stroke(pen: ImageDraw.ImageDraw, points: list[Point], colour: tuple[int, ...], width: int, dashed: bool) -> None:
    if not dashed:
        pen.line(points, fill=colour, width=width, joint="curve")
        return
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        pieces = max(1, round(math.hypot(x1 - x0, y1 - y0) / 5))
        for piece in range(0, pieces, 2):
            start, end = piece / pieces, min(piece + 1, pieces) / pieces
            ends = [(x0 + (x1 - x0) * share, y0 + (y1 - y0) * share) for share in (start, end)]
            pen.line(ends, fill=colour, width=max(width, 2))
