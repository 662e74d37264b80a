"""Video data sets in the layout of Kinetics: a csv file per split lists the videos and their labels."""

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from yacs.config import CfgNode

from maskfeat.batch import BadSample, SampleKey
from maskfeat.data.bad_samples import error_context, read_with_fallback
from maskfeat.data.datasets.base import DatasetRequest, augmentation, num_views
from maskfeat.data.rng import SPAN_STREAM, draw_mask, sample_generator, seeded
from maskfeat.data.sample import Sample, unreadable_sample
from maskfeat.data.transforms import ClipTestTransform, ClipTrainTransform, ClipTransform
from maskfeat.data.video import torchcodec_decoder
from maskfeat.data.video.decoder import VideoInfo, decode_frames
from maskfeat.data.video.temporal_sampling import clip_length, clip_span, frame_indices
from maskfeat.errors import UserError
from maskfeat.file_io import NotReadable, local_path, open_regular_file
from maskfeat.masking import MaskSampler
from maskfeat.registry import DatasetSpec, register

VideoList = list[tuple[str, int]]

MAX_LINE = 16_384
"""Largest number of characters in a line; the longest path on Linux has 4,096 bytes."""

MODES = ("train", "val", "test")


def read_video_list(csv_path: str | os.PathLike[str], separator: str = " ", prefix: str = "") -> VideoList:
    """Read a list of videos, one `path label` per line.

    Args:
        csv_path: the list, a local path or one whose scheme has a handler (`file_io.path_manager`). Blank lines are
            skipped.
        separator: DATA.PATH_LABEL_SEPARATOR. The last one in a line separates the label, so that paths may contain it.
        prefix: DATA.PATH_PREFIX, the folder that paths are relative to.

    Returns:
        [(path, label)] in the order of the file.

    Raises:
        UserError: the list does not exist or is empty, its scheme has no handler, a line cannot be parsed, or a path
            is a URL or leaves `prefix`.
    """
    if not separator:
        raise UserError("DATA.PATH_LABEL_SEPARATOR must not be empty")
    videos: VideoList = []
    for number, line in enumerate(_lines(csv_path), start=1):
        if line.strip():
            videos.append(_parse_line(line.strip(), f"{csv_path}, line {number}", separator, prefix))
    if not videos:
        raise UserError(f"the list of videos {csv_path} is empty: a line is 'path{separator}label'")
    return videos


