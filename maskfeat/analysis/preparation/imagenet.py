"""`maskfeat prepare-imagenet`: ImageNet-1K as it is downloaded, laid out as one folder for each class.

Three sources: the official archives, Kaggle's copy of them, and the parquet files on the Hugging Face Hub. Folders are
named by synsets (n01440764), so that classes are numbered as those of published models.
"""

import argparse
import csv
import io
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from maskfeat.analysis.checks.reading import in_parallel
from maskfeat.analysis.command import count_option, exit_code
from maskfeat.analysis.preparation.videos import read_lines, reading_csv
from maskfeat.data.datasets.folders import class_folders
from maskfeat.data.shards.parquet import load_pyarrow
from maskfeat.distributed.world import available_cores
from maskfeat.errors import UserError, naming
from maskfeat.file_io import replace_bytes
from maskfeat.text import count, some

logger = logging.getLogger(__name__)

ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
SOLUTION = "LOC_val_solution.csv"
TOTALS = {"train": 1_281_167, "val": 50_000}
CLASSES = 1000

_IMAGE = re.compile(r"(?:n\d{8}_\d+|ILSVRC2012_val_\d{8})(?:_n\d{8})?\.JPEG")
_SYNSET = re.compile(r"n\d{8}")
_HUB = re.compile(r"(.+)_(n\d{8})\.JPEG")
_LARGEST = 1 << 28
"""Bytes of one image, at most."""
_DAMAGE = (tarfile.TarError, zlib.error, EOFError, OSError)


def save(folder: Path, name: str, content: bytes) -> None:
    """Write an image into a folder, so that it is there whole or not at all; one that is there is left.

    Raises:
        OSError: it cannot be written.
    """
    target = folder / name
    if target.exists() and target.stat().st_size == len(content):
        return
    folder.mkdir(parents=True, exist_ok=True)
    replace_bytes(target, content)


# ---------------------------------------------------------------------------------------------- official archives


