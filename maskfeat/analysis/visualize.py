"""Images of the predictions of a pre-trained model: `tools/visualize.py` calls `main`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from yacs.config import CfgNode

from maskfeat.build import build_loader, build_objective
from maskfeat.checkpoint.files import given_or_latest_checkpoint
from maskfeat.config import load_config
from maskfeat.config.arguments import ConfigParser
from maskfeat.engine.pictures import predicted_rows
from maskfeat.engine.resume import load_to_evaluate
from maskfeat.errors import UserError, naming
from maskfeat.objectives.base import Objective
from maskfeat.pictures import HogRow, Row, predictions_figure

logger = logging.getLogger(__name__)


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
    """Predict `number` samples, spread evenly over the validation set, with the pre-trained model of a config."""
    objective, path = _pretrained(cfg)
    rows = predicted_rows(objective, build_loader(cfg, "val"), number, cfg.DATA.MEAN, cfg.DATA.STD)
    if not rows:
        raise UserError(
            f"{cfg.MODEL.MODEL_NAME} shows no predictions of the chosen samples, or none of them can be read"
        )
    return Drawing(rows, path)


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
