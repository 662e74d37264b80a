"""Spectra of images: sets of frequencies, removing them, and the distance of two spectra (Xie et al., ICLR 2023).

Spectra are orthonormal (Parseval: an image and its spectrum have the same energy). Shifted ones have frequency zero
at (H // 2, W // 2).

Shape legend: B images, C channels, H x W pixels, which is also the number of frequencies.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def disc(height: int, width: int, radius: float) -> Tensor:
    """(H, W) bool, shifted: the low frequencies, at a distance below `radius` from (H / 2, W / 2).

    There are 793 for radius 16 (section 3.2; REFERENCE: points with d^2 < 256).
    """
    y = torch.arange(height).unsqueeze(1) - height / 2
    x = torch.arange(width).unsqueeze(0) - width / 2
    return y * y + x * x < radius * radius


def spectrum(images: Tensor) -> Tensor:
    """images (..., H, W) float -> (..., H, W) complex, shifted."""
    return torch.fft.fftshift(torch.fft.fft2(images, norm="ortho"), dim=(-2, -1))


def inverse_spectrum(shifted: Tensor) -> Tensor:
    """The inverse of `spectrum`: (..., H, W) complex -> (..., H, W) complex."""
    return torch.fft.ifft2(torch.fft.ifftshift(shifted, dim=(-2, -1)), norm="ortho")


def half_of(shifted: Tensor) -> Tensor:
    """The part of a symmetric set (..., H, W) that tells the rest: (..., H, W // 2 + 1), not shifted.

    A set is symmetric where it holds every frequency together with its mirror: what is left of a real image without it
    is real. Discs are, and so is what lies outside of one, where H and W are even: (H / 2, W / 2) is frequency zero.
    """
    return torch.fft.ifftshift(shifted, dim=(-2, -1))[..., : shifted.shape[-1] // 2 + 1]


def magnitude(values: Tensor, gamma: float, eps: float) -> Tensor:
    """(re^2 + im^2 + eps)^(gamma / 2) of complex values: the distance of two frequencies whose difference they are
    (equation 3; eps keeps the gradient finite where they agree).
    """
    return (values.real.square() + values.imag.square() + eps).pow(gamma / 2)


@dataclass(frozen=True)
class Frequencies:
    """A set of frequencies for each image of a batch.

    Attributes:
        mask: bool; (B, 1, H, W), shifted. Where `width` is given, (B, 1, H, width // 2 + 1), not shifted: the half of a
            symmetric set that a real-input FFT computes, at half the work.
        width: W of a half set; 0 = the set is whole.
    """

    mask: Tensor
    width: int = 0

    def whole(self) -> Tensor:
        """(B, 1, H, W) bool, shifted."""
        if not self.width:
            return self.mask
        mirrored = self.mask[..., 1 : (self.width + 1) // 2].flip(-2, -1).roll(1, dims=-2)
        return torch.fft.fftshift(torch.cat([self.mask, mirrored], dim=-1), dim=(-2, -1))

    def transform(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) float -> their spectra in the layout of `mask`, complex."""
        return torch.fft.rfft2(images, norm="ortho") if self.width else spectrum(images)

    def _copies(self) -> Tensor | None:
        """(width // 2 + 1,) float: how many columns of the whole spectrum each column of the half stands for."""
        if not self.width:
            return None
        copies = torch.full((self.mask.shape[-1],), 2.0, device=self.mask.device)
        copies[0] = 1.0
        if self.width % 2 == 0:
            copies[-1] = 1.0
        return copies

    def sum(self, values: Tensor) -> Tensor:
        """values (B, C, ...) float in the layout of `mask` -> (B, C): the sum over each image's set, in the whole
        spectrum.
        """
        chosen = values.masked_fill(~self.mask, 0.0)
        copies = self._copies()
        return (chosen if copies is None else chosen * copies).sum(dim=(-2, -1))

    def count(self) -> Tensor:
        """(B, 1) float32: how many frequencies of the whole spectrum are in each image's set."""
        return self.sum(torch.ones_like(self.mask, dtype=torch.float32))

    def remove(self, images: Tensor, modulus: bool) -> Tensor:
        """images (B, C, H, W) float32 without these frequencies.

        Args:
            modulus: take the modulus of the inverse transform; otherwise its real part.
        """
        kept = self.transform(images).masked_fill(self.mask, 0.0)
        if self.width:
            inverse = torch.fft.irfft2(kept, s=images.shape[-2:], norm="ortho")
            return inverse.abs() if modulus else inverse
        inverse = inverse_spectrum(kept)
        return inverse.abs() if modulus else inverse.real
