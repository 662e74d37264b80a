"""`maskfeat make-shards`: pack images or videos into tar archives, as WebDataset has them, that are read in place."""

import argparse
import hashlib
import io
import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from maskfeat.analysis.checks.collect import ALL, Collected, Sample, collect
from maskfeat.analysis.checks.reading import in_parallel
from maskfeat.analysis.command import are_same, count_option, exit_code
from maskfeat.data.bad_samples import UnreadableSample, open_regular_file
from maskfeat.data.datasets.layouts import NAMES
from maskfeat.data.datasets.sample_list import NO_LABEL
from maskfeat.data.datasets.shard_sets import check_class_names
from maskfeat.data.image_reader import read_image
from maskfeat.data.names import IMAGES, VIDEOS
from maskfeat.data.shards.files import is_parquet, stamp_of
from maskfeat.data.shards.index import ShardIndex, keep_index, make_index
from maskfeat.data.shards.members import SEPARATOR, Member
from maskfeat.data.shards.tar_index import LABELS
from maskfeat.distributed.world import available_cores
from maskfeat.errors import UserError, naming
from maskfeat.file_io import replace_text
from maskfeat.text import count, some

logger = logging.getLogger(__name__)

MANIFEST = "shards.json"
"""What the shards are made of, beside them, so that an interrupted command goes on with the same."""
_TRIED = 64
"""Images that are made smaller to tell how many go into a shard."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_HEADER = 1536
"""Bytes of a member's header and its class, about."""


class Packed(NamedTuple):
    """A sample as it is packed.

    Attributes:
        source: its path, or its `Member`.
        key: its name in the archive, without an ending.
        label: NO_LABEL = none.
        size: in bytes, of a row in a parquet file about.
        changed: when its file was last changed, in ns.
    """

    source: str
    key: str
    label: int
    size: int
    changed: int


class Job(NamedTuple):
    """A shard to make; `side` 0 = files as they are."""

    target: Path
    samples: list[Packed]
    side: int
    quality: int


# ------------------------------------------------------------------------------------------------ what goes where


def ordered(found: Collected) -> dict[str, list[Sample]]:
    """Return the samples of each split in the order in which training numbers them.

    Raises:
        UserError: a split has classes that the training set lacks, or two that differ in case alone.
    """
    train = found.folders.get("train", [])
    splits: dict[str, list[Sample]] = {}
    for split in found.splits:
        samples = found.of(split)
        inside = [sample for sample in samples if sample.top]
        if ALL in found.splits:  # folders are only where samples lie, and no classes; a list may have some
            splits[split] = [sample._replace(label=NO_LABEL) if sample.top else sample for sample in samples]
        elif 2 * len(inside) < len(samples):  # lists, numbers of classes in shards, or files without a folder
            splits[split] = samples
        elif split in found.folders:
            unknown = sorted(set(found.folders[split]) - set(train))
            if train and unknown:
                raise UserError(f"{split} of {found.place} has classes that train lacks: {some(unknown)}")
            splits[split] = sorted(inside, key=lambda sample: (sample.label, sample.path))
        else:
            splits[split] = samples
    if ALL not in found.splits:
        check_class_names(found.classes or (), found.place)
    return {split: samples for split, samples in splits.items() if samples}


def keys(samples: Sequence[Sample], place: str) -> Iterator[str]:
    """Yield a key for each sample: its path below `place`, without an ending and without dots; each one once."""
    taken: set[str] = set()
    for sample in samples:
        name = sample.path.rpartition(SEPARATOR)[2] if isinstance(sample.path, Member) else sample.path
        if not isinstance(sample.path, Member) and os.path.isabs(name) == os.path.isabs(place):
            below = os.path.relpath(name, place)
            name = below if not below.startswith(os.pardir) else name
        stem, _ = os.path.splitext(name)
        folders = [part for part in stem.split(os.sep) if part not in ("", ".", "..")]
        key = first = "/".join([*(part.lstrip(".") or "_" for part in folders[:-1]), folders[-1].replace(".", "_")])
        number = 1
        while key.casefold() in taken:
            number += 1
            key = f"{first}-{number}"
        taken.add(key.casefold())
        yield key


def pack(samples: Sequence[Sample], place: str) -> Iterator[Packed]:
    """Yield what is to be packed of each sample; see `keys`.

    Raises:
        UserError: there is no such file.
    """
    rows = Counter(sample.path.shard for sample in samples if isinstance(sample.path, Member))
    for (path, _, label, _), key in zip(samples, keys(samples, place), strict=True):
        assert isinstance(label, int)  # several are read of lists with a config alone
        if isinstance(path, Member):
            size = path.stamp.size // rows[path.shard] if is_parquet(path.shard) else path.place[1]
            yield Packed(path, key, label, size, path.stamp.changed)
            continue
        with naming(f"{path} cannot be read"):
            yield Packed(path, key, label, *stamp_of(path))


