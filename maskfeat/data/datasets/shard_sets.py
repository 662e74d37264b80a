"""Splits whose samples lie in shards: which files belong to a split, and the numbers of classes."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from yacs.config import CfgNode

from maskfeat.data.datasets.base import NoValidation, Split
from maskfeat.data.datasets.folders import FolderScan, class_name
from maskfeat.data.datasets.sample_list import NO_LABEL
from maskfeat.data.names import IMAGES, VIDEOS
from maskfeat.data.shards.files import is_parquet
from maskfeat.data.shards.index import ShardIndex, ShardSamples, read_indices
from maskfeat.errors import UserError
from maskfeat.text import count, some

SHARDS = {"tar": ".tar", "parquet": ".parquet"}
"""Their endings by DATA.FORMAT."""
_SPLITS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
_PLACES = ("", "train", "val", "validation", "test", "data")
"""Folders below a data set, or in it, in which shards are looked for where DATA.FORMAT is "auto"."""


class Source(NamedTuple):
    """The shards of a folder, or a single one.

    Attributes:
        root: what was given.
        shards: the files, sorted, by their split; "" where the name says none.
    """

    root: str
    shards: dict[str, list[str]]

    def of(self, *splits: str) -> list[str]:
        """The shards of some splits."""
        return [path for split in splits for path in self.shards.get(split, [])]


def find_shards(root: str, form: str) -> Source | None:
    """Find the shards of a data set.

    Args:
        root: a folder, or one shard.
        form: DATA.FORMAT. With "auto", a folder counts where it, or train/, val/, test/ or data/ in it, holds shards
            and no other folders.

    Returns:
        None where the data set lies in files of its own.

    Raises:
        UserError: there are none although `form` asks for them, there are two kinds, or with "auto" images or videos
            lie beside them.
    """
    if form == "folder" or not root or not os.path.exists(root):
        return None
    wanted = tuple(SHARDS.values()) if form == "auto" else (SHARDS[form],)
    if not os.path.isdir(root):
        return Source(root, {"": [root]}) if root.lower().endswith(wanted) else None
    if form == "auto" and not _holds_shards_alone(root, wanted):
        return None
    scan = FolderScan(Path(root), suffixes=wanted, noun="shard")
    paths = sorted(scan.files_below(root))
    kinds = Counter(os.path.splitext(path)[1].lower() for path in paths)
    if not paths:
        left_out = scan.left_out_in_words()
        raise UserError(
            f"no {wanted[0]} file below {root}{f', which holds {left_out}' if left_out else ''}, and DATA.FORMAT is "
            f"{form!r} (archives must not be compressed)"
        )
    if len(kinds) > 1:
        raise UserError(
            f"{root} holds {some([f'{n} {kind} files' for kind, n in kinds.items()])}: DATA.FORMAT says which"
        )
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(split_of(os.path.relpath(path, root)), []).append(path)
    return Source(root, found)


def _holds_shards_alone(root: str, endings: tuple[str, ...]) -> bool:
    """Whether `_PLACES` hold shards, and no other folders.

    Raises:
        UserError: images or videos lie beside the shards: whichever is read, the others would be left out.
    """
    shards: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for place in _PLACES:
        try:
            with os.scandir(os.path.join(root, place)) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir() and (place or entry.name not in _PLACES):
                        return False
                    kind = os.path.splitext(entry.name)[1].lower()
                    if kind in endings:
                        shards[kind] += 1
                    elif kind in IMAGES + VIDEOS:
                        files[kind] += 1
        except OSError:
            continue
    if shards and files:
        here, beside = (some([count(n, f"{kind} file") for kind, n in found.items()]) for found in (shards, files))
        raise UserError(
            f"{root} holds {here} and {beside}, and DATA.FORMAT 'auto' cannot tell which are the data set: set "
            f"DATA.FORMAT to 'folder' or {' or '.join(repr(kind[1:]) for kind in shards)}, or move the others away"
        )
    return bool(shards)


def split_of(path: str) -> str:
    """Return the split that a shard belongs to by its folders, else by the words of its name; "" = none."""
    *folders, name = path.split(os.sep)
    words = [*folders, *re.split(r"[-_.]", name)]
    return next((_SPLITS[word.lower()] for word in words if word.lower() in _SPLITS), "")


# ------------------------------------------------------------------------------------------------ a split


class Found(NamedTuple):
    """The samples of a split before their classes are numbered.

    Attributes:
        indices: of the shards.
        picked: (number of the index, of its entry, label) of each sample, in order.
        left_out: what else the shards hold, in words.
    """

    indices: list[ShardIndex]
    picked: list[tuple[int, int, int | str | None]]
    left_out: str

    @property
    def names(self) -> list[str]:
        """The names of classes, sorted; none where they are numbers."""
        return sorted({label for _, _, label in self.picked if isinstance(label, str)})


def pick(paths: Sequence[str], noun: str, by_folder: bool) -> Found:
    """Take the images, or the videos, of shards.

    Args:
        by_folder: take the first folder of a sample for its class where the shards say nothing else, and order samples
            by class and name, as those of folders are.

    Raises:
        UserError: a shard cannot be read, there are none of this kind, or parquet files are read for videos.
    """
    whole = any(map(is_parquet, paths))  # which hold images, whatever their names are
    if noun == "video" and whole:
        raise UserError(f"{some(list(paths))}: parquet files are read for images, and the recipe takes videos")
    indices = read_indices(paths)
    endings = IMAGES if noun == "image" else VIDEOS
    left_out: Counter[str] = Counter()
    picked: list[tuple[int, int, int | str | None]] = []
    for number, index in enumerate(indices):
        left_out.update(index.left_out)
        for place, entry in enumerate(index.entries):
            if whole or entry.name.lower().endswith(endings):
                label = class_name(entry.label) if isinstance(entry.label, str) else entry.label
                picked.append((number, place, label))
            else:
                left_out[os.path.splitext(entry.name)[1].lower()] += 1
    said = some([f"{count(n, f'{kind} file'.strip())}" for kind, n in left_out.most_common()])
    if not picked:
        raise UserError(
            f"no {noun} ({', '.join(endings)}) in {some(list(paths))}{f', which hold {said}' if said else ''}"
        )
    if by_folder and all(label is None for _, _, label in picked):
        picked = sorted(
            ((n, e, _folder(indices[n], e)) for n, e, _ in picked),
            key=lambda sample: (sample[2] or "", indices[sample[0]].entries[sample[1]].name),
        )
    return Found(indices, picked, said)


def _folder(index: ShardIndex, entry: int) -> str | None:
    """Return the class folder of a sample: the first one in its name, or the one below the split's."""
    folders = [part for part in index.entries[entry].name.split("/")[:-1] if part not in ("", ".")]
    start = next((place + 1 for place, part in enumerate(folders[:-1]) if part in _SPLITS), 0)
    return class_name(folders[start]) if folders else None


