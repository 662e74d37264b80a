"""Histograms of oriented gradients (Dalal and Triggs, CVPR 2005) as MaskFeat uses them (Wei et al., CVPR 2022, sec. 3).

`reference_hog` computes the arc tangent of every gradient and scatters its magnitude into the bin. The fast form, of
which `histograms` is the core, needs neither: a gradient, flipped into the upper half-plane, lies in bin k or above if
gx cos(k pi / bins) >= gy sin(k pi / bins). For every k the magnitudes of such gradients are summed; the histogram is
the difference of consecutive sums.

Shape legend: N images, C channels (each on its own), H x W pixels, bins orientations, cells of `cell` x `cell` pixels.
A patch is the image area of one token: S x S pixels, or (S + 2) x (S + 2) with a border of one pixel. Results are of
the dtype of the input, float32 or float64, where autocast is off.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maskfeat.errors import UserError
from maskfeat.models.layers import is_reference


def pad_border(images: Tensor) -> Tensor:
    """Add a border of one pixel by reflection: (..., H, W) -> (..., H + 2, W + 2)."""
    return F.pad(images.flatten(0, -3), (1, 1, 1, 1), mode="reflect").unflatten(0, images.shape[:-2])


def gradients(padded: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Sobel responses of images with a border, as in `sobel`.

    They are computed as differences of smoothed lines, so that areas of one colour give exact zeros.

    Args:
        padded: (..., H + 2, W + 2).

    Returns:
        gx and gy, both (..., H, W).
    """
    down = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    across = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    return down[..., :-2] - down[..., 2:], across[..., :-2, :] - across[..., 2:, :]


def gaussian_window(size: int, like: Tensor) -> Tensor:
    """Return Gaussian weights (size, size) of sum 1 and standard deviation size / 2 (Dalal and Triggs, section 6.4)."""
    at = torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1) / 2
    line = torch.exp(-0.5 * (at / (size / 2)) ** 2)
    window = line[:, None] * line[None, :]
    return window / window.sum()