def _images(archive: tarfile.TarFile, path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the images of an archive; their folders, links and all others are left out."""
    for member in archive:
        name = os.path.basename(member.name)
        if not member.isfile() or not _IMAGE.fullmatch(name):
            continue
        if member.size > _LARGEST:
            raise UserError(f"{path}: {member.name} claims {member.size} bytes")
        file = archive.extractfile(member)
        assert file is not None
        content = file.read()
        if len(content) < member.size:
            raise EOFError(f"it ends in the middle of {name}")
        yield name, content


def _unpack_class(job: tuple[Path, tarfile.TarInfo, Path]) -> int:
    """Unpack the archive of a class, which is a member of another one."""
    path, member, output = job
    folder = output / Path(member.name).stem
    number = 0
    try:
        with tarfile.open(path) as outer:
            inner = outer.extractfile(member)
            assert inner is not None
            with tarfile.open(fileobj=inner, mode="r:") as archive:
                for name, content in _images(archive, path):
                    save(folder, name, content)
                    number += 1
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(f"{path}: {member.name} cannot be unpacked into {folder}: {error}") from error
    return number


def _unpack_val(path: Path, synsets: Mapping[str, str], output: Path) -> None:
    missing = dict.fromkeys(synsets)
    try:
        with tarfile.open(path, mode="r:") as archive:
            for name, content in _images(archive, path):
                if name not in synsets:
                    raise UserError(f"{path}: {name} has no class in {DEVKIT}")
                save(output / synsets[name], name, content)
                missing.pop(name, None)
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(f"{path} cannot be unpacked into {output}: {error}") from error
    if missing:
        raise UserError(f"{path} lacks {len(missing)} of {len(synsets)} images ({some([*missing])}): download it again")


def _class_archives(path: Path) -> list[tarfile.TarInfo]:
    """Return the members of the training archive, one for each class."""
    with naming(f"{path} cannot be read"):
        try:
            with tarfile.open(path, mode="r:") as archive:
                members = [
                    m for m in archive if m.isfile() and m.name.endswith(".tar") and _SYNSET.fullmatch(m.name[:-4])
                ]
        except tarfile.TarError as error:
            raise UserError(f"{path} is damaged, or no tar archive: {error}") from error
    if members and members[-1].offset_data + members[-1].size > path.stat().st_size:
        raise UserError(f"{path} is damaged: it ends in the middle of {members[-1].name}; download it again")
    if not members:
        raise UserError(f"{path} holds no archive of a class (n01440764.tar and so on)")
    return members


def read_devkit(path: Path) -> dict[str, str]:
    """Return the synset of every validation image, by its file name.

    Raises:
        UserError: the archive is something else, or SciPy, which reads its list of synsets, is not installed.
    """
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise UserError(
            f"{DEVKIT} needs SciPy, which is not installed: pip install '.[imagenet]', or put Kaggle's {SOLUTION} "
            "beside the archives"
        ) from error
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = os.path.basename(member.name)
                if member.isfile() and name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"):
                    file = archive.extractfile(member)
                    assert file is not None
                    found[name] = file.read(_LARGEST)
        synsets = loadmat(io.BytesIO(found["meta.mat"]), squeeze_me=True)["synsets"]
        names = {
            int(number): str(synset) for number, synset in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        }
        numbers = [int(line) for line in found["ILSVRC2012_validation_ground_truth.txt"].split()]
        found_names = [names[number] for number in numbers]
    except (*_DAMAGE, MatReadError, KeyError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        raise UserError(f"{path} is damaged, or not the development kit of ILSVRC 2012: {error}") from error
    if not all(map(_SYNSET.fullmatch, found_names)):
        raise UserError(f"{path} names classes that are no synsets")
    return {f"ILSVRC2012_val_{place:08d}.JPEG": synset for place, synset in enumerate(found_names, 1)}


def read_solution(path: Path) -> dict[str, str]:
    """Return the synset of every validation image by Kaggle's `LOC_val_solution.csv`, by its file name.

    Raises:
        UserError: the file is something else.
    """
    found = {}
    with reading_csv(path):
        rows = list(csv.reader(read_lines(path)[1:]))
    for number, row in enumerate(rows, 2):
        synset = row[1].split(" ")[0] if len(row) == 2 else ""
        name = f"{row[0]}.JPEG" if row else ""
        if not _SYNSET.fullmatch(synset) or not _IMAGE.fullmatch(name):
            raise UserError(f"{path}, line {number} is not an image and its class (n01440764 ...)")
        found[name] = synset
    if not found:
        raise UserError(f"{path} lists no image")
    return found


def from_archives(source: Path, output: Path, workers: int) -> None:
    """Lay out the archives that are in `source`, of training, validation or both.

    Raises:
        UserError: an archive is damaged or something else, the classes of validation images are not known (see
            `read_solution` and `read_devkit`), or an image cannot be written.
    """
    train, val = (source / ARCHIVES[split] for split in ("train", "val"))
    if train.is_file():
        jobs = [(train, member, output / "train") for member in _class_archives(train)]
        for _ in in_parallel(_unpack_class, jobs, workers, "classes"):
            pass
    if val.is_file():
        solution, devkit = source / SOLUTION, source / DEVKIT
        if not solution.is_file() and not devkit.is_file():
            raise UserError(f"{source} has neither {DEVKIT} nor {SOLUTION}, which name the classes of {val.name}")
        synsets = read_solution(solution) if solution.is_file() else read_devkit(devkit)
        logger.info("unpacking %s", val)
        _unpack_val(val, synsets, output / "val")


# ---------------------------------------------------------------------------------------------- Kaggle's copy


def from_kaggle(source: Path, solution: Path, output: Path, workers: int) -> None:
    """Lay out Kaggle's copy: a link to its training folder, and validation images as hard links, or else copies.

    Raises:
        UserError: `source` has no validation images or lacks some, or `solution` is something else.
        OSError: a file cannot be read or written.
    """
    images = next((path for path in (source / "ILSVRC/Data/CLS-LOC", source) if (path / "val").is_dir()), None)
    if images is None:
        raise UserError(f"{source} has no ILSVRC/Data/CLS-LOC/val, which Kaggle's copy has")
    synsets = read_solution(solution)
    there = {entry.name: entry.path for entry in os.scandir(images / "val") if _IMAGE.fullmatch(entry.name)}
    missing = [name for name in synsets if name not in there]
    if missing:
        raise UserError(f"{images / 'val'} lacks {len(missing)} of {len(synsets)} images: {some(missing)}")
    jobs = [(path, output / "val" / synsets[name]) for name, path in sorted(there.items()) if name in synsets]
    for _ in in_parallel(_link, jobs, workers, "validation images"):
        pass
    train = output / "train"
    if (images / "train").is_dir() and not train.exists():
        train.symlink_to((images / "train").resolve(), target_is_directory=True)


def _link(job: tuple[str, Path]) -> None:
    path, folder = job
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / os.path.basename(path)
    if target.exists():
        return
    try:
        target.hardlink_to(path)
    except OSError:  # on another disk, or a file system without links
        save(folder, target.name, Path(path).read_bytes())


# ---------------------------------------------------------------------------------------------- parquet files


def parquet_files(source: Path) -> list[tuple[Path, str]]:
    """Return the parquet files of training and validation below a folder, with their split."""
    found = []
    for path in sorted(source.rglob("*.parquet")):
        split = {"train": "train", "validation": "val", "val": "val"}.get(re.split(r"[-_.]", path.name)[0])
        if split is not None:
            found.append((path, split))
    return found


def _unpack_parquet(job: tuple[Path, str, Path]) -> int:
    path, split, output = job
    number = 0
    arrow = load_pyarrow()
    try:
        with arrow.ParquetFile(path) as file:
            if not {"image", "label"} <= set(file.schema_arrow.names):
                raise UserError(
                    f"{path} has the columns {', '.join(file.schema_arrow.names)}; image and label are needed"
                )
            for batch in file.iter_batches(batch_size=64, columns=["image", "label"], use_threads=False):
                for row in batch.to_pylist():
                    folder, name = _of_hub(row, f"{split}_{path.stem}_{number:06d}")
                    save(output / split / folder, name, row["image"]["bytes"])
                    number += 1
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:  # errors of pyarrow are ValueErrors or OSErrors
        raise UserError(f"{path} cannot be read as parquet with images and labels: {error}") from error
    return number


def _of_hub(row: Mapping[str, Any], otherwise: str) -> tuple[str, str]:
    """Return folder and file name of an image; without a synset in its path, these are its label and `otherwise`."""
    found = _HUB.fullmatch(os.path.basename(row["image"]["path"] or ""))
    if found and _IMAGE.fullmatch(f"{found[1]}.JPEG"):
        return found[2], f"{found[1]}.JPEG"
    if int(row["label"]) < 0:
        raise ValueError("a row has no label: is it the test set?")
    return f"class_{int(row['label']):04d}", f"{otherwise}.JPEG"


# ---------------------------------------------------------------------------------------------- all


def prepare(source: Path, output: Path, workers: int) -> list[str]:
    """Lay out ImageNet, and return lines about what is there now.

    Raises:
        UserError: `source` is none of the three, or damaged.
    """
    files = parquet_files(source)
    solution = next((path for path in (source / SOLUTION, source.parent / SOLUTION) if path.is_file()), None)
    with naming(f"{output} cannot be written"):
        output.mkdir(parents=True, exist_ok=True)
        if any((source / name).is_file() for name in ARCHIVES.values()):
            from_archives(source, output, workers)
        elif files:
            load_pyarrow()
            jobs = [(path, split, output) for path, split in files]
            for _ in in_parallel(_unpack_parquet, jobs, workers, "files"):
                pass
        elif solution is not None:
            from_kaggle(source, solution, output, workers)
        else:
            raise UserError(
                f"{source} holds neither {' or '.join(ARCHIVES.values())}, nor Kaggle's {SOLUTION}, nor parquet files "
                "named train-... or validation-..."
            )
    return list(_counted(output))


def _counted(output: Path) -> Iterable[str]:
    for split, total in TOTALS.items():
        if (output / split).is_dir():
            classes = class_folders(output / split)
            number = sum(sum(1 for _ in os.scandir(output / split / name)) for name in classes)
            whole = number == total and len(classes) == CLASSES
            note = "" if whole else f"; ImageNet-1K has {total} of {CLASSES}"
            yield f"{output / split}: {count(number, 'image')} of {count(len(classes), 'class')}{note}"


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Lay out ImageNet-1K; return the exit code.

    Args:
        argv: the command line; None = sys.argv.
        prog: name of the command in its help.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Lay out ImageNet-1K as OUTPUT/train/<synset>/ and OUTPUT/val/<synset>/. SOURCE is a folder with "
        f"the official archives ({ARCHIVES['train']}, {ARCHIVES['val']} and {DEVKIT}), with Kaggle's copy (ILSVRC/ and "
        f"{SOLUTION}), or with the parquet files of the Hugging Face Hub (train-*.parquet, validation-*.parquet). No "
        "file of SOURCE is changed. The same command goes on where an interrupted one stopped.",
        epilog="example: %(prog)s downloads imagenet; then maskfeat check-data imagenet",
        allow_abbrev=False,
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder with what was downloaded")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write")
    parser.add_argument("--workers", type=count_option(0), metavar="N", help="processes (default: one a core)")
    args = parser.parse_args(argv)

    def work() -> int:
        workers = available_cores() if args.workers is None else args.workers
        for line in prepare(args.source, args.output, workers):
            logger.info(line)
        return 0

    return exit_code(work, goes_on=True)