def plan(found: Collected, output: Path, size: int, side: int, quality: int) -> list[Job]:
    """Return the shards to make, each of about `size` bytes."""
    jobs: list[Job] = []
    for split, samples in ordered(found).items():
        base = found.place if split == ALL else os.path.join(found.place, split)
        base = (
            base if os.path.isdir(base) else found.place if os.path.isdir(found.place) else os.path.dirname(found.place)
        )
        packed = list(pack(samples, base))
        ratio = _ratio(packed, side, quality) if side else 1.0
        start, total, name = 0, 0.0, "train" if split == ALL else split
        for place, one in enumerate([*(ratio * sample.size + _HEADER for sample in packed), size]):
            if place == len(packed) or (place > start and total + one > size):
                number = sum(job.target.name.startswith(f"{name}-") for job in jobs)
                jobs.append(Job(output / f"{name}-{number:06d}.tar", packed[start:place], side, quality))
                start, total = place, 0.0
            total += one
    return jobs


def _ratio(packed: Sequence[Packed], side: int, quality: int) -> float:
    """Return by how much images become smaller, from some of them."""
    tried = packed[:: max(len(packed) // _TRIED, 1)]
    return sum(len(content_of(one.source, side, quality)[0]) for one in tried) / max(sum(one.size for one in tried), 1)


# ------------------------------------------------------------------------------------------------ one shard


def content_of(path: str, side: int, quality: int) -> tuple[bytes, str]:
    """Return what is packed of a file, and its ending.

    Args:
        side: images with a larger short side are made this small, as JPEG, if they can be read; 0 = as they are.
        quality: of JPEG.

    Raises:
        UserError: it is empty or not there, or has no ending by which it would be found in an archive.
    """
    ending = os.path.splitext(path)[1]
    if isinstance(path, Member) and ending.lower() not in IMAGES + VIDEOS:  # rows of parquet files may have no names
        ending = ".jpg"
    if ending.lower() not in IMAGES + VIDEOS:
        raise UserError(
            f"{path} has no ending of an image or a video, by which the samples of an archive are found: rename it"
        )
    with open_regular_file(path) as file:
        content = file.read()
    if not side:
        return content, ending
    try:
        image = read_image(path)
    except UnreadableSample:
        return content, ending  # it remains the bad sample that it is
    scale = side / min(image.size)
    if scale >= 1:
        return content, ending
    width, height = (max(round(length * scale), side) for length in image.size)
    small = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=None)
    written = io.BytesIO()
    small.save(written, "JPEG", quality=quality, subsampling=0)
    return written.getvalue(), ".jpg"


def make_shard(job: Job) -> int:
    """Write a shard and its index, compare it with what was packed, and return its size in bytes.

    It appears under its name when it is complete.

    Raises:
        UserError: a sample is not there or empty, or what was written is not what is read back.
    """
    draft = job.target.with_name(f".{os.getpid()}.partial.{job.target.name}")
    try:
        expected = []
        with open(draft, "wb") as file, tarfile.open(fileobj=file, mode="w") as archive:
            for sample in job.samples:
                content, ending = content_of(sample.source, job.side, job.quality)
                _add(archive, sample.key + ending, content)
                if sample.label != NO_LABEL:
                    _add(archive, sample.key + LABELS[0], str(sample.label).encode())
                label = None if sample.label == NO_LABEL else sample.label
                expected.append((sample.key + ending, label, hashlib.blake2b(content).digest()))
        index = _verify(draft, expected)
        draft.replace(job.target)
        keep_index(index._replace(path=str(job.target)))
    finally:
        draft.unlink(missing_ok=True)
    return job.target.stat().st_size


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no times and no owners: the same samples make the same bytes
    member.size, member.mode = len(content), 0o644
    archive.addfile(member, io.BytesIO(content))


def _verify(draft: Path, expected: Sequence[tuple[str, int | None, bytes]]) -> ShardIndex:
    """Read an archive back, and return its index."""
    index = make_index(str(draft))
    with open(draft, "rb") as file:
        found = []
        for entry in index.entries:
            file.seek(entry.first)
            found.append((entry.name, entry.label, hashlib.blake2b(file.read(entry.second)).digest()))
    if found != list(expected):
        raise UserError(f"{draft} was written, and is not what is read back: is the disk sound?")
    return index


# ------------------------------------------------------------------------------------------------ all


def make_shards(found: Collected, output: Path, size: int, side: int, quality: int, workers: int) -> list[str]:
    """Pack a data set, and return lines about what was made.

    Raises:
        UserError: it cannot be packed, or `output` holds the shards of something else.
    """
    if side and found.noun == "video":
        raise UserError("--side is for images: maskfeat prepare-kinetics --short-side makes videos smaller")
    jobs = plan(found, output, size, side, quality)
    with naming(f"{output} cannot be written"):
        output.mkdir(parents=True, exist_ok=True)
        _check_manifest(output / MANIFEST, jobs)
        missing = [job for job in jobs if not job.target.exists()]
        if len(missing) < len(jobs):
            logger.info("%d of %d shards are there", len(jobs) - len(missing), len(jobs))
        for _ in in_parallel(make_shard, missing, workers, "shards", chunk=1):
            pass
        if found.classes and any(sample.label != NO_LABEL for job in jobs for sample in job.samples):
            replace_text(output / NAMES, "".join(f"{name}\n" for name in found.classes))
        for draft in output.glob(".*.partial.*.tar"):  # of a killed call
            draft.unlink()
    return [*_counted(jobs)]


def _check_manifest(path: Path, jobs: Sequence[Job]) -> None:
    """Write what the shards are made of, or compare it with what an earlier call wrote."""
    digest = hashlib.blake2b(digest_size=16)
    for job in jobs:
        for sample in job.samples:
            digest.update(repr((job.target.name, *sample)).encode("utf-8", "surrogatepass"))
    side, quality = (jobs[0].side, jobs[0].quality) if jobs else (0, 0)
    manifest = {"side": side, "quality": quality, "shards": len(jobs), "digest": digest.hexdigest()}
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            known = None
        if known != manifest:
            raise UserError(
                f"{path.parent} holds shards of other files, or made with other options: give another OUTPUT, or "
                "remove it"
            )
        return
    there = [job.target.name for job in jobs if job.target.exists()]
    if there:
        raise UserError(f"{path.parent} holds {some(there)}, and no {MANIFEST} that says what of: give another OUTPUT")
    replace_text(path, json.dumps(manifest))


def _counted(jobs: Sequence[Job]) -> Iterator[str]:
    for split in dict.fromkeys(job.target.name.rpartition("-")[0] for job in jobs):
        own = [job for job in jobs if job.target.name.rpartition("-")[0] == split]
        samples, size = sum(len(job.samples) for job in own), sum(job.target.stat().st_size for job in own)
        yield f"{split}: {count(samples, 'sample')} in {count(len(own), 'shard')}, {size / 1e9:.3g} GB"


def size_option(text: str) -> int:
    """Read --size: bytes, or thousands, millions or thousand millions of them."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMG]?)B?", text.strip().upper())
    if not found or float(found[1]) * _UNITS[found[2]] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1G, 500M or 200K")
    return int(float(found[1]) * _UNITS[found[2]])


def _quality_option(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a quality from 1 to 100")
    return int(text)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Pack a data set into shards; return the exit code.

    Args:
        argv: the command line; None = sys.argv.
        prog: name of the command in its help.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Pack images or videos into tar archives, OUTPUT/train-000000.tar and so on, which training reads "
        "in place (DATA.PATH_TO_DATA_DIR OUTPUT). SOURCE is a folder with train/ and val/, any folder without classes, "
        "a folder of lists, a list, or a folder of parquet files or other archives. No file of SOURCE is changed, and "
        "the order of the samples is kept. The same command goes on where an interrupted one stopped.",
        epilog="example: %(prog)s /data/imagenet /data/shards --side 256",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="what is packed")
    add("output", type=Path, metavar="OUTPUT", help="folder to write")
    add("--size", type=size_option, default=10**9, metavar="BYTES", help="of a shard, about (default: 1G)")
    add("--side", type=count_option(16), default=0, metavar="N", help="make images with a larger short side this small")
    add("--quality", type=_quality_option, default=90, metavar="N", help="of JPEG, with --side (default: %(default)s)")
    add("--prefix", default="", metavar="FOLDER", help="that paths in lists are relative to")
    add("--workers", type=count_option(0), metavar="N", help="processes (default: one a core)")
    args = parser.parse_args(argv)

    def work() -> int:
        workers = available_cores() if args.workers is None else args.workers
        if are_same(args.output, args.source):
            raise UserError(
                f"OUTPUT {args.output} is SOURCE: give another folder, shards are only read where nothing else lies"
            )
        found = collect(args.source, None, args.prefix)
        for line in make_shards(found, args.output, args.size, args.side, args.quality, workers):
            logger.info(line)
        logger.info("train on them with DATA.PATH_TO_DATA_DIR %s", args.output)
        return 0

    return exit_code(work, goes_on=True)
