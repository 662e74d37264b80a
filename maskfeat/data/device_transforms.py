"""Transforms that a data worker leaves to the process that uses the batch, which applies them on its device.

Resizing in float, flipping, normalising and erasing a view in float32 takes a worker longer than reading the file, and
float32 takes four times the bytes on the way to the device. So a worker sends uint8 pixels with a `DeferredTransform`,
and the functions below apply it to a whole batch. None of them synchronises with a CUDA device.

Shape legend: B views, C = 3 channels, T frames, H x W pixels of the transformed view, h x w pixels before resizing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RGB = tuple[float, ...]


class Box(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class DeferredTransform:
    """The transforms still to be applied to one view, in the order of the attributes after `std`.

    Attributes:
        shape: of the transformed view, (C, H, W) or (C, T, H, W).
        mean, std: RGB, of pixels in [0, 1].
        resize: (height, width) to resize frames to, bilinearly and without antialiasing; None = no resizing.
        crop: the part of the resized frames to keep; None = all of it.
        flip: whether to flip horizontally.
        erase: boxes of the normalised view to overwrite, in this order, each with its float32 values:
            (C * T, height, width), or (C * T, 1, 1) for one value per channel.
        readable: False for a sample that could not be read; its view is filled with zeros.
    """

    shape: tuple[int, ...]
    mean: RGB = (0.0, 0.0, 0.0)
    std: RGB = (1.0, 1.0, 1.0)
    resize: tuple[int, int] | None = None
    crop: Box | None = None
    flip: bool = False
    erase: tuple[tuple[Box, Tensor], ...] = ()
    readable: bool = True


def transform_images(
    pixels: Tensor, transforms: Sequence[DeferredTransform], flipped: Tensor | None, out: Tensor
) -> None:
    """Flip and normalise a batch of images.

    Args:
        pixels: (B, C, H, W) uint8, channels last in memory.
        transforms: one per image; the images of a batch share `mean` and `std`.
        flipped: (k,) int64 on any device, the rows to flip; None = none.
        out: (B, C, H, W) float32, receives the result.
    """
    readable = next((transform for transform in transforms if transform.readable), transforms[0])
    shift, scale = normalisation(readable.mean, readable.std, out.device)
    if not _batched(out.device):
        for row, transform in enumerate(transforms):
            image = pixels[row].flip(-1) if transform.flip else pixels[row]
            out[row].copy_(image).mul_(scale).add_(shift)
        return
    images = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    if flipped is not None:
        rows = flipped.to(out.device, non_blocking=True)
        images.index_copy_(0, rows, images.index_select(0, rows).flip(-1))
    torch.addcmul(shift, images, scale, out=out)


def transform_clip(frames: Tensor, transform: DeferredTransform, out: Tensor) -> None:
    """Resize, crop, flip and normalise one clip.

    Args:
        frames: (T, h, w, C) uint8 or float32 of 0 to 255.
        transform: what to apply.
        out: (C, T, H, W) float32, receives the result.
    """
    shift, scale = normalisation(transform.mean, transform.std, out.device)
    by_frame = out.transpose(0, 1)
    step = len(frames) if _batched(out.device) else 1
    for first in range(0, len(frames), step):
        images = resize_and_crop(frames[first : first + step], transform)
        if transform.flip:
            images = images.flip(-1)
        torch.addcmul(shift, images, scale, out=by_frame[first : first + step])


def resize_and_crop(frames: Tensor, transform: DeferredTransform) -> Tensor:
    """(T, h, w, C) of 0 to 255 -> (T, C, H, W) float32, resized and cropped."""
    images = frames.permute(0, 3, 1, 2).to(torch.float32)
    if transform.resize is not None:
        images = F.interpolate(images, size=transform.resize, mode="bilinear", align_corners=False)
    if transform.crop is not None:
        top, left, height, width = transform.crop
        images = images[..., top : top + height, left : left + width]
    return images


@lru_cache(maxsize=64)
def normalisation(mean: RGB, std: RGB, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return shift and scale, (C, 1, 1) float32: x * scale + shift = (x / 255 - mean) / std, within 5e-7 for x of 0 to
    255.

    Cached per device, and filled there, because a copy from the host would have to be waited for.
    """
    shift = torch.stack([torch.full((1, 1), -m / s, device=device) for m, s in zip(mean, std, strict=True)])
    scale = torch.stack([torch.full((1, 1), 1 / (255 * s), device=device) for s in std])
    return shift, scale


def _batched(device: torch.device) -> bool:
    """Whether to transform all images or frames at once: a GPU needs few kernel launches, a CPU one image in its cache.

    Frame by frame, with the channels last in memory, a CPU resizes in a fraction of the time and memory of the whole
    clip.
    """
    return device.type != "cpu"
