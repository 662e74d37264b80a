"""Evidence that pre-training learns: one command per suite writes docs/evidence.md. tools/evidence.py calls `main`."""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from maskfeat.analysis.curves import figure_type
from maskfeat.analysis.preparation.ucf_hmdb import source_video
from maskfeat.config.arguments import ConfigParser
from maskfeat.demos.caltech101 import prepare as prepare_caltech101
from maskfeat.demos.cifar10 import prepare as prepare_cifar10
from maskfeat.demos.commands import program
from maskfeat.demos.evidence.record import read_record, record_file
from maskfeat.demos.evidence.report import FILE, Report
from maskfeat.demos.evidence.runs import Runs, Stopped, run_seed
from maskfeat.demos.evidence.suites import SUITES
from maskfeat.demos.shares import COMPLETE, write_list_shares
from maskfeat.demos.synthetic import make_clips
from maskfeat.distributed.preemption import end_interrupted, was_interrupted
from maskfeat.engine.log_handlers import screen_handler
from maskfeat.errors import UserError, naming
from maskfeat.progress import close_lines

logger = logging.getLogger(__name__)


def make_data(
    suite: str, folder: Path, source: Path | None = None, clips: tuple[int, int, int] = (400, 100, 100)
) -> None:
    """Prepare the data of a suite in `folder`, unless it exists.

    Args:
        suite: name of the suite.
        folder: where the data is written.
        source: the data as downloaded, of suites of real data: see `demos.cifar10.prepare` and
            `demos.caltech101.prepare`; for JHMDB a folder with videos/<class>/<video>, train.csv and val.csv.
        clips: number of synthetic clips per class for training, validation and testing.

    Raises:
        UserError: real data is neither in `folder` nor given.
    """
    if suite == "shapes":
        train, val, test = clips
        # Compression noise hides textures of low contrast or few pixels: nothing would predict their HOG.
        made = make_clips(
            folder / "all",
            train_per_class=train,
            val_per_class=val,
            test_per_class=test,
            size=(80, 80),
            difficulty=0.6,
        )
        write_share(made, folder / "tenth", 10)
        return
    if (folder / COMPLETE).is_file():
        return
    if source is None:
        raise UserError(
            f"{folder} has no data of {suite}: give --source, {_SOURCES[suite]}; or --data, a prepared folder"
        )
    if suite == "jhmdb":
        with naming(f"{source} cannot be laid out in {folder}"):
            write_list_shares(source, source / "videos", folder, lambda path: source_video(Path(path).stem))
            (folder / COMPLETE).touch()
    else:
        (prepare_cifar10 if suite == "cifar10" else prepare_caltech101)(source, folder)


_SOURCES = {
    "caltech101": "the official caltech-101.zip, or a tar or folder with train/<class>/ and val/<class>/",
    "cifar10": "the official binary archive (cifar-10-binary.tar.gz), or a folder with train.zip and test.zip",
    "jhmdb": "a folder with videos/<class>/<video>, train.csv and val.csv",
}


def write_share(source: Path, target: Path, every: int) -> None:
    """Write lists of every `every`-th training clip of `source` and of all its held-out clips; paths are unchanged."""
    target.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test"):
        lines = (source / f"{split}.csv").read_text(encoding="utf-8").splitlines(keepends=True)
        kept = lines[::every] if split == "train" else lines
        (target / f"{split}.csv").write_text("".join(kept), encoding="utf-8")


def parse_args(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    """Parse the command line; `prog` is the name of the command in its help."""
    parser = ConfigParser(
        prog=prog,
        description="Pre-train, probe frozen features, fine-tune and train from scratch, for several seeds; write the "
        "tables, charts and images of docs/evidence.md. The same command continues where an earlier one stopped.",
        epilog="example: %(prog)s --suite caltech101 --budget cpu --seeds 1 --source caltech-101.zip --docs page",
    )
    parser.add_argument("--suite", choices=sorted(SUITES), required=True, help="which data and methods")
    parser.add_argument(
        "--budget", choices=("cpu", "night", "gpu"), default="cpu", help="amount of computation (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 (default: %(default)s)")
    parser.add_argument("--source", type=Path, metavar="PATH", help="the data as downloaded")
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared data (default: below --output)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/evidence"),
        metavar="DIR",
        help="folder of the runs (default: %(default)s)",
    )
    parser.add_argument(
        "--docs", type=Path, default=Path("docs"), metavar="DIR", help="folder of evidence.md (default: %(default)s)"
    )
    parser.add_argument(
        "--add",
        action="store_true",
        help="add to what was published: runs in DOCS/evidence/SUITE_BUDGET.json count as finished, so that seeds may "
        "be run on several machines or days",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--only-data", action="store_true", help="lay out the data and run nothing")
    what.add_argument(
        "--so-far", action="store_true", help="run nothing: write the report of the runs that are finished"
    )
    parser.add_overrides("overrides for every run")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a suite and write its section of the report; return the exit code. `prog` as in `parse_args`."""
    args = parse_args(argv, prog)
    logger.handlers, logger.propagate = [screen_handler()], False
    logger.setLevel(logging.INFO)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    data = args.data or args.output / "data" / args.suite
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        suite = SUITES[args.suite]
        if args.budget not in suite.budgets:
            raise UserError(f"--suite {args.suite} has the budgets {', '.join(suite.budgets)}; given {args.budget}")
        kept = record_file(args.docs, f"{suite.name}_{args.budget}")
        published, made_on = read_record(kept) if args.add else ({}, {})
        runs = Runs(suite, args.budget, args.output, data, tuple(args.opts), published)
        if args.seeds < 1:
            raise UserError(f"--seeds is {args.seeds}, expected at least 1")
        if not args.only_data:
            figure_type()  # a missing package is reported now, not after hours of training
        if args.data is None or args.suite != "shapes":
            make_data(args.suite, data, args.source)
        if args.only_data:
            logger.info("the data is in %s", data)
            return 0
        for seed in range(0 if args.so_far else args.seeds):
            run_seed(runs, seed, controls=seed < runs.budget.control_seeds)
        asked = {*range(args.seeds), *map(int, published)}  # with --add, seeds that were published stay
        seeds = [seed for seed in sorted(asked) if runs.names(seed)]
        if not seeds:
            raise UserError(f"--so-far: no run of {runs.root} is finished")
        command = shlex.join([*program("evidence", "evidence.py"), *given])
        report = Report(runs, args.budget, seeds, args.docs, command, made_on)
        section = report.write()
    except Stopped as stopped:  # the run has logged the reason
        return stopped.code
    except (KeyboardInterrupt, RuntimeError, UserError) as error:
        if not isinstance(error, UserError) or was_interrupted(error):
            return end_interrupted(error, goes_on=True)
        logger.error("error: %s", error)
        return 2
    finally:
        close_lines()
    logger.info("\n%s\n\nwritten to %s", section, args.docs / FILE)
    return 0
