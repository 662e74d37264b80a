"""Augmentation: exact where it is deterministic, else of the right distribution; the same for all frames of a clip."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandAugment, RandomResizedCrop, v2

from maskfeat.data.device_transforms import DeferredTransform
from maskfeat.data.rand_augment import augment_frames, make_rand_augment
from maskfeat.data.random_erasing import draw_erasing, make_random_erasing
from maskfeat.data.rng import seeded
from maskfeat.data.sample import Sample
from maskfeat.data.transforms import (
    ClipTestTransform,
    ClipTrainTransform,
    ImageEvalTransform,
    ImageTrainTransform,
    random_resized_crop_box,
    short_side_size,
)
from tests.data.oracle import normalise, resize, to_float, uniform_crop
from tests.data.samples import clip_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GOLDEN = Path(__file__).parents[1] / "golden" / "spatial_test_crops_small.npz"


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make_image(height: int, width: int) -> np.ndarray:
    """Smooth, without any symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 9 + y / 17 + k) * np.cos(y / 13 - k) for k in range(3)]
    return ((np.stack(waves, -1) + 1) * 127).astype(np.uint8)


def plain(pixels: np.ndarray) -> torch.Tensor:
    return normalise(to_float(pixels), MEAN, STD)


def erased(shape: tuple[int, ...], probability: float, mode: str, grey: int = 0) -> torch.Tensor:
    """A grey view of that shape, (3, [T,] H, W), after random erasing; grey pixels keep their value."""
    erase = draw_erasing(make_random_erasing(probability, mode, 1), shape)
    pixels = torch.full((*shape[1:], 3), grey, dtype=torch.uint8)
    return clip_of(Sample(pixels, DeferredTransform(shape, std=(1 / 255,) * 3, erase=erase)))


def check_crops(golden: dict[str, np.ndarray]) -> None:
    for name in ("landscape", "portrait"):
        for position in range(3):
            crop = uniform_crop(torch.from_numpy(golden[name]), 32, 36, position)
            torch.testing.assert_close(crop, torch.from_numpy(golden[f"{name}_{position}"]), atol=1e-5, rtol=0)


def test_published_crops() -> None:
    check_crops(dict(np.load(GOLDEN)))


def test_published_crops_in_full(shared: Path) -> None:
    check_crops(dict(np.load(shared / "goldens" / "spatial_test_crops.npz")))


def test_resize_of_the_short_side_floors_the_long_one() -> None:
    assert short_side_size(40, 64, 36) == (36, 57)
    assert short_side_size(64, 40, 36) == (57, 36)
    assert short_side_size(36, 50, 36) == (36, 50)
    assert short_side_size(50, 50, 36) == (36, 36)


