"""Augmentation of images and clips, from uint8 pixels to a normalised float32 tensor.

Draws come from the generator that is handed in, and, where timm makes them, from the global generators:
call a transform inside `seeding.seeded`.

Shape legend: C channels (3), T frames, H x W pixels.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import ColorJitter, RandomResizedCrop

from maskfeat.data.rand_augment import augment_frames, make_rand_augment, pil_mode

ERASING_MODES = ("const", "rand", "pixel")
MAX_GROWTH = 8
"""Above this aspect an image is not resized whole before it is cropped."""


class ImageTransform(Protocol):
    """An image into (C, H, W)."""

    crop: int

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor: ...


class ClipTransform(Protocol):
    """(T, H, W, C) uint8 into (C, T, H, W)."""

    crop: int

    def __call__(self, frames: np.ndarray, rng: np.random.Generator, position: int = 1) -> Tensor: ...


def random_area_box(
    height: int, width: int, scale: Sequence[float], ratio: Sequence[float]
) -> tuple[int, int, int, int]:
    """torchvision's random resized crop: a share of the area in `scale`, an aspect (width / height) in `ratio`.

    Returns:
        (top, left, height, width) in pixels, inside the picture.
    """
    picture = torch.empty(1, height, width, device="meta")  # only its size is read
    return RandomResizedCrop.get_params(picture, list(scale), list(ratio))


def make_erasing(probability: float, mode: str, count: int) -> RandomErasing:
    """timm's random erasing (Zhong et al., AAAI 2020) of up to `count` boxes: 2 % to a third of the area.

    Args:
        probability: 0 to 1.
        mode: what fills the box: "const" zeros, "rand" one normal colour, "pixel" normal noise.

    Raises:
        ValueError: an unknown mode or a probability outside [0, 1].
    """
    if mode not in ERASING_MODES:
        raise ValueError(f"AUG.RE_MODE must be one of {', '.join(ERASING_MODES)}, not {mode!r}")
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"AUG.RE_PROB must lie in [0, 1], not be {probability}")
    return RandomErasing(probability, mode=mode, max_count=count, device="cpu")


def erase(clip: Tensor, erasing: RandomErasing) -> Tensor:
    """Erases the same box in every frame of (C, T, H, W) float32, in place."""
    erasing(clip.view(-1, *clip.shape[2:]))
    return clip


def to_float(pixels: np.ndarray) -> Tensor:
    """(..., 3) uint8 into (3, ...) float32, still 0 to 255."""
    tensor = torch.from_numpy(np.array(pixels, dtype=np.uint8, copy=True))
    return tensor.movedim(-1, 0).to(torch.float32, memory_format=torch.contiguous_format)


def normalise(tensor: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(3, ...) float32 of 0 to 255, in place: (x / 255 - mean) / std per channel."""
    shape = (-1,) + (1,) * (tensor.ndim - 1)
    centre = torch.tensor(mean, dtype=torch.float32).view(shape)
    spread = torch.tensor(std, dtype=torch.float32).view(shape)
    return tensor.div_(255).sub_(centre).div_(spread)


def short_side_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) once the short side is `short_side`; the long side keeps the aspect, rounded down."""
    if min(height, width) == short_side:
        return height, width
    if width < height:
        return math.floor(height / width * short_side), short_side
    return short_side, math.floor(width / height * short_side)


def crop_corner(height: int, width: int, size: int, position: int) -> tuple[int, int]:
    """(top, left) of one of three square crops that lie evenly along the longer side.

    Args:
        height, width: of the picture.
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


def uniform_crop(clip: Tensor, size: int, short_side: int, position: int) -> Tensor:
    """Resizes the short side of (C, T, H, W) float (bilinear, no antialias) and takes one of three crops.

    Args:
        clip: (C, T, H, W) float.
        size: side of the crop, at most `short_side`.
        short_side: what the short side is resized to first.
        position: see `crop_corner`.

    Returns:
        (C, T, size, size).
    """
    height, width = short_side_size(clip.shape[-2], clip.shape[-1], short_side)
    if (height, width) != tuple(clip.shape[-2:]):
        clip = F.interpolate(clip, size=(height, width), mode="bilinear", align_corners=False)
    top, left = crop_corner(height, width, size, position)
    return clip[..., top : top + size, left : left + size].clone(memory_format=torch.contiguous_format)


def resize_frames(frames: np.ndarray, size: tuple[int, int]) -> Tensor:
    """(T, H, W, 3) uint8 into (3, T, *size) float32 of 0 to 255. Bilinear, no antialias.

    Frame by frame with the channels last: a fraction of the time and memory of resizing the clip as one
    tensor, and within 1e-5 of its values.
    """
    if frames.shape[1:3] == tuple(size):
        return to_float(frames)
    clip = torch.empty(3, len(frames), *size)
    for place, frame in enumerate(frames):
        picture = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].to(torch.float32)
        clip[:, place] = F.interpolate(picture, size=size, mode="bilinear", align_corners=False)[0]
    return clip


