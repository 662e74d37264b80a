"""One page on one run or several: `maskfeat report` and tools/report.py call `main`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from maskfeat.errors import UserError, naming
from maskfeat.file_io import make_parent, replace_text
from maskfeat.report.page import write_page
from maskfeat.report.runs import read_runs, summary_csv

logger = logging.getLogger(__name__)

REPORT = "report.html"


def write_report(folder: str | Path) -> Path:
    """Write the report of one run into its OUTPUT_DIR, and return where.

    Raises:
        UserFileError: it cannot be written, or the run has no log.
    """
    path = Path(folder) / REPORT
    page = write_page(read_runs([folder]))
    with naming(f"{path} cannot be written"):
        replace_text(path, page)
    return path


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write one HTML page on one run or several, which loads nothing: figures, curves, pictures, "
        "weights that were loaded, warnings, and the keys in which the runs differ.",
        epilog="example: %(prog)s runs/pt_a runs/pt_b --output compared.html --csv compared.csv",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="OUTPUT_DIR of a run")
    parser.add_argument(
        "--output", type=Path, metavar="X.html", help=f"(default: {REPORT} in RUN, or here if there are several)"
    )
    parser.add_argument("--csv", type=Path, metavar="X.csv", help="the summary as well, a line for each run; - = print")
    return parser


def _say(args: argparse.Namespace) -> int:
    runs = read_runs(args.runs)
    several = len({run.folder for run in runs}) > 1
    path = args.output or (Path(REPORT) if several else runs[0].folder / REPORT)
    with naming(f"--output {path} cannot be written"):
        make_parent(path)
        replace_text(path, write_page(runs))
    if args.csv is not None:
        text = summary_csv(runs)
        if str(args.csv) == "-":
            sys.stdout.write(text)
        else:
            with naming(f"--csv {args.csv} cannot be written"):
                make_parent(args.csv)
                replace_text(args.csv, text)
    logger.info("%s: %d run%s, %.1f MB", path, len(runs), "s" * (len(runs) > 1), path.stat().st_size / 1e6)
    return 0


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Write a report and return the exit code; 2, and one line, where a run cannot be read or the page not written.

    Args:
        argv: the arguments; None = those of the process.
        prog: name of the command in its help.
    """
    args = _parser(prog).parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return _say(args)
    except UserError as error:
        logger.error("error: %s", error)
        return 2
