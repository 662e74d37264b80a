"""`maskfeat prepare-kinetics`: Kinetics-400, -600 and -700 as the CVD Foundation hosts them, or as class folders."""

import argparse
import csv
import gzip
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from lzma import LZMAError
from pathlib import Path
from typing import BinaryIO, cast

from maskfeat.analysis.checks.reading import in_parallel
from maskfeat.analysis.command import exit_code
from maskfeat.analysis.preparation.videos import Listing, add_options, finish, reading_csv, videos_below
from maskfeat.data.names import VIDEOS
from maskfeat.distributed.world import available_cores
from maskfeat.errors import UserError, naming
from maskfeat.file_io import draft_of
from maskfeat.text import count

logger = logging.getLogger(__name__)

SPLITS = {"train": ("train",), "val": ("val", "validate", "validation"), "test": ("test",)}
"""Split -> names of its annotations and of its folder, as they differ between the editions."""
TARS = (".tar", ".tar.gz", ".tgz")
DONE = ".unpacked"
"""Ending of an empty file that says that an archive was unpacked to its end."""
_CLIP = re.compile(r"(.+)_(\d{6})_(\d{6})")
_REPLACEMENT = "replacement"
"""Begins the name of the folder of what is published in place of corrupted videos."""
_LARGEST = 2 << 30
"""Bytes of one video in an archive, at most."""
_BLOCK = 1 << 20
_DAMAGE = (tarfile.TarError, zlib.error, LZMAError, EOFError, OSError)


def clip_name(youtube_id: str, start: str, end: str) -> str:
    """Return the name of a clip's file, without ending: id, start and end in seconds."""
    return f"{youtube_id}_{int(float(start)):06d}_{int(float(end)):06d}"


def read_annotations(path: Path) -> list[tuple[str, str]]:
    """Read an official annotation file: (name of the clip's file, class) of each row; the class is "" in some tests.

    Raises:
        UserError: it cannot be read, has no columns label, youtube_id, time_start and time_end, or a time that is no
            number.
    """
    with reading_csv(path), path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if not {"youtube_id", "time_start", "time_end"} <= set(reader.fieldnames or ()):
            raise UserError(
                f"{path} must have the columns label, youtube_id, time_start, time_end; its first line is "
                f"{','.join(reader.fieldnames or ())[:200]!r}"
            )
        rows = []
        for number, row in enumerate(reader, 2):
            try:
                name = clip_name(row["youtube_id"], row["time_start"], row["time_end"])
            except (TypeError, ValueError, OverflowError):
                raise UserError(f"{path}, line {number}: time_start and time_end must be seconds") from None
            rows.append((name, (row.get("label") or "").strip()))
    return rows


def find_annotations(folder: Path) -> dict[str, Path]:
    """Return the annotation file of each split that has one: train.csv, or kinetics_400_train.csv, or the like.

    Raises:
        UserError: there is none for train or val, or two for one split.
    """
    found: dict[str, Path] = {}
    for split, names in SPLITS.items():
        files = [path for path in sorted(folder.glob("*.csv")) if re.split(r"[^a-z]+", path.stem.lower())[-1] in names]
        if len(files) > 1:
            raise UserError(f"{folder} has two annotation files of {split}: {files[0].name} and {files[1].name}")
        if files:
            found[split] = files[0]
    missing = [f"{split}.csv" for split in ("train", "val") if split not in found]
    if missing:
        raise UserError(f"{folder} has no {' and no '.join(missing)}: --annotations must hold the official CSV files")
    return found


# ---------------------------------------------------------------------------------------------------------- archives


def unpack_all(root: Path, output: Path, workers: int) -> None:
    """Unpack the archives of videos below `root` into `output`, each into a folder of its own.

    Of each member that is a video its name alone is used, without folders; links and all others are left out.

    Raises:
        UserError: an archive is damaged or holds no video.
    """
    archives = sorted(path for path in root.rglob("*") if path.name.endswith(TARS) and path.is_file())
    if not archives:
        raise UserError(f"{root} has no archive ({', '.join(TARS)}): leave out --unpack")
    jobs = [
        (path, output / path.relative_to(root).parent / re.sub(r"\.(tar|tar\.gz|tgz)$", "", path.name))
        for path in archives
    ]
    with naming(f"{output} cannot be written"):
        for path, number in in_parallel(_unpack, jobs, workers, "archives"):
            logger.debug("%s: %s", path, count(number, "video"))


def _unpack(job: tuple[Path, Path]) -> tuple[Path, int]:
    path, folder = job
    done = folder.with_name(folder.name + DONE)
    if done.exists():
        return path, 0
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    try:
        with _decompressed(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                name = os.path.basename(member.name)
                if not member.isfile() or name.startswith(".") or not name.lower().endswith(VIDEOS):
                    continue
                number += 1
                target = folder / name
                if target.exists() and target.stat().st_size == member.size:
                    continue
                if member.size > _LARGEST:
                    raise UserError(f"{path}: {member.name} claims {member.size} bytes")
                _write(archive, member, target)
            end = b""
            while block := stream.read(_BLOCK):  # to the end, where gzip compares its checksum
                end = block
            if not end or any(end[-512:]):  # tarfile takes the end of a file for that of an archive
                raise EOFError("it lacks its end")
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(f"{path} cannot be unpacked into {folder}: {error}") from error
    if not number:
        raise UserError(f"{path} holds no video ({', '.join(VIDEOS)})")
    done.touch()
    return path, number


def _decompressed(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path)) if packed else path.open("rb")


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    file = archive.extractfile(member)
    assert file is not None
    with file, draft_of(target) as draft, draft.open("wb") as out:
        left = member.size
        while left:
            block = file.read(min(left, _BLOCK))
            if not block:
                raise EOFError("it ends in the middle of a member")
            out.write(block)
            left -= len(block)


