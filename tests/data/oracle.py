"""Reference transforms: one step after the other in float32, on the whole clip."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from maskfeat.data.rand_augment import augment_frames
from maskfeat.data.transforms import (
    ClipTestTransform,
    ClipTrainTransform,
    ImageTrainTransform,
    random_resized_crop_box,
    short_side_size,
    uniform_crop_offset,
)


def to_float(pixels: np.ndarray) -> Tensor:
    """(..., 3) uint8 into (3, ...) float32, still 0 to 255."""
    tensor = torch.from_numpy(np.array(pixels, dtype=np.uint8, copy=True))
    return tensor.movedim(-1, 0).to(torch.float32, memory_format=torch.contiguous_format)


def normalise(tensor: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(3, ...) float32 of 0 to 255 into (x / 255 - mean) / std."""
    shape = (-1,) + (1,) * (tensor.ndim - 1)
    return (tensor / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def resize(clip: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, T, h, w) float32 into (3, T, *size)."""
    return F.interpolate(clip, size=size, mode="bilinear", align_corners=False)


def erase(clip: Tensor, erasing: RandomErasing) -> Tensor:
    """timm's random erasing applied to a tensor (3, T, H, W), with the same box in every frame."""
    clip = clip.contiguous()
    erasing(clip.view(-1, *clip.shape[2:]))
    return clip


def uniform_crop(clip: Tensor, size: int, short_side: int, position: int) -> Tensor:
    """One of three crops of (3, T, h, w) float along its longer side, after resizing the short side."""
    clip = resize(clip, short_side_size(*clip.shape[-2:], short_side))
    top, left = uniform_crop_offset(*clip.shape[-2:], size, position)
    return clip[..., top : top + size, left : left + size]


def train_image(transform: ImageTrainTransform, image: Image.Image, rng: np.random.Generator) -> Tensor:
    """The expected result of `transform` on an image, computed with Pillow."""
    top, left, height, width = random_resized_crop_box(image.height, image.width, transform.scale, transform.ratio)
    image = image.crop((left, top, left + width, top + height)).resize((transform.crop,) * 2, transform.mode)
    if transform.flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if transform.augment is not None:
        image = transform.augment(image)
    view = normalise(to_float(np.asarray(image)), transform.mean, transform.std)
    return erase(view[:, None], transform.erasing)[:, 0]


def train_clip(transform: ClipTrainTransform, frames: np.ndarray, rng: np.random.Generator) -> Tensor:
    """The expected result of `transform` on (T, h, w, 3) uint8 frames."""
    if transform.auto_augment:
        frames = augment_frames(frames, transform.auto_augment, transform.interpolation)
    clip = normalise(to_float(frames), transform.mean, transform.std)
    crop = transform.crop
    if transform.scale:
        top, left, height, width = random_resized_crop_box(*frames.shape[1:3], transform.scale, transform.ratio)
        clip = resize(clip[..., top : top + height, left : left + width], (crop, crop))
    else:
        side = round(rng.uniform(transform.short_sides[0], transform.short_sides[-1]))
        clip = resize(clip, short_side_size(*frames.shape[1:3], side))
        top = int(rng.integers(0, clip.shape[-2] - crop + 1))
        left = int(rng.integers(0, clip.shape[-1] - crop + 1))
        clip = clip[..., top : top + crop, left : left + crop]
    if transform.flip and rng.random() < 0.5:
        clip = clip.flip(-1)
    return erase(clip, transform.erasing)


def test_clip(transform: ClipTestTransform, frames: np.ndarray, position: int) -> Tensor:
    """The expected result of `transform` on (T, h, w, 3) uint8 frames."""
    clip = normalise(to_float(frames), transform.mean, transform.std)
    return uniform_crop(clip, transform.crop, transform.short_side, 1 if transform.num_crops == 1 else position)


test_clip.__test__ = False  # type: ignore[attr-defined]  # not a test
