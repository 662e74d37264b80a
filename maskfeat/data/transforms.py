"""Augmentation of images and clips, from uint8 pixels to a normalised float32 tensor.

Draws come from the generator that is handed in, and, where timm makes them, from the global generators:
call a transform inside `seeding.seeded`.

Shape legend: C channels (3), T frames, H x W pixels.
"""

import math
import random
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms import ColorJitter

from maskfeat.data.erasing import RandomErasing

_PIL_MODES = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_TRANSLATE = 0.45
"""timm's RandAugment shifts by up to this share of the short side."""


class ImageTransform(Protocol):
    """An image into (C, H, W)."""

    crop: int

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor: ...


class ClipTransform(Protocol):
    """(T, H, W, C) uint8 into (C, T, H, W)."""

    crop: int

    def __call__(self, frames: np.ndarray, rng: np.random.Generator, position: int = 1) -> Tensor: ...


def random_area_box(
    height: int, width: int, scale: Sequence[float], ratio: Sequence[float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draws a box with a share of the area in `scale` and an aspect (width / height) in `ratio`, log-uniform.

    After ten boxes that do not fit it takes the largest central one of a permitted aspect (Inception's
    crop, as in torchvision's RandomResizedCrop).

    Returns:
        (top, left, height, width) in pixels, inside the picture.
    """
    for _ in range(10):
        area = height * width * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = max(min(round(width / ratio[0]), height), 1)
    elif width / height > ratio[1]:
        w = max(min(round(height * ratio[1]), width), 1)
    return (height - h) // 2, (width - w) // 2, h, w


def normalise(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(..., 3) uint8 into (3, ...) float32: (x / 255 - mean) / std per channel."""
    tensor = torch.from_numpy(np.array(pixels, dtype=np.uint8, copy=True)).movedim(-1, 0)
    shape = (-1,) + (1,) * (tensor.ndim - 1)
    centre = torch.tensor(mean, dtype=torch.float32).view(shape)
    spread = torch.tensor(std, dtype=torch.float32).view(shape)
    return tensor.to(torch.float32).div_(255).sub_(centre).div_(spread).contiguous()


def make_rand_augment(
    policy: str, short_side: int, interpolation: str, fill: Sequence[int] | None = None
) -> Any:
    """timm's RandAugment for a policy string such as "rand-m9-mstd0.5-inc1"; draws from `random` and
    numpy's globals.

    Args:
        policy: timm's notation.
        short_side: of the picture in pixels; shifts are a share of it.
        interpolation: "bilinear", "bicubic", ... or "random".
        fill: RGB 0-255 of the pixels that move into view; None for timm's grey.

    Raises:
        ValueError: not a RandAugment policy, or an unknown interpolation (AUG.AA_TYPE, AUG.INTERPOLATION).
    """
    if not policy.startswith("rand"):
        raise ValueError(f"AUG.AA_TYPE must be a policy such as 'rand-m9-mstd0.5-inc1', not {policy!r}")
    params: dict[str, Any] = {"translate_const": max(int(short_side * _TRANSLATE), 1)}
    if interpolation != "random":
        params["interpolation"] = pil_mode(interpolation)
    if fill is not None:
        params["img_mean"] = tuple(fill)
    return rand_augment_transform(policy, params)


def pil_mode(interpolation: str) -> Image.Resampling:
    """Pillow's constant for a mode's name."""
    if interpolation not in _PIL_MODES:
        raise ValueError(f"interpolation must be one of {', '.join(_PIL_MODES)}, not {interpolation!r}")
    return _PIL_MODES[interpolation]


def resize_short_side(clip: Tensor, short_side: int) -> Tensor:
    """(C, T, H, W) float to a given short side; the long side keeps the aspect, rounded down. Bilinear, no
    antialias."""
    height, width = clip.shape[-2:]
    if min(height, width) == short_side:
        return clip
    if width < height:
        size = (math.floor(height / width * short_side), short_side)
    else:
        size = (short_side, math.floor(width / height * short_side))
    return _interpolate(clip, size)


def uniform_crop(clip: Tensor, size: int, short_side: int, position: int) -> Tensor:
    """One of three square crops that lie evenly along the longer side, after the short side has become
    `short_side`.

    Args:
        clip: (C, T, H, W) float.
        size: side of the crop, at most `short_side`.
        short_side: what the short side is resized to first.
        position: 0 left (or top), 1 centre, 2 right (or bottom).

    Returns:
        (C, T, size, size).
    """
    assert position in (0, 1, 2), f"crop {position} of three"
    assert size <= short_side, f"a crop of {size} needs a short side of at least that, not {short_side}"
    clip = resize_short_side(clip, short_side)
    height, width = clip.shape[-2:]
    top, left = math.ceil((height - size) / 2), math.ceil((width - size) / 2)
    if position != 1:
        end = position == 2
        if height > width:
            top = height - size if end else 0
        else:
            left = width - size if end else 0
    return clip[..., top : top + size, left : left + size].contiguous()


class ImageTrainTransform:
    """Random resized crop, flip, RandAugment or colour jitter, normalisation, erasing.

    Args:
        crop: side of the result in pixels.
        scale: smallest and largest share of the area that is cropped.
        ratio: smallest and largest aspect (width / height) of the crop.
        interpolation: of the resize, and of RandAugment.
        flip: whether half of the images are mirrored.
        auto_augment: timm's RandAugment policy, "" for none.
        color_jitter: strength for brightness, contrast and saturation; only where there is no `auto_augment`.
        erase_prob, erase_mode, erase_count: see `erasing.RandomErasing`.
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
        self.erase = RandomErasing(erase_prob, erase_mode, erase_count)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """An RGB image of any size into (3, crop, crop) float32."""
        top, left, height, width = random_area_box(image.height, image.width, self.scale, self.ratio, rng)
        image = image.crop((left, top, left + width, top + height)).resize((self.crop, self.crop), self.mode)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.augment is not None:
            image = self.augment(image)
        tensor = normalise(np.asarray(image), self.mean, self.std)
        return self.erase(tensor[:, None], rng)[:, 0]


class ImageEvalTransform:
    """Short side to 256/224 of the crop (bicubic), central crop, normalisation.

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
        # Resizing only what the crop shows is the same, and a picture of 1 x 10,000 pixels does not grow to
        # 256 x 2.5 M.
        step_x, step_y = width / new_width, height / new_height
        box = (left * step_x, top * step_y, (left + self.crop) * step_x, (top + self.crop) * step_y)
        box = (box[0], box[1], min(box[2], width), min(box[3], height))
        return normalise(
            np.asarray(image.resize((self.crop, self.crop), self.mode, box=box)), self.mean, self.std
        )


class ClipTrainTransform:
    """RandAugment with one draw for all frames, normalisation, random resized crop, flip, erasing: the
    published order.

    Args:
        crop: side of the result in pixels.
        scale, ratio: of the area-based crop, see `ImageTrainTransform`; an empty `scale` resizes the short
            side to a length drawn from `short_sides` instead and crops at random.
        short_sides: smallest and largest short side, used only where `scale` is empty.
        flip: whether half of the clips are mirrored.
        auto_augment: timm's RandAugment policy, "" for none.
        interpolation: of RandAugment; the crop is resized bilinearly, without antialiasing.
        erase_prob, erase_mode, erase_count: one box for all frames, see `erasing.RandomErasing`.
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
        self.erase = RandomErasing(erase_prob, erase_mode, erase_count)

    def __call__(self, frames: np.ndarray, rng: np.random.Generator, position: int = 1) -> Tensor:
        """(T, H, W, 3) uint8 into (3, T, crop, crop) float32. `position` has no meaning here."""
        if self.auto_augment:
            frames = augment_frames(frames, self.auto_augment, self.interpolation)
        if self.scale:
            height, width = frames.shape[1:3]
            top, left, h, w = random_area_box(height, width, self.scale, self.ratio, rng)
            clip = normalise(frames[:, top : top + h, left : left + w], self.mean, self.std)
            clip = _interpolate(clip, (self.crop, self.crop))
        else:
            side = round(rng.uniform(self.short_sides[0], self.short_sides[-1]))
            clip = resize_short_side(normalise(frames, self.mean, self.std), side)
            top = int(rng.integers(0, clip.shape[-2] - self.crop + 1))
            left = int(rng.integers(0, clip.shape[-1] - self.crop + 1))
            clip = clip[..., top : top + self.crop, left : left + self.crop]
        if self.flip and rng.random() < 0.5:
            clip = clip.flip(-1)
        return self.erase(clip.contiguous(), rng)


class ClipTestTransform:
    """Normalisation and one of `num_crops` deterministic crops.

    Args:
        crop: side of the result in pixels.
        short_side: what the short side is resized to first.
        num_crops: 1 (the centre) or 3 (left, centre, right along the longer side).
        mean, std: RGB, of pixels in [0, 1].
    """

    def __init__(
        self, crop: int, short_side: int, num_crops: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        if num_crops not in (1, 3):
            raise ValueError(f"TEST.NUM_SPATIAL_CROPS must be 1 or 3, not {num_crops}")
        if short_side < crop:
            raise ValueError(f"a crop of {crop} needs a short side of at least that, not {short_side}")
        self.crop, self.short_side, self.num_crops = crop, short_side, num_crops
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(
        self, frames: np.ndarray, rng: np.random.Generator | None = None, position: int = 0
    ) -> Tensor:
        """(T, H, W, 3) uint8 into (3, T, crop, crop) float32: the crop `position` of `num_crops`. Draws
        nothing."""
        clip = normalise(frames, self.mean, self.std)
        return uniform_crop(clip, self.crop, self.short_side, 1 if self.num_crops == 1 else position)


def augment_frames(frames: np.ndarray, policy: str, interpolation: str) -> np.ndarray:
    """RandAugment on (T, H, W, 3) uint8, with the same draw for every frame.

    timm draws from the globals while it works, so each frame starts from the state that the first one found.
    """
    augment = make_rand_augment(policy, min(frames.shape[1:3]), interpolation)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    images = []
    for frame in frames:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        images.append(np.asarray(augment(Image.fromarray(frame))))
    return np.stack(images)


def _interpolate(clip: Tensor, size: tuple[int, int]) -> Tensor:
    # Frames as the batch: (C, T, H, W) is a batch of C pictures with T channels, which is the same
    # arithmetic.
    return F.interpolate(clip, size=size, mode="bilinear", align_corners=False)
