"""Pictures of what a pre-trained model predicts: `tools/visualize.py` calls `main`.

Shape legend: B samples, T frames, H x W pixels, grid = output tokens ([T',] H', W'), F numbers a token.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from maskfeat.batch import Batch
from maskfeat.build import build_loader, build_objective
from maskfeat.checkpoint import given_or_last, model_state
from maskfeat.config import load_config
from maskfeat.objectives.maskfeat import MaskFeat
from maskfeat.picture import HogRow, grey_out, hog_figure, tokens_to_cells

logger = logging.getLogger(__name__)


def to_pixels(clip: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """A normalised clip (3, [T,] H, W) -> (T, H, W, 3) uint8; an image is one frame."""
    frames = clip if clip.dim() == 4 else clip.unsqueeze(1)
    shape = (3, 1, 1, 1)
    unit = frames * torch.tensor(std).reshape(shape) + torch.tensor(mean).reshape(shape)
    return (unit.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()


@torch.no_grad()
def hog_rows(
    objective: MaskFeat, batch: Batch, mean: Sequence[float], std: Sequence[float], frames: int = 2
) -> list[HogRow]:
    """Rows of `hog_figure` for a batch: one for an image, `frames` (at most T') for a clip.

    Args:
        objective: on the CPU.
        batch: with masks; clips normalised by `mean` and `std`.
    """
    objective.eval()
    hidden = objective.hidden_tokens(batch)
    prediction, _ = objective.predict_hidden(batch)
    target = objective.target(batch.clip)
    predicted = torch.zeros_like(target)
    predicted[hidden] = prediction.float()
    grid = objective.backbone.grid
    on_grid = (len(batch), *((1,) * (3 - len(grid))), *grid)
    rows = []
    for sample in range(len(batch)):
        pictures = to_pixels(batch.clip[sample], mean, std)
        steps = np.unique(np.linspace(0, on_grid[1] - 1, min(frames, on_grid[1])).round().astype(int))
        for step in steps:
            real, guess = (
                tokens_to_cells(tokens.reshape(*on_grid, -1)[sample, step].numpy(), objective.bins, objective.cells)
                for tokens in (target, predicted)
            )
            mask = hidden.reshape(on_grid)[sample, step].numpy()
            frame = int(step) * objective.backbone.frame_stride
            place = int(batch.index[sample]) if batch.index is not None else sample
            caption = f"sample {place}" + (f", frame {frame}" if len(grid) == 3 else "")
            rows.append(HogRow(pictures[frame], grey_out(pictures[frame], mask), real, guess, mask, caption))
    return rows


def _pretrained(cfg: CfgNode) -> tuple[MaskFeat, str]:
    """The objective with TEST.CHECKPOINT_FILE_PATH, or else the last checkpoint of OUTPUT_DIR; and that file."""
    objective = build_objective(cfg)
    if not isinstance(objective, MaskFeat):
        raise ValueError(
            f"MODEL.MODEL_NAME is {cfg.MODEL.MODEL_NAME}, expected MaskMViT: only pre-training predicts features"
        )
    found = given_or_last(cfg.TEST.CHECKPOINT_FILE_PATH, cfg.OUTPUT_DIR, cfg.TASK, cfg.MODEL.MODEL_NAME)
    if found is None:
        raise ValueError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR} has no checkpoint of this recipe: give TEST.CHECKPOINT_FILE_PATH"
        )
    path, content = found
    objective.load_released_state(model_state(content))
    return objective, str(path)


def pictured_rows(cfg: CfgNode, number: int) -> tuple[list[HogRow], str]:
    """Rows for `number` samples spread over the validation set, and the checkpoint that they come from."""
    objective, path = _pretrained(cfg)
    loader = build_loader(cfg, "val")
    chosen = np.unique(np.linspace(0, len(loader.labels) - 1, number).round().astype(int))
    rows = []
    for batch in loader.some(chosen.tolist()):
        rows += hog_rows(objective, batch, cfg.DATA.MEAN, cfg.DATA.STD)
    return rows, path


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the picture; the exit code."""
    parser = argparse.ArgumentParser(
        description="Draw input, what the model saw, HOG target and HOG predicted for a pre-trained checkpoint.",
        epilog="The checkpoint is TEST.CHECKPOINT_FILE_PATH, or else the last one in OUTPUT_DIR.",
    )
    parser.add_argument("--cfg", required=True, metavar="FILE", help="the YAML of a pre-training recipe")
    parser.add_argument("--output", default="hog_predictions.png", metavar="PNG", help="default: %(default)s")
    parser.add_argument("--num", type=int, default=4, help="validation samples to draw (default: %(default)s)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        cfg = load_config(args.cfg, args.opts)
        rows, path = pictured_rows(cfg, args.num)
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        hog_figure(rows, title=Path(path).name).save(args.output)
    except (ValueError, OSError) as error:
        logger.error("error: %s", error)
        return 2
    logger.info("wrote %s", args.output)
    return 0
