"""The content of folders of images or videos, with one folder per class or not, and what is left out of the set."""

import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from maskfeat.data.names import IMAGES
from maskfeat.errors import UserError, naming
from maskfeat.text import count, some

LAYOUT = "DATA.PATH_TO_DATA_DIR must hold train/ and val/ with one folder a class: train/<class>/<image>.JPEG"
LAYOUT_OF_VIDEOS = (
    "DATA.PATH_TO_DATA_DIR must hold train.csv, val.csv and test.csv, or train/ and val/ with one folder a class: "
    "train/<class>/<video>.mp4"
)

_PICTURES = (
    *(".arw", ".avif", ".cr2", ".dng", ".exr", ".hdr", ".heic", ".heif", ".ico", ".j2k", ".jp2", ".jxl", ".nef"),
    *(".pbm", ".pgm", ".pnm", ".ppm", ".psd", ".svg", ".tga"),
)
"""Endings of pictures that are not read."""
_FILMS = (".asf", ".divx", ".dv", ".f4v", ".m1v", ".m2v", ".mxf", ".rm", ".rmvb")
"""Endings of videos that are not read."""
_ARCHIVES = (".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst")
_OF_SYSTEMS = {"#recycle", "$RECYCLE.BIN", "@eaDir", "__MACOSX", "lost+found", "System Volume Information"}
"""Folders that file systems, macOS and network drives make; some hold thumbnails of the images beside them."""

ImageList = list[tuple[str, int]]

Kind = tuple[str, str]
"""What is left out: the noun in the singular, and what follows it."""


def class_name(folder: str) -> str:
    """Return the name of the class in a folder. Systems write é as one or two code points; it is one name (NFC)."""
    return unicodedata.normalize("NFC", folder)


def _is_hidden(entry: "os.DirEntry[str]") -> bool:
    return entry.name.startswith(".") or entry.name in _OF_SYSTEMS


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _entries(folder: str | os.PathLike[str]) -> "list[os.DirEntry[str]]":
    with naming(f"{folder} cannot be listed"), os.scandir(folder) as entries:
        return list(entries)


def class_folders(root: str | os.PathLike[str]) -> list[str]:
    """Return the class names of a split: the names of its folders, sorted, without hidden folders."""
    return sorted(class_name(entry.name) for entry in _entries(root) if _is_folder(entry) and not _is_hidden(entry))


@dataclass
class FolderScan:
    """What `scan_folder` finds.

    Attributes:
        root: the folder of the split.
        files: the image or video files of each class, sorted, by the name of the class in sorted order.
        left_out: how many entries of each kind are not part of the set.
        media: how many of these are pictures or films, as far as names tell.
        possible_classes: archives and broken links beside the class folders, each of which may be a class.
        folders_with_files: how many folders with such files there are, at any depth.
        suffixes: endings of the files that are looked for, in lower case.
        noun: what these files are, "image" or "video".
    """

    root: Path
    files: dict[str, list[str]] = field(default_factory=dict)
    left_out: Counter[Kind] = field(default_factory=Counter)
    media: int = 0
    possible_classes: list[str] = field(default_factory=list)
    folders_with_files: int = 0
    suffixes: tuple[str, ...] = IMAGES
    noun: str = "image"

    @property
    def layout(self) -> str:
        """How the folder should look, for messages."""
        return LAYOUT if self.noun == "image" else LAYOUT_OF_VIDEOS

    @property
    def number(self) -> int:
        """How many images the classes have together."""
        return sum(map(len, self.files.values()))

    @property
    def empty(self) -> list[str]:
        """Classes without an image."""
        return [name for name, files in self.files.items() if not files]

    def left_out_in_words(self) -> str:
        """Return how many entries of which kind are left out, the most frequent kinds first; "" if there are none."""
        kinds = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
        return some([count(number, noun) + rest for (noun, rest), number in kinds])

    def check_share(self) -> None:
        """Check that the images in class folders are most of the pictures, or the videos most of the films.

        Raises:
            UserError: there are none, or more pictures are left out.
        """
        left_out = self.left_out_in_words()
        if not self.number:
            raise UserError(
                f"no {self.noun} ({', '.join(self.suffixes)}) in the class folders of {self.root}"
                f"{f', which holds {left_out}' if left_out else ''}: {self.layout}"
            )
        if self.media > self.number:
            folders = count(len(self.files) - len(self.empty), "class folder")
            raise UserError(
                f"{self.root} has {count(self.number, self.noun)} in {folders}, and more would be left out: "
                f"{left_out}. Move them into class folders, convert what is not one of {', '.join(self.suffixes)}, or "
                "move them away; DATA.PATH_TO_DATA_DIR names the folder"
            )

    def check_numbers(self, num_classes: int) -> None:
        """Check the folders that number the classes of a classifier.

        Args:
            num_classes: MODEL.NUM_CLASSES.

        Raises:
            UserError: they cannot be the classes, or some are missing, so that others would get their numbers.
        """
        names, empty = list(self.files), self.empty
        numbers = f"{self.root} has {count(len(names), 'class folder')} and MODEL.NUM_CLASSES is {num_classes}"
        if len(names) > num_classes:
            hint = f" {len(empty)} without an image are counted ({some(empty)}): remove them, or" if empty else ""
            raise UserError(f"{numbers}:{hint} set MODEL.NUM_CLASSES {len(names)}")
        if len(names) == num_classes:
            return
        if self.possible_classes:
            raise UserError(
                f"{numbers}: {some(self.possible_classes)} may be classes, without which the others would get other "
                "numbers: unpack, mend or remove them"
            )
        if self.folders_with_files == num_classes:
            raise UserError(
                f"{numbers}, which is the number of the folders that images lie in: move the classes up, so that "
                f"they lie directly in {self.root}, or set DATA.PATH_TO_DATA_DIR or MODEL.NUM_CLASSES"
            )

    def leave_out(self, entry: "os.DirEntry[str]", where: str = "") -> None:
        """Count an entry that is not part of the set; `where` describes the place of an image."""
        suffix = os.path.splitext(entry.name)[1].lower()
        if _is_hidden(entry):
            self.left_out["hidden folder" if _is_folder(entry) else "hidden file", ""] += 1
        elif entry.is_symlink() and not os.path.exists(entry.path):
            self.left_out["broken link", ""] += 1
        elif suffix in self.suffixes:
            self.media += 1
            self.left_out[self.noun, where] += 1
        elif suffix:
            self.media += suffix in (_PICTURES if self.noun == "image" else _FILMS)
            self.left_out[f"{suffix} file", ""] += 1
        else:
            self.media += 1
            self.left_out["file", " without an ending"] += 1

    def files_below(
        self, folder: str, above: frozenset[tuple[int, int]] = frozenset(), skip: Collection[str] = ()
    ) -> Iterator[str]:
        """Yield the image files in a folder and the folders in it; links to folders are followed, but not in circles.

        Args:
            above: device and inode of the folders above it.
            skip: names of folders directly in it that are not searched.
        """
        with naming(f"{folder} cannot be listed"):
            status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            self.left_out["link", " to a folder above it"] += 1
            return
        holds_images = False
        for entry in _entries(folder):
            if _is_hidden(entry):
                self.leave_out(entry)
            elif _is_folder(entry) and entry.name in skip:
                self.left_out["folder", f" {entry.name}/"] += 1
            elif _is_folder(entry):
                yield from self.files_below(entry.path, above | {here})
            elif entry.name.lower().endswith(self.suffixes):
                holds_images = True
                yield entry.path
            else:
                self.leave_out(entry)
        self.folders_with_files += holds_images


