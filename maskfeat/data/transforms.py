"""Augmentation of images and clips, up to the transforms that are deferred to the device.

Random numbers come from the generator that is passed in and, in code of timm and torchvision, from the global
generators: call a transform inside `rng.seeded`.

Shape legend: C channels (3), T frames, H x W pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import ColorJitter

from maskfeat.data.device_transforms import Box, DeferredTransform, resize_and_crop
from maskfeat.data.rand_augment import augment_frames, make_rand_augment, pil_mode
from maskfeat.data.random_erasing import draw_erasing, make_random_erasing
from maskfeat.data.sample import Sample
from maskfeat.errors import UserError

MAX_ASPECT_RATIO = 8
"""Images of a larger aspect ratio are cropped before they are resized, to bound the size of the resized image."""

_TORCH_MODES = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}

RGBImage = Image.Image | Tensor
"""An RGB image of any size: a Pillow image, or (H, W, 3) uint8 with any strides."""


class ImageTransform(Protocol):
    """Maps an image to a sample whose transformed shape is (C, crop, crop).

    Attributes:
        libraries: whether it draws from the generators of `random` and numpy, see `rng.seeded`.
    """

    crop: int
    libraries: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: RGBImage, rng: np.random.Generator) -> Sample: ...


class ClipTransform(Protocol):
    """Maps (T, h, w, C) uint8 frames to a sample whose transformed shape is (C, T, crop, crop)."""

    crop: int

    def __call__(self, frames: np.ndarray, rng: np.random.Generator, position: int = 1) -> Sample: ...


def random_resized_crop_box(height: int, width: int, scale: Sequence[float], ratio: Sequence[float]) -> Box:
    """Draw the box of torchvision's RandomResizedCrop.

    Args:
        height, width: of the image.
        scale: smallest and largest share of the area.
        ratio: smallest and largest aspect ratio (width / height).
    """
    # The same draws as RandomResizedCrop.get_params, which takes three times as long.
    low, high = _logarithms(tuple(ratio))
    drawn = torch.empty(1)
    for _ in range(10):
        area = height * width * drawn.uniform_(scale[0], scale[1]).item()
        aspect = drawn.uniform_(low, high).exp_().item()
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(torch.randint(height - box_height + 1, (1,)))
            return Box(top, int(torch.randint(width - box_width + 1, (1,))), box_height, box_width)
    box_height = min(height, round(width / min(ratio)))
    box_width = min(width, round(height * max(ratio)))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


@lru_cache
def _logarithms(ratio: tuple[float, ...]) -> list[float]:
    """Rounded to float32, as torchvision takes them."""
    return torch.log(torch.tensor(ratio)).tolist()


def short_side_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Return (height, width) after resizing the short side to `short_side`; the long side is rounded down."""
    if min(height, width) == short_side:
        return height, width
    if width < height:
        return math.floor(height / width * short_side), short_side
    return short_side, math.floor(width / height * short_side)


def uniform_crop_offset(height: int, width: int, size: int, position: int) -> tuple[int, int]:
    """Return (top, left) of one of three square crops, spaced evenly along the longer side.

    Args:
        height, width: of the image.
        size: side of the crop.
        position: 0 left (or top), 1 centre, 2 right (or bottom).
    """
    assert position in (0, 1, 2), f"crop {position} of three"
    assert size <= min(height, width), f"a crop of {size} from {height}x{width}"
    top, left = math.ceil((height - size) / 2), math.ceil((width - size) / 2)
    if position == 1:
        return top, left
    if height > width:
        return (0 if position == 0 else height - size), left
    return top, (0 if position == 0 else width - size)


def crop_image(image: RGBImage, box: Box) -> RGBImage:
    """Return the part of the image inside `box`."""
    if isinstance(image, Image.Image):
        return image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    return image[box.top : box.top + box.height, box.left : box.left + box.width]


