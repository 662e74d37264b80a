"""Laid out data sets, and parts of them: few labels, and parts of the training samples on which settings are compared.

`all` is the whole set. `few` has `FEW` training samples of each class. `all_tuning` and `few_tuning` hold, as their
`val`, a fifth of the training samples of `all`; their training samples are the others, and those of `few`. Samples of
one group, such as clips of one video, are on one side. No sample of `few` is in that fifth.
"""

import argparse
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from maskfeat.data.datasets.lists import listed
from maskfeat.data.datasets.sample_list import SampleList, read_sample_list
from maskfeat.distributed.preemption import end_interrupted
from maskfeat.errors import UserError

logger = logging.getLogger(__name__)

COMPLETE = "complete"
"""File in a folder that was laid out to its end."""
FEW = 5
"""Training samples of each class in `few`."""
HELD = 5
"""Every fifth group of a class is held out for tuning."""
PARTS = ("all", "few", "all_tuning", "few_tuning")

T = TypeVar("T")


def tuning_split(items: Sequence[T], group: Callable[[T], str]) -> tuple[list[T], list[T], list[T]]:
    """Split the training samples of a class: what settings are fitted to, what they are compared on, and the few.

    Args:
        items: of one class, in an order that does not change.
        group: what keeps samples together.
    """
    groups: dict[str, list[T]] = defaultdict(list)
    for item in items:
        groups[group(item)].append(item)
    fitted: list[T] = []
    held: list[T] = []
    for number, members in enumerate(groups.values()):
        (held if number % HELD == HELD - 1 else fitted).extend(members)
    step = max(len(fitted) // FEW, 1)  # spread over the class: neighbours are alike
    return fitted, held, fitted[::step][:FEW]


def begin(root: Path, parts: Sequence[str]) -> Path | None:
    """Return an empty folder to lay out `parts` in, for `finish`; None where `root` is complete.

    Raises:
        UserError: `root` has some of the parts, and is not complete.
    """
    if (root / COMPLETE).is_file():
        logger.info("%s is there already", root)
        return None
    there = [str(root / part) for part in parts if (root / part).exists()]
    if there:
        raise UserError(
            f"{' and '.join(there)} exists and was not laid out here to its end: remove it, or name another"
        )
    draft = root / ".partial"
    shutil.rmtree(draft, ignore_errors=True)  # of a call that was interrupted
    return draft


def finish(draft: Path, root: Path, parts: Sequence[str]) -> None:
    """Move what was laid out in `draft` to its place, and note that it is complete."""
    for part in parts:
        (draft / part).rename(root / part)
    draft.rmdir()
    (root / COMPLETE).touch()


def link(source: Path, target: Path) -> None:
    """Give a file a second name; where the file system has no hard links, copy it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        target.write_bytes(source.read_bytes())


def write_shares(root: Path) -> None:
    """Write `few`, `all_tuning` and `few_tuning` beside `root/all`, which has train/ and val/ with class folders.

    Files are links where the file system supports hard links.
    """
    everything = root / "all"
    for folder in sorted((everything / "train").iterdir()):
        fitted, held, few = tuning_split(sorted(folder.iterdir()), lambda path: path.name)
        val = sorted((everything / "val" / folder.name).glob("*"))
        parts = {
            "few": (few, val),
            "all_tuning": (fitted, held),
            "few_tuning": (few, held),
        }
        for share, splits in parts.items():
            for split, files in zip(("train", "val"), splits, strict=True):
                for path in files:
                    link(path, root / share / split / folder.name / path.name)


def write_list_shares(
    source: str | os.PathLike[str], videos: str | os.PathLike[str], root: Path, group: Callable[[str], str]
) -> None:
    """Write the lists train.csv, val.csv and test.csv of `all` and of its parts, with absolute paths.

    Args:
        source: folder of train.csv and val.csv, with lines `path label`; the latter is also what is tested on.
        videos: folder that the paths are relative to.
        group: the group of a path.

    Raises:
        UserError: a list is missing or is none, see `read_sample_list`.
    """
    split_of = {split: read_sample_list(Path(source) / f"{split}.csv") for split in ("train", "val")}
    parts: dict[str, tuple[SampleList, SampleList]] = {
        "all": (split_of["train"], split_of["val"]),
        "few": ([], split_of["val"]),
        "all_tuning": ([], []),
        "few_tuning": ([], []),
    }
    for label in sorted({label for _, label in split_of["train"]}):
        own = [pair for pair in split_of["train"] if pair[1] == label]
        fitted, held, few = tuning_split(own, lambda pair: group(pair[0]))
        parts["few"][0].extend(few)
        for share, chosen in (("all_tuning", fitted), ("few_tuning", few)):
            parts[share][0].extend(chosen)
            parts[share][1].extend(held)
    for share, (train, val) in parts.items():
        (root / share).mkdir(parents=True, exist_ok=True)
        for split, pairs in (("train", train), ("val", val), ("test", val)):
            text = "".join(f"{listed(str(Path(videos).resolve() / path))} {label}\n" for path, label in pairs)
            (root / share / f"{split}.csv").write_text(text, encoding="utf-8")


def layout_command(
    prepare: Callable[[str, str], object],
    source: str,
    folder: str,
    description: str,
    argv: Sequence[str] | None,
    prog: str | None,
) -> int:
    """Lay out a data set as the command line says; return the exit code.

    Args:
        prepare: lays out what the first path names in the folder that the second one names.
        source, folder, description: what is laid out, where the recipes look for it, and how, for the help.
        argv: the command line; None = sys.argv.
        prog: name of the command in its help.
    """
    example = f"example: %(prog)s downloads {folder} (where the recipes look)"
    parser = argparse.ArgumentParser(prog=prog, description=description, epilog=example, allow_abbrev=False)
    parser.add_argument("source", metavar="SOURCE", help=source)
    parser.add_argument("output", metavar="DIR", help="folder to write")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        prepare(args.source, args.output)
    except UserError as error:
        parser.error(str(error))
    except KeyboardInterrupt as error:
        return end_interrupted(error)
    return 0
