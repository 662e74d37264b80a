"""Images of the predictions of a pre-trained model: `tools/visualize.py` calls `main`.

Shape legend: B samples, T frames, H x W pixels, grid = output tokens ([T',] H', W'), F values per token.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from maskfeat.analysis.pictures import HogRow, SpectrumRow, grey_out, hog_figure, spectrum_figure, tokens_to_cells
from maskfeat.batch import Batch
from maskfeat.build import build_loader, build_objective
from maskfeat.checkpoint.files import given_or_latest_checkpoint
from maskfeat.config import load_config
from maskfeat.config.arguments import ConfigParser
from maskfeat.engine.resume import load_to_evaluate
from maskfeat.errors import UserError, naming
from maskfeat.objectives.maskfeat import MaskFeat
from maskfeat.objectives.mfm import LUMA, MFM
from maskfeat.objectives.spectrum import inverse_spectrum, spectrum

logger = logging.getLogger(__name__)


def to_pixels(clip: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Convert a normalised clip (3, [T,] H, W) to pixels (T, H, W, 3) uint8; an image has one frame."""
    frames = clip if clip.dim() == 4 else clip.unsqueeze(1)
    shape = (3, 1, 1, 1)
    unit = frames * torch.tensor(std).reshape(shape) + torch.tensor(mean).reshape(shape)
    return (unit.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()


@torch.no_grad()
def hog_rows(
    objective: MaskFeat, batch: Batch, mean: Sequence[float], std: Sequence[float], frames: int = 2
) -> list[HogRow]:
    """Return the rows of `hog_figure` for a batch: one per image, `frames` (at most T') per clip.

    Args:
        objective: on the CPU.
        batch: with masks; clips normalised by `mean` and `std`.
        mean, std: of each colour channel.
        frames: output frames to draw of each clip, spread evenly.
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
        pixels = to_pixels(batch.clip[sample], mean, std)
        steps = np.unique(np.linspace(0, on_grid[1] - 1, min(frames, on_grid[1])).round().astype(int))
        for step in steps:
            real, guess = (
                tokens_to_cells(tokens.reshape(*on_grid, -1)[sample, step].numpy(), objective.bins, objective.cells)
                for tokens in (target, predicted)
            )
            mask = hidden.reshape(on_grid)[sample, step].numpy()
            frame = int(step) * objective.backbone.frame_stride
            index = int(batch.index[sample]) if batch.index is not None else sample
            caption = f"sample {index}" + (f", frame {frame}" if len(grid) == 3 else "")
            rows.append(HogRow(pixels[frame], grey_out(pixels[frame], mask), real, guess, mask, caption))
    return rows


@torch.no_grad()
def spectrum_rows(objective: MFM, batch: Batch, mean: Sequence[float], std: Sequence[float]) -> list[SpectrumRow]:
    """Return the rows of `spectrum_figure` for a batch of images; spectra are averaged over colours.

    Args:
        objective: on the CPU.
        batch: normalised by `mean` and `std`; where it has no masks, they are sampled.
        mean, std: of each colour channel.
    """
    objective.eval()
    batch = objective.prepare(batch)
    removed, seen, target = objective.inputs(batch)
    prediction = objective.predict_image(seen).float()
    masks, real, guess = removed.whole(), spectrum(target), spectrum(prediction)
    together = inverse_spectrum(torch.where(masks, guess, real)).real
    if objective.target_channels == 1:  # undo the normalisation of the grey image
        luma, scale = torch.tensor(LUMA), torch.tensor(std)
        grey_std = 1 / float((luma / scale).sum())
        grey_mean = float((luma * torch.tensor(mean) / scale).sum()) * grey_std
        target_scale: tuple[Sequence[float], Sequence[float]] = (grey_mean,) * 3, (grey_std,) * 3
        prediction, together = prediction.expand(-1, 3, -1, -1), together.expand(-1, 3, -1, -1)
    else:
        target_scale = mean, std
    rows = []
    for i in range(len(batch)):
        image, filtered = (to_pixels(clip[i], mean, std)[0] for clip in (batch.clip, seen))
        guessed, whole = (to_pixels(clip[i], *target_scale)[0] for clip in (prediction, together))
        magnitudes = [values[i].abs().mean(dim=0).numpy() for values in (real, guess)]
        index = int(batch.index[i]) if batch.index is not None else i
        mask = masks[i, 0].numpy()
        rows.append(SpectrumRow(image, filtered, magnitudes[0], mask, guessed, magnitudes[1], whole, f"sample {index}"))
    return rows


def _pretrained(cfg: CfgNode) -> tuple[MaskFeat | MFM, str]:
    """Return the objective with its weights loaded, and the path of the checkpoint.

    The checkpoint is TEST.CHECKPOINT_FILE_PATH, or else the newest one in OUTPUT_DIR.
    """
    objective = build_objective(cfg)
    if not isinstance(objective, MaskFeat | MFM):
        raise UserError(
            f"MODEL.MODEL_NAME is {cfg.MODEL.MODEL_NAME}, expected MaskMViT or MFM: only pre-training predicts features"
        )
    found = given_or_latest_checkpoint(cfg.TEST.CHECKPOINT_FILE_PATH, cfg.OUTPUT_DIR, cfg.TASK, cfg.MODEL.MODEL_NAME)
    if found is None:
        raise UserError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} has no checkpoint of this recipe: give TEST.CHECKPOINT_FILE_PATH")
    path, content = found
    load_to_evaluate(cfg, objective, str(path), content)
    return objective, str(path)


@dataclass(frozen=True)
class Drawing:
    """Rows of an image, either of HOG or of spectra, and the checkpoint that made the predictions."""

    hog: list[HogRow]
    spectra: list[SpectrumRow]
    path: str

    @property
    def name(self) -> str:
        """The default file name of the image."""
        return "hog_predictions.png" if self.hog else "spectrum_predictions.png"

    def figure(self, title: str) -> Image.Image:
        """Return the image."""
        return hog_figure(self.hog, title) if self.hog else spectrum_figure(self.spectra, title)


def drawing(cfg: CfgNode, number: int) -> Drawing:
    """Predict `number` samples, spread evenly over the validation set, with the pre-trained model of a config."""
    objective, path = _pretrained(cfg)
    loader = build_loader(cfg, "val")
    chosen = np.unique(np.linspace(0, len(loader.labels) - 1, number).round().astype(int))
    found = Drawing([], [], path)
    for batch in loader.iter_samples(chosen.tolist()):
        if isinstance(objective, MaskFeat):
            found.hog.extend(hog_rows(objective, batch, cfg.DATA.MEAN, cfg.DATA.STD))
        else:
            found.spectra.extend(spectrum_rows(objective, batch, cfg.DATA.MEAN, cfg.DATA.STD))
    return found


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Draw the predictions of a checkpoint into a PNG file; return the exit code.

    Args:
        argv: the command line; None = sys.argv.
        prog: name of the command in its help.
    """
    parser = ConfigParser(
        prog=prog,
        description="Draw the predictions of a pre-trained checkpoint beside its inputs and targets: HOG (MaskFeat) or "
        "spectra (MFM).",
        epilog="The checkpoint is TEST.CHECKPOINT_FILE_PATH, or else the newest one in OUTPUT_DIR.",
    )
    parser.add_cfg("a pre-training recipe: path of a YAML file or name below configs/")
    parser.add_argument("--output", metavar="PNG", help="default: hog_predictions.png or spectrum_predictions.png")
    parser.add_argument("--num", type=int, default=4, help="validation samples to draw (default: %(default)s)")
    parser.add_overrides("overrides")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if args.num < 1:
            raise UserError(f"--num must be at least 1; given {args.num}")
        found = drawing(load_config(args.cfg, args.opts), args.num)
        output = Path(args.output or found.name)
        figure = found.figure(Path(found.path).name)
        with naming(f"--output {output} cannot be written"):
            output.parent.mkdir(parents=True, exist_ok=True)
            figure.save(output)
    except UserError as error:
        logger.error("error: %s", error)
        return 2
    logger.info("wrote %s", output)
    return 0