class ImageTrainTransform:
    """Random resized crop, flip, RandAugment or colour jitter, normalisation, erasing.

    Args:
        crop: side of the result in pixels.
        scale: smallest and largest share of the area that is cropped.
        ratio: smallest and largest aspect (width / height) of the crop.
        interpolation: of the resize, and of RandAugment.
        flip: whether half of the images are mirrored.
        auto_augment: RandAugment policy, timm's or torchvision's, "" for none.
        color_jitter: strength for brightness, contrast and saturation; only where there is no `auto_augment`.
        erase_prob, erase_mode, erase_count: see `make_erasing`.
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
        self.erasing = make_erasing(erase_prob, erase_mode, erase_count)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """An RGB image of any size into (3, crop, crop) float32."""
        top, left, height, width = random_area_box(image.height, image.width, self.scale, self.ratio)
        image = image.crop((left, top, left + width, top + height)).resize((self.crop, self.crop), self.mode)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.augment is not None:
            image = self.augment(image)
        tensor = normalise(to_float(np.asarray(image)), self.mean, self.std)
        return erase(tensor[:, None], self.erasing)[:, 0]


class ImageEvalTransform:
    """Short side resized, central crop, normalisation.

    Args:
        crop: side of the result in pixels.
        mean, std: RGB, of pixels in [0, 1].
        short_side: of the resized image; None for int(256 / 224 * crop).
        interpolation: of the resize.
    """

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
            raise ValueError(f"a crop of {crop} needs a short side of at least that, not {self.short_side}")

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Tensor:
        """An RGB image of any size into (3, crop, crop) float32. Draws nothing."""
        width, height = image.size
        new_width = self.short_side if width <= height else int(self.short_side * width / height)
        new_height = self.short_side if height <= width else int(self.short_side * height / width)
        left, top = round((new_width - self.crop) / 2), round((new_height - self.crop) / 2)
        if new_width * new_height <= MAX_GROWTH * self.short_side**2:
            image = image.resize((new_width, new_height), self.mode)
            image = image.crop((left, top, left + self.crop, top + self.crop))
        else:  # 1 x 10,000 pixels must not grow to 256 x 2.5 million: only what the crop shows is made
            step_x, step_y = width / new_width, height / new_height
            right, bottom = (left + self.crop) * step_x, (top + self.crop) * step_y
            box = (left * step_x, top * step_y, min(right, width), min(bottom, height))
            image = image.resize((self.crop, self.crop), self.mode, box=box)
        return normalise(to_float(np.asarray(image)), self.mean, self.std)


class ClipTrainTransform:
    """RandAugment with one draw for all frames, normalisation, random resized crop, flip, erasing: the
    published order.

    Args:
        crop: side of the result in pixels.
        scale, ratio: of the area-based crop, see `ImageTrainTransform`; an empty `scale` resizes the short
            side to a length drawn from `short_sides` instead and crops at random.
        short_sides: smallest and largest short side, used only where `scale` is empty.
        flip: whether half of the clips are mirrored.
        auto_augment: RandAugment policy, timm's or torchvision's, "" for none.
        interpolation: of RandAugment; the crop is resized bilinearly, without antialiasing.
        erase_prob, erase_mode, erase_count: one box for all frames, see `make_erasing`.
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
            raise ValueError(
                f"DATA.TRAIN_JITTER_SCALES {self.short_sides} must not lie below DATA.TRAIN_CROP_SIZE {crop}"
            )
        self.flip = flip
        self.auto_augment, self.interpolation = auto_augment, interpolation
        if auto_augment:  # a wrong policy is told before the first clip is decoded
            make_rand_augment(auto_augment, crop, interpolation)
        self.erasing = make_erasing(erase_prob, erase_mode, erase_count)

    def __call__(self, frames: np.ndarray, rng: np.random.Generator, position: int = 1) -> Tensor:
        """(T, H, W, 3) uint8 into (3, T, crop, crop) float32. `position` has no meaning here."""
        if self.auto_augment:
            frames = augment_frames(frames, self.auto_augment, self.interpolation)
        height, width = frames.shape[1:3]
        if self.scale:
            top, left, h, w = random_area_box(height, width, self.scale, self.ratio)
            clip = resize_frames(frames[:, top : top + h, left : left + w], (self.crop, self.crop))
        else:
            side = round(rng.uniform(self.short_sides[0], self.short_sides[-1]))
            height, width = short_side_size(height, width, side)
            clip = resize_frames(frames, (height, width))
            top = int(rng.integers(0, height - self.crop + 1))
            left = int(rng.integers(0, width - self.crop + 1))
            clip = clip[..., top : top + self.crop, left : left + self.crop]
        if self.flip and rng.random() < 0.5:
            clip = clip.flip(-1)
        # The published code normalises first; afterwards it is the same (the resize is linear) on fewer
        # pixels.
        return erase(normalise(clip.contiguous(), self.mean, self.std), self.erasing)


class ClipTestTransform:
    """Normalisation and one of `num_crops` deterministic crops.

    Args:
        crop: side of the result in pixels.
        short_side: what the short side is resized to first.
        num_crops: 1 (the centre) or 3 (left, centre, right along the longer side).
        mean, std: RGB, of pixels in [0, 1].
    """

    def __init__(self, crop: int, short_side: int, num_crops: int, mean: Sequence[float], std: Sequence[float]) -> None:
        if num_crops not in (1, 3):
            raise ValueError(f"TEST.NUM_SPATIAL_CROPS must be 1 or 3, not {num_crops}")
        if short_side < crop:
            raise ValueError(f"a crop of {crop} needs a short side of at least that, not {short_side}")
        self.crop, self.short_side, self.num_crops = crop, short_side, num_crops
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, frames: np.ndarray, rng: np.random.Generator | None = None, position: int = 0) -> Tensor:
        """(T, H, W, 3) uint8 into (3, T, crop, crop) float32: the crop `position` of `num_crops`. Draws
        nothing."""
        height, width = short_side_size(frames.shape[1], frames.shape[2], self.short_side)
        top, left = crop_corner(height, width, self.crop, 1 if self.num_crops == 1 else position)
        clip = resize_frames(frames, (height, width))[..., top : top + self.crop, left : left + self.crop]
        return normalise(clip.contiguous(), self.mean, self.std)
