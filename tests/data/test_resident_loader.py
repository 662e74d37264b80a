"""Images that are kept on the device: evaluation equals `Loader`; training depends on (seed, epoch, sample) only."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from maskfeat.batch import Batch
from maskfeat.build import build_loader
from maskfeat.config import load_config
from maskfeat.data import resident_loader
from maskfeat.data.bad_samples import BadSampleLog, TooManyBadSamples, UnreadableSample
from maskfeat.data.datasets.folders import ImageList
from maskfeat.data.datasets.imagenet import ImageFolder
from maskfeat.data.loader import BatchLoader, Loader
from maskfeat.data.resident_loader import ResidentLoader, crop_and_resize, random_crop_boxes
from maskfeat.data.sample import Sample
from maskfeat.data.samplers import EpochSampler
from maskfeat.data.transforms import ImageEvalTransform, ImageTrainTransform
from maskfeat.distributed.world import World
from maskfeat.errors import UserError
from maskfeat.masking import mask_sampler
from maskfeat.registry import DatasetSpec
from tests.data.datasets.test_imagenet import draw
from tests.small import RECIPES, VIT_PT, images

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
SCALE, RATIO = (0.3, 1.0), (3 / 4, 4 / 3)


@pytest.fixture(autouse=True)
def _few_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident_loader, "NUM_MASKS", 64)


def noise(root: Path, sizes: list[tuple[int, int]]) -> ImageList:
    """One PNG of noise per size (height, width); the first half is class 0, the rest class 1."""
    rng = np.random.default_rng(0)
    listed = []
    for number, size in enumerate(sizes):
        path = root / f"{number:02d}.png"
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        listed.append((str(path), int(2 * number >= len(sizes))))
    return listed


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> ImageList:
    return noise(tmp_path_factory.mktemp("noise"), [(20, 30)] * 16)


def folder(listed: ImageList, seed: int = 3, **changes: object) -> ImageFolder:
    """A training set: random crops of 16 x 16, flips and masks."""
    options = {"crop": 16, "scale": SCALE, "ratio": RATIO, "mean": MEAN, "std": STD, **changes}
    return ImageFolder(listed, ImageTrainTransform(**options), seed, draw_hidden=mask_sampler((6, 6), 0.4))


def trainer(listed: ImageList, batch_size: int = 4, rank: int = 0, world: int = 1, **changes: object) -> ResidentLoader:
    return ResidentLoader(folder(listed, **changes), EpochSampler(len(listed), batch_size, rank, world, seed=3))


def equal(found: Batch, expected: Batch) -> bool:
    """Whether pixels, labels, masks, indices and bad samples are equal to the bit."""
    assert found.clip.dtype == torch.float32 and found.label is not None and found.label.dtype == torch.int64
    pairs = [(found.clip, expected.clip), (found.label, expected.label), (found.index, expected.index)]
    pairs.append((found.hidden, expected.hidden))
    same = all(torch.equal(a, b) if a is not None and b is not None else a is b for a, b in pairs)
    return same and found.bad == expected.bad


# ------------------------------------------------------------------ evaluation


@pytest.mark.slow
@pytest.mark.parametrize(("damaged", "workers"), [((), 0), ((0, 6, 7, 10), 0), ((3, 10), 2)])
def test_evaluation_equals_loader(tmp_path: Path, damaged: tuple[int, ...], workers: int) -> None:
    samples = noise(tmp_path, [(20 + n, 40 - n) for n in range(11)])
    for index in damaged:
        Path(samples[index][0]).write_bytes(b"")
    for size, short_side, interpolation in ((24, None, "bicubic"), (16, 16, "bilinear"))[bool(workers) :]:
        transform = ImageEvalTransform(size, MEAN, STD, short_side, interpolation)
        dataset = ImageFolder(samples, transform, seed=5, draw_hidden=draw, replace_bad=False)
        for rank in range(2):
            loaders: list[BatchLoader] = []
            logs = [BadSampleLog(None, 11, 1.0, "val") for _ in range(2)]
            for kind, log in zip((Loader, ResidentLoader), logs, strict=True):
                sampler = EpochSampler(11, 2, rank, 2, shuffle=False, drop_last=False, seed=5)
                loaders.append(kind(dataset, sampler, log, num_workers=workers))
            expected, found = (list(loader) for loader in loaders)
            assert len(found) == len(expected) == len(loaders[1]) == 3
            assert all(equal(a, b) for a, b in zip(found, expected, strict=True))
            for batch in found:
                assert batch.max_hidden is not None and batch.max_hidden >= batch.hidden.flatten(1).sum(1).max()
            assert sum(len(batch.bad) for batch in found) == sum(len(batch.bad) for batch in expected)
            assert logs[1].indices == frozenset(damaged)
    assert all(equal(a, b) for a, b in zip(*(loader.iter_samples([3, 0, 6, 8]) for loader in loaders), strict=True))
    assert all(equal(a, b) for a, b in zip(list(loaders[1]), expected, strict=True)), "a second pass shows the same"


def test_an_unreadable_file_is_zeros_with_its_label(tmp_path: Path) -> None:
    samples = noise(tmp_path, [(20, 20)] * 6)
    Path(samples[4][0]).write_bytes(b"text")
    dataset = ImageFolder(samples, ImageEvalTransform(16, MEAN, STD), seed=0, replace_bad=False)
    first, second = ResidentLoader(dataset, EpochSampler(6, 3, shuffle=False, drop_last=False))
    assert first.bad == () and first.hidden is None and first.max_hidden is None
    assert [(bad.index, bad.path) for bad in second.bad] == [(4, samples[4][0])]
    assert not second.clip[1].any() and second.clip[0].any() and second.clip[2].any()
    assert second.label.tolist() == [1, 1, 1] and second.index.tolist() == [3, 4, 5]


# ------------------------------------------------------------------ crops


def random_boxes(number: int, height: int, width: int) -> Tensor:
    rng = np.random.default_rng(1)
    tall, wide = rng.integers(1, height + 1, number), rng.integers(1, width + 1, number)
    top, left = rng.integers(0, height - tall + 1), rng.integers(0, width - wide + 1)
    return torch.from_numpy(np.stack([top, left, tall, wide], axis=1).astype(np.float32))


@pytest.mark.parametrize(("height", "width", "side"), [(32, 32, 32), (20, 30, 16), (7, 5, 24), (1, 1, 4), (96, 64, 32)])
def test_crops_are_interpolated_from_pixels_inside_the_box(height: int, width: int, side: int) -> None:
    images, boxes = torch.rand(60, 3, height, width), random_boxes(60, height, width)
    boxes[0] = torch.tensor([0.0, 0.0, height, width])
    flip = torch.arange(60) % 2 == 1
    found = crop_and_resize(images, boxes, flip, side)
    assert found.shape == (60, 3, side, side) and found.dtype == torch.float32
    for row, (top, left, tall, wide) in enumerate(boxes.int().tolist()):
        crop = images[row : row + 1, :, top : top + tall, left : left + wide]
        expected = F.interpolate(crop, (side, side), mode="bilinear", align_corners=False, antialias=False)[0]
        expected = expected.flip(-1) if flip[row] else expected
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=0)


def slow_box(uniform: np.ndarray, height: int, width: int, scale: tuple, ratio: tuple) -> tuple[list[int], bool]:
    """torchvision's get_params with given random numbers; and whether one of the tries fits."""
    for share, turn, down, right in uniform.tolist():
        area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * turn)
        wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            return [int(down * (height - tall + 1)), int(right * (width - wide + 1)), tall, wide], True
    tall, wide = height, width
    if width / height < min(ratio):
        tall = round(width / min(ratio))
    elif width / height > max(ratio):
        wide = round(height * max(ratio))
    return [(height - tall) // 2, (width - wide) // 2, tall, wide], False


BOXES = [
    (32, 32, (0.5, 1.0), (0.75, 1.3333)),
    (20, 30, (0.08, 1.0), (3 / 4, 4 / 3)),
    (48, 17, (0.2, 0.9), (0.5, 2.0)),
    (8, 8, (0.01, 0.3), (0.25, 4.0)),
]


@pytest.mark.parametrize(("height", "width", "scale", "ratio"), BOXES)
def test_boxes_are_inside_with_area_and_aspect_ratio_in_range(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    uniform = np.random.default_rng(2).random((3000, 10, 4))
    found = random_crop_boxes(uniform, height, width, scale, ratio)
    assert found.shape == (3000, 4) and np.array_equal(found, np.rint(found))
    slow = [slow_box(row, height, width, scale, ratio) for row in uniform]
    assert np.array_equal(found, [box for box, _ in slow])
    top, left, tall, wide = found[[fits for _, fits in slow]].T
    assert top.min() >= 0 and left.min() >= 0 and tall.min() >= 1 and wide.min() >= 1
    assert (top + tall).max() <= height and (left + wide).max() <= width
    assert (top + tall == height).any() and (left + wide == width).any() and (top == 0).any() and (left == 0).any()
    # Sides are rounded to whole pixels.
    assert ((wide + 0.5) * (tall + 0.5) >= scale[0] * height * width * (1 - 1e-9)).all()
    assert ((wide - 0.5) * (tall - 0.5) <= scale[1] * height * width * (1 + 1e-9)).all()
    assert ((wide + 0.5) / np.maximum(tall - 0.5, 1e-9) >= ratio[0] - 1e-9).all()
    assert ((wide - 0.5) / (tall + 0.5) <= ratio[1] + 1e-9).all()


def torchvisions(height: int, width: int, scale: tuple, ratio: tuple, number: int) -> np.ndarray:
    image = torch.empty(1, height, width, device="meta")
    return np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(number)])


