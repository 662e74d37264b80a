"""`maskfeat check-data`: say what a data set holds and what is wrong with it, before it is trained on."""

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from maskfeat.analysis.checks.collect import ALL, Collected, Sample, collect
from maskfeat.analysis.checks.faults import HARMFUL, Fault, clean, find_faults, recipe_of
from maskfeat.analysis.checks.reading import read_all
from maskfeat.analysis.checks.report import as_json, as_page, as_text
from maskfeat.analysis.checks.speed import RATES, Speed, measure
from maskfeat.analysis.command import count_option, exit_code
from maskfeat.analysis.preparation.videos import can_be_listed
from maskfeat.build import build_loader
from maskfeat.config import load_config
from maskfeat.config.arguments import ConfigParser
from maskfeat.data.datasets.base import NoValidation
from maskfeat.data.datasets.layouts import NAMES
from maskfeat.data.datasets.lists import quoted
from maskfeat.data.shards.members import Member
from maskfeat.distributed.world import available_cores
from maskfeat.errors import UserError, naming
from maskfeat.file_io import replace_text
from maskfeat.registry import objective_spec

logger = logging.getLogger(__name__)

JOURNAL, RESULT, PAGE = "files.jsonl", "check.json", "report.html"


def _places(args: argparse.Namespace) -> tuple[CfgNode | None, list[str]]:
    """Return the recipe, and the folders and lists to check."""
    if args.cfg is None:
        if len(args.opts) != 1:
            raise UserError("give --cfg RECIPE with overrides, or one folder or list")
        return None, list(args.opts)
    if args.prefix:
        raise UserError(
            f"--prefix is {args.prefix!r}, and is for a folder or list without --cfg: with one, give DATA.PATH_PREFIX "
            f"{args.prefix!r} behind it"
        )
    cfg = load_config(args.cfg, args.opts)
    places = [path for path, _ in cfg.DATA.SOURCES] or [cfg.DATA.PATH_TO_DATA_DIR]
    if not places[0]:
        raise UserError("DATA.PATH_TO_DATA_DIR is '', and names what is checked: give it behind --cfg")
    return cfg, places


def _refusals(cfg: CfgNode) -> list[Fault]:
    """Return what a run with this config would stop with when it opens its data."""
    splits = ["train"] if cfg.TRAIN.ENABLE else []
    if cfg.TRAIN.ENABLE and cfg.TRAIN.EVAL_PERIOD:
        splits.append("val")
    if cfg.TEST.ENABLE and objective_spec(cfg).classifies:
        splits.append("test")
    faults = []
    for split in splits:
        try:
            build_loader(cfg, split)
        except NoValidation:
            continue
        except UserError as error:
            faults.append(Fault("refused", f"{split}: {error}"))
    return faults


def _speed(cfg: CfgNode, args: argparse.Namespace) -> Speed | None:
    rate = args.rate if args.rate else RATES.get(Path(args.cfg).stem)
    try:
        return measure(cfg, args.gpus, rate)
    except UserError:  # among the faults already
        return None


def _lines(samples: Sequence[Sample], labelled: bool) -> list[str]:
    """Return the lines of a list: paths alone where a sample has no class, since a list must not mix both."""
    labelled = labelled and all(sample.numbers for sample in samples)
    lines = []
    for sample in samples:
        path = os.path.abspath(sample.path)
        if can_be_listed(path):
            lines.append(quoted(path) + (f" {','.join(map(str, sample.numbers))}" if labelled else ""))
    return lines


def write_lists(folder: Path, found: Collected, kept: dict[str, list[Sample]], labelled: bool = True) -> list[str]:
    """Write a list for each split, and the names of classes; return what was written, in words.

    Paths are absolute, in double quotes; a path that is not UTF-8 cannot be listed and is left out.

    Args:
        labelled: whether classes are listed, where every sample of a split has one.
    """
    said = []
    whose = {split: split for split in kept}
    untested = not any(sample.numbers for sample in kept.get("test", ()))
    if labelled and found.folders and untested and kept.get("val"):
        whose["test"] = "val"  # as a test of the folders does; one of lists reads test.csv alone
    for split, source in whose.items():
        lines = _lines(kept[source], labelled)
        name = f"{'train' if split == ALL else split}.csv"
        if lines:
            replace_text(folder / name, "\n".join(lines) + "\n")
            said.append(f"{folder / name}: {len(lines)} of {len(found.of(source))} samples")
            if source != split:
                said[-1] += f" of {source}, which a test of these folders reads"
    if found.classes is not None:
        trained = found.folders.get("train", found.classes)
        replace_text(folder / NAMES, "\n".join(trained) + "\n")
    return said


