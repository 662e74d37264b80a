"""Line charts: round ticks, lines where their values lie, several runs pale with their mean thick."""

import math

import numpy as np
import pytest
from PIL import Image

from maskfeat.analysis.curves import COLOURS, Chart, Line, chart_figure, ticks

WIDTH, HEIGHT = 460, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 34, 46  # margins around the plot
FIRST, SECOND = COLOURS[:2]


@pytest.mark.parametrize("most", [3, 4, 6, 10])
@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0, 100), (-0.06, 1.06), (37.2, 41.9), (1e-5, 3e-5), (-3, 3), (0, 7), (0.999, 1.001), (-8e6, -1e6)],
)
def test_ticks_are_round_and_lie_within(low: float, high: float, most: int) -> None:
    found = ticks(low, high, most)
    assert 1 <= len(found) <= most and found == sorted(set(found))
    span = high - low
    assert low - 1e-6 * span <= found[0] and found[-1] <= high + 1e-6 * span
    if len(found) > 1:
        step = found[1] - found[0]
        assert np.allclose(np.diff(found), step)
        lead = step / 10 ** math.floor(math.log10(step) + 1e-6)
        assert any(math.isclose(lead, round_one, rel_tol=1e-4) for round_one in (1, 2, 5)), step
        assert all(math.isclose(tick / step, round(tick / step), abs_tol=1e-3) for tick in found)
        # None is missing at an end, and a finer step would have been too many.
        assert found[0] - low < step * 1.000001 and high - found[-1] < step * 1.000001
        finer = step * (2 / 5 if math.isclose(lead, 5, rel_tol=1e-4) else 1 / 2)
        assert span / finer > most - 1 - 1e-6


def test_ticks_of_familiar_ranges() -> None:
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3, 29) == [10, 20]
    assert ticks(5.0, 5.0)[0] == pytest.approx(5.0)


def flat(name: str, *levels: float, level: bool = False) -> Line:
    """Runs that stay at one value for x from 0 to 10."""
    return Line(name, [[(float(x), value) for x in range(11)] for value in levels], level)


def row_of(value: float, low: float, high: float) -> int:
    """Where a value lies, of a chart whose values go from `low` to `high`: 6 % are left free at either end."""
    margin = 0.06 * (high - low)
    share = (value - low + margin) / (high - low + 2 * margin)
    return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM))


def pixels_of(*charts: Chart, columns: int = 2) -> np.ndarray:
    figure = chart_figure(charts, columns)
    assert figure.mode == "RGB"
    return np.asarray(figure)


def rows_with(picture: np.ndarray, colour: tuple[int, ...], column: int) -> list[int]:
    return np.flatnonzero((picture[:, column] == colour).all(axis=-1)).tolist()


def test_a_horizontal_line_lies_at_its_value() -> None:
    picture = pixels_of(Chart("t", "x", [flat("one", 0.0), flat("two", 1.0)]), columns=1)
    assert picture.shape == (HEIGHT, WIDTH, 3)
    for column in range(LEFT + 2, LEFT + 200, 25):
        for value, colour in ((0.0, FIRST), (1.0, SECOND)):
            rows = rows_with(picture, colour, column)
            assert len(rows) == 3 and abs(np.mean(rows) - row_of(value, 0.0, 1.0)) <= 1, (column, value, rows)
    # It begins at the left axis and ends at the right margin.
    columns = np.flatnonzero((picture[row_of(0.0, 0.0, 1.0)] == FIRST).all(axis=-1))
    assert abs(columns.min() - LEFT) <= 2 and abs(columns.max() - (WIDTH - RIGHT)) <= 2


def test_higher_values_lie_higher_and_later_ones_farther_right() -> None:
    picture = pixels_of(Chart("", "x", [Line("", [[(0.0, 2.0), (4.0, 10.0)]])]), columns=1)
    for share in (0.1, 0.3, 0.5):
        column = round(LEFT + share * (WIDTH - LEFT - RIGHT))
        rows = rows_with(picture, FIRST, column)
        assert rows and abs(np.mean(rows) - row_of(2 + 8 * share, 2, 10)) <= 2


def test_the_mean_is_thick_and_runs_are_thin_and_pale() -> None:
    picture = pixels_of(Chart("", "x", [flat("runs", 0.0, 0.2, 1.0)]), columns=1)
    column = LEFT + 50
    rows = rows_with(picture, FIRST, column)
    assert len(rows) == 3 and abs(np.mean(rows) - row_of(0.4, 0.0, 1.0)) <= 1, "the mean alone has the full colour"
    pale = tuple(int(value + (255 - value) * 0.6) for value in FIRST)
    rows = rows_with(picture, pale, column)
    assert len(rows) == 3 and np.abs(np.array(rows) - [row_of(v, 0.0, 1.0) for v in (1.0, 0.2, 0.0)]).max() <= 1


def test_a_mean_ends_with_the_shortest_run() -> None:
    short, long = [(float(x), 0.0) for x in range(6)], [(float(x), 1.0) for x in range(11)]
    picture = pixels_of(Chart("", "x", [Line("", [short, long])]), columns=1)
    columns = np.flatnonzero((picture[row_of(0.5, 0.0, 1.0)] == FIRST).all(axis=-1))
    assert abs(columns.max() - (LEFT + (WIDTH - LEFT - RIGHT) / 2)) <= 3


