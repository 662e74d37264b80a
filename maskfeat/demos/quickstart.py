"""The quickstart: pre-train, fine-tune and test small models on synthetic data, and report a table and two images.

Everything is written to one folder. Each stage logs the command that a user would type for it.
"""

import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskfeat.analysis.references import MODEL, PLACE, RIDGE, ZERO, references_of, share
from maskfeat.analysis.visualize import Drawing, drawing
from maskfeat.checkpoint.files import find_checkpoints
from maskfeat.config import load_config
from maskfeat.config.arguments import ConfigParser
from maskfeat.config.recipes import CONFIG_ROOT
from maskfeat.config.yaml_io import read_entries
from maskfeat.demos.commands import train_command
from maskfeat.demos.synthetic import is_made_here, make_clips, make_images
from maskfeat.distributed.preemption import end_interrupted, was_interrupted
from maskfeat.engine.log_handlers import screen_handler
from maskfeat.engine.metrics_log import last_json_stats
from maskfeat.engine.owner import LOCK
from maskfeat.engine.run import main as run_net
from maskfeat.errors import UserError, naming
from maskfeat.file_io import unexpanded_path
from maskfeat.pictures import predictions_figure
from maskfeat.progress import close_lines

logger = logging.getLogger(__name__)

CONFIGS = CONFIG_ROOT / "quickstart"


@dataclass(frozen=True)
class Part:
    """One model of the quickstart: a description, the folders of its data, and its number of classes."""

    what: str
    data: str
    labelled: str
    classes: int


TEXTURES = {"images": "stripes", "images_few": "mixed", "clips": "stripes", "clips_few": "mixed"}
"""Textures of each set. Of stripes, which run on behind what is hidden, a small model learns in minutes to predict it;
labels are few, and on faint textures shapes are told apart with few.
"""

PARTS = {
    "images": Part("ViT on images: MaskFeat", "images", "images_few", 8),
    "clips": Part("MViTv2 on clips: MaskFeat", "clips", "clips_few", 6),
    "mfm": Part("ResNet on images: MFM", "images", "images_few", 8),
}


STAGES = 1 + 3 * len(PARTS)


@dataclass(frozen=True)
class Size:
    """Amount of data, in files per class, the seed of data and runs, and overrides for every run."""

    images: int = 120
    labelled: int = 20
    image_tests: int = 40
    clips: int = 40
    clip_tests: int = 20
    seed: int = 0
    opts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """Accuracy on `number` test samples: `share` of them are classified correctly."""

    share: float
    number: int

    @property
    def error(self) -> float:
        """Binomial standard error of the accuracy."""
        return math.sqrt(self.share * (1 - self.share) / self.number)

    def __str__(self) -> str:
        return f"{100 * self.share:5.1f} % +- {100 * self.error:.1f}"


def say(text: str) -> None:
    """Print a headline between the runs; it is written to none of their log files."""
    logger.info("\n== %s", text)


class Quickstart:
    """The stages of the quickstart.

    Args:
        root: the folder for data and runs.
        size: how much data to make, and overrides.
    """

    def __init__(self, root: Path, size: Size) -> None:
        self.root, self.size = root, size
        self.started = time.monotonic()

    def clear(self) -> None:
        """Remove the data and the runs of an earlier quickstart, and nothing else that is in the folder.

        Raises:
            UserError: where they would be is something that no quickstart made, or it cannot be removed; in the first
                case nothing is removed.
        """
        data = [self.root / "data" / name for name in TEXTURES]
        stages = ("pt", "ft", "scratch")
        runs = {self.root / f"{kind}_{stage}": part for kind, part in PARTS.items() for stage in stages}
        made = [path for path in data if is_made_here(path)]
        made += [path for path, part in runs.items() if _trained_on(path, (part.data, part.labelled))]
        for path in (*data, *runs):
            # A run that ended before it began leaves its lock, and nothing to continue.
            if path not in made and not (path / LOCK).is_file() and _holds_something(path):
                raise UserError(
                    f"--fresh would delete {path}, which no quickstart made: move it away, or give another --output"
                )
        for path in made:
            with naming(f"{path} cannot be removed"):
                shutil.rmtree(path)

    def make_data(self) -> None:
        """Write the images for pre-training, the labelled images, and the clips."""
        data, size = self.root / "data", self.size
        say(f"1/{STAGES} rendering images and H.264 clips into {data}")
        for name, number in (("images", size.images), ("images_few", size.labelled)):
            make_images(
                data / name,
                train_per_class=number,
                val_per_class=size.image_tests,
                seed=size.seed,
                texture=TEXTURES[name],
            )
        for name, tests in (("clips", 1), ("clips_few", size.clip_tests)):
            make_clips(
                data / name,
                train_per_class=size.clips,
                val_per_class=size.clip_tests // 2,
                test_per_class=tests,
                size=(80, 80),
                seed=size.seed,
                texture=TEXTURES[name],
            )

    def opts(self, config: str, output: str) -> list[str]:
        """Return the overrides that point a run to its data and output folder."""
        kind, stage = config.split("_")
        part = PARTS[kind]
        data = unexpanded_path(str(self.root / "data" / (part.data if stage == "pt" else part.labelled)))
        paths = ["DATA.PATH_TO_DATA_DIR", data, "OUTPUT_DIR", unexpanded_path(str(self.root / output))]
        if kind == "clips":
            paths += ["DATA.PATH_PREFIX", data]
        return [*paths, "RNG_SEED", str(self.size.seed), *self.size.opts]

    def run(self, headline: str, config: str, output: str, *extra: str) -> None:
        """Run one stage; an error ends the quickstart."""
        opts = [*self.opts(config, output), *extra]
        say(f"{headline}\n   {train_command(f'quickstart/{config}.yaml', opts)}")
        code = run_net(["--cfg", str(CONFIGS / f"{config}.yaml"), *opts])
        if code:
            raise SystemExit(code)

    def last_checkpoint(self, output: str) -> str:
        """Return the last checkpoint of a pre-training run."""
        return str(find_checkpoints(self.root / output, "pt")[-1])

    def last(self, output: str, kind: str) -> dict[str, Any]:
        """Return the last metrics of one kind that a run logged; UserFileError if there are none."""
        return last_json_stats(self.root / output / "stdout.log", kind)

    def run_all(self) -> None:
        """Run all stages in order."""
        self.make_data()
        for number, (kind, part) in zip(range(2, STAGES, 3), PARTS.items(), strict=True):
            self.run(f"{number}/{STAGES} pre-training a small {part.what}", f"{kind}_pt", f"{kind}_pt")
            weights = unexpanded_path(self.last_checkpoint(f"{kind}_pt"))
            self.run(
                f"{number + 1}/{STAGES} fine-tuning and testing it",
                f"{kind}_ft",
                f"{kind}_ft",
                "TRAIN.CHECKPOINT_FILE_PATH",
                weights,
            )
            self.run(
                f"{number + 2}/{STAGES} training from scratch, without the pre-trained weights",
                f"{kind}_ft",
                f"{kind}_scratch",
            )

    def drawing(self, kind: str, number: int) -> Drawing:
        """Return the predictions of a pre-trained model for `number` held-out samples."""
        return drawing(load_config(CONFIGS / f"{kind}_pt.yaml", self.opts(f"{kind}_pt", f"{kind}_pt")), number)

    def draw(self) -> list[Path]:
        """Write hog_predictions.png (images and clip frames) and spectrum_predictions.png (images)."""
        title = "Quickstart: held-out samples"
        hog = self.drawing("images", 4).rows + self.drawing("clips", 2).rows
        figures = {
            "hog_predictions.png": predictions_figure(hog, title),
            "spectrum_predictions.png": self.drawing("mfm", 4).figure(title),
        }
        for name, figure in figures.items():
            figure.save(self.root / name)
        return [self.root / name for name in figures]

    def references(self, kind: str) -> dict[str, float]:
        """Return the held-out loss of a pre-trained model and of simple predictors, see `references_of`."""
        cfg = load_config(CONFIGS / f"{kind}_pt.yaml", self.opts(f"{kind}_pt", f"{kind}_pt"))
        return references_of(self.last_checkpoint(f"{kind}_pt"), cfg)

    def outcome(self, output: str) -> Outcome:
        """Return the accuracy of the last test of a run."""
        tested = self.last(output, "test_final")
        return Outcome(float(tested["top1"]) / 100, int(tested["samples"]))

    def table(self) -> str:
        """Return the results as a table in plain text."""
        columns = (("zero", ZERO), ("mean by place", PLACE), ("linear model", RIDGE), ("held-out", MODEL))
        lines = [f"{'':<18}" + "".join(f"{name:>15}" for name, _ in columns) + "   loss on hidden patches"]
        for kind in PARTS:
            losses = self.references(kind)
            lines.append(f"{kind:<18}" + "".join(f"{losses[key]:>15.4f}" for _, key in columns))
            lines.append(f"  {learned(losses)}")
        lines += ["", f"{'':<18}{'fine-tuned':>18}{'from scratch':>18}{'chance':>9}   top-1 on held-out samples"]
        for kind, part in PARTS.items():
            tuned, scratch = self.outcome(f"{kind}_ft"), self.outcome(f"{kind}_scratch")
            lines.append(f"{kind:<18}{tuned!s:>18}{scratch!s:>18}{100 / part.classes:7.1f} %")
            lines.append(f"  {verdict(tuned, scratch)}")
        return "\n".join(lines)


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _trained_on(run: Path, names: Sequence[str]) -> bool:
    """Whether a folder holds a run on one of these sets of a quickstart."""
    config = run / "config.yaml"
    if not config.is_file():
        return False
    given = read_entries(config).get("DATA.PATH_TO_DATA_DIR")
    return given is not None and Path(str(given.value)).parts[-2:] in [("data", name) for name in names]


def learned(losses: dict[str, float]) -> str:
    """Return a sentence that says whether a model predicts more than the mean of each position."""
    gain = 1 - losses[MODEL] / losses[PLACE]
    if gain <= 0:
        return f"The model predicts no more than the mean of each position (loss {-100 * gain:.1f} % above it)."
    found = share(losses)
    rest = "" if math.isnan(found) else f", {100 * found:.0f} % of what a linear model finds in what is visible"
    return f"The model predicts what is hidden: its loss is {100 * gain:.1f} % below the mean of each position{rest}."


def verdict(tuned: Outcome, scratch: Outcome) -> str:
    """Return a sentence that says whether pre-training helped, by two standard errors of the difference."""
    gain = tuned.share - scratch.share
    noise = math.hypot(tuned.error, scratch.error)
    points = f"{100 * gain:+.1f} points on {tuned.number} tests"
    if abs(gain) <= 2 * noise:
        return f"Pre-training made no difference beyond the noise at this size ({points})."
    return f"Pre-training {'helped' if gain > 0 else 'did harm'} at this size ({points}, beyond two standard errors)."


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the quickstart; return the exit code. `prog` is the name of the command in its help."""
    parser = ConfigParser(
        prog=prog,
        description="Make a small data set; pre-train, fine-tune and test a ViT on images, an MViTv2 on clips "
        "(MaskFeat) and a ResNet on images (MFM); print a table; draw hog_predictions.png and spectrum_predictions.png."
        " Run the same command again to continue an interrupted quickstart.",
        epilog="example: %(prog)s --output quickstart NUM_GPUS 1",
    )
    parser.add_argument(
        "--output", default="quickstart", metavar="DIR", help="folder of data and runs (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of data and runs (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="start over: delete data and runs of an earlier call")
    parser.add_overrides("overrides for every run, such as NUM_GPUS 1")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quickstart = Quickstart(Path(args.output), Size(seed=args.seed, opts=tuple(args.opts)))
    try:
        if args.fresh:
            quickstart.clear()
        return play(quickstart)
    except (KeyboardInterrupt, RuntimeError, UserError) as error:
        if not isinstance(error, UserError) or was_interrupted(error):
            return end_interrupted(error, goes_on=not args.fresh)
        logger.error("error: %s", error)
        return 2
    finally:
        close_lines()


def play(quickstart: Quickstart) -> int:
    """Run all stages, then print the table and write the images; return the exit code."""
    logger.handlers = [screen_handler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    quickstart.run_all()
    images = " and ".join(map(str, quickstart.draw()))
    minutes = (time.monotonic() - quickstart.started) / 60
    say(f"results, after {minutes:.1f} minutes\n\n{quickstart.table()}\n\nImages: {images}")
    return 0
