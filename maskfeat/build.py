"""From a config to objects: the only module that reads the config and imports everything."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from yacs.config import CfgNode

from maskfeat.data.bad_samples import BadSampleLedger
from maskfeat.data.cached_loader import CachedLoader
from maskfeat.data.datasets.imagenet import ImageFolder, class_folders, list_image_folder
from maskfeat.data.datasets.kinetics import VideoClips, read_video_list
from maskfeat.data.loader import BatchLoader, Loader
from maskfeat.data.samplers import EpochSampler
from maskfeat.data.transforms import ClipTestTransform, ClipTrainTransform, ImageEvalTransform, ImageTrainTransform
from maskfeat.distributed.world import World, available_cores
from maskfeat.masking import Sampler, band_sampler, mask_sampler
from maskfeat.models.base import Backbone
from maskfeat.models.mvit import MViT
from maskfeat.models.resnet import ResNet
from maskfeat.models.vit import ViT
from maskfeat.objectives.base import Objective
from maskfeat.objectives.classification import Classification
from maskfeat.objectives.maskfeat import MaskFeat
from maskfeat.objectives.mfm import MFM
from maskfeat.objectives.mixup import Mixup
from maskfeat.optim.optimizers import make_optimizer
from maskfeat.optim.param_groups import parameter_groups
from maskfeat.optim.schedule import lr_at_epoch


def _by_block(rows: Sequence[Sequence[float]]) -> dict[int, list[float]]:
    """[[block, value, ...], ...] as the YAMLs write it -> {block: [value, ...]}."""
    return {int(block): list(values) for block, *values in rows}


def _pools(cfg: CfgNode) -> bool:
    mvit = cfg.MVIT
    return bool(mvit.POOL_Q_STRIDE or mvit.POOL_KV_STRIDE or mvit.POOL_KV_STRIDE_ADAPTIVE)


def _build_vit(cfg: CfgNode, maskable: bool) -> ViT:
    mvit = cfg.MVIT
    return ViT(
        image_size=(cfg.DATA.TRAIN_CROP_SIZE,) * 2,
        patch=mvit.PATCH_STRIDE,
        width=mvit.EMBED_DIM,
        depth=mvit.DEPTH,
        num_heads=mvit.NUM_HEADS,
        mlp_ratio=mvit.MLP_RATIO,
        qkv_bias=mvit.QKV_BIAS,
        drop_path=mvit.DROPPATH_RATE,
        dropout=mvit.DROPOUT_RATE,
        class_token=mvit.CLS_EMBED_ON,
        position=mvit.USE_ABS_POS,
        maskable=maskable,
    )


def _build_mvit(cfg: CfgNode, maskable: bool) -> MViT:
    mvit = cfg.MVIT
    frames = () if mvit.PATCH_2D else (cfg.DATA.NUM_FRAMES,)
    axes = len(mvit.PATCH_KERNEL)  # images leave the first of (t, h, w) out
    if mvit.POOL_KVQ_KERNEL is None and _pools(cfg):
        raise ValueError("MVIT.POOL_KVQ_KERNEL is None, expected a kernel such as [3, 3, 3] where queries are pooled")
    position = "none"
    if mvit.USE_ABS_POS:
        position = "separate" if mvit.SEP_POS_EMBED and not mvit.PATCH_2D else "joint"
    return MViT(
        clip_size=(*frames, cfg.DATA.TRAIN_CROP_SIZE, cfg.DATA.TRAIN_CROP_SIZE),
        kernel=mvit.PATCH_KERNEL,
        stride=mvit.PATCH_STRIDE,
        padding=mvit.PATCH_PADDING,
        width=mvit.EMBED_DIM,
        depth=mvit.DEPTH,
        num_heads=mvit.NUM_HEADS,
        width_mul={block: factor[0] for block, factor in _by_block(mvit.DIM_MUL).items()},
        head_mul={block: factor[0] for block, factor in _by_block(mvit.HEAD_MUL).items()},
        stride_q={block: [int(s) for s in stride][-axes:] for block, stride in _by_block(mvit.POOL_Q_STRIDE).items()},
        stride_kv={block: [int(s) for s in stride][-axes:] for block, stride in _by_block(mvit.POOL_KV_STRIDE).items()},
        stride_kv_adaptive=mvit.POOL_KV_STRIDE_ADAPTIVE and mvit.POOL_KV_STRIDE_ADAPTIVE[-axes:],
        pool_kernel=(mvit.POOL_KVQ_KERNEL or [1, 1, 1])[-axes:],
        mlp_ratio=mvit.MLP_RATIO,
        qkv_bias=mvit.QKV_BIAS,
        drop_path=mvit.DROPPATH_RATE,
        dropout=mvit.DROPOUT_RATE,
        class_token=mvit.CLS_EMBED_ON,
        position=position,
        relative_space=mvit.REL_POS_SPATIAL,
        relative_time=mvit.REL_POS_TEMPORAL and not mvit.PATCH_2D,
        relative_zero_init=mvit.REL_POS_ZERO_INIT,
        residual_pooling=mvit.RESIDUAL_POOLING,
        maskable=maskable,
    )


def build_backbone(cfg: CfgNode, maskable: bool = False) -> Backbone:
    """A ResNet for MODEL.ARCH resnet; a plain ViT where patches are 2-D, do not overlap and nothing is pooled; else an
    MViTv2.
    """
    if cfg.MODEL.ARCH == "resnet":
        return ResNet(depth=cfg.RESNET.DEPTH, image_size=(cfg.DATA.TRAIN_CROP_SIZE,) * 2)
    mvit = cfg.MVIT
    plain = list(mvit.PATCH_KERNEL) == list(mvit.PATCH_STRIDE) and not any(mvit.PATCH_PADDING)
    if mvit.PATCH_2D and plain and not _pools(cfg) and not mvit.REL_POS_SPATIAL:
        return _build_vit(cfg, maskable)
    return _build_mvit(cfg, maskable)


def _build_maskfeat(cfg: CfgNode) -> MaskFeat:
    mask = cfg.MASK
    backbone = build_backbone(cfg, maskable=True)
    return MaskFeat(
        backbone,
        bins=mask.HOG_BINS,
        cell=mask.HOG_CELL,
        window=mask.HOG_GAUSSIAN_WINDOW,
        shuffle=mask.SHUFFLE_TARGETS,
    )


def _build_mfm(cfg: CfgNode) -> MFM:
    mfm = cfg.MFM
    return MFM(
        build_backbone(cfg),
        mean=cfg.DATA.MEAN,
        std=cfg.DATA.STD,
        radius=mfm.RADIUS,
        low_pass=mfm.LOW_PASS_PROB,
        target_channels=mfm.TARGET_CHANNELS,
        filter_normalised=mfm.FILTER_NORMALISED,
        modulus=mfm.INVERSE == "modulus",
        gamma=mfm.GAMMA,
        eps=mfm.EPS,
        mean_per_image=mfm.MEAN_PER_IMAGE,
    )


def _build_classification(cfg: CfgNode) -> Classification:
    mixup = None
    if cfg.MIXUP.ENABLE:
        mixup = Mixup(
            alpha=cfg.MIXUP.ALPHA,
            cutmix_alpha=cfg.MIXUP.CUTMIX_ALPHA,
            prob=cfg.MIXUP.PROB,
            switch_prob=cfg.MIXUP.SWITCH_PROB,
            smoothing=cfg.MIXUP.LABEL_SMOOTH_VALUE,
            num_classes=cfg.MODEL.NUM_CLASSES,
            smooth_others=cfg.MIXUP.LABEL_SMOOTH_OTHERS,
        )
    resnet = cfg.MODEL.ARCH == "resnet"
    return Classification(
        build_backbone(cfg),
        num_classes=cfg.MODEL.NUM_CLASSES,
        mean_pooling=resnet or cfg.MVIT.USE_MEAN_POOLING,
        dropout=cfg.MODEL.DROPOUT_RATE,
        head_init_scale=None if resnet else cfg.MVIT.HEAD_INIT_SCALE,
        mixup=mixup,
        binary=cfg.MODEL.LOSS_FUNC == "bce_logit",
    )


# The registry: MODEL.MODEL_NAME -> objective. A new pre-training method is one line here.
OBJECTIVES: dict[str, Callable[[CfgNode], Objective]] = {
    "MaskMViT": _build_maskfeat,
    "MFM": _build_mfm,
    "MViT": _build_classification,
    "ResNet": _build_classification,
}


def build_objective(cfg: CfgNode) -> Objective:
    """The objective named by MODEL.MODEL_NAME with its backbone: a float32 module on the CPU."""
    return OBJECTIVES[cfg.MODEL.MODEL_NAME](cfg)


def build_optimizer(cfg: CfgNode, objective: Objective) -> Optimizer:
    """AdamW or SGD; each group has "layer_decay" (its learning rate multiplier) and "weight_decay"."""
    solver = cfg.SOLVER
    groups = parameter_groups(
        ((objective.released_name(name), parameter) for name, parameter in objective.named_parameters()),
        layer_id=objective.layer_id,
        last_layer=objective.backbone.num_blocks + 1,
        weight_decay=solver.WEIGHT_DECAY,
        layer_decay=solver.LAYER_DECAY,
        no_decay_1d=solver.ZERO_WD_1D_PARAM,
        no_decay_names=objective.backbone.no_weight_decay() if cfg.MVIT.ZERO_DECAY_POS_CLS else (),
    )
    return make_optimizer(
        groups,
        solver.OPTIMIZING_METHOD,
        lr=lr_at_epoch(cfg, 0.0),
        betas=solver.BETAS,
        momentum=solver.MOMENTUM,
        dampening=solver.DAMPENING,
        nesterov=solver.NESTEROV,
    )


def build_mask_sampler(cfg: CfgNode) -> Sampler | None:
    """The mask sampler of pre-training; None where nothing is hidden.

    Images: on the grid of patches. Clips: on AUG.MASK_WINDOW_SIZE. MFM: which band of frequencies is removed.
    """
    if not cfg.AUG.GEN_MASK_LOADER:
        return None
    if cfg.MODEL.MODEL_NAME == "MFM":
        return band_sampler(cfg.MFM.LOW_PASS_PROB)
    aug = cfg.AUG
    if cfg.MVIT.PATCH_2D:
        side = cfg.DATA.TRAIN_CROP_SIZE
        grid = tuple(side // stride for stride in cfg.MVIT.PATCH_STRIDE)
        if math.prod(grid) == 0:
            raise ValueError(f"DATA.TRAIN_CROP_SIZE {side} is smaller than a patch, MVIT.PATCH_STRIDE")
    else:
        grid = tuple(aug.MASK_WINDOW_SIZE)
    return mask_sampler(
        grid,
        aug.MASK_RATIO,
        tube=aug.MASK_TUBE,
        frames=aug.MASK_FRAMES,
        max_block=aug.MAX_MASK_PATCHES_PER_BLOCK,
    )


SPLITS = ("train", "val", "test")


def _augmentation(cfg: CfgNode) -> dict[str, Any]:
    """What images and clips share in training; AUG.ENABLE False leaves crop and flip."""
    aug, data = cfg.AUG, cfg.DATA
    on = aug.ENABLE
    return {
        "crop": data.TRAIN_CROP_SIZE,
        "mean": data.MEAN,
        "std": data.STD,
        "flip": data.RANDOM_FLIP,
        "auto_augment": aug.AA_TYPE if on else "",
        "interpolation": aug.INTERPOLATION,
        "erase_prob": aug.RE_PROB if on else 0.0,
        "erase_mode": aug.RE_MODE,
        "erase_count": aug.RE_COUNT,
    }


def _image_dataset(cfg: CfgNode, split: str, draw_hidden: Sampler | None, trains: bool) -> ImageFolder:
    """ImageNet layout; `test` reads `val`. The training folder numbers the classes, where there is one."""
    data, root = cfg.DATA, Path(cfg.DATA.PATH_TO_DATA_DIR)
    classes = class_folders(root / "train") if split != "train" and (root / "train").is_dir() else None
    samples, _ = list_image_folder(root / ("train" if split == "train" else "val"), classes)
    if trains:
        transform: ImageTrainTransform | ImageEvalTransform = ImageTrainTransform(
            scale=data.TRAIN_JITTER_SCALES_RELATIVE or (0.08, 1.0),
            ratio=data.TRAIN_JITTER_ASPECT_RELATIVE or (3 / 4, 4 / 3),
            color_jitter=cfg.AUG.COLOR_JITTER if cfg.AUG.ENABLE else None,
            **_augmentation(cfg),
        )
    else:
        transform = ImageEvalTransform(
            data.TEST_CROP_SIZE,
            data.MEAN,
            data.STD,
            short_side=data.TEST_SHORT_SIDE or None,
            interpolation=data.TEST_INTERPOLATION,
        )
    return ImageFolder(
        samples,
        transform,
        seed=cfg.RNG_SEED,
        draw_hidden=draw_hidden,
        replace_bad=trains,
        num_views=cfg.AUG.NUM_SAMPLE if trains and cfg.AUG.ENABLE else 1,
        backend=cfg.DATA_LOADER.IMAGE_BACKEND,
    )


def _clip_dataset(cfg: CfgNode, split: str, draw_hidden: Sampler | None, num_clips: int, trains: bool) -> VideoClips:
    """Kinetics layout: PATH_TO_DATA_DIR/{train,val,test}.csv."""
    data = cfg.DATA
    # Joined as text: a Path would make s3:/ of s3://.
    csv_path = os.path.join(data.PATH_TO_DATA_DIR, f"{split}.csv")
    videos = read_video_list(csv_path, data.PATH_LABEL_SEPARATOR, data.PATH_PREFIX)
    num_crops = cfg.TEST.NUM_SPATIAL_CROPS if split == "test" else 1
    if trains:
        transform: ClipTrainTransform | ClipTestTransform = ClipTrainTransform(
            scale=data.TRAIN_JITTER_SCALES_RELATIVE,
            ratio=data.TRAIN_JITTER_ASPECT_RELATIVE,
            short_sides=data.TRAIN_JITTER_SCALES,
            **_augmentation(cfg),
        )
    else:
        # One crop is cut from the centre of a larger picture; several cover one whose short side is the crop.
        short_side = max(data.TRAIN_JITTER_SCALES[0], data.TEST_CROP_SIZE) if num_crops == 1 else data.TEST_CROP_SIZE
        transform = ClipTestTransform(data.TEST_CROP_SIZE, short_side, num_crops, data.MEAN, data.STD)
    return VideoClips(
        videos,
        transform,
        num_frames=data.NUM_FRAMES,
        sampling_rate=data.SAMPLING_RATE,
        target_fps=data.TARGET_FPS,
        seed=cfg.RNG_SEED,
        mode="val" if split == "train" and not trains else split,
        use_offset=data.USE_OFFSET_SAMPLING,
        num_clips=num_clips,
        num_crops=num_crops,
        num_views=cfg.AUG.NUM_SAMPLE if trains and cfg.AUG.ENABLE else 1,
        draw_hidden=draw_hidden,
        replace_bad=trains,
        torchcodec=data.DECODING_BACKEND == "torchcodec",
    )


def build_loader(
    cfg: CfgNode,
    split: str,
    world: World | None = None,
    num_clips: int | None = None,
    device: torch.device | None = None,
    plain: bool = False,
) -> BatchLoader:
    """Batches of a split for one process.

    Args:
        split: "train" (shuffled, augmented, full batches only), "val" (one central view) or "test" (every view).
        world: where this process stands; None = alone on its machine.
        num_clips: clips a video in testing; None = TEST.NUM_ENSEMBLE_VIEWS.
        device: where batches are finished and handed out; None = the CPU.
        plain: "train" as "val" shows its samples: in order, not augmented, every one (probes of frozen features).

    Raises:
        ValueError: where the data is not there or smaller than a batch; the message names the key.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {SPLITS}")
    trains = split == "train" and not plain
    # A classifier of ResNet features takes any size; transformers have positions for one, MFM a disc.
    fixed = cfg.MODEL.MODEL_NAME != "ResNet"
    if not trains and fixed and cfg.DATA.TEST_CROP_SIZE != cfg.DATA.TRAIN_CROP_SIZE:
        raise ValueError(
            f"DATA.TEST_CROP_SIZE is {cfg.DATA.TEST_CROP_SIZE} and DATA.TRAIN_CROP_SIZE {cfg.DATA.TRAIN_CROP_SIZE}: "
            "ViT, MViTv2 and MFM are built for one size, set both to it"
        )
    world = world or World()
    section = cfg.TEST if split == "test" else cfg.TRAIN
    draw_hidden = build_mask_sampler(cfg)
    views = 1
    dataset: ImageFolder | VideoClips
    if section.DATASET.lower() == "imagenet":
        dataset = _image_dataset(cfg, split, draw_hidden, trains)
    else:
        clips = num_clips or cfg.TEST.NUM_ENSEMBLE_VIEWS
        dataset = _clip_dataset(cfg, split, draw_hidden, clips, trains)
        views = clips * cfg.TEST.NUM_SPATIAL_CROPS if split == "test" else 1
    if OBJECTIVES[cfg.MODEL.MODEL_NAME] is _build_classification and max(dataset.labels) >= cfg.MODEL.NUM_CLASSES:
        raise ValueError(
            f"labels of {split} go up to {max(dataset.labels)}, but MODEL.NUM_CLASSES is {cfg.MODEL.NUM_CLASSES}"
        )
    per_process, left = divmod(section.BATCH_SIZE, world.local_size)
    if left or not per_process:
        key = "TEST.BATCH_SIZE" if split == "test" else "TRAIN.BATCH_SIZE"
        raise ValueError(
            f"{key} is {section.BATCH_SIZE} a machine, which {world.local_size} processes cannot share evenly"
        )
    sampler = EpochSampler(
        len(dataset),
        per_process,
        rank=world.rank,
        world_size=world.size,
        shuffle=trains,
        drop_last=trains,
        seed=cfg.RNG_SEED,
        views=views,
        repeats=cfg.AUG.REPEATS if trains else 1,
    )
    ledger = BadSampleLedger(cfg.OUTPUT_DIR, len(dataset), cfg.DATA.MAX_BAD_FRACTION, split)
    # More workers than cores only take each other's time; how many there are changes nothing in the data.
    workers = min(cfg.DATA_LOADER.NUM_WORKERS, max(available_cores() // world.local_size, 1))
    if cfg.DATA_LOADER.RESIDENT and isinstance(dataset, ImageFolder):
        return CachedLoader(dataset, sampler, ledger, workers, device=device)
    return Loader(dataset, sampler, ledger, workers, cfg.DATA_LOADER.PIN_MEMORY, device=device)
