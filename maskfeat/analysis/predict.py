"""Classes of images and videos: `maskfeat predict` and tools/predict.py call `main`."""

import argparse
import csv
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

import torch

from maskfeat.analysis.command import add_options, check_finite, count_option, exit_code, load, refuse_input
from maskfeat.analysis.inputs import Inputs, find_inputs, input_loader, split_views
from maskfeat.analysis.model import Model, Prediction
from maskfeat.batch import BadSample
from maskfeat.data.datasets.classes import read_class_names
from maskfeat.errors import UserError, naming
from maskfeat.file_io import draft_of, make_parent
from maskfeat.progress import Progress
from maskfeat.text import count

logger = logging.getLogger(__name__)


@torch.no_grad()
def predictions(
    model: Model,
    inputs: Inputs,
    top: int,
    views: tuple[int, int],
    batch_size: int,
    workers: int | None,
    unreadable: dict[int, BadSample],
    as_test: bool = False,
) -> Iterator[Prediction]:
    """Yield the classes of inputs, in order, by the mean of the probabilities of their views, as a test does.

    Args:
        model: a classifier.
        top: how many classes of each, at most all.
        views: (clips, crops) of each input.
        unreadable: receives the inputs that cannot be read, which are left out, by their places.
        as_test: a single view is that of a test, see `input_loader`.
    """
    number = views[0] * views[1]
    progress = Progress(f"{model.media}s", len(inputs))
    total = torch.zeros(())
    for batch in input_loader(model, inputs, views, batch_size, workers, as_test=as_test):
        scores = model.probabilities(batch.clip).cpu()
        unreadable.update({sample.index: sample for sample in batch.unreadable})
        for index, view, row in zip(batch.index.tolist(), batch.view.tolist(), scores, strict=True):
            total = row if view == 0 else total + row
            if view == number - 1:
                progress.step(1)
                if index not in unreadable:
                    check_finite(total, inputs.paths[index], "the scores", model.precision)
                    best = (total / number).topk(min(top, len(total)))
                    yield model.prediction(inputs.paths[index], best.indices, best.values)


def _write_table(found: Iterator[Prediction], file: TextIO) -> None:
    for path, classes, _ in found:
        file.write(f"{path}\n")
        file.writelines(f"  {100 * score:6.2f} %  {name}\n" for name, score in classes)


def _write_csv(found: Iterator[Prediction], file: TextIO) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("path", "rank", "class", "score"))
    for path, classes, _ in found:
        writer.writerows((path, rank, name, f"{score:.6f}") for rank, (name, score) in enumerate(classes, start=1))


def _write_json(found: Iterator[Prediction], file: TextIO) -> None:
    start = "["
    for path, classes, _ in found:
        pairs = [{"class": name, "score": round(score, 6)} for name, score in classes]
        file.write(f"{start}\n {json.dumps({'path': path, 'classes': pairs})}")
        start = ","
    file.write("[]\n" if start == "[" else "\n]\n")


FORMATS: dict[str, Callable[[Iterator[Prediction], TextIO], None]] = {
    "table": _write_table,
    "csv": _write_csv,
    "json": _write_json,
}


def _format_of(output: Path) -> str:
    """Return the format that the ending of a file names, or a table."""
    ending = output.suffix.lower().removeprefix(".")
    return ending if ending in FORMATS else "table"


def _write(output: Path, kind: str, found: Iterator[Prediction]) -> None:
    """Write predictions into a file, which is there when it is complete."""
    with naming(f"--output {output} cannot be written"):
        make_parent(output)
        with draft_of(output) as draft, draft.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            FORMATS[kind](found, file)


def _views(model: Model, given: int | tuple[int, int] | None) -> int | tuple[int, int]:
    """Return the views that were asked for, or those that a test of the recipe shows."""
    test = model.cfg.TEST
    if given is not None or model.media == "image":
        return given or 1
    return (test.NUM_TEMPORAL_CLIPS or [test.NUM_ENSEMBLE_VIEWS])[-1], test.NUM_SPATIAL_CROPS


def predict(args: argparse.Namespace) -> int:
    """Do what the command line says."""
    output = None if args.output is None else Path(args.output)
    if output is not None and output.is_dir():
        raise UserError(f"--output {output} is a folder: the name of a file is expected")
    if output is not None:
        refuse_input(output, [*args.inputs, args.checkpoint])
    model = load(args)
    model.predict([], args.top)  # which refuses a network that does not classify
    if args.classes is not None:
        model.classes = read_class_names(args.classes, model.objective.num_classes, "--classes")
    inputs = find_inputs(args.inputs, model.media, args.prefix)
    if inputs.left_out:
        logger.info("left out: %s", inputs.left_out)
    views = split_views(model, _views(model, args.views))
    unreadable: dict[int, BadSample] = {}
    how = args.batch_size, args.workers, unreadable, args.views is None
    found = predictions(model, inputs, args.top, views, *how)
    if output is None:
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")  # names of files are bytes
        FORMATS[args.format or "table"](found, sys.stdout)
    else:
        _write(output, args.format or _format_of(output), found)
    for sample in unreadable.values():
        logger.warning("cannot be read: %s: %s", sample.path, sample.cause)
    if len(unreadable) == len(inputs):
        raise UserError(f"none of {count(len(inputs), inputs.media)} can be read")
    return 0


def parse_args(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Say which classes a fine-tuned network sees in images or videos.",
        epilog="example: %(prog)s --checkpoint runs/ft/checkpoints/ssl_eval_checkpoint_epoch_00100.pyth photos/*.jpg",
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders and lists (.csv)")
    add_options(parser, views="those of the recipe's test")
    parser.add_argument("--top", type=count_option(1), default=5, metavar="K", help="classes (default: %(default)s)")
    parser.add_argument("--classes", metavar="FILE", help="names of the classes, one a line, where the file has none")
    parser.add_argument(
        "--format", choices=list(FORMATS), help="default: by the ending of --output (.csv, .json), else table"
    )
    parser.add_argument("--output", metavar="FILE", help="default: the terminal")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Predict; return the exit code.

    Args:
        argv: the command line; None = sys.argv.
        prog: name of the command in its help.
    """
    args = parse_args(argv, prog)
    return exit_code(lambda: predict(args))
