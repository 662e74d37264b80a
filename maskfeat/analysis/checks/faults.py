"""What is wrong with a data set: rules over the samples that it names and what their files are."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from yacs.config import CfgNode

from maskfeat.analysis.checks.collect import ALL, Collected, Sample
from maskfeat.analysis.checks.reading import Facts
from maskfeat.data.datasets.folders import without_case
from maskfeat.data.datasets.label_sets import LabelSet, labels_present
from maskfeat.data.datasets.sample_list import NO_LABEL
from maskfeat.data.video.temporal_sampling import clip_length
from maskfeat.registry import objective_spec
from maskfeat.text import count, some

TINY = 32
"""Pixels of the short side below which an image is tiny where no recipe says more."""
FORMATS = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **{".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF", ".gif": "GIF"},
}
TRAINING = ("train", ALL)

HARMFUL = {
    "unreadable": "files that cannot be read",
    "missing": "listed files that do not exist",
    "listed twice": "lines of a list that name a file again",
    "two classes": "the same content in two classes of a split",
    "duplicate": "the same content as another file of the split",
    "in two splits": "content of the training set that a test shows as well",
    "label too large": "labels that MODEL.NUM_CLASSES does not have",
    "label gap": "labels without a sample, below the largest",
    "empty class": "class folders without a sample",
    "untrained class": "class folders of val/ or test/ that train/ lacks",
    "class not tested": "class folders of train/ that val/ or test/ lacks",
    "alike": "class folders whose names differ but for case, spaces or _",
    "outside": "files directly in a split whose other files lie in class folders",
    "broken link": "links to nothing",
    "not read": "pictures or videos of formats, or with endings, that are not read",
    "count": "numbers that are not those of the published set",
    "refused": "what a run would stop with",
}
"""Kinds of faults that change what is learned or measured, in the order of the report."""
ODD = {
    "another format": "files whose content is not what their names say; they are read",
    "grey": "images without colour; they are read",
    "tiny": "images with a short side below {tiny} pixels, which are enlarged",
    "short": "videos shorter than a clip of the recipe ({span:.2f} s), whose last frame is repeated",
}
"""Kinds that may be as they should."""

PUBLISHED = {
    ("image", 1000): ("ImageNet-1K", {"train": 1_281_167, "val": 50_000}),
    ("video", 400): ("Kinetics-400's lists", {"train": 246_534, "val": 19_906, "test": 39_805}),
}
"""Samples by medium and number of classes."""


class Fault(NamedTuple):
    """Something that is wrong.

    Attributes:
        kind: one of `HARMFUL` or `ODD`.
        where: a path, or what else is concerned.
        split: "" = of all.
        detail: what more there is to say.
    """

    kind: str
    where: str
    split: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Recipe:
    """What a config asks of its data.

    Attributes:
        classes: of its classifier; None = it has none, or no recipe was given.
        labelled: whether classes matter: not in pre-training.
        tiny: pixels of the short side below which an image is tiny.
        span: of a clip: (frames, sampling rate, frames a second); None = not known.
    """

    classes: int | None = None
    labelled: bool = True
    tiny: int = TINY
    span: tuple[int, int, float] | None = None

    @property
    def seconds(self) -> float:
        """Length of a clip."""
        return 0.0 if self.span is None else self.span[0] * self.span[1] / self.span[2]


def recipe_of(cfg: CfgNode | None) -> Recipe:
    """Return what a config asks of its data."""
    if cfg is None:
        return Recipe()
    data = cfg.DATA
    classes = cfg.MODEL.NUM_CLASSES if objective_spec(cfg).classifies else None
    spans = data.NUM_FRAMES > 1 and not data.SEGMENT_SAMPLING
    span = (data.NUM_FRAMES, data.SAMPLING_RATE, data.TARGET_FPS) if spans else None
    return Recipe(classes, classes is not None, min(TINY, data.TRAIN_CROP_SIZE // 2), span)


def find_faults(found: Collected, facts: Mapping[str, Facts], recipe: Recipe) -> list[Fault]:
    """Return what is wrong, by kind in the order of `HARMFUL` and `ODD`, and by path.

    Args:
        found: the samples.
        facts: of the file of every sample.
        recipe: what they are for.
    """
    rules = (
        *(_files(found, facts, recipe), _contents(found, facts, recipe.labelled), _repeated(found), _published(found)),
        *((_labels(found, recipe), _folders(found)) if recipe.labelled else ()),
    )
    faults = [fault for rule in rules for fault in rule]
    faults += [Fault(kind, path, split) for path, split, kind in found.strange]
    order = [*HARMFUL, *ODD]
    return sorted(dict.fromkeys(faults), key=lambda fault: (order.index(fault.kind), fault))


def _files(found: Collected, facts: Mapping[str, Facts], recipe: Recipe) -> Iterator[Fault]:
    """What is wrong with single files."""
    for sample in found.samples:
        one = facts[sample.path]
        if one.cause:
            if one.size < 0 and one.cause == "no such file":
                yield Fault("broken link" if os.path.islink(one.path) else "missing", one.path, sample.split)
            else:
                yield Fault("unreadable", one.path, sample.split, one.cause)
            continue
        if found.noun == "image":
            expected = FORMATS.get(os.path.splitext(one.path)[1].lower())
            if expected not in (None, one.kind):
                yield Fault("another format", one.path, sample.split, one.kind)
            if one.grey:
                yield Fault("grey", one.path, sample.split)
            if min(one.width, one.height) < recipe.tiny:
                yield Fault("tiny", one.path, sample.split, f"{one.width}x{one.height}")
        elif recipe.span is not None and one.frames < clip_length(*recipe.span, one.fps):
            yield Fault("short", one.path, sample.split, f"{one.frames} frames, {one.frames / one.fps:.2f} s")


def _is_outside(found: Collected, sample: Sample) -> bool:
    """Whether a sample lies beside the class folders of its split."""
    return not sample.top and len(found.folders.get(sample.split, ())) > 1


def _contents(found: Collected, facts: Mapping[str, Facts], labelled: bool) -> Iterator[Fault]:
    """Files with the same content. Each is named beside the first of its split, or the file that it tests with."""
    same: dict[str, list[Sample]] = defaultdict(list)
    for sample in dict.fromkeys(found.samples):
        if labelled and _is_outside(found, sample):
            continue  # a run does not read it
        if (digest := facts[sample.path].digest) and not facts[sample.path].cause:
            same[digest].append(sample)
    for samples in same.values():
        for split in dict.fromkeys(sample.split for sample in samples):
            first, *others = [sample for sample in samples if sample.split == split]
            for other in others:
                if other.path != first.path:
                    kind = "duplicate" if other.label == first.label or not labelled else "two classes"
                    yield Fault(kind, other.path, split, f"as {first.path}")
        tested = [sample for sample in samples if sample.split not in TRAINING]
        for sample in samples:
            if tested and sample.split in TRAINING:
                yield Fault("in two splits", sample.path, sample.split, f"as {tested[0].path} of {tested[0].split}")


def _repeated(found: Collected) -> Iterator[Fault]:
    """Files that a list names more than once."""
    labels: dict[tuple[str, str], set[int | LabelSet]] = defaultdict(set)
    seen: set[tuple[str, str]] = set()
    for sample in found.samples:
        key = (sample.split, sample.path)
        if key in seen:
            clash = sample.label not in labels[key]
            yield Fault("two classes" if clash else "listed twice", sample.path, sample.split, "in the list")
        seen.add(key)
        labels[key].add(sample.label)


def _labels(found: Collected, recipe: Recipe) -> Iterator[Fault]:
    for split in found.splits:
        present = labels_present(sample.label for sample in found.of(split)) - {NO_LABEL}
        if not present:
            continue
        limit = recipe.classes if recipe.classes is not None and not found.folders else None
        if limit is not None:
            for sample in found.of(split):
                if max(sample.numbers, default=0) >= limit:
                    yield Fault("label too large", sample.path, split, f"label {sample.numbers[-1]} of {limit} classes")
        if split in TRAINING and not found.folders:
            for label in sorted(set(range(limit or max(present) + 1)) - present):
                yield Fault("label gap", f"label {label}", split)
    if recipe.classes is not None and found.folders:
        names = found.folders.get("train", [])
        if names and len(names) != recipe.classes:
            yield Fault("count", f"{count(len(names), 'class folder')}, MODEL.NUM_CLASSES is {recipe.classes}", "train")


def _folders(found: Collected) -> Iterator[Fault]:
    """What is wrong with class folders."""
    if not found.folders:
        return
    for split, names in found.folders.items():
        filled = {sample.top for sample in found.of(split)}
        for name in names:
            if name not in filled:
                yield Fault("empty class", name, split)
        for sample in found.of(split):
            if _is_outside(found, sample):
                yield Fault("outside", sample.path, split)
    alike: dict[str, list[str]] = defaultdict(list)
    for name in sorted({name for names in found.folders.values() for name in names}):
        alike[without_case(name)].append(name)
    twins = [names for names in alike.values() if len(names) > 1]
    for names in twins:
        yield Fault("alike", " and ".join(names))
    apart = {name for names in twins for name in names}  # said once
    train = set(found.folders.get("train", ()))
    for split, folders in found.folders.items():
        if split != "train" and train:
            for name in sorted(set(folders) - train - apart):
                yield Fault("untrained class", name, split)
            for name in sorted(train - set(folders) - apart):
                yield Fault("class not tested", name, split)


def _published(found: Collected) -> Iterator[Fault]:
    classes = found.folders.get("train") or labels_present(sample.label for sample in found.of("train")) - {NO_LABEL}
    name, totals = PUBLISHED.get((found.noun, len(classes)), ("", {}))
    for split in found.splits:
        number = len(found.of(split))
        if split in totals and number != totals[split]:
            yield Fault("count", f"{number} samples, {name} has {totals[split]}", split, f"{number - totals[split]:+d}")


def clean(found: Collected, faults: Iterable[Fault]) -> dict[str, list[Sample]]:
    """Return the samples of each split that can be trained and tested on.

    Left out are files that cannot be read, files that are named or contained twice (all but the first of a split), all
    of the training set that a test shows as well, content in two classes, and classes that cannot be learned.

    Args:
        found: the samples.
        faults: of `find_faults`.
    """
    wrong = (
        "unreadable",
        "missing",
        "broken link",
        "duplicate",
        "two classes",
        "in two splits",
        "label too large",
        "outside",
    )
    out = {(fault.split, fault.where) for fault in faults if fault.kind in wrong}
    # Which of two classes is right is not known: neither is kept.
    out |= {(fault.split, fault.detail[3:]) for fault in faults if fault.kind == "two classes"}
    untrained = {(fault.split, fault.where) for fault in faults if fault.kind == "untrained class"}
    kept: dict[str, list[Sample]] = {split: [] for split in found.splits}
    for sample in dict.fromkeys(found.samples):
        if (sample.split, sample.path) not in out and (sample.split, sample.top) not in untrained:
            kept[sample.split].append(sample)
    return kept


def summary(faults: Sequence[Fault], recipe: Recipe, place: str = "") -> list[tuple[str, str, int, str]]:
    """Return (kind, what it is, how many, the first few, without the folder `place`) of every kind that occurs."""
    words = {**HARMFUL, **ODD}
    kinds = dict.fromkeys(fault.kind for fault in faults)
    rows = []
    for kind in kinds:
        of_kind = [fault for fault in faults if fault.kind == kind]
        shown = some([f"{fault.where}{f' ({fault.detail})' if fault.detail else ''}" for fault in of_kind])
        shown = shown.replace(os.path.join(place, ""), "") if place else shown
        rows.append((kind, words[kind].format(tiny=recipe.tiny, span=recipe.seconds), len(of_kind), shown))
    return rows
