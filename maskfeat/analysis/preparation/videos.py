"""What the preparations of video data sets share: reading every file, encoding, lists and the names of classes."""

import argparse
import csv
import logging
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from maskfeat.analysis.checks.reading import in_parallel, read_all
from maskfeat.analysis.command import count_option
from maskfeat.analysis.preparation.encode import encode
from maskfeat.data.bad_samples import UnreadableSample
from maskfeat.data.datasets.folders import FolderScan
from maskfeat.data.datasets.layouts import NAMES
from maskfeat.data.datasets.lists import listed
from maskfeat.data.names import VIDEOS
from maskfeat.distributed.world import available_cores
from maskfeat.errors import UserError, naming
from maskfeat.file_io import replace_text, unexpanded_path
from maskfeat.text import count, printable, some

logger = logging.getLogger(__name__)

JOURNAL, MISSING, UNREADABLE = "files.jsonl", "missing.txt", "unreadable.txt"
SHORT_SIDE = "short_side.txt"
"""File beside encoded videos that says at which size."""
_NOT_LISTED = "its name is not UTF-8 text in one line, which a list takes: rename it"
_UNLISTED = re.compile("[\ud800-\udfff\r\n]")


@dataclass
class Listing:
    """A data set as it will be listed.

    Attributes:
        root: the folder that paths are relative to.
        splits: [(path, label)] of each split; several may name the same videos.
        classes: names of the classes by their numbers.
        missing: what the published lists name and is not there, for each split.
        totals: videos of each split in the published lists.
    """

    root: Path
    splits: dict[str, list[tuple[str, int]]]
    classes: list[str]
    missing: dict[str, list[str]]
    totals: dict[str, int]


def add_options(parser: argparse.ArgumentParser, videos: str, partial: bool = True) -> None:
    """Add the arguments that all preparations of videos have.

    Args:
        videos: what VIDEOS is.
        partial: whether videos may be missing only if it is said.
    """
    parser.add_argument("videos", type=Path, metavar="VIDEOS", help=videos)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder for the lists")
    parser.add_argument(
        "--short-side", type=count_option(16), metavar="N", help="encode at this short side, into OUTPUT/videos"
    )
    parser.add_argument("--workers", type=count_option(0), metavar="N", help="processes (default: one a core)")
    if partial:
        parser.add_argument("--allow-missing", action="store_true", help="leave out videos that are not there")


def videos_below(root: Path) -> list[str]:
    """Return the videos of a folder at any depth, relative to it, sorted.

    Raises:
        UserError: there is no folder, or it holds none.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: it must hold the videos")
    scan = FolderScan(root, suffixes=VIDEOS, noun="video")
    found = sorted(os.path.relpath(path, root) for path in scan.files_below(os.fspath(root)))
    if not found:
        holds = scan.left_out_in_words()
        raise UserError(f"{root} has no video ({', '.join(VIDEOS)}){f', it holds {holds}' if holds else ''}")
    return found


@contextmanager
def reading_csv(path: Path) -> Iterator[None]:
    """Raise what goes wrong in reading a CSV file inside of the block as a UserError that names it."""
    try:
        with naming(f"{path} cannot be read"):
            yield
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no CSV file of UTF-8 text: {error}") from error


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty, without spaces around them.

    Raises:
        UserError: it cannot be read, or is no text.
    """
    try:
        with naming(f"{path} cannot be read"):
            text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def finish(listing: Listing, output: Path, args: argparse.Namespace) -> int:
    """Read every video, encode where asked, and write lists and names; return the exit code.

    Videos that cannot be read or listed are left out, and named in `UNREADABLE`. A second call does what is left to do.

    Raises:
        UserError: videos are missing, none is left, or something cannot be written.
    """
    missing = {split: names for split, names in listing.missing.items() if names}
    if missing and not getattr(args, "allow_missing", True):
        split, names = next(iter(missing.items()))
        raise UserError(
            f"{len(names)} of {listing.totals[split]} videos of {split} are not in {listing.root}: {some(names)}; "
            "--allow-missing leaves them out"
        )
    workers = available_cores() if args.workers is None else args.workers
    with naming(f"{output} cannot be written"):
        output.mkdir(parents=True, exist_ok=True)
        if args.short_side:
            _check_short_side(output / "videos", args.short_side)
    names = list(dict.fromkeys(name for rows in listing.splits.values() for name, _ in rows))
    if not names:
        raise UserError(f"none of the videos that are listed is in {listing.root}")
    bad = {name: _NOT_LISTED for name in names if not can_be_listed(name)}
    read = [name for name in names if name not in bad]
    facts = read_all([str(listing.root / name) for name in read], "video", output / JOURNAL, workers)
    bad |= {name: one.cause for name, one in zip(read, facts.values(), strict=True) if one.cause}
    root, target = listing.root, {name: name for name in names}
    if args.short_side:
        root = output / "videos"
        target = {name: f"{os.path.splitext(name)[0]}.mp4" for name in names}
        bad |= _encode_all([name for name in names if name not in bad], listing.root, root, args.short_side, workers)
    if len(bad) == len(names):
        name, cause = next(iter(bad.items()))
        raise UserError(f"none of the {len(names)} videos can be read: {name}: {cause}")
    with naming(f"{output} cannot be written"):
        for split, rows in listing.splits.items():
            good = [f"{listed(target[name])} {label}" for name, label in rows if name not in bad]
            replace_text(output / f"{split}.csv", "\n".join(good) + "\n")
        _write_lines(output / NAMES, listing.classes)
        _write_lines(output / UNREADABLE, [f"{name}: {cause}" for name, cause in bad.items()])
        _write_lines(output / MISSING, [name for rows in missing.values() for name in rows])
    _say(listing, bad, root, output)
    return 0


