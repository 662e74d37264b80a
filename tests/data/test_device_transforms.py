"""Deferred transforms give the same results as the reference transforms, for batches of images of any sizes."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskfeat.batch import Batch
from maskfeat.data import device_transforms
from maskfeat.data.collate import PackedBatch, collate
from maskfeat.data.device_transforms import DeferredTransform
from maskfeat.data.rng import seeded
from maskfeat.data.sample import Sample, unreadable_sample
from maskfeat.data.transforms import ClipTestTransform, ClipTrainTransform, ImageEvalTransform, ImageTrainTransform
from tests.data import oracle
from tests.data.samples import clip_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")
RATIO = (3 / 4, 4 / 3)


def make_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth with noise, without any symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 9 + y / 17 + k + seed) * np.cos(y / 13 - k) for k in range(3)], -1)
    return np.clip((waves + 1) * 120 + np.random.default_rng(seed).integers(0, 16, waves.shape), 0, 255).astype(
        np.uint8
    )


def clip(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.stack([make_image(height, width, seed + frame) for frame in range(3)])


IMAGE_TRANSFORMS = {
    "plain": ImageTrainTransform(32, (0.3, 1.0), RATIO, MEAN, STD),
    "unmirrored": ImageTrainTransform(32, (0.3, 1.0), RATIO, MEAN, STD, "bilinear", flip=False),
    "augmented": ImageTrainTransform(32, (0.3, 1.0), RATIO, MEAN, STD, auto_augment="rand-m9-mstd0.5-inc1"),
    "torchvision": ImageTrainTransform(32, (0.3, 1.0), RATIO, MEAN, STD, auto_augment="ra_6_10", erase_prob=0.5),
    "jittered": ImageTrainTransform(32, (0.3, 1.0), RATIO, MEAN, STD, color_jitter=0.4),
    "noise": ImageTrainTransform(32, (0.3, 1.0), RATIO, MEAN, STD, erase_prob=1.0, erase_count=3),
    "colour": ImageTrainTransform(32, (0.3, 1.0), RATIO, MEAN, STD, erase_prob=0.5, erase_mode="rand"),
    "zeros": ImageTrainTransform(32, (0.3, 1.0), RATIO, MEAN, STD, erase_prob=0.5, erase_mode="const"),
}
CLIP_TRANSFORMS = {
    "plain": ClipTrainTransform(32, (0.3, 1.0), RATIO, MEAN, STD),
    "short_side": ClipTrainTransform(32, (), (), MEAN, STD, short_sides=(36, 50)),
    "no_resize": ClipTrainTransform(32, (), (), MEAN, STD, short_sides=(40, 40)),
    "augmented": ClipTrainTransform(32, (0.3, 1.0), RATIO, MEAN, STD, auto_augment="rand-m7-n4-mstd0.5-inc1"),
    "noise": ClipTrainTransform(32, (0.3, 1.0), RATIO, MEAN, STD, erase_prob=1.0, erase_count=2),
    "colour": ClipTrainTransform(32, (0.3, 1.0), RATIO, MEAN, STD, erase_prob=0.5, erase_mode="rand"),
    "zeros": ClipTrainTransform(32, (0.3, 1.0), RATIO, MEAN, STD, erase_prob=0.5, erase_mode="const"),
}
SIZES = [(60, 90), (90, 60), (40, 40), (40, 71), (33, 200), (60, 90), (48, 48), (61, 90)]


@pytest.mark.parametrize("name", IMAGE_TRANSFORMS)
def test_image_batches_equal_the_reference(name: str) -> None:
    transform = IMAGE_TRANSFORMS[name]
    views, expected = [], []
    for seed, size in enumerate(SIZES * 2):
        image = Image.fromarray(make_image(*size, seed))
        with seeded(0, 0, seed, 0) as rng:
            views.append(transform(image, rng))
        with seeded(0, 0, seed, 0) as rng:
            expected.append(oracle.train_image(transform, image, rng))
    check(views, expected, 1e-6)
    assert any(view.transform.flip for view in views) == (name in ("plain", "noise", "colour", "zeros"))


@pytest.mark.parametrize("name", CLIP_TRANSFORMS)
def test_clip_batches_equal_the_reference(name: str) -> None:
    transform = CLIP_TRANSFORMS[name]
    views, expected = [], []
    for seed, size in enumerate(SIZES):
        frames = clip(*size, seed)
        with seeded(0, 0, seed, 0) as rng:
            views.append(transform(frames, rng))
        with seeded(0, 0, seed, 0) as rng:
            expected.append(oracle.train_clip(transform, frames, rng))
    check(views, expected, 1e-5)
    assert {view.transform.flip for view in views} == {False, True}


@pytest.mark.parametrize("num_crops", [1, 3])
def test_views_of_testing(num_crops: int) -> None:
    for short_side in (36, 40):  # 40: some clips need no resizing
        transform = ClipTestTransform(32, short_side, num_crops, MEAN, STD)
        cases = [(clip(*size, 1), position) for size in SIZES[:5] for position in range(num_crops)]
        views = [transform(frames, position=position) for frames, position in cases]
        check(views, [oracle.test_clip(transform, frames, position) for frames, position in cases], 1e-5)


def check(views: list[Sample], expected: list[torch.Tensor], tolerance: float) -> None:
    """One batch of the views, pickled as between processes: close to the reference, and equal in erased boxes."""
    packed = pickle.loads(pickle.dumps(collate([views])))
    batch = packed.to_batch(CPU).clip
    assert batch.dtype == torch.float32 and batch.is_contiguous()
    torch.testing.assert_close(batch, torch.stack(expected), atol=tolerance, rtol=0)
    for row, view in enumerate(views):
        assert view.pixels.dtype == torch.uint8 or view.pixels.numel() <= view.transform.shape[0] * 3 * 32 * 32
        torch.testing.assert_close(clip_of(view), batch[row], atol=0, rtol=0)
        if view.transform.erase:
            box, _ = view.transform.erase[-1]
            rows, columns = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
            assert torch.equal(batch[row][..., rows, columns], expected[row][..., rows, columns])


def test_pixels_of_different_sizes_are_packed_into_one_tensor() -> None:
    transform = ClipTrainTransform(32, (0.3, 0.5), RATIO, MEAN, STD)
    views = [transform(clip(*size), np.random.default_rng(0)) for size in SIZES]
    packed = collate([views])
    assert packed.pixels.shape == (sum(view.pixels.numel() for view in views),) and packed.pixels.dtype == torch.uint8
    assert packed.pixels.numel() < sum(clip(*size).size for size in SIZES) * 0.6, "only cropped pixels are sent"
    assert len(set(packed.shapes)) > 4 and packed.erase_values is None and packed.flipped is None


def test_no_view_takes_more_than_its_float32() -> None:
    """Large frames are resized in the worker, small ones on the device; a batch may contain both."""
    train = ClipTrainTransform(32, (0.3, 1.0), RATIO, MEAN, STD, flip=False)
    test = ClipTestTransform(32, 36, 3, MEAN, STD)
    views, expected = [], []
    for seed, size in enumerate([(37, 41), (301, 203), (64, 64), (90, 90)]):
        frames = clip(*size, seed)
        torch.manual_seed(seed)  # torchvision's crop draws from torch
        views += [train(frames, np.random.default_rng(0)), test(frames, position=2)]
        torch.manual_seed(seed)
        expected += [oracle.train_clip(train, frames, np.random.default_rng(0)), oracle.test_clip(test, frames, 2)]
    assert {view.pixels.dtype for view in views} == {torch.uint8, torch.float32}
    assert max(view.pixels.nbytes for view in views) <= 4 * 3 * 3 * 32 * 32
    check(views, expected, 1e-5)


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 3, 32, 32)])
def test_unreadable_rows_are_zero(shape: tuple[int, ...]) -> None:
    if len(shape) == 3:
        view = ImageEvalTransform(32, MEAN, STD)(Image.fromarray(make_image(60, 60)))
    else:
        view = ClipTestTransform(32, 36, 1, MEAN, STD)(clip(60, 60))
    missing = unreadable_sample(shape)
    for views in ([missing, view], [view, missing], [missing, missing]):
        batch = collate([views]).to_batch(CPU).clip
        for row, one in enumerate(views):
            assert torch.equal(batch[row], torch.zeros(shape) if one is missing else clip_of(view))


def samples(hidden: bool = True) -> list[list[Sample]]:
    """Four views with 0, 3, 6 and 9 patches hidden."""
    masks = [torch.arange(16).view(4, 4) < 3 * number for number in range(4)]
    views = [ImageEvalTransform(32, MEAN, STD)(Image.fromarray(make_image(50, 60, seed))) for seed in range(4)]
    return [
        [replace(view, label=7, hidden=mask if hidden else None, index=5)]
        for view, mask in zip(views, masks, strict=True)
    ]


def test_max_hidden_is_kept_with_the_batch() -> None:
    batch = collate(samples()).to_batch(CPU)
    assert batch.max_hidden == 9
    assert batch.to("cpu", non_blocking=True).max_hidden == 9
    assert [part.max_hidden for part in batch.split(3)] == [9, 9]
    assert collate(samples(hidden=False)).to_batch(CPU).max_hidden is None
    assert Batch(torch.zeros(1, 3, 2, 2)).max_hidden is None


def views_of(name: str) -> list[Sample]:
    """An unreadable view, and views of several sizes by one of the transforms above."""
    clips = name.startswith("clip_")
    transform = CLIP_TRANSFORMS[name.removeprefix("clip_")] if clips else IMAGE_TRANSFORMS[name]
    views = [unreadable_sample((3, 3, 32, 32) if clips else (3, 32, 32))]
    for seed, size in enumerate(SIZES):
        given = clip(*size, seed) if clips else Image.fromarray(make_image(*size, seed))
        with seeded(0, 0, seed, 0) as rng:
            views.append(transform(given, rng))  # type: ignore[arg-type]
    return views


NAMES = [*IMAGE_TRANSFORMS, *(f"clip_{name}" for name in CLIP_TRANSFORMS)]


@pytest.mark.parametrize("name", NAMES)
def test_batched_and_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code path of a GPU, on the CPU; and on the meta device, where reading a value would raise."""
    packed = collate([views_of(name)])
    expected = packed.to_batch(CPU).clip
    assert packed.to_batch(torch.device("meta")).clip.shape == expected.shape
    monkeypatch.setattr(device_transforms, "_batched", lambda device: True)
    together = packed.to_batch(CPU).clip
    assert together.is_contiguous()
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and pytest -m gpu")
@pytest.mark.parametrize("name", NAMES)
def test_gpu_gives_the_same_clip_without_synchronising(name: str) -> None:
    packed: PackedBatch = collate(
        [[replace(view, label=0, hidden=torch.ones(2, 2, dtype=torch.bool), index=0)] for view in views_of(name)]
    )
    pinned = packed.pin_memory()
    assert pinned.pixels.is_pinned() and pinned.label.is_pinned() and pinned.max_hidden == 4
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = pinned.to_batch(torch.device("cuda", 0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(batch.clip.cpu(), packed.to_batch(CPU).clip, atol=1e-5, rtol=0)
    assert not batch.clip[0].any() and batch.hidden is not None and batch.hidden.is_cuda


def test_deferred_transforms_are_small() -> None:
    """They are pickled with every batch."""
    transform = DeferredTransform((3, 16, 224, 224), MEAN, STD, resize=(224, 224), flip=True)
    assert len(pickle.dumps((transform,) * 64)) < 4000


@pytest.mark.slow
def test_real_images(shared: Path) -> None:
    """The pre-training transform on real files of every size."""
    paths = sorted((shared / "data" / "imagenet_samples" / "train").rglob("*.JPEG"))[:24]
    transform = ImageTrainTransform(224, (0.5, 1.0), RATIO, MEAN, STD)
    views, expected = [], []
    for index, path in enumerate(paths):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        with seeded(0, 0, index, 0) as rng:
            views.append(transform(image, rng))
        with seeded(0, 0, index, 0) as rng:
            expected.append(oracle.train_image(transform, image, rng))
    check(views, expected, 1e-6)