def resize_image(image: RGBImage, size: tuple[int, int], mode: Image.Resampling) -> RGBImage:
    """Resize an image to (height, width), antialiased: a Pillow image by Pillow, a tensor by torch.

    For "bicubic" and "bilinear" torch computes in 16 bits and Pillow in 32; for other modes torch has no uint8 kernel,
    and tensors are resized by Pillow too. Pillow resizes the width first. Here the height comes first where it shrinks:
    fewer rows are left for the slower pass, and levels differ by the rounding in between, 0.2 on average.
    """
    if isinstance(image, Image.Image):
        return image.resize((size[1], size[0]), mode)
    if mode not in _TORCH_MODES:
        return torch.from_numpy(np.array(Image.fromarray(image.numpy()).resize((size[1], size[0]), mode)))
    pixels = image[None].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)  # as the result will be
    first = [(size[0], image.shape[1])] if size[0] < image.shape[0] else []
    for height, width in (*first, size):
        pixels = F.interpolate(pixels, (height, width), mode=_TORCH_MODES[mode], align_corners=False, antialias=True)
    return pixels[0].permute(1, 2, 0)


def as_tensor(image: RGBImage) -> Tensor:
    """Return the image as (H, W, C) uint8."""
    return torch.from_numpy(np.array(image)) if isinstance(image, Image.Image) else image


def _as_pil(image: RGBImage) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.fromarray(image.numpy())


