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

from maskfeat.data.device_transforms import Box, Pixels, Plan, erase
from maskfeat.data.rand_augment import augment_frames, make_rand_augment, pil_mode

ERASING_MODES = ("const", "rand", "pixel")
MAX_GROWTH = 8
"""Above this aspect an image is not resized whole before it is cropped."""


_TORCH_MODES = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}

Picture = Image.Image | Tensor
"""An RGB image of any size: Pillow's, or (H, W, 3) uint8 of any strides."""


class ImageTransform(Protocol):
    """An image into pixels that end as (C, crop, crop)."""

    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Picture, rng: np.random.Generator) -> Pixels: ...


class ClipTransform(Protocol):
    """(T, H, W, C) uint8 into pixels that end as (C, T, crop, crop)."""

    crop: int

    def __call__(self, frames: np.ndarray, rng: np.random.Generator, position: int = 1) -> Pixels: ...


def random_area_box(height: int, width: int, scale: Sequence[float], ratio: Sequence[float]) -> Box:
    """torchvision's random resized crop: a share of the area in `scale`, an aspect (width / height) in `ratio`.

    Returns:
        a box inside the picture.
    """
    picture = torch.empty(1, height, width, device="meta")  # only its size is read
    return Box(*RandomResizedCrop.get_params(picture, list(scale), list(ratio)))


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


def crop_image(picture: Picture, box: Box) -> Picture:
    """What `box` shows of a picture."""
    if isinstance(picture, Image.Image):
        return picture.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    return picture[box.top : box.top + box.height, box.left : box.left + box.width]


def resize_image(picture: Picture, size: tuple[int, int], mode: Image.Resampling) -> Picture:
    """Resizes a picture to (height, width), antialiased: by Pillow, or by torch where it is a tensor.

    Of "bicubic" and "bilinear" torch computes in 16 bits what Pillow computes in 32; of other modes it has no uint8
    kernel, so that Pillow takes its place.
    """
    if isinstance(picture, Image.Image):
        return picture.resize((size[1], size[0]), mode)
    if mode not in _TORCH_MODES:
        return torch.from_numpy(np.array(Image.fromarray(picture.numpy()).resize((size[1], size[0]), mode)))
    pixels = picture.permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)  # and so is the result
    resized = F.interpolate(pixels, size, mode=_TORCH_MODES[mode], align_corners=False, antialias=True)
    return resized[0].permute(1, 2, 0)


def as_tensor(picture: Picture) -> Tensor:
    """(H, W, C) uint8."""
    return torch.from_numpy(np.array(picture)) if isinstance(picture, Image.Image) else picture


def _as_image(picture: Picture) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture.numpy())


def _size(picture: Picture) -> tuple[int, int]:
    """(height, width)."""
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    return picture.shape[0], picture.shape[1]


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

    def __call__(self, image: Picture, rng: np.random.Generator) -> Pixels:
        """An RGB image of any size into pixels that end as (3, crop, crop)."""
        box = random_area_box(*_size(image), self.scale, self.ratio)
        image = resize_image(crop_image(image, box), (self.crop, self.crop), self.mode)
        mirror = self.flip and rng.random() < 0.5
        if self.augment is not None:
            image = _as_image(image)
            if mirror:  # not later: what follows does not treat left and right alike
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            image, mirror = self.augment(image), False
        plan = Plan((3, self.crop, self.crop), self.mean, self.std, mirror=mirror)
        return erase(Pixels(as_tensor(image), plan), self.erasing)


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

    def __call__(self, image: Picture, rng: np.random.Generator | None = None) -> Pixels:
        """An RGB image of any size into pixels that end as (3, crop, crop). Draws nothing."""
        height, width = _size(image)
        new_width = self.short_side if width <= height else int(self.short_side * width / height)
        new_height = self.short_side if height <= width else int(self.short_side * height / width)
        left, top = round((new_width - self.crop) / 2), round((new_height - self.crop) / 2)
        if new_width * new_height <= MAX_GROWTH * self.short_side**2:
            image = resize_image(image, (new_height, new_width), self.mode)
            image = crop_image(image, Box(top, left, self.crop, self.crop))
        else:  # 1 x 10,000 pixels must not grow to 256 x 2.5 million: only what the crop shows is made
            step_x, step_y = width / new_width, height / new_height
            right, bottom = (left + self.crop) * step_x, (top + self.crop) * step_y
            box = (left * step_x, top * step_y, min(right, width), min(bottom, height))
            image = _as_image(image).resize((self.crop, self.crop), self.mode, box=box)
        return Pixels(as_tensor(image), Plan((3, self.crop, self.crop), self.mean, self.std))


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

    def __call__(self, frames: np.ndarray, rng: np.random.Generator, position: int = 1) -> Pixels:
        """(T, h, w, 3) uint8 into pixels that end as (3, T, crop, crop). `position` has no meaning here."""
        if self.auto_augment:
            frames = augment_frames(frames, self.auto_augment, self.interpolation)
        height, width = frames.shape[1:3]
        if self.scale:
            box = random_area_box(height, width, self.scale, self.ratio)
            frames = frames[:, box.top : box.top + box.height, box.left : box.left + box.width]
            size, window = (self.crop, self.crop), None
        else:
            size = short_side_size(height, width, round(rng.uniform(self.short_sides[0], self.short_sides[-1])))
            top = int(rng.integers(0, size[0] - self.crop + 1))
            left = int(rng.integers(0, size[1] - self.crop + 1))
            window = Box(top, left, self.crop, self.crop)
        mirror = self.flip and rng.random() < 0.5
        # The published code normalises first; afterwards it is the same (the resize is linear) on fewer
        # pixels.
        return erase(_clip_pixels(frames, self, size, window, mirror), self.erasing)


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

    def __call__(self, frames: np.ndarray, rng: np.random.Generator | None = None, position: int = 0) -> Pixels:
        """(T, h, w, 3) uint8 into pixels that end as (3, T, crop, crop): the crop `position` of `num_crops`. Draws
        nothing."""
        size = short_side_size(frames.shape[1], frames.shape[2], self.short_side)
        top, left = crop_corner(*size, self.crop, 1 if self.num_crops == 1 else position)
        return _clip_pixels(frames, self, size, Box(top, left, self.crop, self.crop))


def _clip_pixels(
    frames: np.ndarray,
    transform: ClipTrainTransform | ClipTestTransform,
    size: tuple[int, int],
    window: Box | None,
    mirror: bool = False,
) -> Pixels:
    """(T, h, w, 3) uint8 as pixels that are yet to be resized to `size`, cut to `window` and mirrored."""
    if frames.shape[1:3] == size and window is not None:  # nothing to resize: only what is shown is sent
        frames = frames[:, window.top : window.top + window.height, window.left : window.left + window.width]
        size, window = (window.height, window.width), None
    plan = Plan(
        (3, len(frames), transform.crop, transform.crop),
        transform.mean,
        transform.std,
        size=None if frames.shape[1:3] == size else size,
        window=window,
        mirror=mirror,
    )
    return Pixels(_borrowed(frames), plan).slim()


def _borrowed(frames: np.ndarray) -> Tensor:
    """The array as a tensor, without a copy unless it runs backwards, as frames that were turned do."""
    return torch.from_numpy(frames if min(frames.strides) >= 0 else np.ascontiguousarray(frames))
