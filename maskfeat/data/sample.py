"""One view of one sample, as a transform returns it and a data set completes it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maskfeat.batch import BadSample
from maskfeat.data.device_transforms import DeferredTransform


@dataclass(frozen=True)
class Sample:
    """One view of one sample. A transform sets `pixels` and `transform`; the data set sets the rest.

    Attributes:
        pixels: with any strides: (H, W, C) uint8 of an image; (T, h, w, C) uint8, or float32 of 0 to 255, of a clip.
        transform: what is still to be applied to the pixels, see `DeferredTransform`.
        label: class index; (K,) float32 of 0 and 1 where a sample may have several of K classes.
        hidden: bool of the shape of the mask grid, True = removed from the model's view; or None.
        index: index of the sample in its data set; if another sample replaced it, that sample's index.
        bad: samples that could not be read before this one.
    """

    pixels: Tensor
    transform: DeferredTransform
    label: int | Tensor = -1
    hidden: Tensor | None = None
    index: int = -1
    bad: tuple[BadSample, ...] = ()


def unreadable_sample(shape: Sequence[int]) -> Sample:
    """Return the placeholder of a sample that could not be read: a view of zeros of `shape`, (C, [T,] H, W)."""
    _, *frames, height, width = shape
    pixels = torch.zeros(*frames, height, width, 3, dtype=torch.uint8)
    return Sample(pixels, DeferredTransform(tuple(shape), readable=False))
