"""Video data sets in the layout of Kinetics: a csv file per split lists the videos and their labels."""

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
from maskfeat.data.datasets.classes import read_class_names
from maskfeat.data.datasets.video_list import check_some_exist, read_video_list
from maskfeat.data.rng import SPAN_STREAM, draw_mask, sample_generator, seeded
from maskfeat.data.sample import Sample, unreadable_sample
from maskfeat.data.transforms import ClipTestTransform, ClipTrainTransform, ClipTransform
from maskfeat.data.video import torchcodec_decoder
from maskfeat.data.video.decoder import VideoInfo, decode_frames
from maskfeat.data.video.temporal_sampling import clip_length, clip_span, frame_indices
from maskfeat.masking import MaskSampler
from maskfeat.registry import DatasetSpec, objective_spec, register

MODES = ("train", "val", "test")
NAMES = "classes.txt"
"""File beside the lists with the names of their classes, see `read_class_names`."""


class VideoClips(Dataset[list[Sample]]):
    """Clips of videos with class labels.

    Training: one random clip per video and epoch, decoded once and augmented `num_views` times. Validation: the centre
    crop of the centre clip. Testing: `num_clips` uniform clips with `num_crops` crops each; view = clip x num_crops +
    crop.

    Args:
        videos: [(path, label)], see `video_list.read_video_list`; not copied.
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
        short_side: that frames are scaled to while they are decoded, see `decoder.open_video`; None = their own.

    Attributes:
        classes: their names by their numbers; None = not known.
        place: where the videos are listed, in words, for the log.
    """

    classes: list[str] | None = None
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
        short_side: int | None = None,
    ) -> None:
        if torchcodec:  # raises here, not at the first video, if it is not installed
            torchcodec_decoder.load_decoder()
        self.torchcodec = torchcodec
        self.short_side = short_side
        assert mode in MODES, f"mode is one of {MODES}, not {mode!r}"
        self.videos = videos
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
            return decode(self.path(index), wanted, short_side=self.short_side)[0]
        # The crops of a clip are requested in succession: decode it once.
        clip = (index, key.view // self.num_crops)
        if self._last is None or self._last[0] != clip:
            self._last = clip, decode(self.path(index), wanted, short_side=self.short_side)[0]
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
    short_side = data.TRAIN_JITTER_SCALES[0]
    if request.augmented:
        transform: ClipTrainTransform | ClipTestTransform = ClipTrainTransform(
            scale=data.TRAIN_JITTER_SCALES_RELATIVE,
            ratio=data.TRAIN_JITTER_ASPECT_RELATIVE,
            short_sides=data.TRAIN_JITTER_SCALES,
            **augmentation(cfg),
        )
    else:
        # One crop is cut from the centre of a larger frame; several cover one whose short side is the crop.
        short_side = max(short_side, data.TEST_CROP_SIZE) if num_crops == 1 else data.TEST_CROP_SIZE
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
        short_side=short_side if data.DECODER_SCALE else None,
    )


def build_kinetics(cfg: CfgNode, request: DatasetRequest) -> VideoClips:
    """Return a split of DATA.PATH_TO_DATA_DIR, which holds train.csv, val.csv and test.csv."""
    data = cfg.DATA
    path = os.path.join(data.PATH_TO_DATA_DIR, f"{request.split}.csv")  # as text: a Path would turn s3:// into s3:/
    # Pre-training needs no labels, except where its training samples are shown plainly, to be told apart by a probe.
    labelled = objective_spec(cfg).classifies or (request.split == "train" and not request.augmented)
    videos = read_video_list(path, data.PATH_LABEL_SEPARATOR, data.PATH_PREFIX, labelled)
    check_some_exist(videos, path, data.PATH_PREFIX, data.PATH_TO_DATA_DIR)
    clips = build_video_clips(cfg, request, videos)
    clips.classes, clips.place = _names(cfg, request), f"list {path}"
    return clips


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


register(
    DatasetSpec(name="kinetics", media="clip", build=build_kinetics, check=check_clips, test_views=views_in_testing)
)
