"""HOG as it is usually written in PyTorch: two convolutions, atan2, votes scattered into bins, cells summed.

Shape legend: N images, 3 channels (each by itself), H x W pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sobel(images: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (gx, gy), each (N, 3, H, W), of images (N, 3, H, W) padded by reflection."""
    kernel = torch.tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=images.dtype, device=images.device)
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    gx = F.conv2d(padded, kernel.repeat(3, 1, 1, 1), groups=3)
    gy = F.conv2d(padded, kernel.T.repeat(3, 1, 1, 1), groups=3)
    return gx, gy


def reference_hog(images: Tensor, bins: int = 9, cell: int = 8, window: int = 0) -> Tensor:
    """HOG of every cell: (N, 3, H, W) -> (N, 3, bins, H / cell, W / cell), each cell's vector of length 1 or 0.

    Args:
        bins: orientations over half a turn.
        cell: pixels along a side of a cell.
        window: side of a Gaussian window that weighs magnitudes, repeated over the image; 0 = none.
    """
    num, channels, height, width = images.shape
    gx, gy = sobel(images)
    magnitude = torch.sqrt(gx**2 + gy**2)
    if window:
        at = torch.arange(window, dtype=images.dtype, device=images.device) - (window - 1) / 2
        line = torch.exp(-0.5 * (at / (window / 2)) ** 2)
        gaussian = torch.outer(line, line)
        magnitude = magnitude * (gaussian / gaussian.sum()).repeat(height // window, width // window)
    orientation = torch.floor(torch.atan2(gx, gy) / math.pi * bins).long() % bins
    votes = torch.zeros(num, channels, bins, height, width, dtype=images.dtype, device=images.device)
    votes.scatter_add_(2, orientation.unsqueeze(2), magnitude.unsqueeze(2))
    histogram = votes.unfold(3, cell, cell).unfold(4, cell, cell).sum(dim=(-1, -2))
    return F.normalize(histogram, dim=2)


def reference_targets(
    images: Tensor, hidden: Tensor, bins: int = 9, cell: int = 8, cells: int = 2, window: int = 0
) -> Tensor:
    """HOG of the hidden tokens: computed for all tokens, then selected.

    Args:
        images: (N, 3, H, W) float32; of clips, every frame that a token stands for.
        hidden: bool with N x tokens elements, in the order of the images and of their tokens, row by row.
        cells: cells along a side of a token.

    Returns:
        (n_hidden, 3 bins cells^2): by channel, bin, and row and column of the cell within the token.
    """
    features = reference_hog(images, bins, cell, window).flatten(1, 2)
    tokens = features.unfold(2, cells, cells).unfold(3, cells, cells)  # (N, 3 bins, H', W', cells, cells)
    tokens = tokens.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
    return tokens[hidden.flatten()]