# ---------------------------------------------------------------------------------------------------------- listing


def _places(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the videos by the name of their clip: `id_start_end`, and `id` for those that say no more."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(Path(name).stem, []).append(name)
    return found


def _choose(split: str, clip: str, places: dict[str, list[str]]) -> str | None:
    """Return the video of a clip; of several, one that replaces a corrupted one, else one in a folder of its split."""
    named = _CLIP.fullmatch(clip)
    candidates = places.get(clip) or places.get(named[1] if named else clip, [])

    def rank(name: str) -> tuple[bool, bool]:
        """Whether a video is a replacement, and whether it lies in a folder of the split."""
        folders = Path(name.lower()).parts[:-1]
        return any(one.startswith(_REPLACEMENT) for one in folders), bool({*folders} & {*SPLITS[split]})

    return max(candidates, key=rank, default=None)


def from_annotations(root: Path, folder: Path, official_test: bool) -> Listing:
    """List the videos below `root` by the annotations in `folder`; "test" shows those of "val" unless it is said.

    Raises:
        UserError: annotations are not there or are something else, there is no video, or a row has no class or one that
            train and val lack.
    """
    annotations = {split: read_annotations(path) for split, path in find_annotations(folder).items()}
    classes = sorted({label for split in ("train", "val") for _, label in annotations[split] if label})
    number = {name: place for place, name in enumerate(classes)}
    places = _places(videos_below(root))
    rows: dict[str, list[tuple[str, int]]] = {}
    missing: dict[str, list[str]] = {}
    totals = {}
    for split, clips in annotations.items():
        if split == "test" and not official_test:
            continue
        unknown = sorted({label for _, label in clips if label not in number})
        if unknown:
            raise UserError(
                f"the annotations of {split} have classes that train and val lack, or rows without one: {unknown[0]!r}"
                f"{'; leave out --official-test, a test then shows the videos of val' if split == 'test' else ''}"
            )
        chosen = [(clip, _choose(split, clip, places), number[label]) for clip, label in clips]
        rows[split] = [(name, label) for _, name, label in chosen if name is not None]
        missing[split] = [f"{split}/{clip}" for clip, name, _ in chosen if name is None]
        totals[split] = len(clips)
    return Listing(root, {**rows, "test": rows.get("test", rows["val"])}, classes, missing, totals)


def from_class_folders(root: Path) -> Listing:
    """List `root/train/<class>/` and `root/val/<class>/`.

    Raises:
        UserError: a folder is not there or holds no video, a video lies in no class folder, or train lacks a class.
    """
    rows: dict[str, list[tuple[str, str]]] = {}
    for split, name in _folders(root):
        rows[split] = [(f"{name}/{video}", video.split(os.sep)[0]) for video in videos_below(root / name)]
        loose = [video for video, label in rows[split] if label == os.path.basename(video)]
        if loose:
            raise UserError(
                f"{root / loose[0]} lies in no class folder: give --annotations, the folder of the official CSV files"
            )
    for split in ("train", "val"):
        if split not in rows:
            raise UserError(f"{root} has no folder {split}/: give --annotations, or class folders in train/ and val/")
    classes = sorted({label for _, label in rows["train"]})
    number = {name: place for place, name in enumerate(classes)}
    unknown = sorted({label for listed in rows.values() for _, label in listed} - set(classes))
    if unknown:
        raise UserError(f"{root} has classes that train/ lacks: {', '.join(unknown[:5])}")
    listed = {split: [(video, number[label]) for video, label in videos] for split, videos in rows.items()}
    return Listing(root, {**listed, "test": listed.get("test", listed["val"])}, classes, {}, {})


def _folders(root: Path) -> Iterator[tuple[str, str]]:
    for split, names in SPLITS.items():
        for name in names:
            if (root / name).is_dir():
                yield split, name
                break


def prepare(args: argparse.Namespace) -> int:
    """Do what the command line says; return the exit code."""
    root: Path = args.videos
    if args.unpack:
        unpack_all(root, args.unpack, available_cores() if args.workers is None else args.workers)
        root = args.unpack
    if args.annotations is None:
        return finish(from_class_folders(root), args.output, args)
    return finish(from_annotations(root, args.annotations, args.official_test), args.output, args)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Write the lists of Kinetics; return the exit code.

    Args:
        argv: the command line; None = sys.argv.
        prog: name of the command in its help.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write train.csv, val.csv, test.csv (the videos of val.csv) and classes.txt for Kinetics-400, -600 "
        "or -700, or for class folders. Videos are found by their names (ID_START_END.mp4) in any folders. Those that "
        "are not there are left out and named in missing.txt, those that cannot be read in unreadable.txt. The same "
        "command goes on where an interrupted one stopped.",
        epilog="example: %(prog)s k400/videos k400/lists --annotations k400/annotations --short-side 256",
        allow_abbrev=False,
    )
    add_options(parser, "folder with videos at any depth, or archives", partial=False)
    parser.add_argument(
        "--annotations", type=Path, metavar="DIR", help="with train.csv, val.csv (validate.csv), test.csv"
    )
    parser.add_argument("--unpack", type=Path, metavar="DIR", help="first unpack the archives of VIDEOS into this one")
    parser.add_argument("--official-test", action="store_true", help="test.csv lists the test set, not that of val.csv")
    args = parser.parse_args(argv)
    return exit_code(lambda: prepare(args), goes_on=True)
