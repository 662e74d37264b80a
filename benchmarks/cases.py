"""What is measured: configs from recipes and options, batches, and files of the size of the real ones."""

import contextlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from yacs.config import CfgNode

from maskfeat.batch import Batch, most_hidden
from maskfeat.build import build_mask_sampler
from maskfeat.config import load_config
from maskfeat.config.recipes import CONFIG_ROOT
from maskfeat.data.rng import draw_mask
from maskfeat.demos.scenes import MOTIONS, SHAPES
from maskfeat.demos.synthetic import make_clips, make_images
from maskfeat.registry import dataset_spec

CONFIGS = CONFIG_ROOT
VIT_B = "masked_ssl/in1k_VIT_B_MaskFeat_PT.yaml"
VIT_L = "masked_ssl/in1k_VIT_L_MaskFeat_PT.yaml"
MVIT_S = "masked_ssl/k400_MVITv2_S_16x4_MaskFeat_PT.yaml"
MVIT_L = "masked_ssl/k400_MVITv2_L_16x4_MaskFeat_PT.yaml"
RESNET_50 = "mfm/in1k_R50_MFM_PT.yaml"

IMAGE_SIZE = (375, 500)  # height and width of a typical ImageNet file
CLIP_SIZE = (256, 340)
CLIP_FRAMES = 300  # ten seconds, as in Kinetics


@dataclass(frozen=True)
class Options:
    """The command line, see `cli`.

    Attributes:
        cfg: a recipe; None = those that a measurement is about.
        opts: KEY VALUE overrides, after everything that is set here.
        batch: samples; None = what suits a measurement.
        files: how many files are made where there are none; None = what suits a measurement.
        steps: of whole recipes that are timed, at most.
        seconds: after which no further ones are begun.
        folder: where they are made, and the outputs of runs.
    """

    device: torch.device
    cfg: str | None = None
    data: str | None = None
    repeats: int = 5
    batch: int | None = None
    files: int | None = None
    steps: int = 200
    seconds: float = math.inf
    compile: bool = False
    opts: tuple[str, ...] = ()
    folder: str = field(default="", compare=False)

    def recipe(self, default: str, batch: int, *settings: str) -> CfgNode:
        """The config of a measurement: the recipe, then `settings`, then the command line's overrides."""
        fixed = [
            "NUM_GPUS", str(int(self.device.type == "cuda")), "OUTPUT_DIR", self.folder or "benchmark",
            "TRAIN.BATCH_SIZE", str(self.batch or batch),
        ]  # fmt: skip
        path = self.cfg or str(CONFIGS / default)
        if self.compile:
            fixed += ["TRAIN.COMPILE", "True"]
        return load_config(path, [*fixed, *settings, *self.opts])


@contextlib.contextmanager
def scratch() -> Iterator[str]:
    """A folder for files and outputs that are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="maskfeat-benchmark-") as folder:
        yield folder


def image_data(options: Options, files: int) -> list[str]:
    """Overrides that lead to images in ImageNet's layout: those of --data, or as many as asked for, made now."""
    if options.data and (Path(options.data) / "train").is_dir():
        return ["DATA.PATH_TO_DATA_DIR", options.data]
    number = max((options.files or files) // 2, 1)
    root = Path(options.folder) / f"images_{number}"
    make_images(root, SHAPES[:2], train_per_class=number, val_per_class=1, size=IMAGE_SIZE)
    return ["DATA.PATH_TO_DATA_DIR", str(root)]


def clip_data(options: Options, files: int) -> list[str]:
    """Overrides that lead to clips in Kinetics' layout: those of --data, or as many as asked for, made now."""
    if options.data and (Path(options.data) / "train.csv").is_file():
        return ["DATA.PATH_TO_DATA_DIR", options.data, "DATA.PATH_PREFIX", options.data]
    number = max((options.files or files) // 2, 1)
    root = Path(options.folder) / f"clips_{number}"
    counts: dict[str, Any] = {"train_per_class": number, "val_per_class": 1, "test_per_class": 1}
    make_clips(root, MOTIONS[:2], num_frames=CLIP_FRAMES, size=CLIP_SIZE, **counts)
    return ["DATA.PATH_TO_DATA_DIR", str(root), "DATA.PATH_PREFIX", str(root)]


def data_for(cfg: CfgNode, options: Options, images: int, clips: int) -> list[str]:
    """One of the two, as the recipe has it."""
    if dataset_spec(cfg, "TRAIN").media == "image":
        return image_data(options, images)
    return clip_data(options, clips)


def clip_shape(cfg: CfgNode) -> tuple[int, ...]:
    """(3, [T,] H, W) of what goes into the model."""
    side = cfg.DATA.TRAIN_CROP_SIZE
    frames = () if dataset_spec(cfg, "TRAIN").media == "image" else (cfg.DATA.NUM_FRAMES,)
    return (3, *frames, side, side)


def hidden_of(cfg: CfgNode, index: int) -> Tensor | None:
    """The mask of a sample, as the loader draws it in the first epoch."""
    return draw_mask(build_mask_sampler(cfg), cfg.RNG_SEED, 0, index, 0)


def normalised(pixels: Tensor, cfg: CfgNode) -> Tensor:
    """(B, 3, ...) of 0 to 1 as the model is given it."""
    shape = (3,) + (1,) * (pixels.dim() - 2)
    mean, std = (torch.tensor(values).view(shape) for values in (cfg.DATA.MEAN, cfg.DATA.STD))
    return (pixels - mean) / std


def random_batch(cfg: CfgNode, device: torch.device) -> Batch:
    """A batch of random pixels with the recipe's masks, on the device.

    Pixels are whole multiples of 1/32 from -2 to 2: sums of them are exact in float32, so that no bin of a HOG target
    hangs on the order in which a gradient is added up.
    """
    size = cfg.TRAIN.BATCH_SIZE
    draw = torch.Generator().manual_seed(cfg.RNG_SEED)
    pixels = torch.randint(-64, 65, (size, *clip_shape(cfg)), generator=draw) / 32
    masks = [mask for mask in (hidden_of(cfg, index) for index in range(size)) if mask is not None]
    batch = Batch(
        clip=pixels,
        label=torch.zeros(size, dtype=torch.int64),
        hidden=torch.stack(masks) if masks else None,
        index=torch.arange(size),
        max_hidden=most_hidden(masks),
    )
    return batch.to(device)
