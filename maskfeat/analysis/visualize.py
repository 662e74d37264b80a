"""Pictures of what a trained model sees and predicts: `tools/visualize.py` calls `main`.

Shape legend: B samples, T frames, H x W pixels, grid = output tokens ([T',] H', W'), F values per token.
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from maskfeat.analysis.maps import HEADERS, MapRow, chosen, encoded, map_figure, map_rows, random_mask
from maskfeat.analysis.model import Model, load_model
from maskfeat.analysis.pictures import HogRow, SpectrumRow, grey_out, hog_figure, spectrum_figure, tokens_to_cells
from maskfeat.batch import Batch
from maskfeat.build import build_loader, build_mask_sampler, build_objective
from maskfeat.checkpoint.files import given_or_latest_checkpoint
from maskfeat.config import load_config
from maskfeat.config.arguments import ConfigParser
from maskfeat.engine.resume import load_to_evaluate
from maskfeat.errors import UserError, naming
from maskfeat.objectives.maskfeat import MaskFeat
from maskfeat.objectives.mfm import LUMA, MFM
from maskfeat.objectives.spectrum import inverse_spectrum, spectrum

logger = logging.getLogger(__name__)

KINDS = ("hog", "spectrum", *HEADERS)
SUFFIXES = (".png", ".gif", ".mp4")
FRAMES = 4
"""Rows of each clip in a PNG file."""


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


Rows = list[HogRow] | list[SpectrumRow] | list[MapRow]


def _predicted(model: Model, x: Tensor, what: str, caption: str, seed: int) -> Rows:
    """Return the rows of HOG or spectra that a pre-trained model predicts of one input."""
    objective, wanted = model.objective, {"hog": MaskFeat, "spectrum": MFM}[what]
    if not isinstance(objective, wanted):
        raise UserError(f"--what {what} needs a file pre-trained by {wanted.__name__}; {model.source} is none")
    mean, std = model.cfg.DATA.MEAN, model.cfg.DATA.STD
    sampler = build_mask_sampler(model.cfg)
    if sampler is None:
        raise UserError("AUG.GEN_MASK_LOADER is False in the config of the file: nothing is hidden")
    batch = Batch(x.unsqueeze(0), hidden=random_mask(sampler, seed))
    if isinstance(objective, MaskFeat):
        rows: Rows = hog_rows(objective, batch, mean, std, frames=len(x[0]))
    else:
        rows = spectrum_rows(objective, batch, mean, std)
    return [replace(row, caption=row.caption.replace("sample 0", caption)) for row in rows]  # type: ignore[return-value]


def rows_of(model: Model, path: str, what: str, block: int = -1, seed: int = 0) -> Rows:
    """Return what is drawn of an image (one row) or of a video (one for each frame or, of HOG, for each output frame).

    Args:
        model: on the CPU.
        path: of the input.
        what: one of `KINDS`.
        block: whose attention is drawn.
        seed: of the mask of "hog" and "spectrum".

    Raises:
        UserError: the input cannot be read, or the model has nothing of this kind.
    """
    x, caption = model.transform(path), Path(path).name
    if what in ("hog", "spectrum"):
        return _predicted(model, x, what, caption, seed)
    return map_rows(model, x, what, caption, to_pixels(x, model.cfg.DATA.MEAN, model.cfg.DATA.STD), block)


def _figure(rows: Rows, what: str, title: str) -> Image.Image:
    if what == "hog":
        return hog_figure(rows, title)  # type: ignore[arg-type]
    return spectrum_figure(rows, title) if what == "spectrum" else map_figure(rows, what, title)  # type: ignore[arg-type]


def draw(model: Model, paths: Sequence[str], what: str, suffix: str, block: int = -1) -> bytes:
    """Return a picture of inputs: a PNG, with up to `FRAMES` rows of each clip; or a GIF or an MP4 of all frames.

    Args:
        model: on the CPU.
        paths: of the inputs.
        what: one of `KINDS`.
        suffix: ".png", ".gif" or ".mp4"; the last two of videos alone.
        block: whose attention is drawn.
    """
    inputs = [rows_of(model, path, what, block) for path in paths]
    title = f"{what}: {Path(model.source).name}"
    if suffix == ".png":
        still: Rows = [rows[number] for rows in inputs for number in chosen(rows, FRAMES)]  # type: ignore[assignment]
        return encoded([_figure(still, what, title)], suffix)
    moments = [[rows[number] for rows in inputs] for number in range(len(inputs[0]))]
    return encoded([_figure(rows, what, title) for rows in moments], suffix)  # type: ignore[arg-type]


def _draw_inputs(checkpoint: str, cfg: str | None, paths: Sequence[str], what: str, output: Path, block: int) -> None:
    if output.suffix not in SUFFIXES:
        raise UserError(f"--output must end with {', '.join(SUFFIXES)}; given {output}")
    model = load_model(checkpoint, cfg, device="cpu")
    if output.suffix != ".png" and model.media == "image":
        raise UserError(f"--output {output}: the network takes images, of which PNG files are drawn")
    content = draw(model, paths, what, output.suffix, block)
    with naming(f"--output {output} cannot be written"):
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(content)


def _draw_validation(args: argparse.Namespace) -> Path:
    """Draw samples of the validation set that a recipe names, and return where."""
    if args.cfg is None:
        raise UserError("give --checkpoint and --input, or --cfg of a pre-training recipe")
    if args.num < 1:
        raise UserError(f"--num must be at least 1; given {args.num}")
    found = drawing(load_config(args.cfg, args.opts), args.num)
    output = Path(args.output or found.name)
    figure = found.figure(Path(found.path).name)
    with naming(f"--output {output} cannot be written"):
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.save(output)
    return output


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Draw what a checkpoint sees or predicts; return the exit code.

    Args:
        argv: the command line; None = sys.argv.
        prog: name of the command in its help.
    """
    parser = ConfigParser(
        prog=prog,
        description="Draw what a trained network sees in images and videos (--checkpoint, --input, --what), or the "
        "predictions of a pre-trained one on the validation set of its recipe (--cfg): HOG (MaskFeat), spectra (MFM).",
        epilog="With --cfg alone the checkpoint is TEST.CHECKPOINT_FILE_PATH, or else the newest one in OUTPUT_DIR.",
    )
    parser.add_cfg("a recipe: path of a YAML file or name below configs/", required=False)
    parser.add_argument("--checkpoint", metavar="FILE", help="file, address or published name of the weights")
    parser.add_argument("--input", nargs="+", metavar="FILE", help="images, or videos for a network of clips")
    parser.add_argument(
        "--what",
        choices=KINDS,
        default="attention",
        help="hog, spectrum: predicted where something is hidden; attention: of --block; rollout: through all blocks "
        "of a ViT; pca: principal components of the tokens (default: %(default)s)",
    )
    parser.add_argument("--block", type=int, default=-1, help="from 0, or from the end (default: %(default)s)")
    parser.add_argument("--output", metavar="FILE", help="PNG; with --input of videos GIF or MP4, too")
    parser.add_argument("--num", type=int, default=4, help="validation samples to draw (default: %(default)s)")
    parser.add_overrides("overrides")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if (args.checkpoint is None) != (args.input is None):
            raise UserError("--checkpoint and --input belong together: a file of weights, and what is shown to it")
        if args.checkpoint is None:
            output = _draw_validation(args)
        else:
            output = Path(args.output or f"{args.what}.png")
            _draw_inputs(args.checkpoint, args.cfg, args.input, args.what, output, args.block)
    except UserError as error:
        logger.error("error: %s", error)
        return 2
    logger.info("wrote %s", output)
    return 0
