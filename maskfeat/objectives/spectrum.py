"""Spectra of images: sets of frequencies, their removal, and the distance between two spectra (Xie et al., ICLR 2023).

Fourier transforms are orthonormal, so that an image and its spectrum have the same energy (Parseval). In a shifted
spectrum frequency zero is at (H // 2, W // 2).

Shape legend: B images, C channels, H x W pixels, which is also the number of frequencies.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def disc(height: int, width: int, radius: float) -> Tensor:
    """Return the set of low frequencies: those at a distance below `radius` from (H / 2, W / 2) in a shifted spectrum.

    With radius 16 there are 793 (section 3.2; points with d^2 < 256).

    Returns:
        (H, W) bool, shifted.
    """
    y = torch.arange(height).unsqueeze(1) - height / 2
    x = torch.arange(width).unsqueeze(0) - width / 2
    return y * y + x * x < radius * radius


def spectrum(images: Tensor) -> Tensor:
    """Return the shifted spectrum of images: (..., H, W) float -> (..., H, W) complex."""
    return torch.fft.fftshift(torch.fft.fft2(images, norm="ortho"), dim=(-2, -1))


def inverse_spectrum(shifted: Tensor) -> Tensor:
    """Invert `spectrum`: (..., H, W) complex -> (..., H, W) complex."""
    return torch.fft.ifft2(torch.fft.ifftshift(shifted, dim=(-2, -1)), norm="ortho")


def half_of(shifted: Tensor) -> Tensor:
    """Return the half of a symmetric set of frequencies that determines the other half.

    A set is symmetric if it contains the negative of each of its frequencies; a real image stays real without them. If
    H and W are even, so that (H / 2, W / 2) is frequency zero, a disc and its complement are symmetric.

    Args:
        shifted: (..., H, W) bool.

    Returns:
        (..., H, W // 2 + 1) bool, not shifted.
    """
    return torch.fft.ifftshift(shifted, dim=(-2, -1))[..., : shifted.shape[-1] // 2 + 1]


def magnitude(values: Tensor, gamma: float, eps: float) -> Tensor:
    """Return (re^2 + im^2 + eps)^(gamma / 2) of complex values: (...) complex64 -> (...) float32.

    For the difference of two spectra this is their distance at each frequency (equation 3). `eps` keeps the gradient
    finite where they are equal.
    """
    return (values.real.square() + values.imag.square() + eps).pow(gamma / 2)


@dataclass(frozen=True)
class Frequencies:
    """A set of frequencies for each image of a batch.

    Attributes:
        mask: bool. (B, 1, H, W), shifted; or, if `width` is not 0, (B, 1, H, width // 2 + 1), not shifted: the half of
            a symmetric set that the FFT of a real image computes, at half the cost.
        width: W of the full spectrum, even, if `mask` is a half; 0 = `mask` is the full set.
    """

    mask: Tensor
    width: int = 0

    def whole(self) -> Tensor:
        """Return the full set: (B, 1, H, W) bool, shifted."""
        if not self.width:
            return self.mask
        mirrored = self.mask[..., 1 : self.width // 2].flip(-2, -1).roll(1, dims=-2)
        return torch.fft.fftshift(torch.cat([self.mask, mirrored], dim=-1), dim=(-2, -1))

    def transform(self, images: Tensor) -> Tensor:
        """Return the spectra of images (B, C, H, W) float in the layout of `mask`, complex."""
        return torch.fft.rfft2(images, norm="ortho") if self.width else spectrum(images)

    def _copies(self) -> Tensor | None:
        """Return how many columns of the full spectrum each column of the half represents: (width // 2 + 1,) float.

        None if the set is full.
        """
        if not self.width:
            return None
        copies = torch.full((self.mask.shape[-1],), 2.0, device=self.mask.device)
        copies[:1] = copies[-1:] = 1.0  # slices: to a single element the host would copy, and wait for the GPU
        return copies

    def sum(self, values: Tensor) -> Tensor:
        """Sum values over the set of each image, counted in the full spectrum.

        Args:
            values: (B, C, ...) float, in the layout of `mask`.

        Returns:
            (B, C)
        """
        chosen = values.masked_fill(~self.mask, 0.0)
        copies = self._copies()
        return (chosen if copies is None else chosen * copies).sum(dim=(-2, -1))

    def count(self) -> Tensor:
        """Return the number of frequencies in the set of each image, counted in the full spectrum: (B, 1) float32."""
        return self.sum(torch.ones_like(self.mask, dtype=torch.float32))

    def remove(self, images: Tensor, modulus: bool) -> Tensor:
        """Remove these frequencies from images.

        Args:
            images: (B, C, H, W) float32.
            modulus: return the modulus of the inverse transform; otherwise its real part.

        Returns:
            (B, C, H, W) float32
        """
        kept = self.transform(images).masked_fill(self.mask, 0.0)
        if self.width:
            inverse = torch.fft.irfft2(kept, s=images.shape[-2:], norm="ortho")
            return inverse.abs() if modulus else inverse
        inverse = inverse_spectrum(kept)
        return inverse.abs() if modulus else inverse.real
