"""Lay out Caltech-101 (Fei-Fei et al., 2004) in folders for `DATA.PATH_TO_DATA_DIR`.

Of each class, every third photograph is held out. Photographs are reduced to a short side of 128 pixels.
"""

import io
import logging
import os
import re
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from maskfeat.demos.shares import PARTS, begin, finish, layout_command, write_shares
from maskfeat.errors import UserError, naming

logger = logging.getLogger(__name__)

SIDE = 128
"""Short side of the photographs in pixels."""
_INNER = "101_ObjectCategories.tar.gz"
_PHOTOGRAPH = re.compile(
    r"(?:.*/)?(?:101_ObjectCategories|(?P<split>train|val))/(?P<name>[\w-]+)/(?P<file>[\w-]+\.jpe?g)"
)
_LEFT_OUT = ("BACKGROUND_Google",)
"""Not one of the 101 classes."""
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, NotImplementedError, EOFError, OSError)
_LARGEST = 5_000_000
"""Bytes of a photograph, at most; those of the archive have up to 40,000."""


def _members(stream: io.BufferedIOBase, name: str) -> Iterator[tuple[str, bytes]]:
    """Yield the names and contents of the photographs in a tar; names are never used as paths."""
    with tarfile.open(fileobj=stream, mode="r:*") as archive:
        for member in archive:
            if member.isfile() and _PHOTOGRAPH.fullmatch(member.name) and member.size <= _LARGEST:
                file = archive.extractfile(member)
                assert file is not None
                yield member.name, file.read()


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the photographs of `source`, see `prepare`."""
    if source.is_dir():
        inside = [source / name for name in ("caltech-101.zip", _INNER, "caltech101.tar") if (source / name).is_file()]
        if inside:
            yield from _files(inside[0])
            return
        for path in sorted(source.rglob("*.jp*g")):
            yield path.relative_to(source.parent).as_posix(), path.read_bytes()
    elif source.suffix == ".zip":
        with zipfile.ZipFile(source) as archive:
            inner = next((name for name in archive.namelist() if PurePosixPath(name).name == _INNER), None)
            if inner is None:
                raise UserError(f"{source} does not hold {_INNER}: expected the official caltech-101.zip")
            with archive.open(inner) as stream:
                yield from _members(io.BytesIO(stream.read()), inner)
    else:
        with source.open("rb") as stream:
            yield from _members(stream, source.name)


def prepare(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Write `output/all/{train,val}/<class>/<image>.jpg`, and shares of it, see `write_shares`.

    Args:
        source: the official `caltech-101.zip` or `101_ObjectCategories.tar.gz`, a tar of `train/<class>/` and
            `val/<class>/`, which keeps this split, or a folder that holds one of these, unpacked or not.
        output: a new folder, or one that an earlier call completed.

    Returns:
        the folder.

    Raises:
        UserError: the source is not one of these, or is damaged; or the output exists and is not complete.
    """
    root, source = Path(output), Path(source)
    draft = begin(root, PARTS)
    if draft is None:
        return root
    if not source.exists():
        raise UserError(f"there is no {source}: expected caltech-101.zip, {_INNER}, or a folder of Caltech-101")
    found: dict[tuple[str, str], dict[str, bytes]] = defaultdict(dict)
    try:
        for name, content in _files(source):
            match = _PHOTOGRAPH.fullmatch(name)
            if match and match["name"] not in _LEFT_OUT:
                found[match["name"], match["split"] or ""][match["file"]] = content
    except _DAMAGE as error:
        raise UserError(f"{source} cannot be read: {error}") from error
    if len({name for name, _ in found}) < 2:
        raise UserError(f"{source} holds no photographs of classes: expected caltech-101.zip or {_INNER}")
    counts: dict[str, int] = defaultdict(int)
    for (name, given), files in sorted(found.items()):
        for number, (file, content) in enumerate(sorted(files.items())):
            split = given or ("val" if number % 3 == 2 else "train")
            path = draft / "all" / split / name / file
            with naming(f"{root} cannot be written"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(_reduced(content, f"{source}: {name}/{file}"))
            counts[split] += 1
    with naming(f"{root} cannot be written"):
        write_shares(draft)
        finish(draft, root, PARTS)
    logger.info("%s: %d training and %d held-out photographs", root, counts["train"], counts["val"])
    return root


def _reduced(content: bytes, what: str) -> bytes:
    """Return a JPEG file with a short side of at most `SIDE`; one that is small enough is not encoded again."""
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            if min(image.size) <= SIDE:
                image.load()
                return content
            scale = SIDE / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    except (OSError, ValueError) as error:
        raise UserError(f"{what} cannot be read: {error}") from error
    out = io.BytesIO()
    small.save(out, "JPEG", quality=92)
    return out.getvalue()


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Lay out Caltech-101 and return the exit code; `prog` is the name of the command in its help."""
    return layout_command(
        prepare,
        f"the official caltech-101.zip or {_INNER}, or a tar or folder of train/<class>/ and val/<class>/",
        "data/caltech101",
        "Lay out Caltech-101 as folders: DIR gets all/ with train/ and val/, few/ with five labelled training "
        "photographs of each class, and all_tuning/ and few_tuning/, with a part of the training set as val/.",
        argv,
        prog,
    )