@pytest.mark.parametrize(("height", "width", "scale", "ratio"), BOXES)
def test_boxes_are_distributed_as_torchvisions(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    ours = random_crop_boxes(np.random.default_rng(0).random((4000, 10, 4), np.float32), height, width, scale, ratio)
    theirs = torchvisions(height, width, scale, ratio, 4000)
    shares = [boxes[:, 2] * boxes[:, 3] / (height * width) for boxes in (ours, theirs)]
    aspects = [np.log(boxes[:, 3] / boxes[:, 2]) for boxes in (ours, theirs)]
    middles = [(boxes[:, :2] + boxes[:, 2:] / 2) / (height, width) for boxes in (ours, theirs)]
    for found, expected in (shares, aspects, middles):
        spread = expected.std(axis=0)
        assert np.all(np.abs(found.mean(axis=0) - expected.mean(axis=0)) < 0.1 * spread + 1e-9)
        assert np.all(np.abs(found.std(axis=0) - spread) < 0.1 * spread + 1e-9)


@pytest.mark.parametrize(("height", "width"), [(10, 100), (100, 10), (9, 9), (10, 13), (7, 31)])
def test_largest_central_box_if_no_try_fits(height: int, width: int) -> None:
    found = random_crop_boxes(np.full((2, 10, 4), 0.9), height, width, (4.0, 5.0), RATIO)
    assert np.array_equal(found, np.repeat(torchvisions(height, width, (4.0, 5.0), RATIO, 1), 2, axis=0))


# ------------------------------------------------------------------ training


def shown(loader: BatchLoader, epoch: int | None = None) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Pixels, mask and label by the index in the data set."""
    if epoch is not None:
        loader.set_epoch(epoch)
    seen = {}
    for batch in loader:
        for row, index in enumerate(batch.index.tolist()):
            seen[index] = (batch.clip[row], batch.hidden[row], batch.label[row])
    return seen


def same(a: dict[int, tuple[Tensor, ...]], b: dict[int, tuple[Tensor, ...]]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(x, y) for index in a for x, y in zip(a[index], b[index], strict=True)
    )


def test_draws_depend_on_seed_epoch_and_sample_only(listed: ImageList) -> None:
    whole = trainer(listed)
    expected = [shown(whole, epoch) for epoch in (0, 1)]
    assert all(len(seen) == 16 for seen in expected)
    for index in range(16):
        first, second = expected[0][index], expected[1][index]
        assert not torch.equal(first[0], second[0]) and torch.equal(first[2], second[2])
    assert any(not torch.equal(expected[0][index][1], expected[1][index][1]) for index in range(16))
    assert same(shown(whole, 0), expected[0]), "going back to an epoch shows it again"
    assert same(shown(trainer(listed, batch_size=8), 1), expected[1])
    ranks = [shown(trainer(listed, 2, rank, 2), 1) for rank in range(2)]
    assert not ranks[0].keys() & ranks[1].keys() and same(ranks[0] | ranks[1], expected[1])
    resumed = trainer(listed)
    resumed.set_epoch(1)
    resumed.set_start(3)
    rest = shown(resumed)
    assert len(rest) == 4 and same(rest, {index: expected[1][index] for index in rest})
    resumed.set_start(4)
    assert list(resumed) == [], "an epoch that is over has no batches left"
    other = shown(trainer(listed, seed=4), 1)
    for kind in (0, 1):
        assert not all(torch.equal(other[index][kind], expected[1][index][kind]) for index in range(16))


def test_order_is_that_of_the_sampler(listed: ImageList) -> None:
    loader, plain = trainer(listed), EpochSampler(16, 4, seed=3)
    for epoch in (0, 2):
        loader.set_epoch(epoch)
        plain.set_epoch(epoch)
        found = [batch.index.tolist() for batch in loader]
        assert found == [[key.index for key in keys] for keys in plain] and len(found) == len(loader) == 4


def test_every_index_has_its_own_image_and_label(tmp_path: Path) -> None:
    samples = []
    for number in range(12):
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.full((20, 30, 3), 20 * number, np.uint8)).save(path)
        samples.append((str(path), number % 5))
    for batch in trainer(samples):
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        levels = (batch.clip * std + mean) * 255
        expected = 20.0 * batch.index[:, None, None, None]
        torch.testing.assert_close(levels, expected.expand_as(levels), atol=0.01, rtol=0)
        assert batch.label.tolist() == [index % 5 for index in batch.index.tolist()]
        assert batch.bad == () and batch.clip.shape == (4, 3, 16, 16)


@pytest.mark.parametrize("flip", [True, False])
def test_whole_images_are_resized_and_half_of_them_flipped(tmp_path: Path, flip: bool) -> None:
    samples = noise(tmp_path, [(20, 20)] * 10) * 20
    dataset = folder(samples, crop=16, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=flip)
    fliped = []
    for batch in ResidentLoader(dataset, EpochSampler(200, 50, seed=3)):
        for row, index in enumerate(batch.index.tolist()):
            pixels = torch.from_numpy(np.asarray(Image.open(samples[index][0])).copy()).permute(2, 0, 1)[None].float()
            resized = F.interpolate(pixels, (16, 16), mode="bilinear", align_corners=False)[0] / 255
            expected = (resized - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
            difference = [(batch.clip[row] - side).abs().max().item() for side in (expected, expected.flip(-1))]
            assert min(difference) < 1e-4 < max(difference)
            fliped.append(difference[1] < difference[0])
    assert 70 < sum(fliped) < 130 if flip else not any(fliped)


@pytest.mark.slow
def test_masks_are_distributed_as_the_samplers_and_hide_no_more_than_requested(
    listed: ImageList, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident_loader, "NUM_MASKS", 1000)
    sampler = mask_sampler((6, 6), 0.4)
    loader = ResidentLoader(folder(listed * 100), EpochSampler(1600, 100, seed=3))
    batches = list(loader)
    masks = torch.cat([batch.hidden for batch in batches])
    assert masks.shape == (1600, 6, 6) and masks.dtype == torch.bool
    counts = masks.flatten(1).sum(dim=1)
    assert counts.max() <= round(0.4 * 36)
    assert {batch.max_hidden for batch in batches} == {int(loader.max_hidden)} and counts.max() <= loader.max_hidden
    assert loader.max_hidden <= round(0.4 * 36)
    expected = torch.from_numpy(np.stack([sampler(np.random.default_rng(seed)) for seed in range(1600)]))
    assert abs(masks.float().mean() - expected.float().mean()) < 0.01
    assert (masks.float().mean(dim=0) - expected.float().mean(dim=0)).abs().max() < 0.07
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 800, "samples have masks of their own"


def test_without_a_sampler_there_are_no_masks(listed: ImageList) -> None:
    dataset = ImageFolder(listed, ImageTrainTransform(16, SCALE, RATIO, MEAN, STD), seed=3)
    batch = next(iter(ResidentLoader(dataset, EpochSampler(16, 4))))
    assert batch.hidden is None and batch.max_hidden is None


@pytest.mark.slow
def test_loading_does_not_change_the_global_generator(listed: ImageList) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    for workers in (0, 1):
        torch.manual_seed(1)
        for _ in ResidentLoader(folder(listed), EpochSampler(16, 8), num_workers=workers):
            pass
        assert torch.equal(torch.rand(3), expected), workers


@pytest.mark.slow
def test_batches_do_not_depend_on_the_number_of_workers(listed: ImageList) -> None:
    there = ResidentLoader(folder(listed), EpochSampler(16, 4, seed=3), num_workers=2)
    assert same(shown(there, 1), shown(trainer(listed), 1))


def test_batches_are_made_on_the_device_without_synchronising(listed: ImageList) -> None:
    loader = ResidentLoader(folder(listed), EpochSampler(16, 4), device=torch.device("meta"))
    for batch in loader:
        assert {t.device.type for t in (batch.clip, batch.label, batch.hidden, batch.index)} == {"meta"}
        assert batch.max_hidden is not None


# ------------------------------------------------------------------ errors and bad samples


def test_data_sets_that_cannot_be_kept_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config(
        RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml",
        [*VIT_PT, "DATA_LOADER.RESIDENT", "True", "AUG.INTERPOLATION", "bilinear"],
    )
    own = DatasetSpec(name="own", media="image", build=lambda cfg, request: ["a.png"])
    monkeypatch.setattr("maskfeat.build.dataset_spec", lambda cfg, section: own)
    with pytest.raises(UserError, match="DATA_LOADER.RESIDENT must be False .*plugin.*given True and a list"):
        build_loader(cfg, "train")


def test_images_of_several_sizes_are_an_error_in_training(tmp_path: Path) -> None:
    samples = noise(tmp_path, [(20, 30), (20, 30), (30, 20)])
    with pytest.raises(ValueError, match="02.png.*30x20 and 20x30.*DATA_LOADER.RESIDENT.*False"):
        trainer(samples, 1)
    dataset = ImageFolder(samples, ImageEvalTransform(16, MEAN, STD), seed=0)
    (batch,) = ResidentLoader(dataset, EpochSampler(3, 3, shuffle=False, drop_last=False))
    assert batch.clip.shape == (3, 3, 16, 16), "evaluation crops them to one size"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_training_samples_are_replaced_and_logged_once(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    samples = noise(tmp_path, [(20, 30)] * 12)
    Path(samples[4][0]).write_bytes(b"")
    Path(samples[5][0]).unlink()  # the last of class 0: its replacement is of class 1
    log = BadSampleLog(tmp_path / "out", 12, 0.5, "train")
    dataset = folder(samples, scale=(1.0, 1.0), ratio=(1.5, 1.5), flip=False)  # whole images
    with caplog.at_level(logging.WARNING):
        loader = ResidentLoader(dataset, EpochSampler(12, 12, shuffle=False), log, num_workers=workers)
        for epoch in range(2):
            loader.set_epoch(epoch)
            (batch,) = loader
            assert batch.index.tolist() == [0, 1, 2, 3, 6, 6, 6, 7, 8, 9, 10, 11]
            assert batch.label.tolist() == [0] * 4 + [1] * 8
            for row in (4, 5):
                torch.testing.assert_close(batch.clip[row], batch.clip[6])
            assert not torch.equal(batch.clip[3], batch.clip[4])
    assert log.indices == {4, 5}
    assert len((tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()) == 2
    assert sum("bad sample" in record.message for record in caplog.records) == 2
    ordinary = Loader(dataset, EpochSampler(12, 12, shuffle=False))
    places = [[batch.index.item() for batch in kind.iter_samples([3, 4, 5, 6])] for kind in (ordinary, loader)]
    assert places[0] == places[1] == [3, 6]


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    samples = noise(tmp_path, [(20, 30)] * 8)
    Path(samples[1][0]).write_bytes(b"")
    log = BadSampleLog(None, 8, 0.0, "train")
    with pytest.raises(TooManyBadSamples, match="DATA.MAX_BAD_FRACTION"):
        ResidentLoader(folder(samples), EpochSampler(8, 4), log)
    for path, _ in samples:
        Path(path).write_bytes(b"")
    with pytest.raises(UnreadableSample, match="nor can any of the 7 samples after it"):
        ResidentLoader(folder(samples), EpochSampler(8, 4))


class Failing(ImageEvalTransform):
    def __call__(self, image: object, rng: object = None) -> Sample:
        raise IndexError("a bug")


def test_an_error_names_the_sample(listed: ImageList) -> None:
    dataset = ImageFolder(listed, Failing(16, MEAN, STD), seed=0)
    with pytest.raises(RuntimeError, match="00.png.*IndexError: a bug"):
        ResidentLoader(dataset, EpochSampler(16, 4, shuffle=False))


# ------------------------------------------------------------------ from a config


@pytest.fixture(scope="module")
def small(image_data: Path) -> Iterator[list[str]]:
    yield [
        *VIT_PT, *images(image_data), "DATA.TEST_SHORT_SIDE", "32", "AUG.INTERPOLATION", "bilinear", "AUG.ENABLE",
        "False", "DATA.TRAIN_JITTER_SCALES_RELATIVE", "[0.5, 1.0]", "TRAIN.BATCH_SIZE", "12",
    ]  # fmt: skip


def test_plain_training_images_come_in_order_and_as_in_evaluation(small: list[str], tmp_path: Path) -> None:
    recipe = RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml"
    kinds = {}
    for kept in ("False", "True"):
        cfg = load_config(recipe, [*small, "DATA_LOADER.RESIDENT", kept, "OUTPUT_DIR", str(tmp_path)])
        for split, plain in (("train", True), ("val", False), ("train", False)):
            kinds[kept, split, plain] = build_loader(cfg, split, World(), plain=plain)
    for (kept, _, _), loader in kinds.items():
        assert isinstance(loader, ResidentLoader if kept == "True" else Loader)
    for split, plain in (("train", True), ("val", False)):
        ordinary, kept_there = (list(kinds[kept, split, plain]) for kept in ("False", "True"))
        assert all(equal(a, b) for a, b in zip(kept_there, ordinary, strict=True)), split
    places = [index for batch in kinds["True", "train", True] for index in batch.index.tolist()]
    assert places == list(range(40)), "all of them, in order"
    training = kinds["True", "train", False]
    assert len(training) == 3, "full batches only"
    assert [kinds["True", "train", plain].dataset.replace_bad for plain in (True, False)] == [False, True]
    shuffled = [index for batch in training for index in batch.index.tolist()]
    assert len(set(shuffled)) == 36 and shuffled != sorted(shuffled)
    plain = shown(kinds["True", "train", True])
    assert not any(torch.equal(clip, plain[index][0]) for index, (clip, _, _) in shown(training).items())