def pixel_weights(images: Tensor, cell: int, window: int) -> Tensor | None:
    """Return the Gaussian window repeated over an image, and check the image size.

    Args:
        images: (..., H, W).
        cell: side of a cell in pixels.
        window: side of the window in pixels; 0 = no window.

    Returns:
        (H, W), of the dtype of `images`; None if `window` is 0.

    Raises:
        UserError: if H or W is not divisible by `cell` or `window`.
    """
    height, width = images.shape[-2:]
    for name, side in (("MASK.HOG_CELL", cell), ("MASK.HOG_GAUSSIAN_WINDOW", window or cell)):
        if height % side or width % side:
            raise UserError(f"an image of {height} x {width} pixels is not divisible by {name} = {side}")
    return gaussian_window(window, images).repeat(height // window, width // window) if window else None


def _rounds_to_half_turn(dtype: torch.dtype) -> float:
    """Return the ratio gx / |gy| below which the arc tangent rounds to pi in `dtype`, which falls into bin 0.

    The published bins are computed from that angle. Pi is itself rounded: pi - math.pi is sin(math.pi).
    """
    rounded = torch.tensor(math.pi, dtype=dtype, device="cpu").item()  # whatever the device of the moment is
    return torch.finfo(dtype).eps - (rounded - math.pi - math.sin(math.pi))


_HALF_TURN = {dtype: _rounds_to_half_turn(dtype) for dtype in (torch.float32, torch.float64)}


def histograms(gx: Tensor, gy: Tensor, bins: int, cell: int, weight: Tensor | None = None) -> Tensor:
    """Sum gradient magnitudes by orientation and cell.

    The orientation is atan2(gx, gy), unsigned: bin = floor(angle / pi * bins) modulo bins. A gradient on the edge
    between two bins falls into the bin that this formula gives in the dtype of `gx`. (With other than 9 bins there are
    edges where it may differ.)

    Args:
        gx, gy: (..., H, W).
        weight: (H, W), multiplies the magnitudes; None = 1.

    Returns:
        (..., bins, H / cell, W / cell)
    """
    magnitude = torch.sqrt(gx * gx + gy * gy)
    if weight is not None:
        magnitude = magnitude * weight
    gx = torch.where((gx > 0) & (gx < -_HALF_TURN[gx.dtype] * gy), 0.0, gx)
    lower = (gx < 0) | ((gx == 0) & (gy < 0))
    gx, gy = torch.where(lower, -gx, gx), torch.where(lower, -gy, gy)
    height, width = gx.shape[-2] // cell, gx.shape[-1] // cell
    above = []  # for each k, the magnitudes in bin k or above
    for k in range(bins):
        angle = k * math.pi / bins
        selected = magnitude
        if k:
            selected = torch.where(gx * math.cos(angle) >= gy * math.sin(angle), magnitude, 0.0)
        # Rows first, so that the sum runs along contiguous memory.
        rows = selected.unflatten(-2, (height, cell)).sum(dim=-2)
        above.append(rows.unflatten(-1, (width, cell)).sum(dim=-1))
    above.append(torch.zeros_like(above[0]))
    return torch.stack([above[k] - above[k + 1] for k in range(bins)], dim=-3)


def sobel(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Sobel responses of images (N, C, H, W) padded by reflection: gx and gy, both (N, C, H, W).

    The kernels are [1, 0, -1; 2, 0, -2; 1, 0, -1] and its transpose, cross-correlated with every channel.
    """
    channels = images.shape[1]
    kernel = torch.tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=images.dtype, device=images.device)
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    gx = F.conv2d(padded, kernel.repeat(channels, 1, 1, 1), groups=channels)
    gy = F.conv2d(padded, kernel.T.repeat(channels, 1, 1, 1), groups=channels)
    return gx, gy


def reference_hog(images: Tensor, bins: int, cell: int, weight: Tensor | None = None) -> Tensor:
    """Compute `hog` as it is usually written: the angle of every gradient, and its magnitude scattered into a bin.

    Args:
        images: (N, C, H, W).
        weight: (H, W), multiplies the magnitudes; None = 1.

    Returns:
        (N, C, bins, H / cell, W / cell)
    """
    gx, gy = sobel(images)
    magnitude = torch.sqrt(gx**2 + gy**2)
    if weight is not None:
        magnitude = magnitude * weight
    orientation = torch.floor(torch.atan2(gx, gy) / math.pi * bins).long() % bins
    votes = magnitude.new_zeros(*images.shape[:2], bins, *images.shape[2:])
    votes.scatter_add_(2, orientation.unsqueeze(2), magnitude.unsqueeze(2))
    histogram = votes.unfold(3, cell, cell).unfold(4, cell, cell).sum(dim=(-1, -2))
    return F.normalize(histogram, dim=2)


@torch.no_grad()
def hog(images: Tensor, bins: int = 9, cell: int = 8, window: int = 0, impl: str = "fast") -> Tensor:
    """Compute the HOG features of each colour channel.

    Gradient magnitudes are summed by cell and bin (see `histograms`), and the vector of each cell is L2-normalised; a
    cell without any gradient is zero.

    Args:
        images: (N, 3, H, W) float32 or float64, any range; H and W divisible by `cell`.
        bins: number of orientations in [0, pi).
        cell: side of a cell in pixels.
        window: side of a Gaussian window that weights the magnitudes, repeated over the image; 0 = none (as released).
        impl: "fast" or "reference". Both give the same up to rounding; where rounding alone decides between two bins,
            they may choose differently.

    Returns:
        (N, 3, bins, H / cell, W / cell), of the dtype of `images`, values in [0, 1].

    Raises:
        UserError: if H or W is not divisible by `cell` or `window`, or the type or a number is another one.
    """
    if images.dtype not in _HALF_TURN or min(bins, cell) < 1:
        raise UserError(
            f"HOG is computed of float32 or float64 images, with at least 1 bin and cells of at least 1 pixel; given "
            f"{images.dtype}, {bins} bins and cells of {cell}"
        )
    weight = pixel_weights(images, cell, window)
    if is_reference(impl):
        return reference_hog(images, bins, cell, weight)
    return F.normalize(histograms(*gradients(pad_border(images)), bins, cell, weight), p=2, dim=-3)


def cut_patches(padded: Tensor, positions: Sequence[Tensor], side: int) -> Tensor:
    """Cut patches with their border out of padded clips.

    Args:
        padded: (N, C, T, H + 2, W + 2) contiguous.
        positions: sample, frame, row and column (in the grid of patches) of each of n patches; (n,) int64 each.
        side: S, the side of a patch in pixels.

    Returns:
        (n, C, S + 2, S + 2)
    """
    # The view holds the line of S + 2 pixels that starts at every pixel; whole lines are gathered from it.
    length = side + 2
    lines = padded.as_strided((padded.numel() - length + 1, length), (1, 1))
    by_sample, by_channel, by_frame, by_row, _ = padded.stride()
    sample, frame, row, column = positions
    corner = sample * by_sample + frame * by_frame + row * (side * by_row) + column * side
    channels = torch.arange(padded.shape[1], device=padded.device) * by_channel
    rows = torch.arange(length, device=padded.device) * by_row
    starts = corner[:, None, None] + channels[:, None] + rows
    return lines.index_select(0, starts.flatten()).view(len(corner), padded.shape[1], length, length)


def patch_features(patches: Tensor, bins: int, cell: int, weight: Tensor | None = None) -> Tensor:
    """Compute the HOG features of patches with their border.

    Args:
        patches: (n, C, S + 2, S + 2).
        weight: (S, S), see `histograms`.

    Returns:
        (n, C bins (S / cell)^2), ordered by channel, bin, and row and column of the cell within the patch.
    """
    return F.normalize(histograms(*gradients(patches), bins, cell, weight), p=2, dim=-3).flatten(1)


def hog_tokens(features: Tensor, cells: int) -> Tensor:
    """Arrange the HOG features of cells by token, in the order of `patch_features`.

    Args:
        features: (N, 3, bins, H, W), a vector of `bins` features for each cell.
        cells: number of cells along each side of a token.

    Returns:
        (N, H / cells, W / cells, 3 bins cells^2)
    """
    num, channels, bins, height, width = features.shape
    split = features.reshape(num, channels * bins, height // cells, cells, width // cells, cells)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(num, height // cells, width // cells, -1)
