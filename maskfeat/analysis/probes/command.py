"""`tools/probe.py`: probes of the frozen features of a checkpoint."""

import argparse
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskfeat.analysis.command import add_options, count_option, exit_code, joined, load
from maskfeat.analysis.inputs import split_views
from maskfeat.analysis.model import Model
from maskfeat.analysis.probes.data import Splits, find_splits
from maskfeat.analysis.probes.probe import KINDS, Probing, Result
from maskfeat.build import build_objective
from maskfeat.engine.rng import seed_everything
from maskfeat.errors import UserError, naming
from maskfeat.file_io import replace_text

logger = logging.getLogger(__name__)

GIVEN, RANDOM = "given", "random"


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Fit small classifiers to the frozen features of a checkpoint, and measure them on a validation "
        "set. A fifth of the training samples chooses between settings; validation samples decide nothing.",
        epilog="example: %(prog)s --checkpoint runs/pt/checkpoints/ssl_checkpoint_epoch_00300.pyth --data "
        "/data/imagenet --kind knn linear --random --json probe.json",
        allow_abbrev=False,
    )
    add_options(parser, "1, the central one; scores are averaged over those of validation samples")
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="train/ and val/ with class folders, or train.csv and val.csv")
    add("--kind", required=True, nargs="+", choices=KINDS, help="one or several")
    add("--blocks", default="4", metavar="N", help="for knn and linear: 4 = the last four (default); 3,7,11 = these")
    add("--random", action="store_true", help="also probe the same network with random weights")
    add("--gray", action="store_true", help="show everything in grey: what features owe to colour is the difference")
    add("--few", type=count_option(1), metavar="K", help="training samples of each class (default: all)")
    add("--seed", type=count_option(0), default=0, help="of all draws (default: %(default)s)")
    add("--json", metavar="FILE", help="write all results, every setting included")
    add(
        "--features",
        metavar="DIR",
        help="keep features here, where the next call goes on (default: a temporary folder)",
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Probe a checkpoint as the command line says; return the exit code."""
    args = _parser(prog).parse_args(joined(argv, "--blocks"))
    return exit_code(lambda: _run(args), goes_on=args.features is not None)


def _run(args: argparse.Namespace) -> int:
    _check(args.json)
    model = load(args)
    blocks = block_numbers(args.blocks, len(model.backbone.repeated_blocks()))
    views = split_views(model, args.views or 1)
    splits = find_splits(args.data, model.media, args.prefix, args.few, args.seed)
    logger.info(
        "%s: %s, %d training and %d validation samples of %d classes",
        *(args.checkpoint, model.kind, len(splits.train), len(splits.val), len(splits.classes)),
    )
    networks = {GIVEN: model, **({RANDOM: randomised(model, args.seed)} if args.random else {})}
    with _folder(args.features) as folder:
        probings = [
            Probing(
                network,
                weights,
                splits,
                folder,
                blocks,
                views,
                args.seed,
                args.batch_size,
                args.workers,
                gray=args.gray,
            )
            for weights, network in networks.items()
        ]
        results = []
        for kind in dict.fromkeys(args.kind):
            for probing in probings:
                results.append(found := probing.run(kind))
                logger.info("%s, %s weights: top-1 %.1f ± %.1f %%", kind, found.weights, found.top1, found.error)
    if args.json:
        with naming(f"--json {args.json} cannot be written"):
            replace_text(Path(args.json), json.dumps(_report(args, splits, probings[0], results), indent=1) + "\n")
    logger.info("\n%s", table(results))
    return 0


def _check(json_file: str | None) -> None:
    """Refuse a file that cannot be written before any work is done."""
    if json_file:
        with naming(f"--json {json_file} cannot be written"):
            place = Path(json_file)
            if place.is_dir():
                raise UserError(f"--json {json_file} is a folder, a file is expected")
            place.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(place.parent, os.W_OK):
                raise PermissionError(None, "its folder is not writable")


@contextmanager
def _folder(given: str | None) -> Iterator[Path]:
    """The folder of features: the given one, or one that is removed in the end."""
    if given:
        yield Path(given)
        return
    with tempfile.TemporaryDirectory(prefix="maskfeat-probe-") as folder:
        yield Path(folder)


def randomised(model: Model, seed: int) -> Model:
    """Return the same network with random weights."""
    seed_everything(seed)
    objective = build_objective(model.cfg).to(model.device)
    return Model(
        objective, model.cfg, f"random weights of seed {seed}", model.kind, model.report, None, model.precision
    )


def block_numbers(given: str, depth: int) -> list[int]:
    """Return the numbers of blocks that --blocks names: "4" = the last four (or all), "3,7,11" = these, "11," = one.

    Raises:
        UserError: it names none, or one that the network does not have.
    """
    try:
        if "," not in given:
            last = int(given)
            if last < 1:
                raise ValueError
            return list(range(depth))[-last:]
        numbers = [int(word) for word in given.split(",") if word.strip()]
    except ValueError:
        numbers = []
    if not numbers or any(not -depth <= number < depth for number in numbers):
        raise UserError(
            f"--blocks {given}: expected how many of the last blocks, or numbers from 0 to {depth - 1} with commas"
        )
    return sorted({number % depth for number in numbers})


def _report(args: argparse.Namespace, splits: Splits, probing: Probing, results: Sequence[Result]) -> dict[str, Any]:
    return {
        "checkpoint": args.checkpoint,
        "data": args.data,
        "train": len(splits.train),
        "val": len(splits.val),
        "classes": splits.classes,
        "unreadable": probing.unreadable,
        "views": probing.views,
        "gray": probing.gray,
        "seed": args.seed,
        "results": [result._asdict() for result in results],
    }


def table(results: Sequence[Result]) -> str:
    """Return the results as aligned text, and for kNN every k."""
    rows = [["probe", "weights", "chosen on held-out samples", "held out", "val top-1", "top-5"]]
    for found in results:
        setting = ", ".join(f"{name} {value}" for name, value in found.setting.items() if name != "features")
        rows.append(
            [
                found.kind,
                found.weights,
                f"{found.setting['features']}, {setting.replace('_', ' ')}",
                f"{found.held_out:.1f}",
                f"{found.top1:.1f} ± {found.error:.1f}",
                f"{found.top5:.1f}",
            ]
        )
    text = _aligned(rows)
    by_k = [found for found in results if found.kind == "knn"]
    if by_k:
        tried = [[one for one in found.tried if "top1" in one] for found in by_k]
        head = ["knn, val top-1", *(f"k {one['k']}" for one in tried[0])]
        lines = [
            [found.weights, *(f"{one['top1']:.1f}" for one in own)] for found, own in zip(by_k, tried, strict=True)
        ]
        text += "\n\n" + _aligned([head, *lines])
    return text


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