def _say(listing: Listing, bad: dict[str, str], root: Path, output: Path) -> None:
    for split, rows in listing.splits.items():
        good = sum(name not in bad for name, _ in rows)
        said = f"{output / split}.csv: {count(good, 'video')} of {count(len(listing.classes), 'class')}"
        for number, what in ((len(listing.missing.get(split, ())), "missing"), (len(rows) - good, "unreadable")):
            said += f", {number} {what}" if number else ""
        said += f"; the published list has {listing.totals[split]}" if split in listing.totals else ""
        logger.info(said)
    for name, cause in list(bad.items())[:5]:
        logger.info("unreadable: %s: %s", _escaped(name), cause)
    paths = [unexpanded_path(str(path)) for path in (output, root)]
    opts = ["DATA.PATH_TO_DATA_DIR", paths[0], "DATA.PATH_PREFIX", paths[1]]
    logger.info("use them with %s", shlex.join([*opts, "MODEL.NUM_CLASSES", str(len(listing.classes))]))


def can_be_listed(path: str) -> bool:
    """Whether a list, which is UTF-8 text with a path a line, can hold a path."""
    return not _UNLISTED.search(path)


def _escaped(text: str) -> str:
    """Return a text in one line of UTF-8: other bytes of the name of a file are written as \\udce9."""
    return printable(text.replace("\n", "\\n").replace("\r", "\\r"))


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write a line for each text; what UTF-8 cannot hold is escaped."""
    replace_text(path, "".join(f"{_escaped(line)}\n" for line in lines))


def _check_short_side(folder: Path, short_side: int) -> None:
    """Refuse a folder whose videos were encoded at another size: those that are there are not encoded again."""
    record = folder / SHORT_SIDE
    before = record.read_text(encoding="utf-8").strip() if record.is_file() else str(short_side)
    if before != str(short_side):
        raise UserError(
            f"{folder} holds videos of --short-side {before}, and --short-side {short_side} is given: give {before}, "
            "another OUTPUT, or remove that folder"
        )


def _encode_all(names: Sequence[str], source: Path, target: Path, short_side: int, workers: int) -> dict[str, str]:
    """Encode videos that are not there yet; return the cause for each that cannot be."""
    jobs = [(name, str(source / name), target / f"{os.path.splitext(name)[0]}.mp4", short_side) for name in names]
    twice = len({job[2] for job in jobs}) < len(jobs)
    if twice:
        raise UserError(f"two videos of {source} differ in their endings alone, and would be encoded into one file")
    with naming(f"{target} cannot be written"):
        target.mkdir(parents=True, exist_ok=True)
        replace_text(target / SHORT_SIDE, f"{short_side}\n")
        done = list(in_parallel(_encode_one, jobs, workers, "videos to encode"))
    return {name: cause for name, cause in done if cause}


def _encode_one(job: tuple[str, str, Path, int]) -> tuple[str, str]:
    name, source, target, short_side = job
    if target.exists() and target.stat().st_mtime >= os.stat(source).st_mtime:
        return name, ""
    try:
        encode(source, target, short_side)
    except UnreadableSample as error:
        return name, error.cause
    return name, ""
