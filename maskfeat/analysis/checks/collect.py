"""Which samples a data set names, without reading them: those of a recipe, of a folder, or of a list."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from yacs.config import CfgNode

from maskfeat.data.datasets.folders import FolderScan, class_folders, class_name
from maskfeat.data.datasets.label_sets import LabelSet, labels_present
from maskfeat.data.datasets.layouts import HELD_OUT, NAMES, SPLITS, SUFFIXES, holds_lists
from maskfeat.data.datasets.lists import LISTS, read_any_list
from maskfeat.data.datasets.sample_list import NO_LABEL, read_multi_label_list, read_sample_list
from maskfeat.data.datasets.shard_sets import Source, find_shards, pick
from maskfeat.data.shards.index import ShardSamples, read_indices
from maskfeat.errors import UserError
from maskfeat.registry import dataset_spec, objective_spec

ALL = "all"
"""Name of the only split of a folder or list that has none."""


class Sample(NamedTuple):
    """A file of a split.

    Attributes:
        label: its class, or a tuple of them (DATA.MULTI_LABEL); NO_LABEL = none.
        top: the folder directly in the split that it lies in; "" = none, or it is listed.
    """

    path: str
    split: str
    label: int | LabelSet
    top: str = ""

    @property
    def numbers(self) -> list[int]:
        """Its classes."""
        return sorted(labels_present([self.label]) - {NO_LABEL})


@dataclass
class Collected:
    """What a data set names.

    Attributes:
        place: what was given.
        noun: "image" or "video".
        samples: of all splits, in order; labels of class folders are those that training gives them.
        folders: the class folders of each split that has some.
        classes: names of the classes by their numbers; None = lists without names, or no classes.
        strange: (path, split, kind) of entries that are not part of the set although they may be meant to.
        left_out: what else is there, in words, for each split.
    """

    place: str
    noun: str
    samples: list[Sample] = field(default_factory=list)
    folders: dict[str, list[str]] = field(default_factory=dict)
    classes: list[str] | None = None
    strange: list[tuple[str, str, str]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def splits(self) -> list[str]:
        """Names of the splits, in order."""
        return list(dict.fromkeys([*(sample.split for sample in self.samples), *self.folders]))

    def of(self, split: str) -> list[Sample]:
        """The samples of a split."""
        return [sample for sample in self.samples if sample.split == split]


@dataclass
class _Recording(FolderScan):
    """A scan that remembers the entries that are left out although they may be meant to be samples: `strange`."""

    strange: list[tuple[str, str]] = field(default_factory=list)

    def leave_out(self, entry: "os.DirEntry[str]", where: str = "") -> None:
        pictures, links = self.media, self.left_out["broken link", ""]
        super().leave_out(entry, where)
        if self.left_out["broken link", ""] > links:
            self.strange.append((entry.path, "broken link"))
        elif self.media > pictures:
            self.strange.append((entry.path, "not read"))


def medium_of(place: str) -> str:
    """Return "image" or "video": what most files of a folder or a first shard, or lines of its lists, are.

    Raises:
        UserError: there is neither, a list, folder or shard cannot be read, or shards lie beside images or videos.
    """
    lists = [path for split in SPLITS if os.path.isfile(path := os.path.join(place, f"{split}.csv"))]
    if lists:
        names: Iterator[str] = (path for one in lists for path, _ in read_any_list(one, "", "--prefix", there=False))
    elif shards := find_shards(place, "auto"):
        (first,) = read_indices(shards.of(*shards.shards)[:1])
        names = (entry.name for entry in first.entries)
    elif os.path.isdir(place):
        names = FolderScan(Path(place), suffixes=SUFFIXES["image"] + SUFFIXES["video"]).files_below(place)
    else:
        names = (path for path, _ in read_any_list(place, "", "--prefix", there=False))
    kinds = Counter("video" if name.lower().endswith(SUFFIXES["video"]) else "image" for name in names)
    if not kinds:
        raise UserError(f"{place} holds neither images nor videos")
    return kinds.most_common(1)[0][0]


def collect(place: str, cfg: CfgNode | None, prefix: str = "") -> Collected:
    """Find the samples of all splits that are there.

    Args:
        place: a folder with class folders, without classes or with lists; or a list.
        cfg: the recipe that names it; None = it is looked at as it is.
        prefix: folder that the paths of lists are relative to; "" = that of the list, or the working folder. With a
            recipe, DATA.PATH_PREFIX says it.

    Raises:
        UserError: there is nothing, or a list cannot be read.
    """
    if not os.path.exists(place):
        raise UserError(f"there is no file or folder {place!r}")
    noun = medium_of(place) if cfg is None else {"image": "image", "clip": "video"}[dataset_spec(cfg, "TRAIN").media]
    found = Collected(place, noun)
    lists = holds_lists(place, noun)
    if not lists and (shards := find_shards(place, "auto" if cfg is None else cfg.DATA.FORMAT)):
        _sharded(found, shards)
    elif not os.path.isdir(place):
        if not place.lower().endswith(LISTS):
            raise UserError(f"{place} is neither a folder nor a list ({', '.join(LISTS)})")
        _listed(found, ALL, place, cfg, prefix)
    elif lists:
        for split in SPLITS:
            if os.path.exists(path := os.path.join(place, f"{split}.csv")):
                _listed(found, split, path, cfg, prefix)
        found.classes = _names(os.path.join(place, NAMES))
    else:
        splits = [split for split in SPLITS if os.path.isdir(os.path.join(place, split))]
        for split in splits:
            _folder(found, split, os.path.join(place, split))
        if "train" not in splits:
            _folder(found, ALL, place, HELD_OUT)
        _number(found)
    if not found.samples:
        raise UserError(f"{place} has no {noun} ({', '.join(SUFFIXES[noun])})")
    return found


def _listed(found: Collected, split: str, path: str, cfg: CfgNode | None, prefix: str) -> None:
    listed: Sequence[tuple[str, int | LabelSet]]
    if cfg is None:
        listed = read_any_list(path, prefix, "--prefix", there=False)
    elif not objective_spec(cfg).classifies and (split == ALL or cfg.DATA.SOURCES):
        # A list that is itself the data set, and those of several sources, see `layouts.find_split`.
        listed = read_any_list(path, cfg.DATA.PATH_PREFIX, "DATA.PATH_PREFIX", there=False)
    else:
        read = read_multi_label_list if cfg.DATA.MULTI_LABEL else read_sample_list
        listed = read(path, cfg.DATA.PATH_LABEL_SEPARATOR, cfg.DATA.PATH_PREFIX, labelled=False)
    found.samples += [Sample(name, split, label) for name, label in listed]


def _names(path: str) -> list[str] | None:
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8-sig") as file:
        return file.read(1 << 20).splitlines()


def _folder(found: Collected, split: str, root: str, skip: Sequence[str] = ()) -> None:
    scan = _Recording(Path(root), suffixes=SUFFIXES[found.noun], noun=found.noun)
    start = len(os.path.join(root, ""))
    for path in sorted(scan.files_below(root, skip=skip)):
        top, *deeper = path[start:].split(os.sep)
        found.samples.append(Sample(path, split, NO_LABEL, class_name(top) if deeper else ""))
    folders = [name for name in class_folders(root) if name not in skip]
    if folders:
        found.folders[split] = folders
    found.strange += [(path, split, kind) for path, kind in scan.strange]
    found.left_out[split] = scan.left_out_in_words()


def _sharded(found: Collected, shards: Source) -> None:
    for split in (*SPLITS, ""):
        paths = shards.of(split)
        if not paths or (not split and found.samples):
            continue  # without a split in their names, they are read where no others are
        name = split or ALL
        picked = pick(paths, found.noun, by_folder=bool(split))
        members = ShardSamples(picked.indices, [(n, e, NO_LABEL) for n, e, _ in picked.picked])
        for (path, _), (_, _, label) in zip(members, picked.picked, strict=True):
            top, number = (label, NO_LABEL) if isinstance(label, str) else ("", NO_LABEL if label is None else label)
            found.samples.append(Sample(path, name, number, top))
        if picked.names:
            found.folders[name] = picked.names
        found.left_out[name] = picked.left_out
    _number(found)
    if found.classes is None:
        found.classes = _names(os.path.join(shards.root, NAMES))


def _number(found: Collected) -> None:
    """Number the class folders of train/ as training does, those that other splits add behind them."""
    first = next((found.folders[split] for split in ("train", ALL) if split in found.folders), [])
    if not first:
        return
    others = sorted({name for names in found.folders.values() for name in names} - set(first))
    found.classes = [*first, *others]
    number = {name: place for place, name in enumerate(found.classes)}
    found.samples = [sample._replace(label=number.get(sample.top, NO_LABEL)) for sample in found.samples]
