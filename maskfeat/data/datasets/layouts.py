"""Where the samples of a split lie: in class folders, in lists or, for pre-training, in any folders and lists."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from maskfeat.data.datasets.base import DatasetRequest, NoValidation, Split
from maskfeat.data.datasets.classes import read_class_names
from maskfeat.data.datasets.folders import FolderScan, class_folders, class_name, list_class_folders, scan_folder
from maskfeat.data.datasets.lists import LISTS, check_some_exist, read_any_list
from maskfeat.data.datasets.sample_list import NO_LABEL, read_multi_label_list, read_sample_list
from maskfeat.data.datasets.shard_sets import SHARDS, find_shards, labelled_split, unlabelled_split
from maskfeat.data.names import IMAGES, VIDEOS
from maskfeat.data.samplers import shares
from maskfeat.errors import UserError
from maskfeat.registry import objective_spec
from maskfeat.text import count, some

HELD_OUT = ("val", "test")
"""Folders of a folder without train/ that pre-training leaves out."""
NAMES = "classes.txt"
"""File beside the lists with the names of their classes, see `read_class_names`."""
SPLITS = ("train", "val", "test")
SUFFIXES = {"image": IMAGES, "video": VIDEOS}


def find_split(cfg: CfgNode, request: DatasetRequest, noun: str) -> Split:
    """Find the samples of a split.

    A classifier is trained and tested on lists (train.csv, val.csv, test.csv) or class folders: `train/<class>/`,
    `val/<class>/`; "test" reads test/ where it has class folders, else val/. `request.classes` number the classes, else
    the folders of train/, where there is one. Where there are both, videos are those of lists, images of folders.

    Pre-training takes any folder or list, see `_unlabelled`, or several with weights (DATA.SOURCES).

    In place of folders, shards are read as DATA.FORMAT says, see `shard_sets`.

    Args:
        noun: what is looked for, "image" or "video".

    Raises:
        UserError: there is nothing, or more is left out than found.
        NoValidation: pre-training asked for "val", and there is none.
    """
    data, labelled = cfg.DATA, objective_spec(cfg).classifies or request.split == "test"
    if not data.SOURCES and data.FORMAT in ("auto", "folder") and holds_lists(data.PATH_TO_DATA_DIR, noun):
        return _listed(cfg, request)
    if labelled and data.MULTI_LABEL:
        raise UserError(
            f"DATA.MULTI_LABEL reads lists, and DATA.PATH_TO_DATA_DIR {data.PATH_TO_DATA_DIR!r} is no folder with "
            f"{request.split}.csv: in class folders and shards, every file has one class"
        )
    if labelled and (shards := find_shards(data.PATH_TO_DATA_DIR, data.FORMAT)):
        return labelled_split(cfg, shards, request.split, noun, request.classes, _names(cfg, request))
    if labelled:
        return _class_folders(cfg, request, noun)
    if data.SOURCES:
        return _mixture(data.SOURCES, request.split, noun, data)
    return _unlabelled(data.PATH_TO_DATA_DIR, request.split, noun, data)


def holds_lists(place: str, noun: str) -> bool:
    """Return whether DATA.PATH_TO_DATA_DIR holds lists and not folders. What is not there should hold lists of videos.

    Args:
        noun: "image" or "video".
    """
    if not os.path.isdir(place):
        return noun == "video" and not place.lower().endswith((*LISTS, *SHARDS.values()))
    if noun == "image" and any(os.path.isdir(os.path.join(place, split)) for split in SPLITS):
        return False
    return any(os.path.lexists(os.path.join(place, f"{split}.csv")) for split in SPLITS)


def _listed(cfg: CfgNode, request: DatasetRequest) -> Split:
    data, labelled = cfg.DATA, objective_spec(cfg).classifies
    path = os.path.join(data.PATH_TO_DATA_DIR, f"{request.split}.csv")  # as text: a Path would turn s3:// into s3:/
    if request.split == "val" and not labelled and "://" not in path and not os.path.exists(path):
        raise NoValidation(f"there is no {path}")
    read = read_multi_label_list if data.MULTI_LABEL else read_sample_list
    samples: Sequence[tuple[str, Any]] = read(path, data.PATH_LABEL_SEPARATOR, data.PATH_PREFIX, labelled)
    if data.MULTI_LABEL and not labelled:
        samples = [(name, NO_LABEL) for name, _ in samples]
    check_some_exist(samples, path, data.PATH_PREFIX, data.PATH_TO_DATA_DIR)
    return Split(samples, f"list {path}", classes=_names(cfg, request))


def _names(cfg: CfgNode, request: DatasetRequest) -> list[str] | None:
    """Return the names of a classifier's classes: those of DATA.CLASS_NAMES, of `NAMES` beside the lists or of the
    checkpoint.
    """
    if not objective_spec(cfg).classifies:
        return None
    beside = os.path.join(cfg.DATA.PATH_TO_DATA_DIR, NAMES)
    if cfg.DATA.CLASS_NAMES or os.path.exists(beside):
        return read_class_names(cfg.DATA.CLASS_NAMES or beside, cfg.MODEL.NUM_CLASSES)
    return None if request.classes is None else list(request.classes)


def _class_folders(cfg: CfgNode, request: DatasetRequest, noun: str) -> Split:
    if cfg.DATA.CLASS_NAMES:
        raise UserError(
            f"DATA.CLASS_NAMES is {cfg.DATA.CLASS_NAMES!r}, and names the classes of lists: those of class folders "
            "have the names of their folders"
        )
    root, split, names = Path(cfg.DATA.PATH_TO_DATA_DIR), request.split, request.classes
    whose = "the checkpoint" if split == "test" and names is not None else "the training set"
    if names is None and split != "train" and (root / "train").is_dir():
        names = class_folders(root / "train") or None
    scan, note = _test_folder(root, names, noun) if split == "test" else (_scan(root / split, noun), "")
    if names is None and objective_spec(cfg).classifies:
        scan.check_numbers(cfg.MODEL.NUM_CLASSES)
    samples, classes = list_class_folders(scan, names, whose)
    return Split(samples, f"folder {scan.root}{note}", scan.left_out_in_words(), classes)


def _scan(root: Path, noun: str) -> FolderScan:
    return scan_folder(root, SUFFIXES[noun], noun)


def _test_folder(root: Path, names: Sequence[str] | None, noun: str) -> tuple[FolderScan, str]:
    """Return a scan of test/, or of val/ where test/ has no labelled image, and a note which it is."""
    test, val = root / "test", root / "val"
    if not test.is_dir():
        return _scan(val, noun), f" (there is no {test})"
    scan = _scan(test, noun)
    known = set(scan.files) if names is None else {class_name(name) for name in names}
    if val.is_dir() and not any(files and name in known for name, files in scan.files.items()):
        return _scan(val, noun), f" ({test} has no {noun} in a class folder)"
    return scan, ""


# --------------------------------------------------------------------------------------------------- pre-training


def _unlabelled(source: str, split: str, noun: str, data: CfgNode) -> Split:
    """Return what pre-training reads of one source.

    Class folders in train/ and val/ are read as those of a classifier. Of other folders every file counts, at any
    depth: those below train/ and val/, or without a train/ all but those of `HELD_OUT`. Videos may be listed in
    train.csv and val.csv. A list is a training set. Shards are those of `unlabelled_split`.

    Args:
        data: DATA of the config.
    """
    root, folder = Path(source), Path(source, split)
    is_list = source.lower().endswith(LISTS) and not os.path.isdir(source)
    if is_list and split == "val":
        raise NoValidation(f"the list {source} is a training set")
    listed = source if is_list else os.path.join(source, f"{split}.csv")
    if is_list or (holds_lists(source, noun) and os.path.isfile(listed)):
        return Split(read_any_list(listed, data.PATH_PREFIX, "DATA.PATH_PREFIX"), f"list {listed}")
    if shards := find_shards(source, data.FORMAT):
        return unlabelled_split(shards, split, noun)
    if folder.is_dir():
        train = root / "train"
        scan, names = _scan(folder, noun), class_folders(train) if train.is_dir() else []
        if scan.number >= max(scan.media, 1) and set(scan.files) <= set(names):
            samples, classes = list_class_folders(scan, names)
            return Split(samples, f"folder {scan.root}", scan.left_out_in_words(), classes)
        return _any_depth(folder, noun)
    if split == "val":
        raise NoValidation(f"there is no {folder}")
    if not source or not root.is_dir():
        _scan(folder, noun)  # raises that there is no such folder
    return _any_depth(root, noun, HELD_OUT)


def _any_depth(root: Path, noun: str, skip: Sequence[str] = ()) -> Split:
    """Return all files below a folder, without classes."""
    scan = FolderScan(root, suffixes=SUFFIXES[noun], noun=noun)
    paths = sorted(scan.files_below(os.fspath(root), skip=skip))
    left_out = scan.left_out_in_words()
    if len(paths) < max(scan.media, 1):
        holds = f", which holds {left_out}" if left_out else ""
        what = f"no {noun}" if not paths else f"only {count(len(paths), noun)}"
        if root.name == "val" and not paths:
            raise NoValidation(f"{root} has no {noun}")
        raise UserError(
            f"{what} below {root}{holds}: pre-training reads {', '.join(scan.suffixes)} at any depth; see "
            "DATA.PATH_TO_DATA_DIR and DATA.SOURCES"
        )
    endings = Counter(os.path.splitext(path)[1].lower() for path in paths).most_common()
    kinds = some([f"{number} {ending}" for ending, number in endings])
    place = f"folder {root} at any depth ({kinds} in {count(scan.folders_with_files, 'folder')})"
    return Split([(path, NO_LABEL) for path in paths], place, left_out)


def _mixture(sources: Sequence[tuple[str, float]], split: str, noun: str, data: CfgNode) -> Split:
    """Return the samples of several sources, one after another; in validation of those that have one."""
    parts: list[tuple[Split, float]] = []
    for path, weight in sources:
        try:
            parts.append((_unlabelled(path, split, noun, data), weight))
        except NoValidation:
            continue
    if not parts:
        raise NoValidation(f"none of the {count(len(sources), 'source')} of DATA.SOURCES has a val/ or val.csv")
    samples = [(path, NO_LABEL) for part, _ in parts for path, _ in part.samples]
    mixture = [(len(part.samples), weight) for part, weight in parts]
    left_out = "; ".join(f"{part.left_out} of {part.place}" for part, _ in parts if part.left_out)
    if split != "train":
        return Split(samples, " and ".join(part.place for part, _ in parts), left_out)
    drawn = shares(mixture, len(samples))
    missed = [path for (path, _), number in zip(sources, drawn, strict=True) if not number]
    if missed:
        raise UserError(
            f"DATA.SOURCES gives {some(missed)} less than one of the {len(samples)} samples of an epoch: raise its "
            "weight"
        )
    places = [
        f"{part.place}: {count(len(part.samples), noun)}, {100 * number / len(samples):.3g} % of an epoch, each shown "
        f"{number / len(part.samples):.3g} times"
        for (part, _), number in zip(parts, drawn, strict=True)
    ]
    return Split(samples, f"{count(len(parts), 'source')} [{'; '.join(places)}]", left_out, mixture=mixture)


def check_sources(cfg: CfgNode) -> Iterator[str]:
    """Yield the problems of DATA.SOURCES."""
    sources = cfg.DATA.SOURCES
    if not sources:
        return
    paths = [path for path, _ in sources]
    if objective_spec(cfg).classifies:
        yield (
            f"DATA.SOURCES is for pre-training, and must be [] for MODEL.MODEL_NAME {cfg.MODEL.MODEL_NAME!r} (a class "
            f"would have several numbers); given {some(paths)}"
        )
    if cfg.DATA.PATH_TO_DATA_DIR:
        yield (
            f"DATA.PATH_TO_DATA_DIR must be '' where DATA.SOURCES is given; given {cfg.DATA.PATH_TO_DATA_DIR!r}: add "
            "it to DATA.SOURCES, with a weight"
        )
    for path, weight in sources:
        if not path or not 1e-6 <= weight <= 1e6:
            yield f"DATA.SOURCES takes pairs of a path and a weight between 1e-06 and 1e+06; given {[path, weight]!r}"
    twice = [path for path, number in Counter(map(os.path.normpath, paths)).items() if number > 1]
    if twice:
        yield f"DATA.SOURCES names {some(twice)} more than once: add their weights"
    if cfg.DATA_LOADER.RESIDENT:
        yield "DATA_LOADER.RESIDENT must be False where DATA.SOURCES is given; given True"
