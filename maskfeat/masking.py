"""Mask sampling on the mask grid, and resizing masks to another grid. Pure functions.

Polarity everywhere: True = hidden from the model. `rng` is a numpy Generator, the only source of randomness.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from maskfeat.errors import UserError

MaskSampler = Callable[[np.random.Generator], np.ndarray]
"""Draws a mask: a generator -> a bool array of the shape of the mask grid, True = removed from the model's view."""

# Attempts to place one block before giving up, as published: for images (BEiT) and for clips.
_TRIES_2D, _TRIES_3D = 10, 100
# The smallest block is a fifth of the patches to hide, the smallest cube a fifth of a frame, as published.
_SMALLEST = 5


def _uniform(low: float, high: float, rng: np.random.Generator) -> float:
    """Draw the same number as rng.uniform(low, high) in a third of its time; a mask of cubes takes over a hundred."""
    return low + (high - low) * rng.random()


def _rectangle(area: float, min_aspect: float, rng: np.random.Generator) -> tuple[int, int]:
    """Draw (height, width) of about this area, the aspect ratio log-uniform in [min_aspect, 1 / min_aspect]."""
    log_aspect = math.log(min_aspect)
    aspect = math.exp(_uniform(log_aspect, -log_aspect, rng))
    return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))


def smallest_block(num_hidden: int) -> int:
    """Return the number of patches of the smallest block of a mask that hides `num_hidden`."""
    return max(1, num_hidden // _SMALLEST)


def block_mask(
    grid: tuple[int, int],
    num_hidden: int,
    rng: np.random.Generator,
    min_block: int | None = None,
    max_block: int | None = None,
    min_aspect: float = 0.3,
) -> np.ndarray:
    """Draw a blockwise mask of an image (BEiT, algorithm 1, also used by MaskFeat).

    Blocks are added until `num_hidden` patches are hidden or no further block fits, so that fewer may be hidden.

    Args:
        grid: (H, W) of the mask.
        num_hidden: number of patches to hide.
        rng: source of randomness.
        min_block, max_block: smallest and largest number of patches that a block adds; None = a fifth of `num_hidden`,
            and as many as are left to hide.
        min_aspect: the aspect ratio of a block is log-uniform in [min_aspect, 1 / min_aspect].

    Returns:
        (H, W) bool with at most `num_hidden` True.
    """
    height, width = grid
    smallest = smallest_block(num_hidden) if min_block is None else min_block
    hidden = np.zeros(grid, dtype=bool)
    count = 0
    while count < num_hidden:
        missing = num_hidden - count
        largest = missing if max_block is None else min(missing, max_block)
        added = 0
        for _ in range(_TRIES_2D):
            # With fewer than `smallest` patches left, the area lies between the two; too large blocks are rejected.
            area = _uniform(smallest, largest, rng)
            h, w = _rectangle(area, min_aspect, rng)
            if not (0 < h < height and 0 < w < width):
                continue
            top = int(rng.integers(0, height - h + 1))
            left = int(rng.integers(0, width - w + 1))
            block = hidden[top : top + h, left : left + w]
            added = h * w - np.count_nonzero(block)
            if 0 < added <= largest:
                block[...] = True
                break
            added = 0
        if not added:
            break
        count += added
    return hidden


def cube_mask(
    grid: tuple[int, int, int],
    num_hidden: int,
    rng: np.random.Generator,
    min_area: int | None = None,
    max_area: int | None = None,
    min_aspect: float = 0.3,
) -> np.ndarray:
    """Draw a mask of space-time cubes ("cube" masking of MaskFeat).

    A cube is a block in space that extends over 1 to T frames of the grid. Cubes are added until `num_hidden` patches
    are hidden or no further cube fits.

    Args:
        grid: (T, H, W) of the mask.
        num_hidden: number of patches to hide.
        rng: source of randomness.
        min_area, max_area: patches of a cube in space; None = a fifth of a frame and a frame (9 and 49 on 7 x 7).
        min_aspect: the aspect ratio in space is log-uniform in [min_aspect, 1 / min_aspect].

    Returns:
        (T, H, W) bool with at most `num_hidden` True.
    """
    frames, height, width = grid
    smallest = max(1, height * width // _SMALLEST) if min_area is None else min_area
    largest = height * width if max_area is None else max_area
    hidden = np.zeros(grid, dtype=bool)
    count = 0
    while count < num_hidden:
        missing = num_hidden - count
        added = 0
        for _ in range(_TRIES_3D):
            area = _uniform(smallest, largest, rng)
            h, w = _rectangle(area, min_aspect, rng)
            t = int(rng.integers(1, frames + 1))
            if not (0 < h < height and 0 < w < width):
                continue
            front = int(rng.integers(0, frames - t + 1))
            top = int(rng.integers(0, height - h + 1))
            left = int(rng.integers(0, width - w + 1))
            cube = hidden[front : front + t, top : top + h, left : left + w]
            added = t * h * w - np.count_nonzero(cube)
            if 0 < added <= missing:
                cube[...] = True
                break
            added = 0
        if not added:
            break
        count += added
    return hidden


def tube_mask(grid: tuple[int, int, int], per_frame: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one blockwise mask of `per_frame` patches and repeat it in every frame ("tube" masking): (T, H, W) bool."""
    frames, height, width = grid
    return np.repeat(block_mask((height, width), per_frame, rng)[None], frames, axis=0)


def frame_mask(grid: tuple[int, int, int], num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """Hide `num_frames` whole frames ("frame" masking): (T, H, W) bool."""
    hidden = np.zeros(grid, dtype=bool)
    hidden[rng.permutation(grid[0])[:num_frames]] = True
    return hidden


def band_sampler(low_pass: float) -> MaskSampler:
    """Return the sampler of MFM's frequency masks, (1, 1) bool: False with probability `low_pass` (the disc of low
    frequencies is kept and the others are hidden), otherwise True (the disc is hidden).
    """
    return lambda rng: np.full((1, 1), rng.random() >= low_pass)


def mask_sampler(
    grid: Sequence[int],
    ratio: float,
    tube: bool = False,
    frames: bool = False,
    max_block: int | None = None,
) -> MaskSampler:
    """Return the sampler for a mask grid.

    Args:
        grid: (H, W) for blocks, (T, H, W) for cubes, tubes or frames.
        ratio: share of the patches to hide, in [0, 1); round(ratio x number of patches) of them, 78 of 14 x 14 and 157
            of 8 x 7 x 7 at 0.4; for tubes, of each frame (20 of 7 x 7, 160 in all), and of the frames (3 of 8). A
            sampler of blocks, cubes or tubes may hide fewer.
        tube: repeat one mask in every frame instead of drawing cubes.
        frames: hide whole frames instead of drawing cubes.
        max_block: largest number of patches of a block, or of a cube in space; None = no limit.

    Raises:
        UserError: a ratio outside [0, 1).
    """
    if not 0.0 <= ratio < 1.0:
        raise UserError(f"AUG.MASK_RATIO is {ratio}, expected at least 0 and below 1")
    if ratio == 0.0:
        return lambda rng: np.zeros(tuple(grid), dtype=bool)
    num_hidden = round(ratio * math.prod(grid))
    if len(grid) == 2:
        height, width = grid
        return lambda rng: block_mask((height, width), num_hidden, rng, max_block=max_block)
    time, height, width = grid
    if frames:
        num_frames = round(ratio * time)
        return lambda rng: frame_mask((time, height, width), num_frames, rng)
    if tube:
        per_frame = round(ratio * height * width)
        return lambda rng: tube_mask((time, height, width), per_frame, rng)
    return lambda rng: cube_mask((time, height, width), num_hidden, rng, max_area=max_block)


def resize_mask(hidden: Tensor, grid: Sequence[int]) -> Tensor:
    """Resize a mask (B, *from_grid) to (B, *grid) by nearest neighbours: index i is taken from floor(i * from / to).

    Raises:
        ValueError: the mask and the grid differ in their number of axes.
    """
    hidden = hidden.bool()
    if hidden.dim() != len(grid) + 1:
        raise ValueError(f"a mask of shape {tuple(hidden.shape)} cannot be resized to the grid {tuple(grid)}")
    for axis, size in enumerate(grid, start=1):
        old_size = hidden.shape[axis]
        if old_size != size:
            source = torch.arange(size, device=hidden.device) * old_size // size
            hidden = hidden.index_select(axis, source)
    return hidden
