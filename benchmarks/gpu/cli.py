"""The command line of tools/gpu_check.py.

What needs more than PyTorch is imported after --wheels was seen to.
"""

import argparse
import importlib
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.parts import CORRECTNESS, GROUPS, SPEED, Part
from benchmarks.gpu.wheels import install_missing, missing

logger = logging.getLogger(__name__)

TABLE = "benchmarks.gpu.table"

DESCRIPTION = """\
Check and measure everything on a GPU, most valuable first: one command, no network, files made here.

Each part runs in a process of its own with its own time limit. What it finds is in DIR/results.json at once, what it
said in DIR/logs. The same command goes on where an earlier one stopped: parts that passed are kept."""

EXAMPLES = """\
examples:
  python tools/gpu_check.py --output gpu --wheels wheels
  python tools/gpu_check.py --output gpu --only correctness --minutes 4
  python tools/gpu_check.py --output gpu --only learning
  python tools/gpu_check.py --output toy --device cpu --toy
  python tools/gpu_check.py --page gpu/results.json

exit code: 0 = no part failed; 1 = a part failed or hung; 2 = the command line, the machine or DIR is not as it must be
"""


def parser() -> argparse.ArgumentParser:
    """The options; those of a part's own process are not in the help."""
    found = argparse.ArgumentParser(
        prog="gpu_check.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = found.add_argument
    add("--output", metavar="DIR", type=Path, help="folder of results.json, logs and files that are made")
    add("--minutes", type=float, default=9.0, metavar="N", help="time for all parts (default %(default)g)")
    add("--only", choices=GROUPS, help=f"one group of parts (default: {CORRECTNESS} and {SPEED})")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="cpu checks this program (default %(default)s)")
    add("--toy", action="store_true", help="smallest sizes: takes every path, measures nothing")
    add("--wheels", metavar="DIR", type=Path, help="install packages that are missing from this folder, with pip")
    add("--again", action="store_true", help="run parts anew that have passed")
    add("--page", metavar="FILE", type=Path, help="write docs/gpu.md from the results.json of a check and end")
    add("--list", action="store_true", help="list the parts and end")
    add("--serve", action="store_true", help=argparse.SUPPRESS)
    for hidden, kind in (("--part", str), ("--table", str), ("--seconds", float)):
        add(hidden, type=kind, help=argparse.SUPPRESS)
    return found


def _parts(table: str) -> tuple[Part, ...]:
    """Import the table of parts; exit with 2 where packages are missing."""
    try:
        parts: tuple[Part, ...] = importlib.import_module(table).PARTS
    except ModuleNotFoundError as error:
        logger.error(
            "error: %s; missing here: %s. Install them, or give --wheels DIR", error, ", ".join(missing()) or "nothing"
        )
        sys.exit(2)
    return parts


def _listing(parts: Sequence[Part]) -> str:
    return "\n".join(f"{part.group:12} {part.name:28} at most {part.seconds:4.0f} s" for part in parts)


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """End with exit code 2 where options make no sense."""
    if args.output is None and not args.list:
        parser.error("give --output DIR")
    if not args.minutes > 0:
        parser.error(f"--minutes must be more than 0, not {args.minutes:g}")
    if args.wheels is not None and not args.wheels.is_dir():
        parser.error(f"--wheels {args.wheels}: no such folder")
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        parser.error(f"--output {args.output} is not a folder")
    if args.device == "cuda" and not args.list and not torch.cuda.is_available():
        parser.error("this machine shows no CUDA device; --device cpu --toy checks this program alone")


def main(argv: Sequence[str] | None = None, table: str = TABLE) -> int:
    """Run the check and return the exit code.

    Args:
        argv: the arguments; None = those of the process.
        table: the module that holds PARTS.
    """
    began = time.monotonic()
    options = parser()
    args = options.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    if args.part is not None:
        return _one(args)
    if args.serve:
        return _serve(args)
    if args.page is not None:
        return _page(args.page)
    _check(args, options)
    wheels = install_missing(args.wheels) if args.wheels else {}
    for name, outcome in wheels.items():
        logger.info("%s: %s", name, outcome)
    importlib.invalidate_caches()
    parts = [part for part in _parts(table) if part.group in ([args.only] if args.only else (CORRECTNESS, SPEED))]
    if args.list:
        logger.info(_listing(parts if args.only else _parts(table)))
        return 0
    return _run(args, parts, table, began, wheels)


def _run(args: argparse.Namespace, parts: Sequence[Part], table: str, began: float, wheels: dict[str, str]) -> int:
    from benchmarks.gpu.results import Results
    from benchmarks.gpu.runner import Runner
    from maskfeat.errors import UserError

    try:
        args.output.mkdir(parents=True, exist_ok=True)
        results = Results(args.output / "results.json", args.device, args.toy)
        results.begin(wheels)
    except (UserError, OSError) as error:
        logger.error("error: %s", error)
        return 2
    runner = Runner(
        results, args.output.resolve(), torch.device(args.device), args.toy, table, began + 60 * args.minutes
    )
    try:
        code = runner.run(parts, args.again)
    except KeyboardInterrupt:
        code = 130
    logger.info("\n%s", results.table(parts))
    left_out = results.not_run(parts)
    if left_out:
        logger.info("\nnot run:\n  %s", "\n  ".join(left_out))
    logger.info("\n%.0f s in all; figures: %s", time.monotonic() - began, results.path)
    return code


def _page(path: Path) -> int:
    """Write the page of the documentation."""
    from benchmarks.gpu.page import PAGE, read_results, write_page
    from maskfeat.errors import UserError, naming

    try:
        with naming(f"{PAGE} cannot be written"):
            write_page(read_results(path), PAGE)
    except UserError as error:
        logger.error("error: %s", error)
        return 2
    logger.info("%s", PAGE)
    return 0


def _one(args: argparse.Namespace) -> int:
    """Run one part in this process, on behalf of another one."""
    from benchmarks.gpu.worker import run_part

    (part,) = (part for part in _parts(args.table) if part.name == args.part)
    return run_part(part, args.output, torch.device(args.device), args.toy, args.seconds)


def _serve(args: argparse.Namespace) -> int:
    """Import everything and fork for every part that another process asks for."""
    from benchmarks.gpu.processes import serve

    _parts(args.table)
    return serve(main, args.device == "cuda")