def test_levels_are_dashed() -> None:
    level = Line("level", [[(0.0, 1.0), (10.0, 1.0)]], level=True)
    picture = pixels_of(Chart("", "x", [flat("solid", 0.0), level]), columns=1)
    shares = []
    for value, colour in ((0.0, FIRST), (1.0, SECOND)):
        row = picture[row_of(value, 0.0, 1.0) - 1 : row_of(value, 0.0, 1.0) + 2, LEFT + 5 : LEFT + 205]
        shares.append((row == colour).all(axis=-1).any(axis=0).mean())
    assert shares[0] == 1.0 and 0.4 < shares[1] < 0.8


@pytest.mark.parametrize(
    ("number", "columns", "size"), [(1, 2, (1, 1)), (2, 2, (2, 1)), (3, 2, (2, 2)), (3, 1, (1, 3))]
)
def test_figures_are_as_large_as_their_charts(number: int, columns: int, size: tuple[int, int]) -> None:
    charts = [Chart(f"chart {n}", "x", [flat("a", n, n + 1.0)]) for n in range(number)]
    assert chart_figure(charts, columns).size == (WIDTH * size[0], HEIGHT * size[1])


def test_every_chart_has_its_place() -> None:
    charts = [Chart(str(n), "x", [flat("", 0.0)] * n + [flat("", 1.0)]) for n in range(3)]
    whole = pixels_of(*charts)
    for number, chart in enumerate(charts):
        top, left = number // 2 * HEIGHT, number % 2 * WIDTH
        alone = pixels_of(chart, columns=1)
        assert np.array_equal(whole[top : top + HEIGHT, left : left + WIDTH], alone)
    assert (whole[HEIGHT:, WIDTH:] == 255).all(), "the fourth place is empty"


def dark(picture: np.ndarray, rows: slice, columns: slice) -> bool:
    return bool((picture[rows, columns].max(axis=-1) < 90).any())


def test_words_stand_beside_the_plot() -> None:
    lines = [flat("a name", 0.0), flat("b", 1.0)]
    picture, bare = (pixels_of(Chart(title, x, lines), columns=1) for title, x in (("A title", "epochs"), ("", "")))
    assert dark(picture, slice(4, 26), slice(LEFT, 200)) and not dark(bare, slice(4, 26), slice(LEFT, 200))
    foot = slice(HEIGHT - 20, HEIGHT)
    assert dark(picture, foot, slice(WIDTH - 60, WIDTH)) and not dark(bare, foot, slice(WIDTH - 60, WIDTH))
    assert dark(bare, slice(TOP, HEIGHT - BOTTOM), slice(0, LEFT - 4)), "numbers of y"
    assert dark(bare, slice(HEIGHT - BOTTOM + 5, HEIGHT - BOTTOM + 20), slice(LEFT, WIDTH)), "numbers of x"
    for colour in (FIRST, SECOND):  # the key, below which no line of these passes
        key = (picture[TOP + 4 : TOP + 4 + 30, WIDTH - 120 : WIDTH - RIGHT] == colour).all(axis=-1)
        assert key.sum() >= 24, colour
    assert dark(bare, slice(TOP, TOP + 40), slice(WIDTH - 60, WIDTH)), "names of lines"
    renamed = pixels_of(Chart("A title", "epochs", [flat("another", 0.0), lines[1]]), columns=1)
    changed = np.argwhere((picture != renamed).any(axis=-1))
    assert len(changed) and changed[:, 0].min() >= TOP and changed[:, 0].max() < TOP + 40


def test_colours_begin_anew_after_the_last() -> None:
    picture = pixels_of(Chart("", "x", [flat("", float(n)) for n in range(len(COLOURS) + 1)]), columns=1)
    assert len(rows_with(picture, FIRST, LEFT + 50)) == 6
    for colour in COLOURS[1:]:
        assert len(rows_with(picture, colour, LEFT + 50)) == 3


def test_a_single_value_and_no_value() -> None:
    assert isinstance(chart_figure([Chart("", "x", [flat("", 0.0)])]), Image.Image)
    assert isinstance(chart_figure([Chart("", "x", [Line("", [[(3.0, 0.1)]])])]), Image.Image)
    with pytest.raises(AssertionError, match="'nothing' has no points"):
        chart_figure([Chart("nothing", "x", [Line("a", [[]])])])


def test_the_first_moments_of_a_long_run_do_not_set_the_scale() -> None:
    """With them the rest would lie within a hundredth of the picture's height."""
    settled = [(float(x), 1.0 + 0.01 * (x % 2)) for x in range(100)]
    plain, wild = (
        np.asarray(chart_figure([Chart("", "", [Line("a", [run])])])).astype(int)
        for run in (settled, [(0.0, 100.0), *settled[1:]])
    )
    late = slice(plain.shape[1] // 3, 2 * plain.shape[1] // 3)
    assert np.array_equal(plain[100:, late], wild[100:, late])
