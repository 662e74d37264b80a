"""RandAugment (Cubuk et al., 2019) of timm or torchvision, for images and for whole clips."""

import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import InterpolationMode, RandAugment

from maskfeat.errors import UserError

_PIL_MODES = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_TRANSLATE = 0.45
"""Largest translation of timm's RandAugment, as a share of the short side."""

_TORCHVISION_POLICY = re.compile(r"ra_(\d+)_(\d+)")
"""Magnitude and number of bins."""


def make_rand_augment(policy: str, short_side: int, interpolation: str, fill: Sequence[int] | None = None) -> Any:
    """Return the RandAugment of a policy string. It draws from the global generators of `random`, numpy and torch.

    Args:
        policy: in timm's notation, such as "rand-m9-mstd0.5-inc1"; or "ra_6_10" for torchvision's RandAugment (two
            operations of magnitude 6 of 10 bins, filled with black).
        short_side: of the image in pixels; translations are a share of it.
        interpolation: "bilinear", "bicubic", ...
        fill: RGB 0-255 of pixels from outside the image; None = timm's grey.

    Raises:
        UserError: not a RandAugment policy, or an unknown interpolation (AUG.AA_TYPE, AUG.INTERPOLATION).
    """
    match = _TORCHVISION_POLICY.fullmatch(policy)
    if match:
        magnitude, bins = int(match[1]), int(match[2])
        if magnitude >= bins:
            raise UserError(f"AUG.AA_TYPE {policy!r}: the magnitude must be below the number of bins, ra_6_10 for one")
        mode = InterpolationMode(interpolation)
        return RandAugment(magnitude=magnitude, num_magnitude_bins=bins, interpolation=mode)
    params: dict[str, Any] = {
        "translate_const": max(int(short_side * _TRANSLATE), 1),
        "interpolation": pil_mode(interpolation),
    }
    if fill is not None:
        params["img_mean"] = tuple(fill)
    try:
        augment = rand_augment_transform(policy, params)
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"AUG.AA_TYPE must be a policy such as 'rand-m9-mstd0.5-inc1', not {policy!r}") from error
    for op in augment.ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize
    return augment


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the upper bits of each value. At full strength 0 bits: black, which newer versions of Pillow reject."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def pil_mode(interpolation: str) -> Image.Resampling:
    """Return Pillow's constant for the name of an interpolation mode.

    Raises:
        ValueError: there is no such mode.
    """
    if interpolation not in _PIL_MODES:
        raise ValueError(f"interpolation must be one of {', '.join(_PIL_MODES)}, not {interpolation!r}")
    return _PIL_MODES[interpolation]


def augment_frames(frames: np.ndarray, policy: str, interpolation: str) -> np.ndarray:
    """Apply RandAugment to (T, H, W, 3) uint8 frames, with the same random numbers for every frame.

    It draws from the global generators, whose states are reset before each frame.
    """
    augment = make_rand_augment(policy, min(frames.shape[1:3]), interpolation)
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    images = []
    for frame in frames:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.random.set_rng_state(torch_state)
        images.append(np.asarray(augment(Image.fromarray(frame))))
    return np.stack(images)