def _lines(csv_path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the lines of a list, none longer than a path and a label can be."""
    try:
        with io.TextIOWrapper(open_regular_file(local_path(csv_path)), encoding="utf-8-sig") as file:
            while line := file.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE:
                    raise UserError(f"the list of videos {csv_path} has a line of more than {MAX_LINE} characters")
                yield line
    except NotReadable as error:
        raise UserError(
            f"the list of videos {csv_path} cannot be read ({error}): "
            "DATA.PATH_TO_DATA_DIR must hold train.csv, val.csv and test.csv"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"the list of videos {csv_path} is not UTF-8 text ({error})") from error


def _parse_line(line: str, location: str, separator: str, prefix: str) -> tuple[str, int]:
    path, found, label = line.rpartition(separator)
    path, label = path.strip(), label.strip()
    if not found or not path or not (label.isascii() and label.isdigit()):
        raise UserError(
            f"{location}: {line!r} is not 'path{separator}label' with a label of 0 or more "
            f"(DATA.PATH_LABEL_SEPARATOR is {separator!r})"
        )
    if "://" in path or "\0" in path:
        raise UserError(f"{location}: {path!r} is not a local file; download the videos first")
    if prefix and os.path.isabs(path):
        raise UserError(
            f"{location}: {path!r} is absolute although DATA.PATH_PREFIX is {prefix!r}; make one of them empty"
        )
    if not os.path.isabs(path) and os.path.normpath(path).split(os.sep)[0] == os.pardir:
        raise UserError(f"{location}: {path!r} leaves DATA.PATH_PREFIX {prefix!r}, which is not allowed")
    if len(label) > 18:
        raise UserError(f"{location}: a label of {len(label)} digits")
    # Without any `..`, which after a symbolic link would point elsewhere than it seems to.
    return os.path.join(prefix, path if os.path.isabs(path) else os.path.normpath(path)), int(label)


class VideoClips(Dataset[list[Sample]]):
    """Clips of videos with class labels.

    Training: one random clip per video and epoch, decoded once and augmented `num_views` times. Validation: the centre
    crop of the centre clip. Testing: `num_clips` uniform clips with `num_crops` crops each; view = clip x num_crops +
    crop.

    Args:
        videos: [(path, label)], see `read_video_list`.
        transform: the augmentation, see `ClipTransform`.
        num_frames, sampling_rate, target_fps: a clip spans num_frames x sampling_rate frames at target_fps.
        seed: of all random draws.
        mode: "train", "val" or "test".
        use_offset: how uniform clips are placed, see `temporal_sampling.clip_span`.
        num_clips, num_crops: clips of a video and crops of a clip in testing.
        num_views: augmented views of a clip in training (repeated augmentation).
        draw_hidden: draws a mask for every view; None = no masks.
        replace_bad: True replaces a video that cannot be read by the next readable one (training); False replaces it by
            zeros.
        torchcodec: decode by torchcodec, which must be installed and returns the same frames, see `torchcodec_decoder`.

    Attributes:
        place: where the videos are listed, in words, for the log.
    """

    place = ""

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
        draw_hidden: MaskSampler | None = None,
        replace_bad: bool = True,
        torchcodec: bool = False,
    ) -> None:
        if torchcodec:  # raises here, not at the first video, if it is not installed
            torchcodec_decoder.load_decoder()
        self.torchcodec = torchcodec
        assert mode in MODES, f"mode is one of {MODES}, not {mode!r}"
        self.videos = list(videos)
        self.labels = [label for _, label in self.videos]
        self.transform = transform
        self.num_frames, self.sampling_rate, self.target_fps = num_frames, sampling_rate, target_fps
        self.seed = seed
        self.mode = mode
        self.use_offset = use_offset
        self.num_clips, self.num_crops = num_clips, num_crops
        self.views = num_clips * num_crops if mode == "test" else 1
        self.num_views = num_views
        self.draw_hidden = draw_hidden
        self.replace_bad = replace_bad
        self._last: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.videos)

    def path(self, index: int) -> str:
        """Return the file of a video."""
        return self.videos[index][0]

    def __getitem__(self, key: Any) -> list[Sample]:
        """Return the views of `key` (a SampleKey): `num_views` of one clip in training, else view `key.view` only."""
        key = SampleKey(*key)
        frames, index, bad = read_with_fallback(self, lambda index: self._decode(index, key), key.index)
        views = range(key.view, key.view + (self.num_views if self.mode == "train" else 1))
        with error_context(self.path(index)):
            return [self._view(frames, key, view, index, bad) for view in views]

    def _decode(self, index: int, key: SampleKey) -> np.ndarray:
        def wanted(info: VideoInfo) -> list[int]:
            start, end = self._span(info, key)
            return frame_indices(start, end, self.num_frames, info.frames)

        decode = torchcodec_decoder.decode_frames if self.torchcodec else decode_frames
        if self.mode == "train":
            return decode(self.path(index), wanted)[0]
        # The crops of a clip are requested in succession: decode it once.
        clip = (index, key.view // self.num_crops)
        if self._last is None or self._last[0] != clip:
            self._last = clip, decode(self.path(index), wanted)[0]
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
        if frames is None:
            sample = unreadable_sample((3, self.num_frames, self.transform.crop, self.transform.crop))
        else:
            with seeded(self.seed, key.epoch, key.index, view) as rng:
                sample = self.transform(frames, rng, view % self.num_crops)
        hidden = draw_mask(self.draw_hidden, self.seed, key.epoch, key.index, view)
        return replace(sample, label=self.labels[index], hidden=hidden, index=index, bad=bad)


def check_clips(cfg: CfgNode) -> Iterator[str]:
    """Yield the problems of keys that `build_video_clips` reads."""
    data = cfg.DATA
    jitters = cfg.TRAIN.ENABLE and not data.TRAIN_JITTER_SCALES_RELATIVE
    if jitters and data.TRAIN_JITTER_SCALES[0] < data.TRAIN_CROP_SIZE:
        yield (
            f"DATA.TRAIN_JITTER_SCALES must start at DATA.TRAIN_CROP_SIZE ({data.TRAIN_CROP_SIZE}) or above, "
            f"or the crop does not fit; given {data.TRAIN_JITTER_SCALES}"
        )


def views_in_testing(cfg: CfgNode) -> list[tuple[int, int]]:
    """Return (clips, crops) for each of TEST.NUM_TEMPORAL_CLIPS, or for TEST.NUM_ENSEMBLE_VIEWS alone."""
    counts = cfg.TEST.NUM_TEMPORAL_CLIPS or [cfg.TEST.NUM_ENSEMBLE_VIEWS]
    return [(count, cfg.TEST.NUM_SPATIAL_CROPS) for count in counts]


def build_video_clips(cfg: CfgNode, request: DatasetRequest, videos: Sequence[tuple[str, int]]) -> VideoClips:
    """Return clips of videos [(path, label)] with the transforms that the config describes."""
    data, split = cfg.DATA, request.split
    num_crops = cfg.TEST.NUM_SPATIAL_CROPS if split == "test" else 1
    if request.augmented:
        transform: ClipTrainTransform | ClipTestTransform = ClipTrainTransform(
            scale=data.TRAIN_JITTER_SCALES_RELATIVE,
            ratio=data.TRAIN_JITTER_ASPECT_RELATIVE,
            short_sides=data.TRAIN_JITTER_SCALES,
            **augmentation(cfg),
        )
    else:
        # One crop is cut from the centre of a larger frame; several cover one whose short side is the crop.
        short_side = max(data.TRAIN_JITTER_SCALES[0], data.TEST_CROP_SIZE) if num_crops == 1 else data.TEST_CROP_SIZE
        transform = ClipTestTransform(data.TEST_CROP_SIZE, short_side, num_crops, data.MEAN, data.STD)
    return VideoClips(
        videos,
        transform,
        num_frames=data.NUM_FRAMES,
        sampling_rate=data.SAMPLING_RATE,
        target_fps=data.TARGET_FPS,
        seed=cfg.RNG_SEED,
        mode="val" if split == "train" and not request.augmented else split,
        use_offset=data.USE_OFFSET_SAMPLING,
        num_clips=request.num_clips or cfg.TEST.NUM_ENSEMBLE_VIEWS,
        num_crops=num_crops,
        num_views=num_views(cfg, request),
        draw_hidden=request.draw_hidden,
        replace_bad=request.augmented,
        torchcodec=data.DECODING_BACKEND == "torchcodec",
    )


def build_kinetics(cfg: CfgNode, request: DatasetRequest) -> VideoClips:
    """Return a split of DATA.PATH_TO_DATA_DIR, which holds train.csv, val.csv and test.csv."""
    data = cfg.DATA
    path = os.path.join(data.PATH_TO_DATA_DIR, f"{request.split}.csv")  # as text: a Path would turn s3:// into s3:/
    clips = build_video_clips(cfg, request, read_video_list(path, data.PATH_LABEL_SEPARATOR, data.PATH_PREFIX))
    clips.place = f"list {path}"
    return clips


register(
    DatasetSpec(name="kinetics", media="clip", build=build_kinetics, check=check_clips, test_views=views_in_testing)
)
