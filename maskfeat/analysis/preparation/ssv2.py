"""`maskfeat prepare-ssv2`: Something-Something v2 by its official JSON lists."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskfeat.analysis.command import exit_code
from maskfeat.analysis.preparation.videos import Listing, add_options, finish, videos_below
from maskfeat.errors import UserError, naming

LISTS = {"train": "train", "val": "validation"}
LABELS = "labels"
_PREFIXES = ("", "something-something-v2-")


def _read(folder: Path, name: str) -> Any:
    for prefix in _PREFIXES:
        path = folder / f"{prefix}{name}.json"
        if path.is_file():
            try:
                with naming(f"{path} cannot be read"):
                    return json.loads(path.read_text(encoding="utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} is no JSON file: {error}") from error
    raise UserError(f"{folder} has neither {name}.json nor {_PREFIXES[1]}{name}.json: it must hold the official lists")


def _classes(folder: Path) -> dict[str, int]:
    labels = _read(folder, LABELS)
    try:
        numbers = {str(name): int(number) for name, number in labels.items()}
    except (AttributeError, TypeError, ValueError):
        numbers = {}
    if not numbers or sorted(numbers.values()) != list(range(len(numbers))):
        raise UserError(f"{LABELS}.json of {folder} must give each template a number, from 0 to the number of classes")
    return numbers


def listing_of(root: Path, folder: Path) -> Listing:
    """List the videos below `root` by the official lists in `folder`; "test" shows those of validation, which have
    labels.

    Raises:
        UserError: a list is not there or is something else.
    """
    numbers = _classes(folder)
    place = {Path(name).stem: name for name in videos_below(root)}
    rows: dict[str, list[tuple[str, int]]] = {}
    missing: dict[str, list[str]] = {}
    totals = {}
    for split, name in LISTS.items():
        entries: list[Any] = _read(folder, name)
        rows[split], missing[split] = [], []
        for entry in entries:
            try:
                video, template = str(entry["id"]), entry["template"].replace("[", "").replace("]", "")
                label = numbers[template]
            except (TypeError, KeyError, AttributeError):
                raise UserError(
                    f"{name}.json of {folder} must list objects with an id and a template of {LABELS}.json; one is "
                    f"{str(entry)[:200]}"
                ) from None
            if video in place:
                rows[split].append((place[video], label))
            else:
                missing[split].append(video)
        totals[split] = len(entries)
    return Listing(root, {**rows, "test": rows["val"]}, sorted(numbers, key=numbers.__getitem__), missing, totals)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Write the lists of Something-Something v2; return the exit code.

    Args:
        argv: the command line; None = sys.argv.
        prog: name of the command in its help.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write train.csv, val.csv, test.csv (the videos of val.csv) and classes.txt for "
        "Something-Something v2. Every video is read. The same command goes on where an interrupted one stopped.",
        epilog="example: %(prog)s 20bn-something-something-v2 lists --labels labels",
        allow_abbrev=False,
    )
    add_options(parser, "folder with <id>.webm files, at any depth")
    parser.add_argument(
        "--labels",
        type=Path,
        required=True,
        metavar="DIR",
        help="with train.json, validation.json and labels.json, or something-something-v2-train.json and so on",
    )
    args = parser.parse_args(argv)
    return exit_code(lambda: finish(listing_of(args.videos, args.labels), args.output, args))
