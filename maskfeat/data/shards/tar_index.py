"""What lies where in a tar archive: files grouped by the names of samples, as WebDataset writes them, or in folders."""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

from maskfeat.data.names import IMAGES, MAX_CLASS_NAME, VIDEOS
from maskfeat.errors import UserError, naming
from maskfeat.file_io import NotReadable, open_regular_file

LABELS = (".cls", ".json")
"""Endings of the files beside a sample that may hold its class, the first one first."""
LABEL_KEYS = ("label", "cls", "class")
"""Keys of the class in a .json file."""
_LARGEST_LABEL = 1 << 20
_BLOCK = 512
_PART = 1 << 20


class Entry(NamedTuple):
    """A sample of a shard.

    Attributes:
        name: in the shard.
        first, second: see `Member.place`.
        label: number or name of its class; None = the shard does not say.
    """

    name: str
    first: int
    second: int
    label: int | str | None


def index_tar(path: str) -> tuple[list[Entry], dict[str, int]]:
    """Read the headers of a tar archive, and the classes in it.

    Returns:
        Its images and videos in their order, and how many files of which ending are no samples.

    Raises:
        UserError: it is damaged or cut short, or has a member that is a link, lies outside, or is there twice.
    """
    with naming(f"{path} cannot be read"), _opened(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as archive:
                members = list(_files(archive, path))
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{path} is damaged, cut short or not a tar archive ({error}); archives must not be compressed"
            ) from error
        _check_end(file, path, members)
        files = [member for member in members if member.isfile()]
        return _grouped(file, path, files)


def _opened(path: str) -> BinaryIO:
    try:
        return open_regular_file(path)
    except NotReadable as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _files(archive: tarfile.TarFile, path: str) -> Iterator[tarfile.TarInfo]:
    """Yield files and folders, also hidden ones."""
    seen = set()
    for member in archive:
        name = member.name
        if name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise UserError(f"{path}: the member {name!r} does not lie in the archive's own folder")
        if member.isdir():
            yield member
            continue
        if not member.isfile() or member.issparse():
            what = "a link" if member.islnk() or member.issym() else "no plain file"
            raise UserError(
                f"{path}: the member {name!r} is {what}: pack files as they are (tar --dereference --hard-dereference)"
            )
        if name in seen:
            raise UserError(f"{path} has the member {name!r} twice")
        seen.add(name)
        yield member


def _check_end(file: BinaryIO, path: str, members: list[tarfile.TarInfo]) -> None:
    """Check that the archive ends where it says: tarfile takes damage in its middle, and a cut, for an end."""
    last = members[-1] if members else None
    end = 0 if last is None else last.offset_data
    if last is not None and last.isfile():
        end += -(-last.size // _BLOCK) * _BLOCK
    file.seek(end)
    mark = file.read(_BLOCK)
    where = f"after {last.name!r}" if last else "at its start"
    if len(mark) < _BLOCK:
        raise UserError(f"{path} is cut short {where}: it has no end mark; copy or make it again")
    while mark:
        if mark.strip(b"\0"):
            raise UserError(
                f"{path} goes on {where} with what is no member: it is damaged, or archives were joined (cat)"
            )
        mark = file.read(_PART)


def split_name(name: str) -> tuple[str, str, str]:
    """Return the key of WebDataset, the name without its ending, and the ending in lower case."""
    folder, base = os.path.split(name)
    stem, ending = os.path.splitext(name)
    return os.path.join(folder, base.split(".")[0]), stem, ending.lower()


def _grouped(file: BinaryIO, path: str, members: Iterable[tarfile.TarInfo]) -> tuple[list[Entry], dict[str, int]]:
    """Join samples and the files with their classes, which have the same name up to the ending or the first dot."""
    labels: dict[str, tarfile.TarInfo] = {}
    media: list[tarfile.TarInfo] = []
    left_out: Counter[str] = Counter()
    for member in members:
        _, stem, ending = split_name(member.name)
        if any(part.startswith(".") and part != "." for part in member.name.split("/")):
            left_out["hidden"] += 1
        elif ending in LABELS:
            known = labels.get(stem)
            if known is None or ending == LABELS[0]:
                labels[stem] = member
        elif ending in IMAGES or ending in VIDEOS:
            media.append(member)
        else:
            left_out[ending] += 1
    entries: list[Entry] = []
    taken: dict[tuple[str, bool], str] = {}
    for member in media:
        key, stem, ending = split_name(member.name)
        label = labels.get(stem)
        if label is None and key in labels:  # such as a.seg.png beside a.jpg and a.cls
            left_out[member.name[len(key) :].lower()] += 1
            continue
        if label is not None and (other := taken.setdefault((stem, ending in IMAGES), member.name)) != member.name:
            raise UserError(f"{path}: {other!r} and {member.name!r} share the class of {label.name!r}")
        found = None if label is None else _label(file, path, label)
        entries.append(Entry(member.name, member.offset_data, member.size, found))
    return entries, dict(left_out)


def _label(file: BinaryIO, path: str, member: tarfile.TarInfo) -> int | str | None:
    """Return the class in a .cls file, which is a number or a name, or in a .json file, which may have none."""
    if member.size > _LARGEST_LABEL:
        raise UserError(f"{path}: {member.name!r} should hold a class, and has {member.size} bytes")
    file.seek(member.offset_data)
    try:
        text = file.read(member.size).decode("utf-8").strip()
        if member.name.lower().endswith(LABELS[0]):
            value: object = int(text) if text.isascii() and text.isdecimal() else text
        else:
            fields = json.loads(text)
            value = next((fields[key] for key in LABEL_KEYS if key in fields), None) if fields else None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path}: no class can be read from {member.name!r}: {error}") from error
    if value is None:
        return None
    if not is_label(value):
        raise UserError(f"{path}: {member.name!r} has the class {value!r}, which is no number of 0 or more and no name")
    assert isinstance(value, int | str)
    return value


def is_label(value: object) -> bool:
    """Whether a value is the number or the name of a class; -1 says that there is none, as in test sets."""
    if isinstance(value, str):
        return 0 < len(value) <= MAX_CLASS_NAME
    return isinstance(value, int) and not isinstance(value, bool) and -1 <= value < 1 << 31
