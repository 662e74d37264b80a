"""Video data sets: a csv file per split lists the videos and their labels, as for Kinetics, or they lie in folders."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from yacs.config import CfgNode

from maskfeat.batch import SampleKey
from maskfeat.data.bad_samples import error_context, read_with_fallback
from maskfeat.data.datasets.base import DatasetRequest, augmentation, num_views
from maskfeat.data.datasets.files import FileSamples
from maskfeat.data.datasets.label_sets import LabelSet
from maskfeat.data.datasets.layouts import check_sources, find_split
from maskfeat.data.rng import SPAN_STREAM, sample_generator, seeded
from maskfeat.data.sample import Sample, unreadable_sample
from maskfeat.data.transforms import ClipTestTransform, ClipTrainTransform, ClipTransform
from maskfeat.data.video import torchcodec_decoder
from maskfeat.data.video.decoder import VideoInfo, decode_frames
from maskfeat.data.video.temporal_sampling import clip_length, clip_span, frame_indices, segment_indices
from maskfeat.masking import MaskSampler
from maskfeat.registry import DatasetSpec, register

MODES = ("train", "val", "test")


class VideoClips(FileSamples):
    """Clips of videos with class labels.

    Training: one random clip per video and epoch, decoded once and augmented `num_views` times. Validation: the centre
    crop of the centre clip. Testing: `num_clips` uniform clips with `num_crops` crops each; view = clip x num_crops +
    crop.

    Args:
        videos, seed, draw_hidden, replace_bad, num_views, num_classes: see `FileSamples`.
        transform: the augmentation, see `ClipTransform`.
        num_frames, sampling_rate, target_fps: a clip spans num_frames x sampling_rate frames at target_fps.
        mode: "train", "val" or "test".
        use_offset: how uniform clips are placed, see `temporal_sampling.clip_span`.
        num_clips, num_crops: clips of a video and crops of a clip in testing.
        torchcodec: decode by torchcodec, which must be installed and returns the same frames, see `torchcodec_decoder`.
        short_side: that frames are scaled to while they are decoded, see `decoder.open_video`; None = their own.
        segments: a clip is one frame from each of num_frames equal parts of the whole video, see `segment_indices`.
    """

    def __init__(
        self,
        videos: Sequence[tuple[str, int | LabelSet]],
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
        num_classes: int = 0,
        segments: bool = False,
    ) -> None:
        super().__init__(videos, seed, draw_hidden, replace_bad, num_views, num_classes)
        if torchcodec:  # raises here, not at the first video, if it is not installed
            torchcodec_decoder.load_decoder()
        self.torchcodec = torchcodec
        self.short_side, self.segments = short_side, segments
        assert mode in MODES, f"mode is one of {MODES}, not {mode!r}"
        self.transform = transform
        self.num_frames, self.sampling_rate, self.target_fps = num_frames, sampling_rate, target_fps
        self.mode = mode
        self.use_offset = use_offset
        self.num_clips, self.num_crops = num_clips, num_crops
        self.views = num_clips * num_crops if mode == "test" else 1
        self._last: tuple[tuple[int, int], np.ndarray] | None = None

    def __getitem__(self, key: Any) -> list[Sample]:
        """Return the views of `key` (a SampleKey): `num_views` of one clip in training, else view `key.view` only."""
        key = SampleKey(*key)
        frames, index, bad = read_with_fallback(self, lambda index: self._decode(index, key), key.index)
        views = range(key.view, key.view + (self.num_views if self.mode == "train" else 1))
        with error_context(self.path(index)):
            return [self.labelled(self._view(frames, key, view), key, view, index, bad) for view in views]

    def _decode(self, index: int, key: SampleKey) -> np.ndarray:
        def wanted(info: VideoInfo) -> list[int]:
            if self.segments:
                return segment_indices(self.num_frames, info.frames, self._rng(key) if self.mode == "train" else None)
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

    def _rng(self, key: SampleKey) -> np.random.Generator:
        return sample_generator(self.seed, key.epoch, key.index, key.view, SPAN_STREAM)

    def _span(self, info: VideoInfo, key: SampleKey) -> tuple[float, float]:
        length = clip_length(self.num_frames, self.sampling_rate, self.target_fps, info.fps)
        if self.mode == "train":
            return clip_span(info.frames, length, -1, 1, rng=self._rng(key))
        if self.mode == "val":
            return clip_span(info.frames, length, 0, 1, use_offset=True)
        return clip_span(info.frames, length, key.view // self.num_crops, self.num_clips, self.use_offset)

    def _view(self, frames: np.ndarray | None, key: SampleKey, view: int) -> Sample:
        if frames is None:
            return unreadable_sample((3, self.num_frames, self.transform.crop, self.transform.crop))
        with seeded(self.seed, key.epoch, key.index, view) as rng:
            return self.transform(frames, rng, view % self.num_crops)


def check_clips(cfg: CfgNode) -> Iterator[str]:
    """Yield the problems of keys that `build_video_clips` and `build_kinetics` read."""
    data = cfg.DATA
    yield from check_sources(cfg)
    jitters = cfg.TRAIN.ENABLE and not data.TRAIN_JITTER_SCALES_RELATIVE
    if jitters and data.TRAIN_JITTER_SCALES[0] < data.TRAIN_CROP_SIZE:
        yield (
            f"DATA.TRAIN_JITTER_SCALES must start at DATA.TRAIN_CROP_SIZE ({data.TRAIN_CROP_SIZE}) or above, "
            f"or the crop does not fit; given {data.TRAIN_JITTER_SCALES}"
        )
    clips = [number for number, _ in views_in_testing(cfg)]
    if cfg.TEST.ENABLE and data.SEGMENT_SAMPLING and clips != [1]:
        key = "TEST.NUM_TEMPORAL_CLIPS" if cfg.TEST.NUM_TEMPORAL_CLIPS else "TEST.NUM_ENSEMBLE_VIEWS"
        yield (
            f"{key} must be {'[1]' if cfg.TEST.NUM_TEMPORAL_CLIPS else 1} where DATA.SEGMENT_SAMPLING is True (every "
            f"clip would have the same frames); given {cfg.TEST.NUM_TEMPORAL_CLIPS or clips[0]}"
        )


def views_in_testing(cfg: CfgNode) -> list[tuple[int, int]]:
    """Return (clips, crops) for each of TEST.NUM_TEMPORAL_CLIPS, or for TEST.NUM_ENSEMBLE_VIEWS alone."""
    counts = cfg.TEST.NUM_TEMPORAL_CLIPS or [cfg.TEST.NUM_ENSEMBLE_VIEWS]
    return [(count, cfg.TEST.NUM_SPATIAL_CROPS) for count in counts]


def build_video_clips(
    cfg: CfgNode, request: DatasetRequest, videos: Sequence[tuple[str, int | LabelSet]]
) -> VideoClips:
    """Return clips of videos [(path, label or labels)] with the transforms that the config describes."""
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
        num_classes=cfg.MODEL.NUM_CLASSES,
        segments=data.SEGMENT_SAMPLING,
    )


def build_kinetics(cfg: CfgNode, request: DatasetRequest) -> VideoClips:
    """Return a split of DATA.PATH_TO_DATA_DIR, or of DATA.SOURCES, see `layouts.find_split`."""
    found = find_split(cfg, request, "video")
    clips = build_video_clips(cfg, request, found.samples)
    clips.describe(found)
    return clips


register(
    DatasetSpec(
        name="kinetics",
        media="clip",
        build=build_kinetics,
        check=check_clips,
        test_views=views_in_testing,
        mixes=True,
    )
)
