"""Pictures of what a trained model sees and predicts: `tools/visualize.py` calls `main`."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from maskfeat.analysis.command import exit_code, refuse_input
from maskfeat.analysis.maps import HEADERS, MapRow, chosen, encoded, map_figure, map_rows, random_mask
from maskfeat.analysis.model import Model, load_model
from maskfeat.batch import Batch
from maskfeat.build import build_loader, build_mask_sampler, build_objective
from maskfeat.checkpoint.files import given_or_latest_checkpoint
from maskfeat.config import load_config
from maskfeat.config.arguments import ConfigParser
from maskfeat.data.datasets.base import NoValidation
from maskfeat.engine.pictures import predicted_rows
from maskfeat.engine.resume import load_to_evaluate
from maskfeat.errors import UserError, naming
from maskfeat.file_io import draft_of, replace_bytes
from maskfeat.objectives.base import Objective
from maskfeat.objectives.maskfeat import MaskFeat
from maskfeat.objectives.mfm import MFM
from maskfeat.objectives.predictions import hog_rows, spectrum_rows, to_pixels
from maskfeat.pictures import HogRow, Row, predictions_figure

logger = logging.getLogger(__name__)

KINDS = ("hog", "spectrum", *HEADERS)
SUFFIXES = (".png", ".gif", ".mp4")
FRAMES = 4
"""Rows of each clip in a PNG file."""


def _pretrained(cfg: CfgNode) -> tuple[Objective, str]:
    """Return the objective with its weights loaded, and the path of the checkpoint.

    The checkpoint is TEST.CHECKPOINT_FILE_PATH, or else the newest one in OUTPUT_DIR.
    """
    objective = build_objective(cfg)
    if objective.classifies:
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
    """Rows that show predictions, and the checkpoint that made them."""

    rows: list[Row]
    path: str

    @property
    def name(self) -> str:
        """The default file name of the image."""
        return "hog_predictions.png" if isinstance(self.rows[0], HogRow) else "spectrum_predictions.png"

    def figure(self, title: str) -> Image.Image:
        """Return the image."""
        return predictions_figure(self.rows, title)


def drawing(cfg: CfgNode, number: int) -> Drawing:
    """Predict `number` samples, spread evenly over the validation set or, where there is none, the training
    set, with the pre-trained model of a config.

    Raises:
        UserError: the config is of a classifier, there is no checkpoint that fits, the data cannot be read, or nothing
            is predicted of the samples.
    """
    objective, path = _pretrained(cfg)
    try:
        loader = build_loader(cfg, "val")
    except NoValidation:
        loader = build_loader(cfg, "train", plain=True)
    rows = predicted_rows(objective, loader, number, cfg.DATA.MEAN, cfg.DATA.STD)
    if not rows:
        raise UserError(
            f"{cfg.MODEL.MODEL_NAME} shows no predictions of the chosen samples, or none of them can be read"
        )
    return Drawing(rows, path)


def _predicted(model: Model, x: Tensor, what: str, caption: str, seed: int) -> Sequence[Row]:
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
        rows: Sequence[Row] = hog_rows(objective, batch, mean, std, frames=len(x[0]))
    else:
        assert isinstance(objective, MFM)
        rows = spectrum_rows(objective, batch, mean, std)
    return [replace(row, caption=row.caption.replace("sample 0", caption)) for row in rows]


def rows_of(model: Model, path: str, what: str, block: int = -1, seed: int = 0) -> Sequence[Row | MapRow]:
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


def _figure(rows: Sequence[Any], what: str, title: str) -> Image.Image:
    return map_figure(rows, what, title) if what in HEADERS else predictions_figure(rows, title)


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
        still = [rows[number] for rows in inputs for number in chosen(rows, FRAMES)]
        return encoded([_figure(still, what, title)], suffix)
    moments = [[rows[number] for rows in inputs] for number in range(len(inputs[0]))]
    return encoded([_figure(rows, what, title) for rows in moments], suffix)


def _draw_inputs(args: argparse.Namespace) -> Path:
    """Draw what --checkpoint makes of --input, and return where."""
    what = args.what or "attention"
    output = Path(args.output or f"{what}.png")
    if args.num is not None:
        raise UserError(f"--num {args.num} is of --cfg without --input: all of --input is drawn")
    if args.block is not None and what != "attention":
        raise UserError(f"--block {args.block} is of --what attention; given --what {what}")
    if output.suffix not in SUFFIXES:
        raise UserError(f"--output must end with {', '.join(SUFFIXES)}; given {output}")
    if args.opts and args.cfg is None:
        raise UserError(f"overrides change the recipe of --cfg, and none is given: {' '.join(args.opts)}")
    refuse_input(output, [*args.input, args.checkpoint])
    cfg = None if args.cfg is None else load_config(args.cfg, args.opts)
    model = load_model(args.checkpoint, cfg, device="cpu")
    if output.suffix != ".png" and model.media == "image":
        raise UserError(f"--output {output}: the network takes images, of which PNG files are drawn")
    content = draw(model, args.input, what, output.suffix, -1 if args.block is None else args.block)
    with naming(f"--output {output} cannot be written"):
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(output, content)
    return output


def _draw_validation(args: argparse.Namespace) -> Path:
    """Draw samples of the validation set that a recipe names, and return where."""
    if args.cfg is None:
        raise UserError("give --checkpoint and --input, or --cfg of a pre-training recipe")
    if args.what is not None or args.block is not None:
        raise UserError("--what and --block need --checkpoint and --input: a recipe says what its network predicts")
    number = 4 if args.num is None else args.num
    if number < 1:
        raise UserError(f"--num must be at least 1; given {number}")
    # What Pillow writes is known once its extensions were asked for.
    form = Image.registered_extensions().get(Path(args.output).suffix.lower()) if args.output else "PNG"
    if args.output and form not in Image.SAVE:
        raise UserError(f"--output must end with .png, or as another picture that Pillow writes; given {args.output}")
    found = drawing(load_config(args.cfg, args.opts), number)
    output = Path(args.output or found.name)
    figure = found.figure(Path(found.path).name)
    with naming(f"--output {output} cannot be written"):
        output.parent.mkdir(parents=True, exist_ok=True)
        with draft_of(output) as draft:
            figure.save(draft, form)
    return output


def _visualize(args: argparse.Namespace) -> int:
    """Do what the command line says."""
    if (args.checkpoint is None) != (args.input is None):
        raise UserError("--checkpoint and --input belong together: a file of weights, and what is shown to it")
    output = _draw_validation(args) if args.checkpoint is None else _draw_inputs(args)
    logger.info("wrote %s", output)
    return 0


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
        epilog="With --cfg alone the checkpoint is TEST.CHECKPOINT_FILE_PATH, or else the newest one in OUTPUT_DIR. "
        "example: %(prog)s --checkpoint maskfeat_vit_base_in1k --input photo.jpg --what attention --output seen.png",
    )
    parser.add_cfg("a recipe: path of a YAML file or name below configs/", required=False)
    parser.add_argument("--checkpoint", metavar="FILE", help="file, address or published name of the weights")
    parser.add_argument("--input", nargs="+", metavar="FILE", help="images, or videos for a network of clips")
    parser.add_argument(
        "--what",
        choices=KINDS,
        help="hog, spectrum: predicted where something is hidden; attention: of --block; rollout: through all blocks "
        "of a ViT; pca: principal components of the tokens (default: attention)",
    )
    parser.add_argument("--block", type=int, help="of --what attention, from 0, or from the end (default: -1)")
    parser.add_argument("--output", metavar="FILE", help="PNG; with --input of videos GIF or MP4, too")
    parser.add_argument("--num", type=int, help="validation samples to draw of --cfg without --input (default: 4)")
    parser.add_overrides("overrides of the recipe")
    args = parser.parse_args(argv)
    return exit_code(lambda: _visualize(args))
