"""Reading images and clips as a training run does, against Pillow with torchvision and against decoding whole files."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from benchmarks.cases import MVIT_S, VIT_B, Options, clip_data, hidden_of, image_data
from benchmarks.measure import NotTheSame, Row, Run, in_turn
from benchmarks.reference_loading import Box, ReferenceImages, decode_all, reference_clip, reference_image
from maskfeat.batch import SampleKey
from maskfeat.build import build_loader
from maskfeat.config.ranges import CHOICES
from maskfeat.data.collate import collate
from maskfeat.data.datasets.imagenet import ImageFolder
from maskfeat.data.datasets.kinetics import VideoClips
from maskfeat.data.loader import BatchLoader
from maskfeat.data.rng import SPAN_STREAM, sample_generator, seeded
from maskfeat.data.transforms import random_resized_crop_box
from maskfeat.data.video.decoder import VideoInfo, decode_frames
from maskfeat.data.video.temporal_sampling import clip_length, clip_span, frame_indices
from maskfeat.errors import UserError

BACKEND = "DATA_LOADER.IMAGE_BACKEND"
CHECKED = 16  # images whose pixels are compared
SAME_LEVELS = 0.01  # grey levels of 255: the rounding of float32, resized before or after normalisation
CPU = torch.device("cpu")
IN_THIS_PROCESS = ("DATA_LOADER.NUM_WORKERS", "0")


def first_epoch(loader: BatchLoader) -> Run:
    """Reads the first epoch of a training split: the same draws in every call, since their cost differs."""

    def read() -> None:
        loader.set_epoch(0)
        for _ in loader:
            pass

    return read


def per_second(row: Row, samples: int, unit: str) -> Row:
    """The row with what it read, and samples a second in its note."""
    speeds = f"{samples / row.reference.cpu:.1f} -> {samples / row.ours.cpu:.1f} {unit}/s a core"
    return Row(row.what, row.reference, row.ours, asked=row.asked, note=f"{speeds}; {row.note}")


def _clip(dataset: ImageFolder | VideoClips, index: int) -> Tensor:
    """(C, [T,] H, W) float32: what training shows of a sample in the first epoch."""
    return collate([dataset[SampleKey(0, index)]]).to_batch(CPU).clip[0]


def _levels(clip: Tensor, cfg: CfgNode) -> Tensor:
    """(3, ...) as the loader gives it, in grey levels 0 to 255, float32."""
    shape = (3,) + (1,) * (clip.dim() - 1)
    mean, std = (torch.tensor(values).view(shape) for values in (cfg.DATA.MEAN, cfg.DATA.STD))
    return (clip * std + mean) * 255


def measure_images(options: Options) -> Iterator[Row]:
    """Reading, cropping and collating images in this process, with every backend that there is."""
    data = image_data(options, 64)
    for number, backend in enumerate(CHOICES[BACKEND]):  # the default first
        cfg = options.recipe(VIT_B, 16, *IN_THIS_PROCESS, *data, BACKEND, str(backend))
        loader = build_loader(cfg, "train")
        row = _images(cfg, loader, str(backend), is_default=number == 0, repeats=options.repeats)
        yield per_second(row, len(loader) * loader.batch_size, "images")


def _images(cfg: CfgNode, loader: BatchLoader, backend: str, is_default: bool, repeats: int) -> Row:
    dataset = loader.dataset
    if not isinstance(dataset, ImageFolder):
        raise UserError("--cfg must be a recipe for images (TRAIN.DATASET imagenet) to measure how they are read")
    data = cfg.DATA
    plain = ReferenceImages(
        dataset.samples[: len(loader) * loader.batch_size],
        data.TRAIN_CROP_SIZE,
        tuple(data.TRAIN_JITTER_SCALES_RELATIVE),
        tuple(data.TRAIN_JITTER_ASPECT_RELATIVE),
        data.MEAN,
        data.STD,
        lambda index: mask if (mask := hidden_of(cfg, index)) is not None else torch.zeros(1),
    )
    batches: DataLoader[object] = DataLoader(plain, loader.batch_size, shuffle=True)
    apart = _check_images(cfg, dataset, exact=is_default)

    def reference() -> None:
        torch.manual_seed(0)
        for _ in batches:
            pass

    seconds = in_turn({"reference": reference, "ours": first_epoch(loader)}, repeats, CPU)
    asked = ">= 1.4x, same pixels" if is_default else ">= 2x, opt-in"
    note = "same pixels" if apart == 0 else f"pixels {apart:.2f} grey levels apart on average"
    what = f"reading {len(plain)} images to {data.TRAIN_CROP_SIZE}, {backend}"
    return Row(what, seconds["reference"], seconds["ours"], asked=asked, note=note)


def _check_images(cfg: CfgNode, dataset: ImageFolder, exact: bool) -> float:
    """Mean difference in grey levels from the reference's pixels under the same draws.

    Raises:
        NotTheSame: where `exact` and any pixel differs.
    """
    transform = dataset.transform
    apart = []
    for index in range(min(CHECKED, len(dataset))):
        clip = _clip(dataset, index)
        scale, ratio = cfg.DATA.TRAIN_JITTER_SCALES_RELATIVE, cfg.DATA.TRAIN_JITTER_ASPECT_RELATIVE
        with seeded(dataset.seed, 0, index, 0) as rng:
            box = random_resized_crop_box(*_image_size(dataset.path(index)), scale, ratio)
            flip = cfg.DATA.RANDOM_FLIP and rng.random() < 0.5
        expected = reference_image(dataset.path(index), box, flip, transform.crop, cfg.DATA.MEAN, cfg.DATA.STD)
        apart.append((_levels(clip, cfg) - _levels(expected, cfg)).abs())
    largest = max(pixels.max().item() for pixels in apart)
    if exact and not largest <= SAME_LEVELS:
        raise NotTheSame(
            f"images: up to {largest:.3g} grey levels from Pillow's and torchvision's (at most {SAME_LEVELS:g})"
        )
    mean = sum(pixels.mean().item() for pixels in apart) / len(apart)
    return 0.0 if largest <= SAME_LEVELS else mean


def _image_size(path: str) -> tuple[int, int]:
    """(height, width)."""
    with Image.open(path) as image:
        return image.height, image.width


def _video_dataset(loader: BatchLoader) -> VideoClips:
    if not isinstance(loader.dataset, VideoClips):
        raise UserError("--cfg must be a recipe for clips (TRAIN.DATASET kinetics) to measure how they are read")
    return loader.dataset


def _indices(dataset: VideoClips, index: int, frames: int, fps: float) -> list[int]:
    """The frames of the clip that the first epoch shows of a video."""
    length = clip_length(dataset.num_frames, dataset.sampling_rate, dataset.target_fps, fps)
    rng = sample_generator(dataset.seed, 0, index, 0, SPAN_STREAM)
    start, end = clip_span(frames, length, -1, 1, rng=rng)
    return frame_indices(start, end, dataset.num_frames, frames)


def _fps(path: str) -> float:
    found: list[VideoInfo] = []

    def note(info: VideoInfo) -> list[int]:
        found.append(info)
        return [0]

    decode_frames(path, note)
    return found[0].fps


def measure_video(options: Options) -> Iterator[Row]:
    """Clips of a training run: decoded, cropped and collated in this process."""
    data = clip_data(options, 4)
    cfg = options.recipe(MVIT_S, 2, *IN_THIS_PROCESS, *data)
    loader = build_loader(cfg, "train")
    dataset = _video_dataset(loader)
    indices = range(len(loader) * loader.batch_size)
    rates = [_fps(dataset.path(index)) for index in indices]

    def plain(index: int) -> Tensor:
        """What `dataset` shows of a video in the first epoch, from the same draws."""
        data = cfg.DATA
        scale, ratio = data.TRAIN_JITTER_SCALES_RELATIVE, data.TRAIN_JITTER_ASPECT_RELATIVE
        with seeded(dataset.seed, 0, index, 0) as rng:

            def box(height: int, width: int) -> Box:
                return random_resized_crop_box(height, width, scale, ratio)

            return reference_clip(
                dataset.path(index),
                lambda frames: _indices(dataset, index, frames, rates[index]),
                box,
                lambda: bool(data.RANDOM_FLIP and rng.random() < 0.5),
                data.TRAIN_CROP_SIZE,
                data.MEAN,
                data.STD,
                dataset.short_side,
            )

    apart = [_levels(_clip(dataset, i), cfg) - _levels(plain(i), cfg) for i in indices]
    largest = max(levels.abs().max().item() for levels in apart)
    if not largest <= SAME_LEVELS:
        raise NotTheSame(f"clips: up to {largest:.3g} grey levels from the reference's (at most {SAME_LEVELS:g})")

    def reference() -> None:
        for start in range(0, len(indices), loader.batch_size):
            batch = indices[start : start + loader.batch_size]
            torch.stack([plain(index) for index in batch])
            for index in batch:
                hidden_of(cfg, index)

    seconds = in_turn({"reference": reference, "ours": first_epoch(loader)}, options.repeats, CPU)
    what = f"reading {len(indices)} clips of {dataset.num_frames} frames to {cfg.DATA.TRAIN_CROP_SIZE}"
    note = f"{largest:.0e} grey levels apart"
    row = Row(what, seconds["reference"], seconds["ours"], asked=">= 3x", note=note)
    yield per_second(row, len(indices), "clips")


def measure_decode(options: Options) -> Iterator[Row]:
    """Decoding alone: every frame of the files, against the frames of a clip."""
    data = clip_data(options, 4)
    dataset = _video_dataset(build_loader(options.recipe(MVIT_S, 2, *IN_THIS_PROCESS, *data), "train"))
    number = min(len(dataset), options.files or 4)

    def wanted(index: int) -> Callable[[VideoInfo], list[int]]:
        return lambda info: _indices(dataset, index, info.frames, info.fps)

    for index in range(number):
        path = dataset.path(index)
        whole, (ours, info) = decode_all(path), decode_frames(path, wanted(index))
        if not np.array_equal(ours, whole[_indices(dataset, index, info.frames, info.fps)]):
            raise NotTheSame(f"frames of {path} differ from those that decoding the whole file gives")

    def decode_spans() -> None:
        for index in range(number):
            decode_frames(dataset.path(index), wanted(index))

    sides: dict[str, Run] = {
        "reference": lambda: [len(decode_all(dataset.path(index))) for index in range(number)],
        "ours": decode_spans,
    }
    seconds = in_turn(sides, options.repeats, CPU)
    row = Row(f"decoding {number} clips", seconds["reference"], seconds["ours"], note="same frames to the bit")
    yield per_second(row, number, "clips")
