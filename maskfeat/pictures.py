"""Images that show targets beside predictions: HOG as line glyphs, spectra, rows of labelled tiles.

Nothing here needs torch: functions take NumPy arrays and return a `PIL.Image.Image`.

Shape legend: H x W pixels, Hp x Wp patches, Hc x Wc HOG cells, D values per token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from maskfeat.errors import UserError

Pixels = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colour = tuple[int, int, int]

GREY = 128  # value of patches that are hidden from the model
PAPER, INK, FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)
TARGET_COLOUR, PREDICTED_COLOUR = (235, 235, 235), (255, 200, 60)
DIM = 0.35  # brightness of the target's glyphs on patches where nothing was predicted
SEEN_GROUND, HIDDEN_GROUND = (24, 31, 48), (0, 0, 0)
MIN_TILE = 240  # pixels on the long side of a tile: smaller images are enlarged
MIN_CELL = 10  # pixels on the side of a glyph

HEADERS = (
    "Input",
    "Input of the model\ngrey: hidden patches",
    "HOG target\nblack background: hidden patches\nblue background: visible patches",
    "HOG prediction\nblack background: hidden patches\ndim on blue: target of visible patches",
)

SPECTRUM_HEADERS = (
    "Input",
    "Spectrum of the input\nlog magnitude, frequency 0 in the centre",
    "Removed frequencies\nblack background: removed\nblue background: kept",
    "Input of the model",
    "Predicted image\nonly the removed frequencies enter the loss",
    "Spectrum of the prediction\nyellow on black: removed frequencies\ndim on blue: not in the loss",
    "Reconstruction\nkept frequencies of the input, removed ones from the prediction",
)


# --------------------------------------------------------------------------- HOG


def tokens_to_cells(tokens: Floats, bins: int = 9, cells: int = 2) -> Floats:
    """Rearrange a grid of predicted tokens into a HOG map.

    Args:
        tokens: (H, W, 3 * bins * cells * cells); the last axis is indexed by
            ((channel * bins + bin) * cells + dy) * cells + dx.
        bins: number of orientations.
        cells: HOG cells along each side of a token (a 16-pixel token has 2 cells of 8 pixels).

    Returns:
        (3, bins, H * cells, W * cells).

    Raises:
        UserError: the last axis has another length.
    """
    height, width, numbers = tokens.shape
    if numbers != 3 * bins * cells * cells:
        raise UserError(
            f"tokens of {numbers} values given: expected 3 x {bins} bins x {cells} x {cells} cells = "
            f"{3 * bins * cells * cells}"
        )
    split = tokens.reshape(height, width, 3, bins, cells, cells)
    return split.transpose(2, 3, 0, 4, 1, 5).reshape(3, bins, height * cells, width * cells)


def glyph_angle(index: int, bins: int = 9) -> float:
    """Return the direction of an edge whose gradients fall into bin `index`: radians, anticlockwise from horizontal.

    The HOG kernels give (gx, gy) = -(dI/dx, dI/dy) in image coordinates (y down), and the bin is that of
    a = atan2(gx, gy), an angle measured from the y axis. The gradient therefore points along (sin a, cos a), and
    the edge, which is perpendicular to it, along (cos a, -sin a). With y pointing up, that is the angle a itself.
    """
    return (index + 0.5) * math.pi / bins


def hog_glyphs(hog: Floats, cell_pixels: int = 12, scale: float | None = None) -> Floats:
    """Draw a HOG map as line glyphs: one line per bin through the centre of each cell, in the direction of its edges.

    Length and brightness of a line grow with its weight, so the glyphs resemble the contours of the image.

    Args:
        hog: (bins, Hc, Wc), one colour channel or the sum over channels; negative values are not drawn.
        cell_pixels: side of a cell in the output, in pixels.
        scale: the weight that gives a full line; None = the largest weight in `hog`.

    Returns:
        brightness (Hc * cell_pixels, Wc * cell_pixels), float32 in [0, 1].
    """
    bins, rows, columns = hog.shape
    top = float(hog.max(initial=0.0)) if scale is None else scale
    weights = np.clip(hog / top, 0.0, 1.0) if top > 0 else np.zeros(hog.shape)
    offset = np.arange(cell_pixels) - (cell_pixels - 1) / 2
    right, up = offset[None, :], -offset[:, None]
    thickness = max(1.0, cell_pixels / 9)
    canvas = np.zeros((rows, columns, cell_pixels, cell_pixels), dtype=np.float32)
    for index in range(bins):
        angle = glyph_angle(index, bins)
        along = np.abs(right * math.cos(angle) + up * math.sin(angle))
        across = np.abs(up * math.cos(angle) - right * math.sin(angle))
        stroke = np.clip(thickness / 2 + 0.5 - across, 0.0, 1.0)  # anti-aliased: a ramp of one pixel
        weight = weights[index][:, :, None, None]
        reach = 0.55 * cell_pixels * np.sqrt(weight)
        line = stroke * np.clip(reach + 0.5 - along, 0.0, 1.0) * weight
        np.maximum(canvas, line, out=canvas, casting="same_kind")
    return canvas.transpose(0, 2, 1, 3).reshape(rows * cell_pixels, columns * cell_pixels)


def grey_out(image: Pixels, hidden: NDArray[np.bool_], grey: int = GREY) -> Pixels:
    """Return a copy of the image (H, W, 3) uint8 whose hidden patches, `hidden` (Hp, Wp) bool, are grey."""
    return np.where(_spread(hidden, image.shape[:2])[..., None], np.uint8(grey), image)


def _spread(mask: NDArray[np.bool_], size: tuple[int, ...]) -> NDArray[np.bool_]:
    """Resize `mask` (Hp, Wp) to (H, W): each pixel takes the value of its patch."""
    rows = np.arange(size[0]) * mask.shape[0] // size[0]
    columns = np.arange(size[1]) * mask.shape[1] // size[1]
    return mask[rows[:, None], columns]


@dataclass(frozen=True)
class HogRow:
    """One row of `hog_figure`.

    Attributes:
        image: (H, W, 3) uint8, the input.
        seen: (H, W, 3) uint8, the input with hidden patches in grey (`grey_out`).
        target: (bins, Hc, Wc) or (3, bins, Hc, Wc); colour channels are summed before drawing.
        predicted: the same shape; only hidden patches are drawn.
        hidden: (Hp, Wp) bool, True = removed from the model's view.
        caption: a line above the row.
    """

    image: Pixels
    seen: Pixels
    target: Floats
    predicted: Floats
    hidden: NDArray[np.bool_]
    caption: str = ""


def hog_figure(rows: Sequence[HogRow], title: str = "", headers: Sequence[str] = HEADERS) -> Image.Image:
    """Return an image with one row per sample: input, input of the model, HOG target, HOG prediction.

    Target and prediction of a row share one scale, so that a prediction that is too weak looks weak.
    """
    side = max([MIN_TILE, *(MIN_CELL * max(row.target.shape[-2:]) for row in rows)])
    return tile_grid([_hog_tiles(row, side) for row in rows], headers, [row.caption for row in rows], title)


def _hog_tiles(row: HogRow, side: int) -> list[Pixels]:
    target, predicted = (hog.sum(axis=0) if hog.ndim == 4 else hog for hog in (row.target, row.predicted))
    cell = side // max(target.shape[1:])
    scale = float(np.percentile(target.max(axis=0), 95))
    target_lines, predicted_lines = (hog_glyphs(hog, cell, scale) for hog in (target, predicted))
    size = target_lines.shape
    hidden = _spread(row.hidden, size)
    shown = np.where(hidden, predicted_lines, DIM * target_lines)
    return [
        _resized(row.image, size),
        _resized(row.seen, size),
        _tinted(target_lines, TARGET_COLOUR, TARGET_COLOUR, hidden),
        _tinted(shown, PREDICTED_COLOUR, TARGET_COLOUR, hidden),
    ]


def _tinted(brightness: Floats, where_hidden: Colour, where_seen: Colour, hidden: NDArray[np.bool_]) -> Pixels:
    """Map brightness (H, W) in [0, 1] to colours (H, W, 3) uint8: from the background of a patch to its line colour."""
    colour = np.where(hidden[..., None], where_hidden, where_seen)
    ground = np.where(hidden[..., None], HIDDEN_GROUND, SEEN_GROUND)
    mixed = ground + brightness[..., None] * (colour - ground)
    return (mixed + 0.5).astype(np.uint8)


def _resized(image: Pixels, size: tuple[int, ...], smooth: bool = True) -> Pixels:
    if image.shape[:2] == tuple(size):
        return image
    height, width = size
    mode = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(image).resize((width, height), mode))


# --------------------------------------------------------------------------- spectra


@dataclass(frozen=True)
class SpectrumRow:
    """One row of `spectrum_figure`.

    Attributes:
        image, seen: (H, W, 3) uint8, the input, and the filtered input of the model.
        spectrum, predicted_spectrum: (H, W) magnitudes, at least 0; frequency 0 in the centre.
        removed: (H, W) bool, True = frequencies removed from the model's view.
        predicted, together: (H, W, 3) or (H, W) uint8, the predicted image, and the input whose removed frequencies
            are taken from the prediction.
        caption: a line above the row.
    """

    image: Pixels
    seen: Pixels
    spectrum: Floats
    removed: NDArray[np.bool_]
    predicted: Pixels
    predicted_spectrum: Floats
    together: Pixels
    caption: str = ""


def log_brightness(magnitude: Floats, reference: Floats) -> Floats:
    """Map magnitudes (H, W) to [0, 1] on a log scale, from the 1st to the 99.9th percentile of `reference`."""
    low, high = np.log(np.maximum(np.percentile(reference, (1, 99.9)), 1e-6))
    logarithm = np.log(np.maximum(magnitude, 1e-6))
    return np.clip((logarithm - low) / max(high - low, 1e-6), 0.0, 1.0)


def spectrum_figure(
    rows: Sequence[SpectrumRow], title: str = "", headers: Sequence[str] = SPECTRUM_HEADERS
) -> Image.Image:
    """A labelled picture with a row for each image: see `SPECTRUM_HEADERS`.

    Both spectra of a row are drawn at the same scale.
    """
    return tile_grid([_spectrum_tiles(row) for row in rows], headers, [row.caption for row in rows], title)


def _spectrum_tiles(row: SpectrumRow) -> list[Pixels]:
    side = max(MIN_TILE, *row.image.shape[:2])
    size = (side, side)
    real = log_brightness(row.spectrum, row.spectrum)
    guess = log_brightness(row.predicted_spectrum, row.spectrum)
    everything = np.ones_like(row.removed)
    tiles = [
        row.image,
        _tinted(real, TARGET_COLOUR, TARGET_COLOUR, everything),
        _tinted(np.where(row.removed, real, DIM * real), TARGET_COLOUR, TARGET_COLOUR, row.removed),
        row.seen,
        row.predicted,
        _tinted(np.where(row.removed, guess, DIM * guess), PREDICTED_COLOUR, TARGET_COLOUR, row.removed),
        row.together,
    ]
    smooth = (0, 3, 4, 6)  # photographs; a frequency is a square
    return [_resized(tile, size, smooth=place in smooth) for place, tile in enumerate(tiles)]


Row = HogRow | SpectrumRow


def predictions_figure(rows: Sequence[Row], title: str = "") -> Image.Image:
    """Return the picture of rows of one kind: `hog_figure` or `spectrum_figure`."""
    hog = [row for row in rows if isinstance(row, HogRow)]
    return hog_figure(hog, title) if hog else spectrum_figure([r for r in rows if isinstance(r, SpectrumRow)], title)


# --------------------------------------------------------------------------- rows of labelled tiles


def tile_grid(
    rows: Sequence[Sequence[Pixels]],
    headers: Sequence[str],
    captions: Sequence[str] = (),
    title: str = "",
    gap: int = 8,
) -> Image.Image:
    """Return an image of rows of tiles under column headers.

    Args:
        rows: tiles (H, W, 3) or (H, W) uint8, one per header in each row. A column is as wide as its widest tile, a
            row as high as its highest.
        headers: one per column; lines after the first are set smaller and wrapped to the width of the column.
        captions: one line above each row; empty = none.
        title: a line at the top.
        gap: pixels between tiles.

    Raises:
        ValueError: the numbers of tiles, headers and captions differ.
    """
    if not rows or any(len(row) != len(headers) for row in rows):
        raise ValueError(f"rows of {[len(row) for row in rows]} tiles given: expected {len(headers)} in each")
    if captions and len(captions) != len(rows):
        raise ValueError(f"{len(captions)} captions for {len(rows)} rows given: expected one for each")
    large, middle, small = (ImageFont.load_default(size=size) for size in (18, 14, 11))
    widths = [max(row[k].shape[1] for row in rows) for k in range(len(headers))]
    heights = [max(tile.shape[0] for tile in row) for row in rows]
    notes = [_wrapped(header, small, width) for header, width in zip(headers, widths, strict=True)]
    top = gap + (30 if title else 0)
    head = 20 + 14 * max(len(lines) - 1 for lines in notes)
    band = 20 if any(captions) else 0
    width = sum(widths) + gap * (len(widths) + 1)
    canvas = Image.new("RGB", (width, top + head + sum(heights) + (band + gap) * len(rows)), PAPER)
    pen = ImageDraw.Draw(canvas)
    if title:
        pen.text((gap, gap), title, fill=INK, font=large)
    lefts = [gap + sum(widths[:k]) + gap * k for k in range(len(widths))]
    for left, lines in zip(lefts, notes, strict=True):
        for number, line in enumerate(lines):
            below = 0 if number == 0 else 5 + 14 * number
            font, ink = (middle, INK) if number == 0 else (small, FAINT)
            pen.text((left, top + below), line, fill=ink, font=font)
    y = top + head
    for number, row in enumerate(rows):
        if band:
            pen.text((gap, y + 2), captions[number], fill=INK, font=small)
        for left, tile in zip(lefts, row, strict=True):
            canvas.paste(Image.fromarray(tile).convert("RGB"), (left, y + band))
        y += band + heights[number] + gap
    return canvas


def _wrapped(header: str, font: Font, width: int) -> list[str]:
    """Return the lines of a header: the first unchanged, the others wrapped at word boundaries to `width` pixels."""
    name, *notes = header.split("\n")
    lines = [name]
    for note in notes:
        line = ""
        for word in note.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines
