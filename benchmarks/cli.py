"""The command line of tools/benchmark.py."""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.cases import Options, scratch
from benchmarks.compute import measure_attention, measure_hog
from benchmarks.features import measure_extract
from benchmarks.measure import NotTheSame, Row
from benchmarks.reading import measure_decode, measure_images, measure_video
from benchmarks.report import machine, machine_line, table, training_table, write_json
from benchmarks.shards import measure_shards
from benchmarks.steps import measure_step
from benchmarks.training import Training, measure_training
from maskfeat.config.arguments import ConfigParser
from maskfeat.errors import UserError

logger = logging.getLogger(__name__)

MEASUREMENTS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "hog": measure_hog,
    "attention": measure_attention,
    "step": measure_step,
    "images": measure_images,
    "shards": measure_shards,
    "video": measure_video,
    "decode": measure_decode,
    "extract": measure_extract,
}

DESCRIPTION = """\
Measure this package against plain formulations of the same computations (benchmarks/).

Both sides are checked to compute the same before they are timed; where they do not, nothing is timed and the exit
code is 1. On the CPU seconds are processor time, the minimum of the repeats. `WHAT --help` lists the options."""

WHAT = {
    "hog": "HOG targets of a batch",
    "attention": "forward and backward of each shape of pooling attention in MViTv2-S",
    "step": "whole steps of pre-training: MViTv2-S, ViT-B",
    "images": "reading and augmenting images",
    "shards": "the same from tar archives and parquet files as from their folder",
    "video": "reading and augmenting clips",
    "decode": "decoding alone",
    "extract": "features of images into a file, beside reading and the network alone",
    "train": "samples a second of whole recipes, on files and on random input (meant for a GPU)",
    "all": "everything; `train` only where there is a GPU",
}

EXAMPLES = """\
examples:
  python tools/benchmark.py all --json benchmark.json
  python tools/benchmark.py step --cfg configs/masked_ssl/in1k_VIT_B_MaskFeat_PT.yaml --batch 4
  python tools/benchmark.py images --data /path/to/imagenet --repeats 3
  python tools/benchmark.py attention --threads 2 DATA.NUM_FRAMES 8 AUG.MASK_WINDOW_SIZE "[4, 7, 7]"
  python tools/benchmark.py train --device cuda --compile --data /path/to/imagenet \\
    --cfg configs/masked_ssl/in1k_VIT_B_MaskFeat_PT.yaml --batch 256 DATA_LOADER.NUM_WORKERS 16
"""


def parser() -> argparse.ArgumentParser:
    """What to measure, then options, then overrides of the config."""
    common = ConfigParser(add_help=False)
    common.add_cfg("the YAML of a recipe (default: those that each is about)", required=False)
    add = common.add_argument
    add("--data", metavar="DIR", help="real files in the recipe's layout (default: made for the while)")
    add("--batch", type=int, metavar="N", help="samples a batch (default: by measurement)")
    add("--files", type=int, metavar="N", help="files that are made without --data")
    add("--repeats", type=int, default=5, metavar="N", help="the minimum counts (default %(default)s)")
    add("--steps", type=int, default=200, metavar="N", help="steady ones of `train` (default %(default)s)")
    add("--threads", type=int, default=1, metavar="N", help="of PyTorch on the CPU (default %(default)s)")
    add("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    add("--compile", action="store_true", help="ours with TRAIN.COMPILE True")
    add("--json", metavar="FILE", help="write everything here, too")
    common.add_overrides("overrides of the config")
    form = argparse.RawDescriptionHelpFormatter
    found = ConfigParser(description=DESCRIPTION, epilog=EXAMPLES, formatter_class=form)
    commands = found.add_subparsers(dest="what", required=True, metavar="WHAT", title="what")
    for name, text in WHAT.items():
        commands.add_parser(name, parents=[common], help=text, description=text, epilog=EXAMPLES, formatter_class=form)
    return found


def options_of(args: argparse.Namespace) -> Options:
    """The parsed command line. ValueError where a number makes no sense."""
    for name in ("batch", "files", "repeats", "steps", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine shows no CUDA device, leave the option out")
    return Options(
        device=device,
        cfg=args.cfg,
        data=args.data,
        repeats=args.repeats,
        batch=args.batch,
        files=args.files,
        steps=args.steps,
        compile=args.compile,
        opts=tuple(args.opts),
    )


def measure(what: str, options: Options) -> tuple[list[Row], list[Training]]:
    """Everything that was asked for, a line logged as soon as it is known."""
    rows: list[Row] = []
    training: list[Training] = []
    for name in MEASUREMENTS if what == "all" else (what,):
        for row in MEASUREMENTS[name](options) if name in MEASUREMENTS else ():
            logger.info("%s: %.4g s, ours %.4g s (%.2fx)", row.what, row.reference.cpu, row.ours.cpu, row.ratio)
            rows.append(row)
    if what == "train" or (what == "all" and options.device.type == "cuda"):
        for line in measure_training(options):
            logger.info("%s, %s input: %.4g samples/s", line.recipe, line.input, line.samples_per_second)
            training.append(line)
    return rows, training


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; return the exit code: 1 where the two sides differ, 2 for errors that a user can fix."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    reading = logging.getLogger("maskfeat.data")
    level = reading.level
    reading.setLevel(logging.WARNING)
    try:
        options = options_of(args)
        torch.set_num_threads(args.threads)
        found = machine(options.device)
        logger.info("%s\n", machine_line(found))
        with scratch() as folder:
            rows, training = measure(args.what, dataclasses.replace(options, folder=folder))
        for text in (table(rows) if rows else "", training_table(training) if training else ""):
            if text:
                logger.info("\n%s", text)
        logger.info("\n%s", machine_line(found))
        if args.json:
            write_json(args.json, found, rows, training)
    except NotTheSame as error:
        logger.error("not the same: %s", error)
        return 1
    except UserError as error:
        logger.error("error: %s", error)
        return 2
    finally:
        reading.setLevel(level)
    return 0
