"""Line charts: which lines are drawn and how, what sets the scale, and that titles and legends can be read."""

import io
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskfeat.analysis.curves import Chart, Line, chart_figure


def flat(name: str, *levels: float, level: bool = False) -> Line:
    """Runs that stay at one value for x from 0 to 10."""
    return Line(name, [[(float(x), value) for x in range(11)] for value in levels], level)


def axes_of(*charts: Chart, columns: int = 2) -> list[Any]:
    return list(chart_figure(charts, columns).axes)


def points(line: Any) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in line.get_xydata()]


def pixels(figure: Any) -> np.ndarray:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return np.asarray(Image.open(content).convert("RGB")).astype(int)


@pytest.mark.slow
def test_a_single_run_is_one_thick_line() -> None:
    given = [(0.0, 2.0), (1.0, 7.0), (4.0, 10.0)]
    (axes,) = axes_of(Chart("A title", "epochs", [Line("a name", [given])]))
    (line,) = axes.lines
    assert points(line) == given and line.get_linewidth() > 2 and line.get_linestyle() == "-"
    assert line.get_alpha() is None and line.get_label() == "a name"


def test_the_mean_is_thick_and_runs_are_thin_and_pale() -> None:
    (axes,) = axes_of(Chart("", "x", [flat("runs", 0.0, 0.2, 1.0)]))
    *runs, mean = axes.lines
    assert [points(run)[0][1] for run in runs] == [0.0, 0.2, 1.0]
    assert [y for _, y in points(mean)] == pytest.approx([0.4] * 11)
    assert all(run.get_linewidth() < 1 < 2 < mean.get_linewidth() for run in runs)
    assert all(run.get_alpha() < 0.5 for run in runs) and mean.get_alpha() is None
    assert {run.get_color() for run in runs} == {mean.get_color()}


def test_a_mean_ends_with_the_shortest_run() -> None:
    short, long = [(float(x), 0.0) for x in range(6)], [(float(x), 1.0) for x in range(11)]
    (axes,) = axes_of(Chart("", "x", [Line("", [short, long])]))
    assert points(axes.lines[-1]) == [(float(x), 0.5) for x in range(6)]
    assert axes.get_xlim() == (0, 10)


def test_a_mean_is_of_what_stands_above_one_another() -> None:
    """Of a published run one point an epoch is left, of another one all."""
    all_of_it, published = [(x / 3, float(x)) for x in range(1, 13)], [(float(x), 0.0) for x in range(1, 5)]
    (axes,) = axes_of(Chart("", "x", [Line("", [all_of_it, published])]))
    assert points(axes.lines[-1]) == [(1, 1.5), (2, 3), (3, 4.5), (4, 6)]


def test_levels_are_dashed_and_have_no_runs_beside_them() -> None:
    (axes,) = axes_of(Chart("", "x", [flat("solid", 0.0), flat("level", 1.0, 3.0, level=True)]))
    solid, level = axes.lines
    assert (solid.get_linestyle(), level.get_linestyle()) == ("-", "--")
    assert points(level)[0] == (0, 2) and level.get_linewidth() < solid.get_linewidth()
    assert level.get_color() != solid.get_color()


def test_limits_leave_a_margin_around_the_values() -> None:
    (axes,) = axes_of(Chart("", "x", [flat("one", 0.0), flat("two", 1.0)]))
    assert axes.get_xlim() == (0, 10) and axes.get_ylim() == pytest.approx((-0.06, 1.06))


@pytest.mark.parametrize("points_number, level", [(100, 1), (51, 1), (50, 100), (10, 100)])
def test_the_first_twentieth_of_a_long_run_does_not_set_the_scale(points_number: int, level: float) -> None:
    settled = [(float(x), 1.0 + 0.01 * (x % 2)) for x in range(points_number)]
    wild = [(0.0, 100.0), *settled[1:]]
    (axes,) = axes_of(Chart("", "", [Line("a", [wild])]))
    low, high = axes.get_ylim()
    assert low < 1.0 and level < high < 1.1 * level
    assert points(axes.lines[0]) == wild, "the values are all drawn"


def test_one_value_and_no_value() -> None:
    (axes,) = axes_of(Chart("", "", [Line("", [[(3.0, 0.1)]])]))
    assert axes.get_xlim() == (3, 4) and axes.get_ylim()[0] < 0.1 < axes.get_ylim()[1]
    (axes,) = axes_of(Chart("", "", [flat("", 0.0)]))
    assert axes.get_ylim() == (-1, 1)
    with pytest.raises(AssertionError, match="'nothing' has no points"):
        chart_figure([Chart("nothing", "x", [Line("a", [[]])])])


def test_words_and_legend() -> None:
    lines = [flat("a name", 0.0, 1.0), flat("", 0.5), flat("level", 1.0, level=True)]
    figure = chart_figure([Chart("A title", "epochs", lines)])
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "A title" and axes.get_xlabel() == "epochs"
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["a name", "level"], "one entry a line that has a name"
    assert all(text.get_fontsize() >= 8 for text in legend.get_texts())
    image = pixels(figure)
    plot, key = axes.get_window_extent(), legend.get_window_extent()
    label = axes.xaxis.label.get_window_extent()
    assert key.y1 <= label.y0 < label.y1 < plot.y0, "from top to bottom: lines, the label of x, the legend"
    assert key.x0 >= 0 and key.y0 >= 0 and key.x1 <= image.shape[1], "all of it is in the figure"
    (axes,) = axes_of(Chart("", "x", [flat("", 0.0)]))
    assert axes.get_legend() is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "columns", "size"), [(1, 2, (1, 1)), (2, 2, (2, 1)), (3, 2, (2, 2)), (3, 1, (1, 3))]
)
def test_figures_are_as_large_as_their_charts(number: int, columns: int, size: tuple[int, int]) -> None:
    charts = [Chart(f"chart {n}", "x", [flat("a", n, n + 1.0)]) for n in range(number)]
    figure = chart_figure(charts, columns)
    assert pixels(figure).shape == (350 * size[1], 450 * size[0], 3)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [chart.title for chart in charts]
    places = [(axes.get_subplotspec().rowspan.start, axes.get_subplotspec().colspan.start) for axes in figure.axes]
    assert places == [(n // columns, n % columns) for n in range(number)]


def test_lines_differ_in_colour() -> None:
    (axes,) = axes_of(Chart("", "x", [flat("", float(n)) for n in range(11)]))
    colours = [line.get_color() for line in axes.lines]
    assert len(set(colours)) == 10 and colours[10] == colours[0]


def test_drawing_leaves_no_global_state() -> None:
    """pyplot would keep every figure, and would open a window where there is a screen."""
    from matplotlib import rcParams

    before = dict(rcParams)
    pixels(chart_figure([Chart("", "x", [flat("a", 0.0)])]))
    assert dict(rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"charts need matplotlib.*pip install '\.\[plots\]'"):
        chart_figure([Chart("", "x", [flat("a", 0.0)])])
