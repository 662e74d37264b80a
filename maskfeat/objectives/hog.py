"""Histograms of oriented gradients (Dalal and Triggs, CVPR 2005) as MaskFeat uses them (Wei et al., CVPR 2022, sec. 3).

Shape legend: N images, channels 3 (each by itself), H x W pixels, bins orientations, cells of `cell` x `cell` pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def gradients(images: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel responses (gx, gy), both (N, 3, H, W), of reflect-padded images (N, 3, H, W).

    The kernels are [1, 0, -1; 2, 0, -2; 1, 0, -1] and its transpose, cross-correlated; written as differences of
    smoothed lines, so that flat ground gives exact zeros.
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    down = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    across = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    return down[..., :-2] - down[..., 2:], across[:, :, :-2] - across[:, :, 2:]


def gaussian_window(size: int, like: Tensor) -> Tensor:
    """(size, size) Gaussian weights with sum 1, standard deviation size / 2 (Dalal and Triggs, section 6.4)."""
    at = torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1) / 2
    line = torch.exp(-0.5 * (at / (size / 2)) ** 2)
    window = line[:, None] * line[None, :]
    return window / window.sum()


@torch.no_grad()
def hog(images: Tensor, bins: int = 9, cell: int = 8, window: int = 0) -> Tensor:
    """HOG features of each colour channel.

    The orientation of a gradient is atan2(gx, gy), unsigned: bin = floor(angle / pi * bins) modulo bins. Magnitudes
    are summed per cell and bin, and each cell's vector is L2-normalised; a cell without gradient stays zero.

    Args:
        images: (N, 3, H, W) floating point, any range; H and W divisible by `cell`.
        bins: orientations over half a turn.
        cell: pixels along a side of a cell.
        window: side of a Gaussian window that weighs magnitudes, repeated over the image; 0 = none (as released).

    Returns:
        (N, 3, bins, H / cell, W / cell), of the dtype of `images`, values in [0, 1].

    Raises:
        ValueError: where H or W is not divisible by `cell` or `window`.
    """
    num, channels, height, width = images.shape
    for name, side in (("MASK.HOG_CELL", cell), ("MASK.HOG_GAUSSIAN_WINDOW", window or cell)):
        if height % side or width % side:
            raise ValueError(f"an image of {height} x {width} pixels is not divisible by {name} = {side}")
    gx, gy = gradients(images)
    magnitude = torch.sqrt(gx * gx + gy * gy)
    if window:
        magnitude = magnitude * gaussian_window(window, images).repeat(height // window, width // window)
    orientation = torch.floor(torch.atan2(gx, gy) / math.pi * bins).remainder_(bins)
    cells = (num, channels, height // cell, cell, width // cell, cell)
    histogram = torch.stack(
        [torch.where(orientation == k, magnitude, 0.0).reshape(cells).sum(dim=(3, 5)) for k in range(bins)],
        dim=2,
    )
    return F.normalize(histogram, p=2, dim=2)


def hog_tokens(features: Tensor, cells: int) -> Tensor:
    """HOG features by token: (N, 3, bins, H, W) cells -> (N, H / cells, W / cells, 3 bins cells^2).

    A token's numbers are ordered by channel, bin, and row and column of the cell within the token.
    """
    num, channels, bins, height, width = features.shape
    split = features.reshape(num, channels * bins, height // cells, cells, width // cells, cells)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(num, height // cells, width // cells, -1)
