"""Which patches to hide: samplers on the mask grid, and carrying a mask to another grid. Pure functions.

Polarity everywhere: True = hidden from the model. `rng` is a numpy Generator; nothing else is random.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Sampler = Callable[[np.random.Generator], np.ndarray]

# Draws of one block before it is given up, as published: for images (BEiT) and for clips.
_TRIES_2D, _TRIES_3D = 10, 100


def _uniform(low: float, high: float, rng: np.random.Generator) -> float:
    """What rng.uniform(low, high) draws, in a third of its time; cubes take a hundred tries and more."""
    return low + (high - low) * rng.random()


def _rectangle(area: float, min_aspect: float, rng: np.random.Generator) -> tuple[int, int]:
    """(height, width) of about this area, the aspect log-uniform in [min_aspect, 1 / min_aspect]."""
    spread = math.log(min_aspect)
    aspect = math.exp(_uniform(spread, -spread, rng))
    return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))


def block_mask(
    grid: tuple[int, int],
    num_hidden: int,
    rng: np.random.Generator,
    min_block: int = 15,
    max_block: int | None = None,
    min_aspect: float = 0.3,
) -> np.ndarray:
    """Blockwise mask of an image (BEiT, algorithm 1, which MaskFeat takes over).

    Blocks of `min_block` to at most the missing number of patches, with aspect ratio log-uniform in
    [min_aspect, 1 / min_aspect], are hidden until `num_hidden` patches are or no further block fits. May undershoot.

    Returns:
        (H, W) bool with at most `num_hidden` True.
    """
    height, width = grid
    hidden = np.zeros(grid, dtype=bool)
    count = 0
    while count < num_hidden:
        missing = num_hidden - count
        largest = missing if max_block is None else min(missing, max_block)
        added = 0
        for _ in range(_TRIES_2D):
            # With fewer than `min_block` left to hide, between those and `min_block`: what is too large is dropped.
            area = _uniform(min_block, largest, rng)
            h, w = _rectangle(area, min_aspect, rng)
            if not (0 < h < height and 0 < w < width):
                continue
            top = int(rng.integers(0, height - h + 1))
            left = int(rng.integers(0, width - w + 1))
            block = hidden[top : top + h, left : left + w]
            added = h * w - np.count_nonzero(block)
            if 0 < added <= missing:
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
    """Mask of space-time cubes ("cube" masking of MaskFeat).

    A cube is a block of `min_area` to `max_area` patches in space (published: 9 to 49 on 7 x 7) that lasts 1 to T
    frames of the grid. Cubes are added until `num_hidden` patches are hidden or no further cube fits.

    Returns:
        (T, H, W) bool with at most `num_hidden` True.
    """
    frames, height, width = grid
    smallest = max(1, round(9 * height * width / 49)) if min_area is None else min_area
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


def tube_mask(grid: tuple[int, int, int], num_hidden: int, rng: np.random.Generator) -> np.ndarray:
    """One blockwise image mask repeated in every frame ("tube" masking): (T, H, W) bool."""
    frames, height, width = grid
    in_space = num_hidden // frames
    # The published smallest block, 15 of 14 x 14 patches, scaled to the grid.
    smallest = max(1, min(in_space, round(15 * height * width / 196)))
    return np.repeat(block_mask((height, width), in_space, rng, min_block=smallest)[None], frames, axis=0)


def frame_mask(grid: tuple[int, int, int], num_hidden: int, rng: np.random.Generator) -> np.ndarray:
    """Whole frames ("frame" masking): (T, H, W) bool, round(num_hidden / (H W)) frames hidden entirely."""
    frames, height, width = grid
    hidden = np.zeros(grid, dtype=bool)
    chosen = rng.permutation(frames)[: round(num_hidden / (height * width))]
    hidden[chosen] = True
    return hidden


def band_sampler(low_pass: float) -> Sampler:
    """Masks (1, 1) of frequencies: False with probability `low_pass` (the disc of low ones stays, the rest is hidden),
    otherwise True (the disc is hidden).
    """
    return lambda rng: np.full((1, 1), rng.random() >= low_pass)


def mask_sampler(
    grid: Sequence[int],
    ratio: float,
    tube: bool = False,
    frames: bool = False,
    max_block: int | None = None,
) -> Sampler:
    """The sampler for a mask grid: blocks for ([1,] H, W), cubes, tubes or whole frames for (T, H, W).

    The aim is round(ratio x number of patches): 78 of 14 x 14 and 157 of 8 x 7 x 7 at 0.4.
    """
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"AUG.MASK_RATIO is {ratio}, expected at least 0 and below 1")
    if ratio == 0.0:
        return lambda rng: np.zeros(tuple(grid), dtype=bool)
    num_hidden = round(ratio * math.prod(grid))
    if len(grid) == 2:
        height, width = grid
        smallest = max(1, min(15, round(15 * height * width / 196)))
        return lambda rng: block_mask((height, width), num_hidden, rng, smallest, max_block)
    time, height, width = grid
    if frames:
        return lambda rng: frame_mask((time, height, width), num_hidden, rng)
    if tube:
        return lambda rng: tube_mask((time, height, width), num_hidden, rng)
    return lambda rng: cube_mask((time, height, width), num_hidden, rng, max_area=max_block)


def resize_mask(hidden: Tensor, grid: Sequence[int]) -> Tensor:
    """Nearest-neighbour resize of a mask (B, *from_grid) to (B, *grid): place i takes from floor(i * from / to)."""
    hidden = hidden.bool()
    if hidden.dim() != len(grid) + 1:
        raise ValueError(f"a mask of shape {tuple(hidden.shape)} cannot be resized to the grid {tuple(grid)}")
    for axis, to in enumerate(grid, start=1):
        have = hidden.shape[axis]
        if have != to:
            source = torch.arange(to, device=hidden.device) * have // to
            hidden = hidden.index_select(axis, source)
    return hidden
