"""Videos listed in a csv file, as clips."""

import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from maskfeat.batch import BadSample, SampleKey
from maskfeat.data.bad_samples import naming_sample
from maskfeat.data.collate import DrawHidden, Sample, draw_mask, first_readable
from maskfeat.data.device_transforms import Pixels
from maskfeat.data.rng import SPAN_STREAM, sample_generator, seeded
from maskfeat.data.transforms import ClipTransform
from maskfeat.data.video import torchcodec_decoder as decode_torchcodec
from maskfeat.data.video.decoder import VideoInfo, decode_frames
from maskfeat.data.video.temporal_sampling import clip_length, clip_span, frame_indices
from maskfeat.file_io import NotReadable, local_path, open_regular_file

VideoList = list[tuple[str, int]]

MAX_LINE = 16_384
"""Characters of a line: Linux' longest path has 4,096 bytes."""

MODES = ("train", "val", "test")


def read_video_list(csv_path: str | os.PathLike[str], separator: str = " ", prefix: str = "") -> VideoList:
    """Reads `path label` lines.

    Args:
        csv_path: the list, a local path or one whose scheme has a handler (`file_io.path_manager`). Blank lines are
            skipped.
        separator: DATA.PATH_LABEL_SEPARATOR; the last one of a line counts, so that paths may contain it.
        prefix: DATA.PATH_PREFIX, the folder that paths are relative to.

    Returns:
        [(path, label)] in the order of the file.

    Raises:
        ValueError: no such list, a scheme without a handler, no line in it, a line that does not parse, or a path that
            is a URL or leaves `prefix`.
    """
    if not separator:
        raise ValueError("DATA.PATH_LABEL_SEPARATOR must not be empty")
    videos: VideoList = []
    for number, line in enumerate(_lines(csv_path), start=1):
        if line.strip():
            videos.append(_parse(line.strip(), f"{csv_path}, line {number}", separator, prefix))
    if not videos:
        raise ValueError(f"the list of videos {csv_path} is empty: a line is 'path{separator}label'")
    return videos


