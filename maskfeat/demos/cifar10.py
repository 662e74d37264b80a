"""Lay out CIFAR-10 (Krizhevsky, 2009) in folders for `DATA.PATH_TO_DATA_DIR`: the whole set, and a labelled tenth.

File names of the archive are never used as paths, and no pickle is read: the "Python version" of the archive holds
pickles, the binary version does not.
"""

import gzip
import io
import logging
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from maskfeat.demos.shares import begin, finish, layout_command, link
from maskfeat.errors import UserError

logger = logging.getLogger(__name__)

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ARCHIVE = "cifar-10-binary.tar.gz"
SPLITS = {"train": "train", "test": "val"}
"""Split of CIFAR-10 -> folder of ImageNet's layout."""
SHARES = {"all": 1, "tenth": 10}
"""Folder -> n: it holds every n-th training image of a class."""
_SIDE = 32
_RECORD = 1 + 3 * _SIDE**2
_IN_ARCHIVE = re.compile(r"cifar-10-batches-bin/(?:data_batch_[1-5]|(test)_batch)\.bin")
_IN_ZIP = re.compile(r"(train|test)/(\w+)/(\w+\.(?:jpg|png))")
_LARGEST = 200_000
"""Bytes of one image in a zip, at most; 32 x 32 pixels take about 1,000."""
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, EOFError, OSError)
"""Exceptions that damaged archives raise."""

Labelled = tuple[str, str, str, bytes]
"""An image: split, class, file name, content."""


def _from_archive(path: Path) -> Iterator[Labelled]:
    """Yield the images of the official binary archive as PNG files, which change no value."""
    count: dict[tuple[str, int], int] = defaultdict(int)
    with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
        for member in archive:
            found = _IN_ARCHIVE.fullmatch(member.name)
            if found is None or not member.isfile():
                continue
            file = archive.extractfile(member)
            assert file is not None
            data = file.read(10_000 * _RECORD + 1)
            if not data or len(data) % _RECORD or len(data) > 10_000 * _RECORD:
                raise UserError(f"{path}: {member.name} does not consist of records of {_RECORD} bytes: download again")
            split = found[1] or "train"
            for record in np.frombuffer(data, np.uint8).reshape(-1, _RECORD):
                if record[0] >= len(CLASSES):
                    raise UserError(f"{path}: {member.name} has a label {record[0]}, expected 0 to 9: download again")
                number = count[split, int(record[0])]
                count[split, int(record[0])] += 1
                content = io.BytesIO()
                pixels = record[1:].reshape(3, _SIDE, _SIDE).transpose(1, 2, 0)
                Image.fromarray(np.ascontiguousarray(pixels)).save(content, "PNG")
                yield split, CLASSES[record[0]], f"{number:04d}.png", content.getvalue()
        while stream.read(1 << 20):  # to the end, where gzip compares its checksum
            pass


def _from_zip(path: Path) -> Iterator[Labelled]:
    """Yield the images `train/<class>/<image>` and `test/<class>/<image>` of a zip; their content is not changed."""
    with zipfile.ZipFile(path) as archive:
        for info in sorted(archive.infolist(), key=lambda info: info.filename):
            found = _IN_ZIP.fullmatch(info.filename)
            if found is None or found[2] not in CLASSES:
                continue
            if info.file_size > _LARGEST:
                raise UserError(f"{path}: {info.filename} claims {info.file_size} bytes, too many for 32 x 32 pixels")
            if info.flag_bits & 1:
                raise UserError(f"{path}: {info.filename} is encrypted, expected a zip without a password")
            with archive.open(info) as file:  # the declared size may be false: unpack no more than the limit
                yield found[1], found[2], found[3], file.read(_LARGEST + 1)


def _images(source: Path) -> Iterator[Labelled]:
    zips = [source / f"{split}.zip" for split in SPLITS]
    if source.is_dir() and all(path.is_file() for path in zips):
        for path in zips:
            yield from _from_zip(path)
    elif (source / ARCHIVE).is_file():
        yield from _from_archive(source / ARCHIVE)
    elif source.is_file() and source.name.endswith(".tar.gz") and "python" not in source.name:
        yield from _from_archive(source)
    else:
        raise UserError(
            f"{source}: expected {ARCHIVE}, a folder that holds it, or a folder with train.zip and test.zip. The "
            "archive 'for Python' is a pickle, which could run anything, and is not read"
        )


def prepare(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Write `output/{all,tenth}/{train,val}/<class>/<image>`; both have all test images as `val`.

    The labelled tenth holds the first of every ten training images of a class. Its files are links to those of `all`
    where the file system supports hard links. A folder that is complete is not written again.

    Args:
        source: `cifar-10-binary.tar.gz`, its folder, or a folder with train.zip and test.zip.
        output: a new folder, or one that an earlier call completed.

    Returns:
        the folder.

    Raises:
        UserError: the source is not one of these, or is damaged; or the output exists and is not complete.
    """
    root = Path(output)
    draft = begin(root, list(SHARES))
    if draft is None:
        return root
    counts: dict[tuple[str, str], int] = defaultdict(int)
    try:
        for split, name, file, content in _images(Path(source)):
            relative = Path(SPLITS[split], name, file)
            for share, every in SHARES.items():
                if split == "test" or counts[split, name] % every == 0:
                    _write_or_link(draft / share / relative, content, draft / "all" / relative)
            counts[split, name] += 1
    except _NotWritten as error:
        raise UserError(f"{root} cannot be written: {error}") from error
    except _DAMAGE as error:
        raise UserError(f"{source} cannot be read: {error}") from error
    missing = [f"{split}/{name}" for split in SPLITS for name in CLASSES if not counts[split, name]]
    if missing:
        raise UserError(f"{source} has no picture of {', '.join(missing)}: download it again")
    finish(draft, root, list(SHARES))
    total = {split: sum(counts[split, name] for name in CLASSES) for split in SPLITS}
    logger.info("%s: %d training and %d test images", root, total["train"], total["test"])
    return root


class _NotWritten(Exception):
    """The disk is full, or the folder is not writable."""


def _write_or_link(path: Path, content: bytes, original: Path) -> None:
    try:
        if path != original:
            link(original, path)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise _NotWritten(error.strerror) from error


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Lay out CIFAR-10 and return the exit code; `prog` is the name of the command in its help."""
    return layout_command(
        prepare,
        f"the official binary archive ({ARCHIVE}), or a folder with it, or a folder with train.zip and test.zip "
        "(train/<class>/<image>)",
        "data/cifar10",
        "Lay out CIFAR-10 as folders: DIR gets all/ and tenth/, each with train/ and val/. tenth/ has one in ten "
        "labelled training images, both have all test images as val/.",
        argv,
        prog,
    )