def resized(frames: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """Frames resized by their deferred transform, 0 to 255."""
    transform = DeferredTransform((3, len(frames), *size), std=(1 / 255,) * 3, resize=size)
    return clip_of(Sample(torch.from_numpy(frames), transform))


def test_frames_are_resized_as_a_clip_would_be() -> None:
    frames = noise(3, 50, 70, 3)
    for size in ((36, 50), (64, 64), (50, 70), (9, 100)):
        torch.testing.assert_close(resized(frames, size), resize(to_float(frames), size), atol=2e-3, rtol=0)  # of 255


def test_frames_of_a_rotated_video() -> None:
    frames = noise(3, 50, 70, 3)
    transform = ClipTestTransform(32, 36, 3, MEAN, STD)
    turned, copied = transform(frames[:, ::-1, ::-1]), transform(frames[:, ::-1, ::-1].copy())
    assert torch.equal(clip_of(turned), clip_of(copied))


def test_normalise() -> None:
    pixels = noise(4, 5, 6, 3)
    expected = (torch.from_numpy(pixels).double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    result = clip_of(Sample(torch.from_numpy(pixels), DeferredTransform((3, 4, 5, 6), MEAN, STD)))
    assert result.dtype == torch.float32 and result.shape == (3, 4, 5, 6) and result.is_contiguous()
    torch.testing.assert_close(result, expected.permute(3, 0, 1, 2).float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(plain(pixels), result, atol=1e-6, rtol=0)


def same_pixels(sample: Sample, image: Image.Image) -> None:
    """Equal before normalisation, and within rounding after it."""
    assert np.array_equal(sample.pixels.numpy(), np.asarray(image))
    torch.testing.assert_close(clip_of(sample), plain(np.asarray(image)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (90, 90), (256, 257), (37, 250)])
@pytest.mark.parametrize("crop", [224, 96])
def test_image_evaluation_equals_resize_and_centre_crop(size: tuple[int, int], crop: int) -> None:
    image = Image.fromarray(make_image(*size))
    reference = v2.Compose([v2.Resize(int(256 / 224 * crop), Image.BICUBIC), v2.CenterCrop(crop)])(image)
    same_pixels(ImageEvalTransform(crop, MEAN, STD)(image), reference)


def test_image_evaluation_of_extreme_aspect_ratios() -> None:
    image = Image.fromarray(make_image(20, 400))
    reference = v2.Compose([v2.Resize(36, Image.BICUBIC), v2.CenterCrop(32)])(image)
    difference = clip_of(ImageEvalTransform(32, MEAN, STD, short_side=36)(image)) - plain(np.asarray(reference))
    assert difference.abs().mean() < 0.5 / 255 / min(STD)


def test_image_evaluation_of_extreme_shapes() -> None:
    for size in ((1, 1), (2000, 4), (4, 2000)):
        assert clip_of(ImageEvalTransform(224, MEAN, STD)(Image.new("RGB", size))).shape == (3, 224, 224)


def test_random_resized_crop_box_of_slivers_is_central() -> None:
    assert random_resized_crop_box(4, 2000, (0.9, 1.0), (3 / 4, 4 / 3)) == (0, 997, 4, 5)
    assert random_resized_crop_box(2000, 4, (0.9, 1.0), (3 / 4, 4 / 3)) == (997, 0, 5, 4)
    assert random_resized_crop_box(1, 1, (0.5, 1.0), (3 / 4, 4 / 3)) == (0, 0, 1, 1)


@pytest.mark.slow
def test_boxes_and_draws_are_torchvisions() -> None:
    """Also where no attempt fits, and the box is the central one."""
    rng = np.random.default_rng(0)
    for seed in range(600):
        height, width = (int(side) for side in rng.integers(1, 700, 2))
        scale, ratio = ((0.08, 1.0), (0.5, 1.0), (0.9, 1.0))[seed % 3], ((3 / 4, 4 / 3), (1.0, 1.0))[seed % 2]
        torch.manual_seed(seed)
        image = torch.empty(1, height, width, device="meta")
        expected = RandomResizedCrop.get_params(image, list(scale), list(ratio)), torch.rand(1)
        torch.manual_seed(seed)
        assert (random_resized_crop_box(height, width, scale, ratio), torch.rand(1)) == expected


def test_image_training_without_randomness_is_a_resize() -> None:
    image = Image.fromarray(make_image(100, 100))
    transform = ImageTrainTransform(64, (1.0, 1.0), (1.0, 1.0), MEAN, STD, flip=False)
    sample = transform(image, np.random.default_rng(0))
    same_pixels(sample, image.resize((64, 64), Image.BICUBIC))
    result = clip_of(sample)
    mirrored = ImageTrainTransform(64, (1.0, 1.0), (1.0, 1.0), MEAN, STD)
    flips = [torch.equal(clip_of(mirrored(image, np.random.default_rng(i))), result.flip(-1)) for i in range(60)]
    assert 15 < sum(flips) < 45


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_takes_the_same_box_in_all_frames(mode: str) -> None:
    shares = []
    for seed in range(40):
        with seeded(0, 0, seed, 0):
            clip = erased((3, 4, 48, 64), 1.0, mode, grey=9)
        gone = (clip != 9.0).any(0)
        assert torch.equal(gone, gone[:1].expand_as(gone))
        rows, columns = gone[0].any(1), gone[0].any(0)
        assert gone[0].sum() == rows.sum() * columns.sum()  # a solid rectangle
        shares.append(float(gone[0].float().mean()))
        box = clip[:, :, rows][..., columns]
        assert (box == 0).all() if mode == "const" else True
        assert mode != "rand" or torch.equal(box, box[..., :1, :1].expand_as(box))
        assert mode != "pixel" or not torch.equal(box[:, 0], box[:, 1])
    assert 0.005 < min(shares) < 0.1 and 0.2 < max(shares) < 0.36


def test_erasing_happens_with_the_given_probability() -> None:
    with seeded(0, 0, 0, 0):
        hits = sum(bool(erased((3, 1, 16, 16), 0.25, "pixel").any()) for _ in range(800))
    assert 150 < hits < 250
    assert not erased((3, 16, 16), 0.0, "pixel").any()
    for probability, mode in ((1.5, "pixel"), (0.5, "black")):
        with pytest.raises(ValueError, match="AUG.RE_"):
            make_random_erasing(probability, mode, 1)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m7-n4-mstd0.5-inc1", "ra_6_10"])
def test_rand_augment_is_the_same_for_all_frames_and_differs_between_clips(policy: str) -> None:
    frames = np.repeat(make_image(48, 64)[None], 4, axis=0)
    results = []
    for index in range(12):
        with seeded(0, 0, index, 0):
            result = augment_frames(frames, policy, "bicubic")
        assert all(np.array_equal(result[0], frame) for frame in result), index
        results.append(result[0])
    assert len({r.tobytes() for r in results}) > 6
    moving = np.stack([make_image(48, 64), noise(48, 64, 3)])
    with seeded(0, 0, 3, 0):
        together = augment_frames(moving, policy, "bicubic")
    with seeded(0, 0, 3, 0):
        alone = augment_frames(moving[1:], policy, "bicubic")
    assert np.array_equal(together[1], alone[0])


def test_rand_augment_at_full_strength() -> None:
    augment = make_rand_augment("rand-m10-n15-p1-inc1", 32, "bilinear")
    image = Image.fromarray(make_image(32, 32))
    for op in augment.ops:
        with seeded(0, 0, 0, 0):
            assert op(image).size == (32, 32), op.name


def test_torchvision_rand_augment() -> None:
    image = Image.fromarray(make_image(48, 48))
    ours = make_rand_augment("ra_6_10", 48, "bilinear")
    theirs = RandAugment(num_ops=2, magnitude=6, num_magnitude_bins=10, interpolation=InterpolationMode.BILINEAR)
    seen = set()
    for index in range(20):
        torch.manual_seed(index)
        expected = theirs(image)
        torch.manual_seed(index)
        assert np.array_equal(np.asarray(ours(image)), np.asarray(expected))
        seen.add(np.asarray(expected).tobytes())
    assert len(seen) > 10
    transform = ImageTrainTransform(32, (0.3, 1.0), (1.0, 1.0), MEAN, STD, "bilinear", auto_augment="ra_6_10")
    views = []
    for view in (0, 0, 1):
        with seeded(0, 0, 0, view) as rng:
            views.append(clip_of(transform(image, rng)))
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


def test_image_evaluation_at_another_size() -> None:
    image = Image.fromarray(make_image(300, 400))
    reference = v2.Compose([v2.Resize(235, Image.BILINEAR), v2.CenterCrop(224)])(image)
    transform = ImageEvalTransform(224, MEAN, STD, short_side=235, interpolation="bilinear")
    same_pixels(transform(image), reference)


@pytest.mark.parametrize("policy", ["original", "rand-q3", "augmix-m3", "ra_10_10", "ra_6"])
def test_unknown_policy_names_the_key(policy: str) -> None:
    with pytest.raises(ValueError, match="AUG.AA_TYPE"):
        make_rand_augment(policy, 32, "bilinear")


def test_clip_training_is_a_crop_and_a_resize() -> None:
    frames = np.stack([make_image(90, 120), noise(90, 120, 3)])
    transform = ClipTrainTransform(64, (0.3, 0.5), (3 / 4, 4 / 3), MEAN, STD, flip=False)
    with seeded(0, 0, 1, 0) as rng:
        result = clip_of(transform(frames, rng))
    with seeded(0, 0, 1, 0):
        top, left, height, width = random_resized_crop_box(90, 120, (0.3, 0.5), (3 / 4, 4 / 3))
    region = plain(frames)[..., top : top + height, left : left + width]
    expected = torch.nn.functional.interpolate(region, size=(64, 64), mode="bilinear")
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    usual = ClipTrainTransform(64, (0.3, 0.5), (), MEAN, STD, flip=False)
    assert usual.ratio == transform.ratio, "an empty range of aspect ratios is torchvision's"


def test_clip_training_by_short_side() -> None:
    frames = np.repeat(make_image(90, 120)[None], 2, axis=0)
    transform = ClipTrainTransform(64, (), (), MEAN, STD, short_sides=(64, 80))
    for seed in range(5):
        assert clip_of(transform(frames, np.random.default_rng(seed))).shape == (3, 2, 64, 64)
    with pytest.raises(ValueError, match="DATA.TRAIN_JITTER_SCALES"):
        ClipTrainTransform(64, (), (), MEAN, STD, short_sides=(40, 80))


def test_clip_training_augments_all_frames_alike() -> None:
    frames = np.repeat(make_image(90, 120)[None], 3, axis=0)
    transform = ClipTrainTransform(
        64,
        (0.08, 1.0),
        (3 / 4, 4 / 3),
        MEAN,
        STD,
        auto_augment="rand-m7-n4-mstd0.5-inc1",
        erase_prob=1.0,
        erase_mode="const",
    )
    for index in range(6):
        with seeded(0, 0, index, 0) as rng:
            clip = clip_of(transform(frames, rng))
        assert clip.shape == (3, 3, 64, 64) and clip.dtype == torch.float32 and clip.is_contiguous()
        assert torch.equal(clip[:, :1].expand_as(clip), clip)


def test_clip_testing() -> None:
    frames = np.stack([make_image(60, 100)] * 2)
    three = ClipTestTransform(32, 36, 3, MEAN, STD)
    crops = [clip_of(three(frames, position=position)) for position in range(3)]
    for position, crop in enumerate(crops):
        torch.testing.assert_close(crop, uniform_crop(plain(frames), 32, 36, position), atol=1e-5, rtol=1e-5)
    assert not torch.equal(crops[0], crops[2])
    torch.testing.assert_close(clip_of(ClipTestTransform(32, 36, 1, MEAN, STD)(frames)), crops[1])
    with pytest.raises(ValueError, match="TEST.NUM_SPATIAL_CROPS"):
        ClipTestTransform(32, 36, 2, MEAN, STD)


def test_transforms_are_a_function_of_the_seed_alone() -> None:
    image = Image.fromarray(make_image(80, 100))
    transform = ImageTrainTransform(
        48, (0.08, 1.0), (3 / 4, 4 / 3), MEAN, STD, auto_augment="rand-m9-mstd0.5-inc1", erase_prob=0.5
    )
    jitter = ImageTrainTransform(48, (0.5, 1.0), (3 / 4, 4 / 3), MEAN, STD, color_jitter=0.4)
    for maker in (transform, jitter):
        outcomes = []
        for _ in range(2):
            random.random(), np.random.rand(), torch.rand(3)  # the global state before must not matter
            with seeded(7, 1, 5, 0) as rng:
                outcomes.append(clip_of(maker(image, rng)))
        assert torch.equal(*outcomes)
        with seeded(7, 1, 6, 0) as rng:
            assert not torch.equal(clip_of(maker(image, rng)), outcomes[0])


def test_rand_augment_fills_with_the_mean_of_the_images() -> None:
    """Pixels from outside of an image: those of DATA.MEAN; of a clip, timm's grey."""
    mean = (0.1, 0.5, 0.9)
    expected = [round(255 * m) for m in mean]
    white = Image.fromarray(np.full((64, 64, 3), 255, np.uint8))
    transform = ImageTrainTransform(64, (1.0, 1.0), (1.0, 1.0), mean, STD, auto_augment="rand-m10-n1-p1-inc1")
    filled = 0
    moves = [op for op in transform.augment.ops if op.name.startswith(("Rotate", "Shear", "Translate"))]
    assert len(moves) == 5
    for op in moves:
        for index in range(4):
            with seeded(0, 0, index, 0):
                colours = np.unique(np.asarray(op(white)).reshape(-1, 3), axis=0)
            filled += any(np.array_equal(colour, expected) for colour in colours)
    assert filled == 20
    clip = make_rand_augment("rand-m10-n1-p1-inc1", 64, "nearest")
    for op in (op for op in clip.ops if op.name.startswith("Rotate")):
        with seeded(0, 0, 0, 0):
            assert (np.asarray(op(white)).reshape(-1, 3) == 128).all(axis=1).any()


def test_colour_jitter_changes_brightness_contrast_and_saturation() -> None:
    transform = ImageTrainTransform(32, (1.0, 1.0), (1.0, 1.0), MEAN, STD, color_jitter=0.4)
    for strength in ("brightness", "contrast", "saturation"):
        assert getattr(transform.augment, strength) == pytest.approx((0.6, 1.4))
    # Saturation alone changes how far apart the channels of a pixel are, brightness and contrast scale them alike.
    image = Image.fromarray(np.stack([np.full((32, 32), v, np.uint8) for v in (90, 100, 110)], axis=-1))
    ratios = []
    for index in range(20):
        with seeded(0, 0, index, 0):
            red, green, blue = np.asarray(transform.augment(image), dtype=float).mean(axis=(0, 1))
        ratios.append((blue - red) / green)
    assert max(ratios) / min(ratios) > 1.3
