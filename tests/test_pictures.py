"""HOG glyphs lie along the edges of the image; figures have the size and the content that they promise."""

import math

import numpy as np
import pytest

from maskfeat.pictures import (
    GREY,
    HEADERS,
    HIDDEN_GROUND,
    MIN_CELL,
    MIN_TILE,
    SEEN_GROUND,
    HogRow,
    glyph_angle,
    grey_out,
    hog_figure,
    hog_glyphs,
    tile_grid,
    tokens_to_cells,
)

KERNEL = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]])


def plain_hog(image: np.ndarray, bins: int = 9, cell: int = 8) -> np.ndarray:
    """The definition, for one channel: (H, W) -> (bins, H / cell, W / cell)."""
    height, width = image.shape
    padded = np.pad(image, 1, mode="reflect")
    near = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
    gx, gy = (near * KERNEL).sum((2, 3)), (near * KERNEL.T).sum((2, 3))
    index = np.floor(np.arctan2(gx, gy) / np.pi * bins).astype(int) % bins
    maps = np.stack([np.where(index == k, np.hypot(gx, gy), 0.0) for k in range(bins)])
    cells = maps.reshape(bins, height // cell, cell, width // cell, cell).sum((2, 4))
    return cells / np.maximum(np.linalg.norm(cells, axis=0), 1e-12)


def edge(degrees: float, side: int = 8) -> np.ndarray:
    """A straight edge through the middle, (side, side): `degrees` anticlockwise from horizontal, as seen."""
    y, x = np.mgrid[0:side, 0:side] - (side - 1) / 2
    turn = math.radians(degrees)
    return 1 / (1 + np.exp(-3 * (x * math.sin(turn) + y * math.cos(turn))))


def line_angle(drawn: np.ndarray) -> float:
    """The direction of the bright pixels in degrees anticlockwise from horizontal, by second moments."""
    y, x = np.mgrid[0 : drawn.shape[0], 0 : drawn.shape[1]] - (drawn.shape[0] - 1) / 2
    xx, yy, xy = (drawn * x * x).sum(), (drawn * y * y).sum(), -(drawn * x * y).sum()
    return math.degrees(0.5 * math.atan2(2 * xy, xx - yy)) % 180


def between(a: float, b: float) -> float:
    """Degrees between two undirected lines."""
    return abs((a - b + 90) % 180 - 90)


@pytest.mark.parametrize("degrees", [0, 10, 25, 45, 50, 70, 90, 110, 135, 150, 172])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_glyph_runs_along_the_edge(degrees: float, sign: float) -> None:
    image = sign * edge(degrees)
    middle = np.abs(image - image.mean()) < 0.4
    assert between(line_angle(middle), degrees) < 6  # the edge is where it should be
    hog = plain_hog(image)
    strongest = int(hog[:, 0, 0].argmax())
    half_a_bin = 180 / 9 / 2
    assert between(math.degrees(glyph_angle(strongest)), degrees) <= half_a_bin + 1.5
    drawn = hog_glyphs(hog, cell_pixels=41)
    assert drawn.shape == (41, 41)
    assert between(line_angle(drawn), degrees) <= half_a_bin + 1.5


def test_glyph_of_each_bin_has_its_own_angle() -> None:
    for index in range(9):
        hog = np.zeros((9, 1, 1))
        hog[index] = 1.0
        assert between(line_angle(hog_glyphs(hog, 41)), 20 * index + 10) < 1.0


def test_glyphs_follow_the_weight_and_stay_in_their_cell() -> None:
    hog = np.zeros((9, 2, 3))
    hog[4, 0, 1], hog[4, 1, 2], hog[2, 1, 0] = 1.0, 0.3, -1.0
    drawn = hog_glyphs(hog, cell_pixels=16, scale=1.0)
    assert drawn.shape == (32, 48) and drawn.dtype == np.float32
    assert drawn.min() == 0.0 and drawn.max() <= 1.0
    cells = drawn.reshape(2, 16, 3, 16).sum((1, 3))
    assert cells[0, 1] > 2 * cells[1, 2] > 0
    assert np.count_nonzero(cells) == 2  # what is negative or zero leaves no mark
    assert not hog_glyphs(np.zeros((9, 2, 2))).any()


def test_tokens_to_cells_round_trip() -> None:
    bins, cells = 9, 2
    hog = np.random.default_rng(0).normal(size=(3, bins, 4 * cells, 5 * cells))
    tokens = np.empty((4, 5, 3 * bins * cells * cells))
    for c, b, y, x in np.ndindex(*hog.shape):
        place = ((c * bins + b) * cells + y % cells) * cells + x % cells
        tokens[y // cells, x // cells, place] = hog[c, b, y, x]
    np.testing.assert_array_equal(tokens_to_cells(tokens, bins, cells), hog)
    with pytest.raises(ValueError, match="107 values.*108"):
        tokens_to_cells(tokens[..., :107], bins, cells)


def test_grey_out_paints_hidden_patches_only() -> None:
    image = np.random.default_rng(0).integers(0, 100, (32, 48, 3), dtype=np.uint8)
    before = image.copy()
    hidden = np.zeros((2, 3), dtype=bool)
    hidden[0, 2] = hidden[1, 0] = True
    seen = grey_out(image, hidden)
    assert seen.dtype == np.uint8
    np.testing.assert_array_equal(image, before)
    patches = seen.reshape(2, 16, 3, 16, 3).swapaxes(1, 2)
    assert (patches[hidden] == GREY).all()
    np.testing.assert_array_equal(patches[~hidden], image.reshape(2, 16, 3, 16, 3).swapaxes(1, 2)[~hidden])


def make_row(side: int = 96, caption: str = "") -> HogRow:
    rng = np.random.default_rng(side)
    image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    hidden = np.zeros((side // 16, side // 16), dtype=bool)
    hidden[:2] = True
    target = np.stack([plain_hog(image[..., c].astype(float)) for c in range(3)])
    return HogRow(image, grey_out(image, hidden), target, np.zeros_like(target), hidden, caption)


def test_hog_figure_columns_hold_what_their_headers_say() -> None:
    row = make_row()
    picture = hog_figure([row], title="A title")
    tile = 240
    gap, top, head = 8, 38, 20 + 14 * 2
    assert tile == MIN_TILE
    assert picture.size == (4 * tile + 5 * gap, top + head + tile + gap) and picture.mode == "RGB"
    pixels = np.asarray(picture)
    assert (pixels[: top + head] < 100).any(), "title and headers are missing"
    tiles = [pixels[top + head : top + head + tile, gap + k * (tile + gap) :][:, :tile] for k in range(4)]
    shown, seen, target, predicted = tiles
    split = 2 * tile // 6  # the two upper rows of patches are hidden
    assert (seen[: split - 8] == GREY).all() and not (shown[: split - 8] == GREY).all()
    np.testing.assert_array_equal(seen[split + 8 :], shown[split + 8 :])
    assert target[:split].max() > 200 and target[split:].max() > 200
    assert (predicted[:split] == HIDDEN_GROUND).all(), "a prediction of zero leaves hidden patches black"
    assert 60 < predicted[split:].max() < 150, "the target shows dimly where the model saw the patch"
    assert (predicted[split:].reshape(-1, 3) == SEEN_GROUND).all(axis=1).any()


def test_hog_figure_takes_rows_of_different_sizes_and_summed_channels() -> None:
    small, large = make_row(64, "small"), make_row(256, "large")
    picture = hog_figure([small, large])
    tile = MIN_CELL * 32
    assert picture.size == (4 * tile + 5 * 8, 8 + 20 + 14 * 2 + 2 * (tile + 20 + 8))
    summed = HogRow(small.image, small.seen, small.target.sum(0), small.predicted.sum(0), small.hidden, "small")
    np.testing.assert_array_equal(np.asarray(hog_figure([summed, large])), np.asarray(picture))


def test_tile_grid_places_tiles_and_refuses_ragged_rows() -> None:
    red = np.full((10, 60, 3), (255, 0, 0), dtype=np.uint8)
    grey = np.full((20, 30), 77, dtype=np.uint8)
    pixels = np.asarray(tile_grid([[red, grey], [red, grey]], ["a", "b"], gap=4))
    assert pixels.shape == (4 + 20 + 2 * 24, 60 + 30 + 3 * 4, 3)
    assert (pixels[24:34, 4:64] == (255, 0, 0)).all() and (pixels[48:68, 68:98] == 77).all()
    with pytest.raises(ValueError, match="expected 2"):
        tile_grid([[red]], ["a", "b"])
    with pytest.raises(ValueError, match="1 captions for 2 rows"):
        tile_grid([[red], [red]], ["a"], captions=["one"])
    with pytest.raises(ValueError):
        hog_figure([])
    assert len(HEADERS) == 4
