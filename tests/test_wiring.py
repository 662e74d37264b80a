"""Keys of the config reach what they configure: each has a value here that is neither its default nor the recipe's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maskfeat.batch import SampleKey
from maskfeat.build import build_loader, build_mask_sampler, build_objective, build_optimizer
from maskfeat.config import load_config
from maskfeat.data.loader import BatchLoader
from maskfeat.data.rand_augment import make_rand_augment
from maskfeat.engine.trainer import build_trainer
from tests.small import MFM_PT, MFM_RECIPES, MVIT_FT, MVIT_PT, RECIPES, VIT_FT, VIT_PT, clips, images

CPU = torch.device("cpu")
Recipe = tuple[Path, list[str]]
FT: Recipe = (RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml", VIT_FT)
PT: Recipe = (RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", VIT_PT)
CLIPS_FT: Recipe = (RECIPES / "k400_MVITv2_S_16x4_FT.yaml", MVIT_FT)
CLIPS_PT: Recipe = (RECIPES / "k400_MVITv2_S_16x4_MaskFeat_PT.yaml", MVIT_PT)
FREQUENCIES: Recipe = (MFM_RECIPES / "in1k_R50_MFM_PT.yaml", MFM_PT)


@pytest.mark.parametrize(
    ("recipe", "key", "value", "found"),
    [
        (FT, "MIXUP.ALPHA", 0.3, lambda o: o.mixup.alpha),
        (FT, "MIXUP.CUTMIX_ALPHA", 0.4, lambda o: o.mixup.cutmix_alpha),
        (FT, "MIXUP.PROB", 0.6, lambda o: o.mixup.prob),
        (FT, "MIXUP.SWITCH_PROB", 0.2, lambda o: o.mixup.switch_prob),
        (FT, "MIXUP.LABEL_SMOOTH_VALUE", 0.25, lambda o: o.mixup.smoothing),
        (FT, "MODEL.DROPOUT_RATE", 0.35, lambda o: o.head.dropout.p),
        (FT, "MVIT.DROPOUT_RATE", 0.15, lambda o: o.backbone.blocks[0].mlp.drop1.p),
        (FT, "MVIT.DROPOUT_RATE", 0.15, lambda o: o.backbone.blocks[0].attn.proj_drop.p),
        (CLIPS_FT, "MVIT.DROPOUT_RATE", 0.15, lambda o: o.backbone.blocks[0].mlp.drop2.p),
        (CLIPS_FT, "MVIT.DROPOUT_RATE", 0.15, lambda o: o.backbone.blocks[0].attn.dropout.p),
        (PT, "MASK.HOG_GAUSSIAN_WINDOW", 16, lambda o: o.window),
        (PT, "MASK.HOG_BINS", 7, lambda o: o.bins),
        (FREQUENCIES, "MFM.GAMMA", 0.7, lambda o: o.gamma),
    ],
)
def test_keys_of_objectives(recipe: Recipe, key: str, value: float, found: Callable[[Any], float]) -> None:
    path, opts = recipe
    assert found(build_objective(load_config(path, [*opts, key, str(value)]))) == pytest.approx(value)


@pytest.fixture(params=["images", "clips"])
def trained_on(request: pytest.FixtureRequest, image_data: Path, clip_data: Path) -> Callable[..., BatchLoader]:
    """Makes the loader of fine-tuning on images or on clips, for a split and overrides."""
    (path, opts), data = (FT, images(image_data)) if request.param == "images" else (CLIPS_FT, clips(clip_data))
    return lambda split, *more: build_loader(load_config(path, [*opts, *data, "AUG.NUM_SAMPLE", "1", *more]), split)


def test_keys_of_augmentation(trained_on: Callable[..., BatchLoader]) -> None:
    def transform(*more: str) -> Any:
        return trained_on("train", *more).dataset.transform

    assert transform().flip and transform().erasing.probability == 0.25
    assert not transform("DATA.RANDOM_FLIP", "False").flip
    assert transform("AUG.RE_COUNT", "3").erasing.max_count == 3
    assert transform("AUG.RE_PROB", "0.6").erasing.probability == 0.6
    assert transform("AUG.RE_MODE", "const").erasing.mode == "const"
    off = transform("AUG.ENABLE", "False")
    assert not off.erasing.probability and not (getattr(off, "augment", None) or getattr(off, "auto_augment", ""))


def test_the_number_of_views_and_batches(trained_on: Callable[..., BatchLoader]) -> None:
    assert trained_on("train", "AUG.REPEATS", "2").sampler.copies == 2
    assert trained_on("train", "AUG.NUM_SAMPLE", "3").dataset.num_views == 3
    sizes = [trained_on(split, "TRAIN.BATCH_SIZE", "8", "TEST.BATCH_SIZE", "4").sampler for split in ("train", "test")]
    assert [len(next(iter(sampler))) for sampler in sizes] == [8, 4]


def test_randaugment_is_not_replaced_by_colour_jitter(image_data: Path) -> None:
    """The recipes of fine-tuning name both; published, jitter is for those without RandAugment."""
    path, opts = FT
    cfg = load_config(path, [*opts, *images(image_data)])
    assert cfg.AUG.COLOR_JITTER and cfg.AUG.AA_TYPE
    augment = build_loader(cfg, "train").dataset.transform.augment
    assert type(augment) is type(make_rand_augment(cfg.AUG.AA_TYPE, 32, "bicubic"))
    jitter = build_loader(load_config(path, [*opts, *images(image_data), "AUG.AA_TYPE", ""]), "train")
    assert type(jitter.dataset.transform.augment).__name__ == "ColorJitter"
    off = load_config(path, [*opts, *images(image_data), "AUG.AA_TYPE", "", "AUG.ENABLE", "False"])
    assert build_loader(off, "train").dataset.transform.augment is None


def test_keys_of_clips(clip_data: Path) -> None:
    path, opts = CLIPS_FT
    for value in (True, False):
        cfg = load_config(path, [*opts, *clips(clip_data), "DATA.USE_OFFSET_SAMPLING", str(value)])
        assert build_loader(cfg, "train").dataset.use_offset == value
    free = ["DATA.TRAIN_JITTER_SCALES_RELATIVE", "[]", "DATA.TRAIN_JITTER_SCALES", "[33, 47]"]
    cfg = load_config(path, [*opts, *clips(clip_data), *free])
    assert list(build_loader(cfg, "train").dataset.transform.short_sides) == [33, 47]


@pytest.mark.parametrize("media", ["image", "clip"])
def test_every_epoch_seed_and_view_has_draws_of_its_own(media: str, image_data: Path, clip_data: Path) -> None:
    """Masks of eight samples, and the order of an epoch: equal by chance once in a million."""
    (path, opts), data = (PT, images(image_data)) if media == "image" else (CLIPS_PT, clips(clip_data))
    big = ["AUG.MASK_RATIO", "0.5"]
    if media == "image":
        big += ["DATA.TRAIN_CROP_SIZE", "128", "DATA.TEST_CROP_SIZE", "128"]

    def masks(seed: int, epoch: int, view: int = 0) -> Tensor:
        cfg = load_config(
            path, [*opts, *data, *big, "RNG_SEED", str(seed), "AUG.ENABLE", "True", "AUG.NUM_SAMPLE", "2"]
        )
        dataset = build_loader(cfg, "train").dataset
        return torch.stack([dataset[SampleKey(epoch, index)][view].hidden for index in range(8)])

    first = masks(1, 0)
    assert torch.equal(first, masks(1, 0))
    for other in (masks(1, 1), masks(2, 0), masks(1, 0, view=1)):
        assert not torch.equal(first, other)


@pytest.mark.parametrize("media", ["image", "clip"])
def test_every_epoch_and_seed_crops_for_itself(media: str, image_data: Path, clip_data: Path) -> None:
    """A clip of all frames of its video, so that only the crop and the mirror are drawn."""
    (path, opts), data = (FT, images(image_data)) if media == "image" else (CLIPS_FT, clips(clip_data))
    plain = ["AUG.ENABLE", "False", "AUG.NUM_SAMPLE", "1"]

    def boxes(seed: int, epoch: int) -> list[Any]:
        cfg = load_config(path, [*opts, *data, *plain, "RNG_SEED", str(seed)])
        dataset = build_loader(cfg, "train").dataset
        if media == "clip":
            dataset._clip_span = lambda info, *_: (0, info.frames - 1)
        found = []
        crop = dataset.transform

        def spied(frames: Any, rng: np.random.Generator, *more: Any) -> Any:
            found.append(rng.random(4).tolist())
            return crop(frames, rng, *more)

        spied.crop, spied.libraries = crop.crop, getattr(crop, "libraries", False)  # type: ignore[attr-defined]
        dataset.transform = spied
        for index in range(3):
            dataset[SampleKey(epoch, index)]
        return found

    first = boxes(1, 0)
    assert len(first) == 3 and first == boxes(1, 0)
    assert first != boxes(1, 1) and first != boxes(2, 0)


def test_the_seed_orders_samples_and_starts_the_draws_of_a_step(image_data: Path) -> None:
    path, opts = PT
    orders, draws = [], []
    for seed in ("1", "2", "1"):
        cfg = load_config(path, [*opts, *images(image_data), "RNG_SEED", seed])
        orders.append([key.index for batch in build_loader(cfg, "train").sampler for key in batch])
        trainer = build_trainer(cfg, CPU)
        trainer.begin_step(steps_per_epoch=10)
        draws.append(float(torch.rand(())))
    assert orders[0] == orders[2] != orders[1] and draws[0] == draws[2] != draws[1]


def test_the_share_of_low_frequencies_is_that_of_its_key() -> None:
    path, opts = FREQUENCIES
    sampler = build_mask_sampler(load_config(path, [*opts, "MFM.LOW_PASS_PROB", "0.2"]))
    assert sampler is not None
    removed = np.mean([sampler(np.random.default_rng(seed)).item() for seed in range(500)])
    assert 0.75 < removed < 0.85, "the disc is removed from the other four fifths"


def without_decay(recipe: Recipe, *more: str, frozen: str = "") -> set[str]:
    path, opts = recipe
    cfg = load_config(path, [*opts, *more])
    objective = build_objective(cfg)
    for name, parameter in objective.named_parameters():
        parameter.requires_grad_(not frozen or frozen not in name)
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    groups = build_optimizer(cfg, objective).param_groups
    return {names[id(p)].removeprefix("backbone.") for g in groups if not g["weight_decay"] for p in g["params"]}


def test_positions_and_class_tokens_have_no_weight_decay_where_the_key_says_so() -> None:
    """The recipes of MFM's ViT have it; those of MaskFeat do not."""
    vit = (MFM_RECIPES / "in1k_VIT_B_MFM_PT.yaml", [*VIT_PT[:-2], "MFM.RADIUS", "6"])
    assert {"pos_embed", "cls_token"} <= without_decay(vit)
    assert "cls_token" in (found := without_decay(vit, frozen="pos_embed")) and "pos_embed" not in found
    assert not {"pos_embed", "cls_token"} & without_decay(vit, "MVIT.ZERO_DECAY_POS_CLS", "False")
    positions = ["MVIT.USE_ABS_POS", "True", "MVIT.SEP_POS_EMBED", "True", "MVIT.ZERO_DECAY_POS_CLS", "True"]
    found = without_decay(CLIPS_FT, *positions)
    tables = {"cls_token", "pos_embed_spatial", "pos_embed_temporal", "pos_embed_class"}
    assert tables <= found and sum(".rel_pos_" in name for name in found) == 6
    kept = without_decay(CLIPS_FT, *positions[:4])
    assert not tables & kept and not any(".rel_pos_" in name for name in kept)