def scan_folder(root: str | os.PathLike[str], suffixes: tuple[str, ...] = IMAGES, noun: str = "image") -> FolderScan:
    """Look for the images of `root/<class>/`, at any depth. Hidden files and folders are left out.

    Args:
        root: the folder of a split.
        suffixes, noun: what is looked for, see `FolderScan`.

    Raises:
        UserError: the folder does not exist, a folder cannot be listed, or two names are the same in Unicode.
    """
    found = FolderScan(Path(root), suffixes=suffixes, noun=noun)
    if not found.root.is_dir():
        raise UserError(f"no folder {root}: {found.layout}")
    for entry in sorted(_entries(root), key=lambda entry: (class_name(entry.name), entry.name)):
        name = class_name(entry.name)
        if _is_folder(entry) and not _is_hidden(entry):
            if name in found.files:
                raise UserError(f"{root} has two folders {name}, in different Unicode forms: merge them")
            found.files[name] = sorted(found.files_below(entry.path))
            continue
        found.leave_out(entry, f" directly in {found.root.name}/, outside of a class folder")
        broken = entry.is_symlink() and not os.path.exists(entry.path) and not name.lower().endswith(suffixes)
        if (broken or name.lower().endswith(_ARCHIVES)) and not _is_hidden(entry):
            found.possible_classes.append(entry.name)
    # An archive that has been unpacked beside itself is no class.
    found.possible_classes = [
        name for name in found.possible_classes if class_name(name.split(".")[0]) not in found.files
    ]
    return found


def list_class_folders(
    root: str | os.PathLike[str] | FolderScan, classes: Sequence[str] | None = None, whose: str = "the training set"
) -> tuple[ImageList, list[str]]:
    """List the images of `root/<class>/`, at any depth.

    Args:
        root: the folder of a split, such as DATA.PATH_TO_DATA_DIR/train, or a scan of it.
        classes: class names in the order of their indices; None = the folders of `root`, sorted by name. Pass the names
            of the training set for a validation set that lacks some classes.
        whose: what `classes` belong to, for messages.

    Returns:
        [(path, class index)] sorted by class and name, and the class names.

    Raises:
        UserError: the folder does not exist, contains no image or leaves out most of them, or contains a class that is
            not in `classes`.
    """
    scan = root if isinstance(root, FolderScan) else scan_folder(root)
    names = list(scan.files) if classes is None else [class_name(name) for name in classes]
    class_index = {name: index for index, name in enumerate(names)}
    unknown = [name for name in scan.files if name not in class_index]
    if unknown:
        alike = {without_case(name): name for name in names}
        shown = [
            f"{name} ({alike[without_case(name)]} but for case or spaces)" if without_case(name) in alike else name
            for name in unknown
        ]
        raise UserError(
            f"{scan.root} has {count(len(unknown), 'class folder')} that {whose} lacks ({some(shown)}): {scan.layout}"
        )
    scan.check_share()
    return [(path, class_index[name]) for name, files in scan.files.items() for path in files], names


def without_case(name: str) -> str:
    """Return a name as it is compared with others that may differ in case, spaces and underscores alone."""
    return " ".join(name.casefold().replace("_", " ").split())