def check_class_names(names: Sequence[str], root: str) -> None:
    """Refuse two names that differ in case alone: some systems take them for one.

    Raises:
        UserError: names both.
    """
    alike: dict[str, str] = {}
    for name in names:
        other = alike.setdefault(name.casefold(), name)
        if other != name:
            raise UserError(f"{root} has the classes {other!r} and {name!r}, which differ in case alone: rename one")


def labelled_split(
    cfg: CfgNode, source: Source, split: str, noun: str, classes: Sequence[str] | None, names: Sequence[str] | None
) -> Split:
    """Return a split of a classifier.

    Args:
        cfg: the recipe.
        split: "train", "val" or "test"; the latter is val where no shard of the test set has classes.
        noun: "image" or "video".
        classes: that number named classes; None = the training set's.
        names: of classes that are numbers; None = not known.

    Raises:
        UserError: there are no shards of the split, samples have no class or unknown ones.
    """
    note, paths = "", source.of(split)
    if split == "test" and not paths:
        note, paths = " (there are no shards of a test set)", source.of("val")
    if not paths:
        raise UserError(
            f"{source.root} holds {count(sum(map(len, source.shards.values())), 'shard')}, none of {split}: they must "
            f"lie in {split}/, or have it in their names ({split}-000000.tar)"
        )
    found = pick(paths, noun, by_folder=True)
    if split == "test" and source.of("val") and not note and not any(has_label(label) for _, _, label in found.picked):
        note = " (the shards of the test set have no classes)"
        found = pick(source.of("val"), noun, by_folder=True)
    bare = [(n, e) for n, e, label in found.picked if not has_label(label)]
    if bare:
        index = found.indices[bare[0][0]]
        raise UserError(
            f"{count(len(bare), noun)} of {split} have no class, such as {index.entries[bare[0][1]].name!r} in "
            f"{index.path}: expected are files NAME.cls or NAME.json (with label) beside them, or a folder for each "
            "class"
        )
    place = _place(source, found, note)
    present = found.names
    if not present:
        return _numbered(found, {}, place, None if names is None else list(names))
    if len(present) < len({label for _, _, label in found.picked}):
        raise UserError(f"{source.root} has classes that are numbers, and others that are names ({some(present)})")
    order = present if classes is None and split == "train" else list(map(class_name, classes or ()))
    if not order:
        order = pick(source.of("train"), noun, by_folder=True).names if source.of("train") else present
    check_class_names(sorted({*order, *present}), source.root)
    unknown = sorted(set(present) - set(order))
    if unknown:
        whose = "the training set" if classes is None else "the checkpoint"
        raise UserError(
            f"{split} of {source.root} has {count(len(unknown), 'class')} that {whose} lacks: {some(unknown)}"
        )
    if classes is None and len(order) > cfg.MODEL.NUM_CLASSES:
        raise UserError(
            f"{source.root} has {count(len(order), 'class')} and MODEL.NUM_CLASSES is {cfg.MODEL.NUM_CLASSES}: set "
            f"MODEL.NUM_CLASSES {len(order)}"
        )
    return _numbered(found, {name: number for number, name in enumerate(order)}, place, order)


