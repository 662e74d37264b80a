"""The interface between the training loop and a method.

Shape legend: B samples, K classes.
"""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor
from yacs.config import CfgNode

from maskfeat.batch import Batch, StepOutput
from maskfeat.checkpoint.names import unwrapped
from maskfeat.checkpoint.weights import ReleasedModule
from maskfeat.masking import MaskSampler, mask_sampler, smallest_block
from maskfeat.models.base import Backbone
from maskfeat.pictures import Row
from maskfeat.registry import backbone_spec

BACKBONE = "backbone."


class Objective(ReleasedModule):
    """Base class of objectives: a backbone and the head and loss on top of it.

    Subclasses implement `forward`, and `predict` where they classify (`classifies = True`).
    """

    classifies: bool = False
    num_classes: int = 0
    backbone: Backbone

    def forward(self, batch: Batch) -> StepOutput:
        """Return the loss of a batch and detached metrics, each a mean over `weight(batch)` terms."""
        raise AssertionError("an objective implements forward")

    def prepare(self, batch: Batch) -> Batch:
        """Make random draws that span a batch.

        Called once per training step, on the device, before the batch is split into micro-batches.
        """
        return batch

    def weight(self, batch: Batch) -> Tensor:
        """Return over how many terms the loss of this batch is a mean: scalar float32 on the batch's device.

        Micro-batches and ranks are weighted by it, so that their number does not change the gradient of a step.
        """
        return batch.clip.new_full((), float(len(batch)))

    def predict(self, batch: Batch) -> Tensor:
        """Return (B, K) float32 probabilities, of each class by itself with DATA.MULTI_LABEL; where `classifies`."""
        raise AssertionError(f"{type(self).__name__} does not classify")

    def picture_rows(self, batch: Batch, mean: Sequence[float], std: Sequence[float]) -> Sequence[Row]:
        """Return rows that show what is predicted for a batch, beside what is true; none where nothing can be shown.

        Args:
            batch: on the device of the objective, with masks where the method samples them in the loader; normalised by
                `mean` and `std`.
            mean, std: of each colour channel.
        """
        return ()

    def released_name(self, name: str) -> str:
        """Return the name in released files of a parameter or buffer of this module."""
        return unwrapped(name).removeprefix(BACKBONE)

    def layer_id(self, released_name: str) -> int:
        """Return the layer for layer-wise learning rate decay; parameters outside the backbone are in the last."""
        return self.backbone.layer_id(released_name)


def can_be_read(values: Tensor) -> bool:
    """Return whether values can be read without waiting for a device: on the CPU, and not of a fake tensor."""
    return values.device.type == "cpu" and type(values) is Tensor


def sample_patches(cfg: CfgNode, grid: tuple[int, ...]) -> MaskSampler:
    """Return the sampler of hidden patches that the AUG.MASK_* keys describe, on a grid ([T,] H, W).

    It is the `mask_sampler` of objectives that hide patches.
    """
    aug = cfg.AUG
    return mask_sampler(
        grid,
        aug.MASK_RATIO,
        tube=aug.MASK_TUBE,
        frames=aug.MASK_FRAMES,
        max_block=aug.MAX_MASK_PATCHES_PER_BLOCK,
    )


def check_patch_masks(cfg: CfgNode) -> Iterator[str]:
    """Yield the problems of the keys that `sample_patches` reads, for the `check` of objectives that use it."""
    if not 0 <= cfg.AUG.MASK_RATIO < 1:
        yield f"AUG.MASK_RATIO must be at least 0 and below 1 for pre-training; given {cfg.AUG.MASK_RATIO:g}"
    if cfg.AUG.MASK_TUBE and cfg.AUG.MASK_FRAMES:
        yield "AUG.MASK_TUBE and AUG.MASK_FRAMES exclude each other; both are True"
    grid_of = backbone_spec(cfg).mask_grid
    if cfg.AUG.GEN_MASK_LOADER and grid_of is not None:
        yield from _check_mask_grid(cfg, grid_of(cfg))


def _check_mask_grid(cfg: CfgNode, grid: Sequence[int]) -> Iterator[str]:
    """Yield that no mask on a grid ([T,] H, W) would hide anything, though AUG.MASK_RATIO says that some do."""
    ratio, frames = cfg.AUG.MASK_RATIO, cfg.AUG.MASK_FRAMES
    hidden_of = grid[:1] if frames else grid[-2:] if cfg.AUG.MASK_TUBE else grid
    if not 0 < ratio < 1:
        return
    if not round(ratio * math.prod(hidden_of)):
        what = "frames" if frames else "patches"
        yield f"AUG.MASK_RATIO {ratio:g} of {math.prod(hidden_of)} {what} hides none of them: raise it, or set it to 0"
    smallest, largest = smallest_block(round(ratio * math.prod(grid))), cfg.AUG.MAX_MASK_PATCHES_PER_BLOCK
    if len(grid) == 2 and largest is not None and largest < smallest:
        yield (
            f"AUG.MAX_MASK_PATCHES_PER_BLOCK must be at least {smallest}, a fifth of the patches to hide, or masks "
            f"hide fewer than AUG.MASK_RATIO {ratio:g} says; given {largest}"
        )
    if not frames and min(grid[-2:]) < 2:
        yield (
            f"masks are drawn on a grid of {' x '.join(map(str, grid))}, and blocks are smaller than it: nothing would "
            "be hidden; raise DATA.TRAIN_CROP_SIZE, or for clips AUG.MASK_WINDOW_SIZE"
        )
