"""HOG against a slow float64 oracle, and what it must not depend on."""

import math

import numpy as np
import pytest
import torch

from maskfeat.objectives.hog import hog, hog_tokens


def slow_hog(image: np.ndarray, bins: int, cell: int, window: int) -> np.ndarray:
    """One channel (H, W), pixel by pixel: gradients at reflected borders, votes by atan2, cells normalised."""
    height, width = image.shape
    kernel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=np.float64)
    padded = np.pad(image.astype(np.float64), 1, mode="reflect")
    votes = np.zeros((bins, height // cell, width // cell))
    sigma = window / 2
    for y in range(height):
        for x in range(width):
            patch = padded[y : y + 3, x : x + 3]
            # Line by line, so that mirrored pixels at the border cancel exactly: a gradient along an axis lies on the
            # edge of a bin.
            gx = sum((kernel[row] * patch[row]).sum() for row in range(3))
            gy = sum((kernel[row] * patch[:, row]).sum() for row in range(3))
            vote = math.hypot(gx, gy)
            if window:
                offset = [(i % window) - (window - 1) / 2 for i in (y, x)]
                vote *= math.exp(-0.5 * sum(o * o for o in offset) / sigma**2)
            votes[math.floor(math.atan2(gx, gy) / math.pi * bins) % bins, y // cell, x // cell] += vote
    norm = np.sqrt((votes**2).sum(axis=0, keepdims=True))
    return votes / np.maximum(norm, 1e-12)


@pytest.mark.parametrize(("bins", "cell", "window"), [(9, 8, 0), (6, 4, 0), (9, 8, 16)])
def test_oracle(bins: int, cell: int, window: int) -> None:
    images = torch.randn(1, 3, 16, 32, dtype=torch.float64)
    features = hog(images, bins, cell, window)
    assert features.shape == (1, 3, bins, 16 // cell, 32 // cell)
    for channel in range(3):
        expected = slow_hog(images[0, channel].numpy(), bins, cell, window)
        np.testing.assert_allclose(features[0, channel].numpy(), expected, atol=1e-12)


def test_cells_have_unit_length_and_flat_cells_none() -> None:
    images = torch.randn(2, 3, 32, 32)
    images[1, :, 8:24, 8:24] = 0.5
    lengths = hog(images).norm(dim=2)
    torch.testing.assert_close(lengths[0], torch.ones(3, 4, 4))
    assert (hog(torch.full((1, 3, 16, 16), 0.3)) == 0).all()
    # Predicting zero costs 1/9 where every cell has a gradient.
    assert hog(images[:1]).square().mean().item() == pytest.approx(1 / 9, rel=1e-6)


def test_invariances() -> None:
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    features = hog(images)
    torch.testing.assert_close(hog(3.0 * images + 5.0), features)
    torch.testing.assert_close(hog(-images), features, msg="orientations are unsigned")
    one = hog(torch.cat([images, torch.randn_like(images)]))[:1]
    torch.testing.assert_close(one, features, msg="an image does not depend on its neighbours")


def test_orientation_follows_a_rotation() -> None:
    """A quarter turn of the image moves every vote by half the bins (of an even number)."""
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    turned = torch.rot90(images, 1, dims=(-2, -1))
    expected = torch.rot90(hog(images, bins=8), 1, dims=(-2, -1)).roll(4, dims=2)
    torch.testing.assert_close(hog(turned, bins=8), expected)


def test_token_layout() -> None:
    features = torch.arange(2 * 3 * 9 * 4 * 6).reshape(2, 3, 9, 4, 6)
    tokens = hog_tokens(features, 2)
    assert tokens.shape == (2, 2, 3, 108)
    for n, row, column, c, b, dy, dx in [(0, 0, 0, 0, 0, 0, 0), (1, 1, 2, 2, 8, 1, 0), (0, 1, 0, 1, 4, 0, 1)]:
        expected = features[n, c, b, 2 * row + dy, 2 * column + dx]
        assert tokens[n, row, column, ((c * 9 + b) * 2 + dy) * 2 + dx] == expected


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="MASK.HOG_CELL"):
        hog(torch.zeros(1, 3, 20, 16))
    with pytest.raises(ValueError, match="MASK.HOG_GAUSSIAN_WINDOW"):
        hog(torch.zeros(1, 3, 24, 24), window=16)
