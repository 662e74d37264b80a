"""Files that a trained network is shown: found in what a command names, and loaded as a test loads them.

Shape legend: N files, B clips of a batch, T frames, H x W pixels.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskfeat.analysis.model import Model
from maskfeat.batch import BadSample, SampleKey
from maskfeat.data.datasets.base import DatasetRequest
from maskfeat.data.datasets.folders import FolderScan, class_folders, class_name
from maskfeat.data.datasets.imagenet import build_image_folder
from maskfeat.data.datasets.kinetics import build_video_clips
from maskfeat.data.datasets.lists import LISTS, read_any_list
from maskfeat.data.datasets.sample_list import NO_LABEL
from maskfeat.data.loader import Loader
from maskfeat.data.names import IMAGES, VIDEOS
from maskfeat.data.samplers import EpochSampler
from maskfeat.distributed.world import available_cores
from maskfeat.errors import UserError
from maskfeat.text import count, some

SPLITS = {"train", "val", "test"}
MOST_WORKERS = 8
PARTS, JOB = ".parts", "job.json"
"""Ending of the folder of an extraction that is not complete, and the file in it that says which."""


class Item(NamedTuple):
    """A file, its medium ("image" or "video"), and the number of its class; None = not known."""

    path: str
    media: str
    label: int | None


@dataclass
class Inputs(Sequence[Item]):
    """The files that were found, in order. A million of them are a list of paths and an array of numbers.

    Attributes:
        paths: N paths.
        numbers: (N,) int64, the class of each; NO_LABEL = not known.
        media: "image" or "video", of all of them.
        classes: names of the classes by their numbers, where these are folders; None = not known.
        left_out: what else was there, in words; "" = nothing.
    """

    paths: list[str]
    numbers: np.ndarray
    media: str
    classes: list[str] | None = None
    left_out: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:  # type: ignore[override]  # single files alone
        label = int(self.numbers[index])
        return Item(self.paths[index], self.media, None if label == NO_LABEL else label)

    @property
    def labelled(self) -> bool:
        """Whether the class of every file is known."""
        return bool((self.numbers != NO_LABEL).all())


class _Samples(Sequence[tuple[str, int]]):
    """Inputs as data sets take them, made one by one."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[str, int]:  # type: ignore[override]
        return self.inputs.paths[index], int(self.inputs.numbers[index])


def find_inputs(
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], media: str | None = None, prefix: str = ""
) -> Inputs:
    """Find images or videos.

    Args:
        data: files, folders and lists, one or several. A folder is searched at any depth; where it is the only input
            and all files lie in two or more folders directly in it (or in those of its splits, train/, val/ and
            test/), these are classes. A list (.csv, .tsv, .txt) is one of paths, with or without labels, see
            `sample_list.read_sample_list`.
        media: "image" or "video": what is looked for. None = what is there, which must be one of both.
        prefix: folder that the paths of lists are relative to; "" = that of the list, or the working folder.

    Raises:
        UserError: something does not exist or cannot be read, or there is no file of this medium.
    """
    given = [os.fspath(one) for one in ([data] if isinstance(data, str | os.PathLike) else data)]
    if not given:
        raise UserError("no input was given: a file, a folder or a list is expected")
    paths: list[str] = []
    labels: list[int] = []
    scan = FolderScan(Path(given[0]), suffixes=IMAGES + VIDEOS)
    for one in given:
        found, theirs = _find(one, prefix, scan)
        paths += found
        labels += theirs
    is_video = np.fromiter((_is_video(path, media) for path in paths), dtype=bool, count=len(paths))
    where, videos = some(given), int(is_video.sum())
    if media is None:
        if 0 < videos < len(paths):
            kinds = f"{count(len(paths) - videos, 'image')} and {count(videos, 'video')}"
            raise UserError(f"{where} holds {kinds}: give one of both kinds")
        media = "video" if videos else "image"
    kept = is_video == (media == "video")
    others = int((~kept).sum())
    if others:
        scan.left_out["image" if media == "video" else "video", ""] += others
    left_out = scan.left_out_in_words()
    if not kept.any():
        holds = f", which holds {left_out}" if left_out else ""
        raise UserError(f"no {media} in {where}{holds}: {', '.join(VIDEOS if media == 'video' else IMAGES)} are read")
    numbers = np.asarray(labels, dtype=np.int64)
    if others:
        paths, numbers = [path for path, keep in zip(paths, kept, strict=True) if keep], numbers[kept]
    inputs = Inputs(paths, numbers, media, left_out=left_out)
    if len(given) == 1 and os.path.isdir(given[0]):
        _number_classes(inputs, given[0])
    return inputs


def _is_video(path: str, media: str | None) -> bool:
    """Whether a file is a video by its ending; one of another ending is taken for what is looked for."""
    name = path.lower()
    return name.endswith(VIDEOS) or (media == "video" and not name.endswith(IMAGES))


def _find(given: str, prefix: str, scan: FolderScan) -> tuple[list[str], list[int]]:
    """Return paths and labels of one input; `scan` counts what is left out."""
    if os.path.isdir(given):
        paths = sorted(scan.files_below(given))
        return paths, [NO_LABEL] * len(paths)
    if given.lower().endswith(LISTS):
        listed = _listed(given, prefix)
        return [path for path, _ in listed], [label for _, label in listed]
    if not os.path.exists(given):
        raise UserError(f"there is no file or folder {given}")
    if not given.lower().endswith(scan.suffixes):
        raise UserError(
            f"{given} is neither an image ({', '.join(IMAGES)}), nor a video ({', '.join(VIDEOS)}), nor a list "
            f"({', '.join(LISTS)}), as its ending tells"
        )
    return [given], [NO_LABEL]