def unlabelled_split(source: Source, split: str, noun: str) -> Split:
    """Return what pre-training reads of shards: those of the split or, without any of train, all but val and test.

    Classes that the shards number are kept; others are none.

    Raises:
        NoValidation: "val" was asked for, and there is none.
        UserError: there are no samples.
    """
    paths = source.of("train") or source.of("") if split == "train" else source.of(split)
    if not paths and split == "val":
        raise NoValidation(f"{source.root} holds no shards of val")
    if not paths:
        raise UserError(f"{source.root} holds shards of {some(list(source.shards))} alone, none to train on")
    found = pick(paths, noun, by_folder=False)
    numbers = all(isinstance(label, int) for _, _, label in found.picked)
    kept = found if numbers else found._replace(picked=[(n, e, NO_LABEL) for n, e, _ in found.picked])
    return _numbered(kept, {}, _place(source, found), None)


def has_label(label: int | str | None) -> bool:
    """Whether a shard says which class a sample has."""
    return label is not None and label != NO_LABEL


def _place(source: Source, found: Found, note: str = "") -> str:
    rows = max(
        (entry.second + 1 for index in found.indices if is_parquet(index.path) for entry in index.entries), default=0
    )
    groups = f" (row groups of up to {count(rows, 'image')})" if rows else ""
    return f"{count(len(found.indices), 'shard')} of {source.root}{groups}{note}"


def _numbered(found: Found, numbers: dict[str, int], place: str, classes: list[str] | None) -> Split:
    samples = [(n, e, numbers[label] if isinstance(label, str) else label) for n, e, label in found.picked]
    known = [(n, e, label) for n, e, label in samples if label is not None]
    assert len(known) == len(samples), "samples without a class were refused, or got NO_LABEL"
    return Split(ShardSamples(found.indices, known), place, found.left_out, classes)
