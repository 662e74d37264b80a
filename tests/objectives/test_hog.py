"""HOG against a slow float64 oracle, and what it must not depend on."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maskfeat.errors import UserError
from maskfeat.objectives.hog import (
    cut_patches,
    gradients,
    histograms,
    hog,
    hog_tokens,
    pad_border,
    patch_features,
    pixel_weights,
)


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


@pytest.mark.parametrize("impl", ["fast", "reference"])
@pytest.mark.parametrize(("bins", "cell", "window"), [(9, 8, 0), (6, 4, 0), (9, 8, 16)])
def test_oracle(bins: int, cell: int, window: int, impl: str) -> None:
    images = torch.randn(1, 3, 16, 32, dtype=torch.float64)
    if impl == "reference":
        # Convolutions do not cancel exactly at mirrored borders, and with 6 bins those gradients lie on an edge.
        images = (8 * images).round() / 8
    features = hog(images, bins, cell, window, impl)
    assert features.shape == (1, 3, bins, 16 // cell, 32 // cell)
    for channel in range(3):
        expected = slow_hog(images[0, channel].numpy(), bins, cell, window)
        np.testing.assert_allclose(features[0, channel].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "bins", "cell"),
    [(torch.uint8, 9, 8), (torch.float16, 9, 8), (torch.float32, 0, 8), (torch.float32, 9, 0)],
)
def test_what_hog_is_not_computed_of(dtype: torch.dtype, bins: int, cell: int) -> None:
    with pytest.raises(UserError, match="HOG is computed of float32 or float64 images"):
        hog(torch.zeros(1, 3, 16, 16, dtype=dtype), bins, cell)


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


def test_patches_are_cut_with_their_border() -> None:
    clip = torch.randn(2, 3, 4, 12, 20)
    padded = pad_border(clip)
    assert torch.equal(padded, torch.stack([F.pad(c, (1, 1, 1, 1), mode="reflect") for c in clip.unbind(1)], dim=1))
    places = [(0, 0, 0, 0), (1, 3, 2, 4), (1, 0, 1, 2), (0, 2, 2, 0)]
    patches = cut_patches(padded, torch.tensor(places).T.unbind(), 4)
    for patch, (sample, frame, row, column) in zip(patches, places, strict=True):
        assert torch.equal(patch, padded[sample, :, frame, 4 * row : 4 * row + 6, 4 * column : 4 * column + 6])


@pytest.mark.parametrize("window", [0, 8, 16, 32])
def test_patches_have_the_features_of_the_image(window: int) -> None:
    images = torch.randn(2, 3, 32, 64)
    whole = hog_tokens(hog(images, 9, 4, window), 2)
    places = torch.cartesian_prod(torch.arange(2), torch.arange(1), torch.arange(4), torch.arange(8))
    patches = cut_patches(pad_border(images.unsqueeze(2)), places.unbind(1), 8)
    weight = None
    if window:
        line = pixel_weights(images, 4, window)
        assert line is not None
        weight = line.reshape(4, 8, 8, 8).transpose(1, 2).reshape(32, 1, 8, 8).repeat(2, 1, 1, 1)
    assert torch.equal(patch_features(patches, 9, 4, weight), whole.flatten(0, 2))


def bins_by_angle(gx: Tensor, gy: Tensor, bins: int) -> Tensor:
    """The published formula; -1 where there is no gradient."""
    angle = torch.floor(torch.atan2(gx, gy) / math.pi * bins).remainder(bins)
    return torch.where((gx == 0) & (gy == 0), -1.0, angle)


def bins_by_histograms(gx: Tensor, gy: Tensor, bins: int) -> Tensor:
    """Which bin each gradient falls into, every pixel a cell of its own."""
    votes = histograms(gx, gy, bins, cell=1) > 0
    return torch.where(votes.any(dim=-3), votes.to(torch.uint8).argmax(dim=-3).float(), -1.0)


def tie_heavy() -> Tensor:
    """(6, 3, 64, 64): pixels of few values, where gradients lie along the axes; whole numbers, flat ground, noise."""
    draw = torch.Generator().manual_seed(5)
    few = torch.randint(0, 3, (3, 3, 64, 64), generator=draw).float()
    many = torch.randint(0, 256, (1, 3, 64, 64), generator=draw) / 255
    flat = torch.where(torch.rand(1, 3, 64, 64, generator=draw) < 0.1, 1.0, 0.25)
    return torch.cat([few, (many - 0.45) / 0.225, flat, torch.randn(1, 3, 64, 64, generator=draw)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bins_are_those_of_the_angle(dtype: torch.dtype) -> None:
    gx, gy = gradients(pad_border(tie_heavy().to(dtype)))
    assert ((gx == 0) & (gy != 0)).float().mean() > 0.01 and ((gy == 0) & (gx != 0)).float().mean() > 0.01
    assert torch.equal(bins_by_histograms(gx, gy, 9), bins_by_angle(gx, gy, 9))


def exact(dtype: torch.dtype) -> Tensor:
    """(5, 3, 64, 64): pixels whose sums have no rounding error, so that every order of adding gives one gradient."""
    draw = torch.Generator().manual_seed(6)
    levels = torch.randint(0, 256, (2, 3, 64, 64), generator=draw)
    blocks = torch.randint(0, 8, (1, 3, 16, 16), generator=draw).repeat_interleave(4, -1).repeat_interleave(4, -2)
    eighths = torch.randint(0, 4, (2, 3, 64, 64), generator=draw) / 8
    return torch.cat([levels, blocks, eighths]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_forms_choose_the_same_bins(dtype: torch.dtype) -> None:
    """With one pixel a cell, what is not zero is the bin of its gradient."""
    fast, plain = (hog(exact(dtype), cell=1, impl=impl) > 0.5 for impl in ("fast", "reference"))
    assert (fast.sum(dim=2) <= 1).all() and 0.5 < fast.sum(dim=2).float().mean() < 1.0
    assert torch.equal(fast, plain)


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_both_forms_have_the_same_features(dtype: torch.dtype, tolerance: float, window: int) -> None:
    for images in (exact(dtype), torch.randn(2, 3, 32, 48, dtype=torch.float64).to(dtype)):
        fast, plain = (hog(images, window=window, impl=impl) for impl in ("fast", "reference"))
        assert plain.dtype == dtype
        torch.testing.assert_close(fast, plain, rtol=0, atol=tolerance)
    with pytest.raises(ValueError, match="impl is 'exact'"):
        hog(images, impl="exact")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bins_around_half_a_turn(dtype: torch.dtype) -> None:
    """Angles so close to half a turn that they round to it belong to bin 0, the next smaller ones to the last."""
    steps = torch.arange(1, 60, dtype=dtype) * torch.finfo(dtype).eps / 16
    for scale in (1.0, 1e-3, 777.0):
        gx = (steps * scale).reshape(1, 1, 1, -1)
        gy = torch.full_like(gx, -scale)
        expected = bins_by_angle(gx, gy, 9)
        assert {0.0, 8.0} == set(expected.flatten().tolist())
        assert torch.equal(bins_by_histograms(gx, gy, 9), expected)


@pytest.mark.slow
def test_compiled_features_are_the_same() -> None:
    """Bins included: a gradient that changed its bin would change features by far more than rounding."""
    torch.compiler.reset()
    patches = pad_border(tie_heavy().reshape(-1, 3, 16, 16))
    compiled = torch.compile(patch_features)(patches, 9, 8)
    torch.testing.assert_close(compiled, patch_features(patches, 9, 8), rtol=0, atol=1e-6)
