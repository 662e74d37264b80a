"""Random erasing (Zhong et al., 2017) of a box that is the same in all frames of a clip."""

import math

import numpy as np
import torch
from torch import Tensor

MODES = ("const", "rand", "pixel")


class RandomErasing:
    """Replaces a box with probability `probability`.

    The area is drawn from 2 % to a third of the picture (divided by `count`), the aspect log-uniformly from
    0.3 to 1/0.3; ten attempts for a box that fits, as in timm.

    Args:
        probability: 0 to 1.
        mode: what fills the box: "const" zeros, "rand" one normal colour, "pixel" normal noise (fresh in
            every frame).
        count: how many boxes.
    """

    def __init__(self, probability: float, mode: str = "pixel", count: int = 1) -> None:
        if mode not in MODES:
            raise ValueError(f"AUG.RE_MODE must be one of {', '.join(MODES)}, not {mode!r}")
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"AUG.RE_PROB must lie in [0, 1], not be {probability}")
        self.probability, self.mode, self.count = probability, mode, count

    def __call__(self, clip: Tensor, rng: np.random.Generator) -> Tensor:
        """(C, T, H, W) float32, normalised; changed in place and returned."""
        if self.probability == 0.0 or rng.random() >= self.probability:
            return clip
        channels, frames, height, width = clip.shape
        for _ in range(self.count):
            box = self._draw_box(height, width, rng)
            if box is None:
                continue
            top, left, h, w = box
            shape = {"const": (1, 1, 1, 1), "rand": (channels, 1, 1, 1), "pixel": (channels, frames, h, w)}[
                self.mode
            ]
            fill = np.zeros(shape) if self.mode == "const" else rng.standard_normal(shape)
            clip[:, :, top : top + h, left : left + w] = torch.from_numpy(fill.astype(np.float32))
        return clip

    def _draw_box(
        self, height: int, width: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int] | None:
        for _ in range(10):
            area = rng.uniform(0.02, 1 / 3) * height * width / self.count
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < h < height and 0 < w < width:
                return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
        return None
