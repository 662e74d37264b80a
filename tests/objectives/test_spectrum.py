"""Sets of frequencies: invariants of the transform, and the half that a real-input FFT computes."""

import pytest
import torch
from torch import Tensor

from maskfeat.objectives.spectrum import Frequencies, disc, half_of, inverse_spectrum, magnitude, spectrum

SIZES = [(32, 32), (32, 48), (30, 46)]  # frequency zero of (30, 46) stands at (15, 23)


def images(height: int, width: int, channels: int = 3) -> Tensor:
    return torch.randn(4, channels, height, width, dtype=torch.float64)


def sets(height: int, width: int, radius: float = 6.0) -> tuple[Tensor, Frequencies, Frequencies]:
    """Discs and their complements in turn: as (4, H, W) bool, and as a whole and a half set."""
    low = disc(height, width, radius)
    mask = torch.stack([low, ~low, low, ~low])
    return mask, Frequencies(mask.unsqueeze(1)), Frequencies(half_of(mask).unsqueeze(1), width)


def is_symmetric(mask: Tensor) -> bool:
    """Whether a set of frequencies (H, W) holds k with -k, by its definition."""
    plain = torch.fft.ifftshift(mask)
    return all(plain[-y, -x] == plain[y, x] for y in range(plain.shape[0]) for x in range(plain.shape[1]))


@pytest.mark.parametrize("size", [*SIZES, (33, 33), (31, 20)])
def test_transform_and_energy(size: tuple[int, int]) -> None:
    clip = images(*size)
    frequencies = spectrum(clip)
    torch.testing.assert_close(inverse_spectrum(frequencies).real, clip, msg="there and back")
    torch.testing.assert_close(frequencies.abs().square().sum(), clip.square().sum(), msg="Parseval")
    mean = frequencies[..., size[0] // 2, size[1] // 2]
    torch.testing.assert_close(mean.real, clip.sum(dim=(-2, -1)) / (size[0] * size[1]) ** 0.5, msg="orthonormal")


@pytest.mark.parametrize("size", SIZES)
def test_what_is_removed_and_what_is_left_are_the_image(size: tuple[int, int]) -> None:
    clip = images(*size)
    mask, whole, half = sets(*size)
    for removed, rest in (
        (whole, Frequencies(~whole.mask)),
        (half, Frequencies(~half.mask, half.width)),
    ):
        parts = [removed.remove(clip, modulus=False), rest.remove(clip, modulus=False)]
        torch.testing.assert_close(parts[0] + parts[1], clip)
        energy = sum(part.square().sum() for part in parts)
        torch.testing.assert_close(energy, clip.square().sum(), msg="they are orthogonal")
        left = spectrum(parts[0])
        assert left[mask.unsqueeze(1).expand_as(left)].abs().max() < 1e-12, "removed is gone"
    none = Frequencies(torch.zeros_like(whole.mask))
    torch.testing.assert_close(none.remove(clip, modulus=False), clip)
    torch.testing.assert_close(none.remove(clip, modulus=True), clip.abs())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("modulus", [True, False])
def test_half_is_whole(size: tuple[int, int], modulus: bool) -> None:
    mask, whole, half = sets(*size)
    assert is_symmetric(mask[0]) and is_symmetric(mask[1])
    clip, other = images(*size), images(*size).requires_grad_(True)
    assert torch.equal(half.whole(), whole.whole()) and torch.equal(whole.whole(), whole.mask)
    torch.testing.assert_close(whole.remove(clip, modulus), half.remove(clip, modulus))
    counts = mask.sum(dim=(1, 2)).float().unsqueeze(1)
    torch.testing.assert_close(whole.count(), counts)
    torch.testing.assert_close(half.count(), counts)
    sums, gradients = [], []
    for frequencies in (whole, half):
        distance = frequencies.sum(magnitude(frequencies.transform(other - clip), 1.0, 1e-7))
        sums.append(distance)
        gradients += torch.autograd.grad(distance.sum(), other)
    torch.testing.assert_close(sums[0], sums[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_discs_of_odd_sides_are_not_symmetric() -> None:
    assert not is_symmetric(disc(33, 33, 6.0))
    assert not is_symmetric(disc(32, 33, 6.0))


def test_visible_frequencies_have_no_gradient() -> None:
    for frequencies in sets(32, 32)[1:]:
        difference = frequencies.transform(images(32, 32)).requires_grad_(True)
        frequencies.sum(magnitude(difference, 1.0, 1e-7)).sum().backward()
        assert difference.grad is not None
        visible = ~frequencies.mask.expand_as(difference.grad)
        assert (difference.grad[visible] == 0).all()
        assert (difference.grad[~visible].abs() > 0).all()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_distance_is_that_of_the_paper(gamma: float) -> None:
    values = torch.tensor([3 + 4j, 0j, -1j], dtype=torch.complex128, requires_grad=True)
    distance = magnitude(values, gamma, 1e-12)
    expected = torch.tensor([5.0, 1e-6, 1.0], dtype=torch.float64) ** gamma
    torch.testing.assert_close(distance, expected, rtol=1e-6, atol=0)
    distance.sum().backward()
    assert torch.isfinite(torch.view_as_real(values.grad)).all(), "also where prediction and target agree"