def _lines(csv_path: str | os.PathLike[str]) -> Iterator[str]:
    """The lines of a list, of which none is longer than a path and a label can be."""
    try:
        with io.TextIOWrapper(open_regular_file(local_path(csv_path)), encoding="utf-8-sig") as file:
            while line := file.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE:
                    raise ValueError(f"the list of videos {csv_path} has a line of more than {MAX_LINE} characters")
                yield line
    except NotReadable as error:
        raise ValueError(
            f"the list of videos {csv_path} cannot be read ({error}): "
            "DATA.PATH_TO_DATA_DIR must hold train.csv, val.csv and test.csv"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the list of videos {csv_path} is not UTF-8 text ({error})") from error


def _parse(line: str, place: str, separator: str, prefix: str) -> tuple[str, int]:
    path, found, label = line.rpartition(separator)
    path, label = path.strip(), label.strip()
    if not found or not path or not (label.isascii() and label.isdigit()):
        raise ValueError(
            f"{place}: {line!r} is not 'path{separator}label' with a label of 0 or more "
            f"(DATA.PATH_LABEL_SEPARATOR is {separator!r})"
        )
    if "://" in path or "\0" in path:
        raise ValueError(f"{place}: {path!r} is not a local file; download the videos first")
    if prefix and os.path.isabs(path):
        raise ValueError(
            f"{place}: {path!r} is absolute although DATA.PATH_PREFIX is {prefix!r}; make one of them empty"
        )
    if not os.path.isabs(path) and os.path.normpath(path).split(os.sep)[0] == os.pardir:
        raise ValueError(f"{place}: {path!r} leaves DATA.PATH_PREFIX {prefix!r}, which is not allowed")
    if len(label) > 18:
        raise ValueError(f"{place}: a label of {len(label)} digits")
    # Without a `..`, which behind a symbolic link would lead somewhere else than it seems to.
    return os.path.join(prefix, path if os.path.isabs(path) else os.path.normpath(path)), int(label)


class VideoClips(Dataset[list[Sample]]):
    """Clips of videos with their classes.

    Training shows one random span a video and epoch, decoded once, in `num_views` augmentations. Testing
    lays `num_clips` clips over the video and cuts `num_crops` crops out of each: view = clip x num_crops +
    crop. Validation shows the centre of the centre clip.

    Args:
        videos: [(path, label)], see `read_video_list`.
        transform: frames, a generator and the number of the crop into pixels that end as (3, num_frames, crop, crop).
        num_frames, sampling_rate, target_fps: a clip spans num_frames x sampling_rate frames at target_fps.
        seed: of all draws.
        mode: "train", "val" or "test".
        use_offset: how uniform clips are laid, see `sampling.clip_span`.
        num_clips, num_crops: views of a video in testing.
        num_views: augmentations of a span in training (repeated augmentation).
        draw_hidden: draws a mask for every view; None where the method hides nothing here.
        replace_bad: True shows the next readable video in place of one that cannot be read (training);
            False shows zeros.
        torchcodec: decode by torchcodec, which must be installed, see `decode_torchcodec`; the frames are the same.
    """

    def __init__(
        self,
        videos: Sequence[tuple[str, int]],
        transform: ClipTransform,
        num_frames: int,
        sampling_rate: int,
        target_fps: float,
        seed: int,
        mode: str = "train",
        use_offset: bool = False,
        num_clips: int = 1,
        num_crops: int = 1,
        num_views: int = 1,
        draw_hidden: DrawHidden | None = None,
        replace_bad: bool = True,
        torchcodec: bool = False,
    ) -> None:
        if torchcodec:  # where it is missing, that is told before the first video
            decode_torchcodec.load_decoder()
        self.torchcodec = torchcodec
        assert mode in MODES, f"mode is one of {MODES}, not {mode!r}"
        self.videos = list(videos)
        self.transform = transform
        self.num_frames, self.sampling_rate, self.target_fps = num_frames, sampling_rate, target_fps
        self.seed = seed
        self.mode = mode
        self.use_offset = use_offset
        self.num_clips, self.num_crops = num_clips, num_crops
        self.num_views = num_views
        self.draw_hidden = draw_hidden
        self.replace_bad = replace_bad
        self._last: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.videos)

    @property
    def labels(self) -> list[int]:
        """The class of every video."""
        return [label for _, label in self.videos]

    def path(self, index: int) -> str:
        """The file of a video."""
        return self.videos[index][0]

    def __getitem__(self, key: Any) -> list[Sample]:
        """Training: `num_views` views of one span. Testing and validation: the one view that `key` (a
        SampleKey) names."""
        key = SampleKey(*key)
        frames, index, bad = first_readable(self, lambda place: self._decode(place, key), key.index)
        views = range(key.view, key.view + (self.num_views if self.mode == "train" else 1))
        with naming_sample(self.path(index)):
            return [self._view(frames, key, view, index, bad) for view in views]

    def _decode(self, place: int, key: SampleKey) -> np.ndarray:
        def wanted(info: VideoInfo) -> list[int]:
            start, end = self._span(info, key)
            return frame_indices(start, end, self.num_frames, info.frames)

        decode = decode_torchcodec.decode_frames if self.torchcodec else decode_frames
        if self.mode == "train":
            return decode(self.path(place), wanted)[0]
        # The crops of a clip are asked for one after the other: it is decoded once.
        clip = (place, key.view // self.num_crops)
        if self._last is None or self._last[0] != clip:
            self._last = clip, decode(self.path(place), wanted)[0]
        return self._last[1]

    def _span(self, info: VideoInfo, key: SampleKey) -> tuple[float, float]:
        length = clip_length(self.num_frames, self.sampling_rate, self.target_fps, info.fps)
        if self.mode == "train":
            rng = sample_generator(self.seed, key.epoch, key.index, key.view, SPAN_STREAM)
            return clip_span(info.frames, length, -1, 1, rng=rng)
        if self.mode == "val":
            return clip_span(info.frames, length, 0, 1, use_offset=True)
        return clip_span(info.frames, length, key.view // self.num_crops, self.num_clips, self.use_offset)

    def _view(
        self, frames: np.ndarray | None, key: SampleKey, view: int, index: int, bad: tuple[BadSample, ...]
    ) -> Sample:
        with seeded(self.seed, key.epoch, key.index, view) as rng:
            clip = self._unreadable() if frames is None else self.transform(frames, rng, view % self.num_crops)
        hidden = draw_mask(self.draw_hidden, self.seed, key.epoch, key.index, view)
        return Sample(clip, self.videos[index][1], hidden, index, bad)

    def _unreadable(self) -> Pixels:
        return Pixels.unreadable((3, self.num_frames, self.transform.crop, self.transform.crop))