def _size(image: RGBImage) -> tuple[int, int]:
    """(height, width)."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return image.shape[0], image.shape[1]


class ImageTrainTransform:
    """Random resized crop, horizontal flip, RandAugment or colour jitter, normalisation, random erasing.

    Args:
        crop: side of the result in pixels.
        scale, ratio: range of the crop's share of the area and of its aspect ratio, see `random_resized_crop_box`.
        interpolation: of the resizing and of RandAugment.
        flip: whether to flip half of the images.
        auto_augment: RandAugment policy, see `make_rand_augment`; "" = none.
        color_jitter: strength for brightness, contrast and saturation; only used without `auto_augment`.
        erase_prob, erase_mode, erase_count: see `make_random_erasing`.
        mean, std: RGB, of pixels in [0, 1].
    """

    def __init__(
        self,
        crop: int,
        scale: Sequence[float],
        ratio: Sequence[float],
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
        flip: bool = True,
        auto_augment: str = "",
        color_jitter: float | None = None,
        erase_prob: float = 0.0,
        erase_mode: str = "pixel",
        erase_count: int = 1,
    ) -> None:
        self.crop = crop
        self.scale, self.ratio = tuple(scale), tuple(ratio)
        self.mean, self.std = tuple(mean), tuple(std)
        self.flip = flip
        self.mode = pil_mode(interpolation)
        self.augment = None
        if auto_augment:
            fill = [min(255, round(255 * m)) for m in mean]
            self.augment = make_rand_augment(auto_augment, crop, interpolation, fill)
        elif color_jitter:
            self.augment = ColorJitter(color_jitter, color_jitter, color_jitter)
        self.erasing = make_random_erasing(erase_prob, erase_mode, erase_count)
        self.libraries = self.augment is not None or erase_prob > 0

    def __call__(self, image: RGBImage, rng: np.random.Generator) -> Sample:
        """Augment an RGB image of any size into a sample of shape (3, crop, crop)."""
        box = random_resized_crop_box(*_size(image), self.scale, self.ratio)
        image = resize_image(crop_image(image, box), (self.crop, self.crop), self.mode)
        flip = self.flip and rng.random() < 0.5
        if self.augment is not None:
            image = _as_pil(image)
            if flip:  # not deferred: the augmentation is not symmetric
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            image, flip = self.augment(image), False
        shape = (3, self.crop, self.crop)
        erase = draw_erasing(self.erasing, shape) if self.erasing.probability else ()
        return Sample(as_tensor(image), DeferredTransform(shape, self.mean, self.std, flip=flip, erase=erase))


class ImageEvalTransform:
    """Resizing of the short side, centre crop, normalisation.

    Args:
        crop: side of the result in pixels.
        mean, std: RGB, of pixels in [0, 1].
        short_side: of the resized image; None = int(256 / 224 * crop).
        interpolation: of the resizing.
    """

    libraries = False

    def __init__(
        self,
        crop: int,
        mean: Sequence[float],
        std: Sequence[float],
        short_side: int | None = None,
        interpolation: str = "bicubic",
    ) -> None:
        self.crop = crop
        self.mean, self.std = tuple(mean), tuple(std)
        self.short_side = int(256 / 224 * crop) if short_side is None else short_side
        self.mode = pil_mode(interpolation)
        if self.short_side < crop:
            raise UserError(f"a crop of {crop} needs a short side of at least that, not {self.short_side}")

    def __call__(self, image: RGBImage, rng: np.random.Generator | None = None) -> Sample:
        """Transform an RGB image of any size into a sample of shape (3, crop, crop). Not random; `rng` is not used."""
        height, width = _size(image)
        new_width = self.short_side if width <= height else int(self.short_side * width / height)
        new_height = self.short_side if height <= width else int(self.short_side * height / width)
        left, top = round((new_width - self.crop) / 2), round((new_height - self.crop) / 2)
        if new_width * new_height <= MAX_ASPECT_RATIO * self.short_side**2:
            image = resize_image(image, (new_height, new_width), self.mode)
            image = crop_image(image, Box(top, left, self.crop, self.crop))
        else:  # 1 x 10,000 pixels must not be resized to 256 x 2.5 million: compute the crop only
            step_x, step_y = width / new_width, height / new_height
            right, bottom = (left + self.crop) * step_x, (top + self.crop) * step_y
            box = (left * step_x, top * step_y, min(right, width), min(bottom, height))
            image = _as_pil(image).resize((self.crop, self.crop), self.mode, box=box)
        return Sample(as_tensor(image), DeferredTransform((3, self.crop, self.crop), self.mean, self.std))


class ClipTrainTransform:
    """RandAugment, the same for all frames, normalisation, random resized crop, horizontal flip, random erasing: the
    published order.

    Args:
        crop: side of the result in pixels.
        scale, ratio: see `ImageTrainTransform`. With an empty `scale`, the short side is resized to a random length in
            `short_sides` and the clip is cropped at a random position.
        short_sides: smallest and largest short side, only used with an empty `scale`.
        flip: whether to flip half of the clips.
        auto_augment: RandAugment policy, see `make_rand_augment`; "" = none.
        interpolation: of RandAugment; the crop is resized bilinearly, without antialiasing.
        erase_prob, erase_mode, erase_count: the same boxes for all frames, see `make_random_erasing`.
        mean, std: RGB, of pixels in [0, 1].
    """

    def __init__(
        self,
        crop: int,
        scale: Sequence[float],
        ratio: Sequence[float],
        mean: Sequence[float],
        std: Sequence[float],
        short_sides: Sequence[int] = (256, 320),
        flip: bool = True,
        auto_augment: str = "",
        interpolation: str = "bicubic",
        erase_prob: float = 0.0,
        erase_mode: str = "pixel",
        erase_count: int = 1,
    ) -> None:
        self.crop = crop
        self.scale, self.ratio = tuple(scale), tuple(ratio) or (3 / 4, 4 / 3)
        self.mean, self.std = tuple(mean), tuple(std)
        self.short_sides = tuple(short_sides)
        if not self.scale and min(self.short_sides) < crop:
            raise UserError(
                f"DATA.TRAIN_JITTER_SCALES {self.short_sides} must not lie below DATA.TRAIN_CROP_SIZE {crop}"
            )
        self.flip = flip
        self.auto_augment, self.interpolation = auto_augment, interpolation
        if auto_augment:  # an invalid policy is reported before the first clip is decoded
            make_rand_augment(auto_augment, crop, interpolation)
        self.erasing = make_random_erasing(erase_prob, erase_mode, erase_count)

    def __call__(self, frames: np.ndarray, rng: np.random.Generator, position: int = 1) -> Sample:
        """Augment (T, h, w, 3) uint8 into a sample of shape (3, T, crop, crop). `position` is not used."""
        if self.auto_augment:
            frames = augment_frames(frames, self.auto_augment, self.interpolation)
        height, width = frames.shape[1:3]
        if self.scale:
            box = random_resized_crop_box(height, width, self.scale, self.ratio)
            frames = frames[:, box.top : box.top + box.height, box.left : box.left + box.width]
            size, crop = (self.crop, self.crop), None
        else:
            size = short_side_size(height, width, round(rng.uniform(self.short_sides[0], self.short_sides[-1])))
            top = int(rng.integers(0, size[0] - self.crop + 1))
            left = int(rng.integers(0, size[1] - self.crop + 1))
            crop = Box(top, left, self.crop, self.crop)
        flip = self.flip and rng.random() < 0.5
        # The published code normalises before resizing. Resizing is linear, so that the result is the same, and fewer
        # pixels have to be normalised.
        sample = _clip_sample(frames, self, size, crop, flip)
        erase = draw_erasing(self.erasing, sample.transform.shape)
        return replace(sample, transform=replace(sample.transform, erase=erase)) if erase else sample


class ClipTestTransform:
    """Normalisation and one of `num_crops` deterministic crops.

    Args:
        crop: side of the result in pixels.
        short_side: length that the short side is resized to.
        num_crops: 1 (the centre) or 3 (left, centre, right along the longer side).
        mean, std: RGB, of pixels in [0, 1].
    """

    def __init__(self, crop: int, short_side: int, num_crops: int, mean: Sequence[float], std: Sequence[float]) -> None:
        if num_crops not in (1, 3):
            raise UserError(f"TEST.NUM_SPATIAL_CROPS must be 1 or 3, not {num_crops}")
        if short_side < crop:
            raise UserError(f"a crop of {crop} needs a short side of at least that, not {short_side}")
        self.crop, self.short_side, self.num_crops = crop, short_side, num_crops
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, frames: np.ndarray, rng: np.random.Generator | None = None, position: int = 0) -> Sample:
        """Transform (T, h, w, 3) uint8 into a sample of shape (3, T, crop, crop): crop `position` of `num_crops`.

        Not random; `rng` is not used.
        """
        size = short_side_size(frames.shape[1], frames.shape[2], self.short_side)
        top, left = uniform_crop_offset(*size, self.crop, 1 if self.num_crops == 1 else position)
        return _clip_sample(frames, self, size, Box(top, left, self.crop, self.crop))


def _clip_sample(
    frames: np.ndarray,
    transform: ClipTrainTransform | ClipTestTransform,
    size: tuple[int, int],
    crop: Box | None,
    flip: bool = False,
) -> Sample:
    """The sample of (T, h, w, 3) uint8 frames that are to be resized to `size`, cropped and flipped."""
    if frames.shape[1:3] == size and crop is not None:  # no resizing: send the cropped pixels only
        frames = frames[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        size, crop = (crop.height, crop.width), None
    deferred = DeferredTransform(
        (3, len(frames), transform.crop, transform.crop),
        transform.mean,
        transform.std,
        resize=None if frames.shape[1:3] == size else size,
        crop=crop,
        flip=flip,
    )
    # torch takes no negative strides, which rotated frames have.
    pixels = torch.from_numpy(frames if min(frames.strides) >= 0 else np.ascontiguousarray(frames))
    return _resize_if_smaller(Sample(pixels, deferred))


def _resize_if_smaller(sample: Sample) -> Sample:
    """Resize and crop in the worker if the float32 result takes fewer bytes than the uint8 frames.

    Frames that are much larger than their crop (1080p) would otherwise fill the memory shared between processes.
    """
    transform = sample.transform
    if transform.resize is None or sample.pixels.numel() <= 4 * math.prod(transform.shape):
        return sample
    frames = torch.cat([resize_and_crop(frame[None], transform) for frame in sample.pixels])
    return replace(sample, pixels=frames.permute(0, 2, 3, 1), transform=replace(transform, resize=None, crop=None))
