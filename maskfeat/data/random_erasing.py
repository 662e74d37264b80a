"""Random erasing (Zhong et al., AAAI 2020) as timm draws it, recorded so that it can be applied on the device."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from maskfeat.data.device_transforms import Box
from maskfeat.errors import UserError

ERASING_MODES = ("const", "rand", "pixel")


def make_random_erasing(probability: float, mode: str, count: int) -> RandomErasing:
    """Return timm's RandomErasing of up to `count` boxes, each 2 % to a third of the area.

    Args:
        probability: of erasing anything, 0 to 1.
        mode: what fills the box: "const" zeros, "rand" one normal colour, "pixel" normal noise.
        count: the largest number of boxes.

    Raises:
        UserError: an unknown mode or a probability outside [0, 1].
    """
    if mode not in ERASING_MODES:
        raise UserError(f"AUG.RE_MODE must be one of {', '.join(ERASING_MODES)}, not {mode!r}")
    if not 0.0 <= probability <= 1.0:
        raise UserError(f"AUG.RE_PROB must lie in [0, 1], not be {probability}")
    return RandomErasing(probability, mode=mode, max_count=count, device="cpu")


class _WriteRecorder:
    """Stands in for a (C * T, H, W) float32 tensor in timm's RandomErasing and records what is written to it."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, shape: Sequence[int]) -> None:
        channels, *frames, height, width = shape
        self.shape = torch.Size((channels * math.prod(frames), height, width))
        self.writes: list[tuple[Box, Tensor]] = []

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, index: Any, values: Tensor) -> None:
        channels, rows, columns = index
        assert channels == slice(None), "all channels are erased together"
        box = Box(rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
        self.writes.append((box, values))


def draw_erasing(erasing: RandomErasing, shape: Sequence[int]) -> tuple[tuple[Box, Tensor], ...]:
    """Draw what `erasing` overwrites in a view of `shape`, (C, [T,] H, W); all frames share the boxes.

    Returns:
        (box, float32 values) of each box, see `DeferredTransform.erase`; empty where nothing is erased.
    """
    recorder = _WriteRecorder(shape)
    erasing(recorder)
    return tuple(recorder.writes)
