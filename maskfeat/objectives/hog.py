"""Histograms of oriented gradients (Dalal and Triggs, CVPR 2005) as MaskFeat uses them (Wei et al., CVPR 2022, sec. 3).

Neither an arc tangent nor a scatter is needed: a gradient, turned into the upper half-plane, lies in bin k or beyond
where gx cos(k pi / bins) >= gy sin(k pi / bins). Magnitudes summed over such places, for each k, differ from one k to
the next by the histogram.

Shape legend: N images, C channels (each by itself), H x W pixels, bins orientations, cells of `cell` x `cell` pixels;
a patch is what one token stands for: S x S pixels, and with a border of one pixel (S + 2) x (S + 2).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_border(images: Tensor) -> Tensor:
    """(..., H, W) -> (..., H + 2, W + 2): a border of one pixel, mirrored at the outermost pixels."""
    return F.pad(images.flatten(0, -3), (1, 1, 1, 1), mode="reflect").unflatten(0, images.shape[:-2])


def gradients(padded: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel responses (gx, gy), both (..., H, W), of images with a border (..., H + 2, W + 2).

    The kernels are [1, 0, -1; 2, 0, -2; 1, 0, -1] and its transpose, cross-correlated; written as differences of
    smoothed lines, so that flat ground gives exact zeros.
    """
    down = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    across = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    return down[..., :-2] - down[..., 2:], across[..., :-2, :] - across[..., 2:, :]


def gaussian_window(size: int, like: Tensor) -> Tensor:
    """(size, size) Gaussian weights with sum 1, standard deviation size / 2 (Dalal and Triggs, section 6.4)."""
    at = torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1) / 2
    line = torch.exp(-0.5 * (at / (size / 2)) ** 2)
    window = line[:, None] * line[None, :]
    return window / window.sum()


def pixel_weights(images: Tensor, cell: int, window: int) -> Tensor | None:
    """(H, W): the Gaussian window repeated over images (..., H, W); None where `window` is 0.

    Raises:
        ValueError: where H or W is not divisible by `cell` or `window`.
    """
    height, width = images.shape[-2:]
    for name, side in (("MASK.HOG_CELL", cell), ("MASK.HOG_GAUSSIAN_WINDOW", window or cell)):
        if height % side or width % side:
            raise ValueError(f"an image of {height} x {width} pixels is not divisible by {name} = {side}")
    return gaussian_window(window, images).repeat(height // window, width // window) if window else None


def _rounds_to_half_turn(dtype: torch.dtype) -> float:
    """gx / |gy| below which the arc tangent, rounded to `dtype`, is half a turn, which counts as none.

    The published bins come from such an angle. Half a turn is rounded itself: pi - math.pi is sin(math.pi).
    """
    rounded = torch.tensor(math.pi, dtype=dtype).item()
    return torch.finfo(dtype).eps - (rounded - math.pi - math.sin(math.pi))


_HALF_TURN = {dtype: _rounds_to_half_turn(dtype) for dtype in (torch.float32, torch.float64)}


def histograms(gx: Tensor, gy: Tensor, bins: int, cell: int, weight: Tensor | None = None) -> Tensor:
    """Magnitudes summed by orientation and cell: (..., H, W) each -> (..., bins, H / cell, W / cell).

    The orientation is atan2(gx, gy), unsigned: bin = floor(angle / pi * bins) modulo bins; gradients on the edge of two
    bins fall as that formula makes them fall in the dtype of gx (bins other than 9 have edges where it may differ).

    Args:
        weight: (H, W), multiplies magnitudes; None = 1.
    """
    magnitude = torch.sqrt(gx * gx + gy * gy)
    if weight is not None:
        magnitude = magnitude * weight
    gx = torch.where((gx > 0) & (gx < -_HALF_TURN[gx.dtype] * gy), 0.0, gx)
    lower = (gx < 0) | ((gx == 0) & (gy < 0))
    gx, gy = torch.where(lower, -gx, gx), torch.where(lower, -gy, gy)
    height, width = gx.shape[-2] // cell, gx.shape[-1] // cell
    beyond = []
    for k in range(bins):
        angle = k * math.pi / bins
        there = magnitude
        if k:
            there = torch.where(gx * math.cos(angle) >= gy * math.sin(angle), magnitude, 0.0)
        # Rows first: their sum runs along whole lines of memory.
        rows = there.unflatten(-2, (height, cell)).sum(dim=-2)
        beyond.append(rows.unflatten(-1, (width, cell)).sum(dim=-1))
    beyond.append(torch.zeros_like(beyond[0]))
    return torch.stack([beyond[k] - beyond[k + 1] for k in range(bins)], dim=-3)


@torch.no_grad()
def hog(images: Tensor, bins: int = 9, cell: int = 8, window: int = 0) -> Tensor:
    """HOG features of each colour channel.

    Magnitudes of gradients are summed per cell and bin (see `histograms`), and each cell's vector is L2-normalised; a
    cell without gradient stays zero.

    Args:
        images: (N, 3, H, W) float32 or float64, any range; H and W divisible by `cell`.
        bins: orientations over half a turn.
        cell: pixels along a side of a cell.
        window: side of a Gaussian window that weighs magnitudes, repeated over the image; 0 = none (as released).

    Returns:
        (N, 3, bins, H / cell, W / cell), of the dtype of `images`, values in [0, 1].

    Raises:
        ValueError: where H or W is not divisible by `cell` or `window`.
    """
    weight = pixel_weights(images, cell, window)
    return F.normalize(histograms(*gradients(pad_border(images)), bins, cell, weight), p=2, dim=-3)


def cut_patches(padded: Tensor, places: Sequence[Tensor], side: int) -> Tensor:
    """Patches with their border.

    Args:
        padded: (N, C, T, H + 2, W + 2) contiguous.
        places: for each of n patches its sample, frame, and row and column in the grid of patches; (n,) int64 each.
        side: S of a patch.

    Returns:
        (n, C, S + 2, S + 2)
    """
    # Lines of S + 2 pixels are what is gathered: every pixel is the start of one in this view.
    wide = side + 2
    lines = padded.as_strided((padded.numel() - wide + 1, wide), (1, 1))
    by_sample, by_channel, by_frame, by_row, _ = padded.stride()
    sample, frame, row, column = places
    corner = sample * by_sample + frame * by_frame + row * (side * by_row) + column * side
    channels = torch.arange(padded.shape[1], device=padded.device) * by_channel
    rows = torch.arange(wide, device=padded.device) * by_row
    starts = corner[:, None, None] + channels[:, None] + rows
    return lines.index_select(0, starts.flatten()).view(len(corner), padded.shape[1], wide, wide)


def patch_features(patches: Tensor, bins: int, cell: int, weight: Tensor | None = None) -> Tensor:
    """HOG of patches with their border: (n, C, S + 2, S + 2) -> (n, C bins (S / cell)^2).

    A token's numbers are ordered by channel, bin, and row and column of the cell within it. `weight`: (S, S), see
    `histograms`.
    """
    return F.normalize(histograms(*gradients(patches), bins, cell, weight), p=2, dim=-3).flatten(1)


def hog_tokens(features: Tensor, cells: int) -> Tensor:
    """HOG features by token: (N, 3, bins, H, W) cells -> (N, H / cells, W / cells, 3 bins cells^2), ordered as in
    `patch_features`.
    """
    num, channels, bins, height, width = features.shape
    split = features.reshape(num, channels * bins, height // cells, cells, width // cells, cells)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(num, height // cells, width // cells, -1)
