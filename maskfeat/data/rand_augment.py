"""RandAugment (Cubuk et al., 2019) as timm or torchvision makes it, for images and for whole clips."""

import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import InterpolationMode, RandAugment

_PIL_MODES = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_TRANSLATE = 0.45
"""timm's RandAugment shifts by up to this share of the short side."""


_TORCHVISION = re.compile(r"ra_(\d+)_(\d+)")
"""Magnitude and number of bins."""


def make_rand_augment(policy: str, short_side: int, interpolation: str, fill: Sequence[int] | None = None) -> Any:
    """RandAugment for a policy string; draws from the globals of `random`, numpy and torch.

    Args:
        policy: timm's notation, such as "rand-m9-mstd0.5-inc1"; or "ra_6_10" for torchvision's (two operations, of
            magnitude 6 among 10 bins, which fill with black).
        short_side: of the picture in pixels; shifts are a share of it.
        interpolation: "bilinear", "bicubic", ... or "random".
        fill: RGB 0-255 of the pixels that move into view; None for timm's grey.

    Raises:
        ValueError: not a RandAugment policy, or an unknown interpolation (AUG.AA_TYPE, AUG.INTERPOLATION).
    """
    torchvisions = _TORCHVISION.fullmatch(policy)
    if torchvisions:
        magnitude, bins = int(torchvisions[1]), int(torchvisions[2])
        if magnitude >= bins:
            raise ValueError(f"AUG.AA_TYPE {policy!r}: the magnitude must be below the number of bins, ra_6_10 for one")
        mode = InterpolationMode(interpolation)
        return RandAugment(magnitude=magnitude, num_magnitude_bins=bins, interpolation=mode)
    params: dict[str, Any] = {"translate_const": max(int(short_side * _TRANSLATE), 1)}
    if interpolation != "random":
        params["interpolation"] = pil_mode(interpolation)
    if fill is not None:
        params["img_mean"] = tuple(fill)
    try:
        augment = rand_augment_transform(policy, params)
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(f"AUG.AA_TYPE must be a policy such as 'rand-m9-mstd0.5-inc1', not {policy!r}") from error
    for op in augment.ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize
    return augment


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keeps the upper bits of each value. None at full strength: black, which newer Pillows refuse to
    paint."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def pil_mode(interpolation: str) -> Image.Resampling:
    """Pillow's constant for a mode's name."""
    if interpolation not in _PIL_MODES:
        raise ValueError(f"interpolation must be one of {', '.join(_PIL_MODES)}, not {interpolation!r}")
    return _PIL_MODES[interpolation]


def augment_frames(frames: np.ndarray, policy: str, interpolation: str) -> np.ndarray:
    """RandAugment on (T, H, W, 3) uint8, with the same draw for every frame.

    It draws from the globals while it works, so each frame starts from the state that the first one found.
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