def _listed(given: str, prefix: str) -> list[tuple[str, int]]:
    """Return paths and labels of a list, which may have several labels a line (DATA.MULTI_LABEL)."""
    try:
        return read_any_list(given, prefix, "--prefix")
    except UserError as error:
        try:
            return read_any_list(given, prefix, "--prefix", several=True)
        except UserError:
            raise error from None


def _holds_parts(folder: str) -> bool:
    """Whether a folder is that of an extraction that was interrupted, whose output lies beside its inputs."""
    return folder.endswith(PARTS) and os.path.isfile(os.path.join(folder, JOB))


def _number_classes(inputs: Inputs, root: str) -> None:
    """Take the folders directly in `root` as classes, where all files lie in two or more of them; the folders in these,
    where they are splits.
    """
    start = len(os.path.join(root, ""))
    parts = [path[start:].split(os.sep) for path in inputs.paths]
    tops = {part[0] for part in parts}
    depth = int(tops <= SPLITS)
    if any(len(part) < depth + 2 for part in parts) or len({part[depth] for part in parts}) < 2:
        return
    places = [os.path.join(root, top) for top in tops] if depth else [root]
    names = {name for place in places for name in class_folders(place) if not _holds_parts(os.path.join(place, name))}
    inputs.classes = sorted(names)
    number = {name: place for place, name in enumerate(inputs.classes)}
    inputs.numbers = np.asarray([number[class_name(part[depth])] for part in parts], dtype=np.int64)


# ---------------------------------------------------------------------------------------------------------- loading


class InputBatch(NamedTuple):
    """A batch of views.

    Attributes:
        index: (B,) int64, the place of each in the inputs.
        view: (B,) int64.
        clip: (B, 3, [T,] H, W) float32 on the device of the network, normalised; zeros where a file is unreadable.
        unreadable: files of this batch that cannot be read.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which is not used
    view: Tensor
    clip: Tensor
    unreadable: tuple[BadSample, ...]


class _Batches(EpochSampler):
    """Batches of all views in order, those of `numbers` alone."""

    def __init__(self, num_samples: int, batch_size: int, views: int, numbers: Sequence[int] | None) -> None:
        super().__init__(num_samples, batch_size, shuffle=False, drop_last=False, views=views)
        self.numbers = range(super().__len__()) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order, first = np.arange(self.num_samples), np.zeros(self.num_samples, dtype=int)
        return (self._batch(order, first, number) for number in self.numbers)


def split_views(model: Model, views: int | tuple[int, int]) -> tuple[int, int]:
    """Return (clips of a video, crops of a clip).

    Args:
        views: both, or how many views in all, of TEST.NUM_SPATIAL_CROPS crops a clip; 1 is the central view.

    Raises:
        UserError: they cannot be had.
    """
    if isinstance(views, tuple):
        clips, crops = views
    elif views == 1:
        clips, crops = 1, 1
    else:
        crops = model.cfg.TEST.NUM_SPATIAL_CROPS
        clips, left = divmod(views, crops)
        if left:
            raise UserError(
                f"{views} views are no multiple of the {crops} crops of a clip (TEST.NUM_SPATIAL_CROPS): say how many "
                f"clips and crops, such as {views}x1"
            )
    if clips < 1 or crops not in (1, 3):
        raise UserError(f"views are 1 or more clips x 1 or 3 crops; given {clips}x{crops}")
    if clips > 1 and model.cfg.DATA.SEGMENT_SAMPLING:
        raise UserError(
            f"{model.source} takes a frame of each segment of a video (DATA.SEGMENT_SAMPLING), so that all clips "
            f"would have the same frames: give 1 clip; given {clips}x{crops}"
        )
    if model.media == "image" and clips * crops > 1:
        raise UserError(f"{model.source} takes images, which have one view; given {clips}x{crops}")
    return clips, crops


def input_loader(
    model: Model,
    inputs: Inputs,
    views: int | tuple[int, int] = 1,
    batch_size: int = 32,
    workers: int | None = None,
    batches: Sequence[int] | None = None,
    as_test: bool = False,
) -> Iterator[InputBatch]:
    """Yield the views of inputs in order, as a test of the network's recipe shows them.

    All views of a file follow one another. What a batch holds depends on `views` and `batch_size` alone.

    Args:
        views: see `split_views`.
        batch_size: views of a batch; the last one may have fewer.
        workers: processes that read and decode; 0 = this one; None = one a core, at most MOST_WORKERS.
        batches: numbers of the batches to load, from 0; None = all.
        as_test: a single view is that of a test, and not the central one.

    Raises:
        UserError: the network takes another medium, or has no such views.
    """
    if inputs.media != model.media:
        raise UserError(f"{model.source} takes {model.media}s, and the inputs are {inputs.media}s")
    clips, crops = split_views(model, views)
    cfg, samples = model.cfg.clone(), _Samples(inputs)
    cfg.defrost()
    cfg.TEST.NUM_SPATIAL_CROPS = crops
    split = "test" if as_test or clips * crops > 1 else "val"
    request = DatasetRequest(split, augmented=False, num_clips=clips)
    build = build_image_folder if model.media == "image" else build_video_clips
    dataset = build(cfg, request, samples)
    sampler = _Batches(len(inputs), batch_size, clips * crops, batches)
    if workers is None:
        workers = min(available_cores(), MOST_WORKERS)
    loader = Loader(dataset, sampler, num_workers=min(workers, len(sampler)), pin_memory=True, device=model.device)
    for number, batch in zip(sampler.numbers, loader, strict=True):
        items = number * batch_size + torch.arange(len(batch))
        yield InputBatch(items // (clips * crops), items % (clips * crops), batch.clip, batch.bad)