def check(args: argparse.Namespace) -> int:
    """Check what the command line names; 1 = something harmful was found."""
    cfg, places = _places(args)
    recipe, output = recipe_of(cfg), Path(args.output)
    workers = available_cores() if args.workers is None else args.workers
    refused = [] if cfg is None else _refusals(cfg)
    speed = None if cfg is None else _speed(cfg, args)
    harmful = False
    if args.fix and len(places) > 1:
        raise UserError("--fix writes the lists of one folder or list: check DATA.SOURCES one by one")
    for number, place in enumerate(places):
        folder = output / f"source_{number}" if len(places) > 1 else output
        with naming(f"--output {output} cannot be written"):
            folder.mkdir(parents=True, exist_ok=True)
        found = collect(place, cfg, args.prefix)
        if args.fix and any(isinstance(sample.path, Member) for sample in found.samples):
            raise UserError("--fix writes lists of files, and the samples of shards are none: make the shards anew")
        facts = read_all([sample.path for sample in found.samples], found.noun, folder / JOURNAL, workers)
        faults = [*find_faults(found, facts, recipe), *refused]
        lines = [] if speed is None else [speed.words(args.gpus)]
        more: dict[str, Any] = {} if speed is None else {"speed": speed._asdict()}
        if args.fix:
            with naming(f"--fix {args.fix} cannot be written"):
                Path(args.fix).mkdir(parents=True, exist_ok=True)
                lines += write_lists(Path(args.fix), found, clean(found, faults), recipe.labelled)
            lines.append(f"train on them with DATA.PATH_TO_DATA_DIR {args.fix} DATA.PATH_PREFIX ''")
        with naming(f"--output {output} cannot be written"):
            replace_text(folder / RESULT, json.dumps(as_json(found, faults, facts, **more), indent=1) + "\n")
            replace_text(folder / PAGE, as_page(found, faults, facts, recipe, lines))
        logger.info("%s", as_text(found, faults, recipe, [*lines, f"wrote {folder / RESULT} and {folder / PAGE}"]))
        harmful = harmful or any(fault.kind in HARMFUL for fault in faults)
    return int(harmful)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Check a data set; return the exit code: 0, 1 where something harmful was found, 2 where nothing can be checked.

    Args:
        argv: the command line; None = sys.argv.
        prog: name of the command in its help.
    """
    parser = ConfigParser(
        prog=prog,
        description="Say what a data set holds, per split and class, and what is wrong with it: files that cannot be "
        "read, duplicates, classes that differ between splits, and more. Every file is read once; the same command "
        "goes on where an interrupted one stopped. No file of the data set is changed.",
        epilog="examples: %(prog)s photos/   %(prog)s --cfg masked_ssl/in1k_VIT_B_MaskFeat_FT DATA.PATH_TO_DATA_DIR "
        "/data/flowers MODEL.NUM_CLASSES 102 --fix clean",
    )
    parser.add_cfg("check what this recipe would train on, and how fast it is read", required=False)
    parser.add_argument("--output", default="data_check", metavar="DIR", help="for the report (default: %(default)s)")
    parser.add_argument("--fix", metavar="DIR", help="write lists of what is left without faults")
    parser.add_argument(
        "--prefix", default="", metavar="DIR", help="that paths in lists are relative to, without --cfg"
    )
    parser.add_argument("--workers", type=count_option(0), metavar="N", help="processes (default: one a core)")
    parser.add_argument("--gpus", type=count_option(1), default=1, metavar="N", help="that train (default: 1)")
    parser.add_argument("--rate", type=count_option(1), metavar="N", help="samples a second that one GPU trains on")
    parser.add_overrides("with --cfg: overrides of its keys; without: a folder or a list")
    args = parser.parse_args(argv)
    return exit_code(lambda: check(args), goes_on=True)
