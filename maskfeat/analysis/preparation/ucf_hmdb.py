"""`maskfeat prepare-ucf-hmdb`: UCF-101, HMDB51, JHMDB, and other folders with a folder of videos for each class."""

import argparse
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from maskfeat.analysis.command import exit_code
from maskfeat.analysis.preparation.videos import Listing, add_options, finish, read_lines, videos_below
from maskfeat.errors import UserError

_UCF_GROUP = re.compile(r"(.+_g\d+)_c\d+")
_HMDB_TAGS = re.compile(r"(.+?)_[a-z]+_(?:nm|cm)_np\d+_(?:ba|fr|le|ri)_(?:bad|med|goo)_\d+")
"""Body part, camera, people, viewpoint, quality and number of a clip, after the title of its film and the class."""
_HMDB_PARTS = {"0": "", "1": "train", "2": "val"}


def source_video(stem: str) -> str:
    """Return what names the film that a clip was cut from, as UCF-101 and HMDB51 write it; else the clip's own name."""
    found = _UCF_GROUP.fullmatch(stem) or _HMDB_TAGS.fullmatch(stem)
    return stem if found is None else found[1]


def hold_out(names: Sequence[str], share: float, seed: int) -> set[str]:
    """Choose about `share` of the videos of each class, whole films at a time, so that no film is on both sides.

    Args:
        names: `class/.../video`.
        share: between 0 and 1.
        seed: another one chooses other films.

    Raises:
        UserError: a class has one film alone.
    """
    films: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        films[name.split(os.sep)[0]][source_video(Path(name).stem)].append(name)
    held: set[str] = set()
    for label, of_class in films.items():
        if len(of_class) < 2:
            raise UserError(f"all videos of class {label!r} are of one film: it cannot be on both sides of a split")
        order = sorted(
            of_class, key=lambda film: hashlib.blake2b(f"{seed}/{film}".encode("utf-8", "surrogateescape")).digest()
        )
        wanted, taken = share * sum(map(len, of_class.values())), 0
        for film in order[:-1]:
            # The film that comes nearest to the share is the last one, but one there is in any case.
            if taken and taken + len(of_class[film]) / 2 > wanted:
                break
            held.update(of_class[film])
            taken += len(of_class[film])
    return held


def split_of(folder: Path, number: int) -> dict[str, list[str]]:
    """Read an official split: names `class/video`, without ending, of "train" and "val".

    Args:
        folder: with trainlist01.txt and testlist01.txt (UCF-101), or <class>_test_split1.txt (HMDB51, JHMDB).
        number: of the split, 1 to 3.

    Raises:
        UserError: there are no such files, or a line of them is something else.
    """
    ucf = {part: folder / f"{name}list{number:02d}.txt" for part, name in (("train", "train"), ("val", "test"))}
    if all(path.is_file() for path in ucf.values()):
        return {part: [os.path.splitext(line.split()[0])[0] for line in read_lines(path)] for part, path in ucf.items()}
    files = sorted(folder.glob(f"*_test_split{number}.txt"))
    if not files:
        raise UserError(
            f"{folder} has neither trainlist{number:02d}.txt and testlist{number:02d}.txt (UCF-101) nor "
            f"<class>_test_split{number}.txt (HMDB51, JHMDB)"
        )
    found: dict[str, list[str]] = {"train": [], "val": []}
    for path in files:
        label = path.name.removesuffix(f"_test_split{number}.txt")
        for line in read_lines(path):
            name, _, part = line.rpartition(" ")
            if part not in _HMDB_PARTS or not name:
                raise UserError(f"{path}: {line!r} is not a video and 0, 1 or 2")
            if _HMDB_PARTS[part]:
                found[_HMDB_PARTS[part]].append(f"{label}/{os.path.splitext(name.strip())[0]}")
    return found


def listing_of(root: Path, splits: Path | None, number: int, share: float, seed: int) -> Listing:
    """List a folder of class folders by an official split, or by one that is made; arguments as of the command.

    Raises:
        UserError: `root` holds no video, or one that lies in no class folder; or as `split_of` and `hold_out`.
    """
    names = videos_below(root)
    loose = [name for name in names if os.sep not in name]
    if loose:
        raise UserError(f"{root} must hold a folder for each class; {loose[0]} lies directly in it")
    classes = sorted({name.split(os.sep)[0] for name in names})
    label = {name: place for place, name in enumerate(classes)}
    missing: dict[str, list[str]] = {}
    totals: dict[str, int] = {}
    if splits is None:
        held = hold_out(names, share, seed)
        parts = {"train": [name for name in names if name not in held], "val": sorted(held)}
    else:
        place = {f"{name.split(os.sep)[0]}/{Path(name).stem}": name for name in names}
        official = split_of(splits, number)
        parts = {part: [place[name] for name in listed if name in place] for part, listed in official.items()}
        missing = {part: [name for name in listed if name not in place] for part, listed in official.items()}
        totals = {part: len(listed) for part, listed in official.items()}
    rows = {part: [(name, label[name.split(os.sep)[0]]) for name in listed] for part, listed in parts.items()}
    return Listing(root, {**rows, "test": rows["val"]}, classes, missing, totals)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1")
    return share


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Write the lists of UCF-101, HMDB51, JHMDB or the like; return the exit code.

    Args:
        argv: the command line; None = sys.argv.
        prog: name of the command in its help.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write train.csv, val.csv, test.csv (the videos of val.csv) and classes.txt for a folder with a "
        "folder of videos for each class: UCF-101, HMDB51, JHMDB or your own. Every video is read. The same command "
        "goes on where an interrupted one stopped.",
        epilog="example: %(prog)s UCF-101 lists --splits ucfTrainTestlist --split 1",
        allow_abbrev=False,
    )
    add_options(parser, "folder with a folder for each class")
    parser.add_argument(
        "--splits",
        type=Path,
        metavar="DIR",
        help="with the official files: trainlist01.txt (UCF-101), <class>_test_split1.txt (HMDB51, JHMDB)",
    )
    parser.add_argument("--split", type=int, choices=(1, 2, 3), default=1, help="which official split (default: 1)")
    parser.add_argument(
        "--hold-out",
        type=_share,
        default=0.3,
        metavar="X",
        help="without --splits: share of the videos of each class to test on, no film on both sides (default: 0.3)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --hold-out (default: 0)")
    args = parser.parse_args(argv)
    return exit_code(
        lambda: finish(listing_of(args.videos, args.splits, args.split, args.hold_out, args.seed), args.output, args)
    )
