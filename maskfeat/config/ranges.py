"""The values that a single key may have: choices, ranges, lengths. Checks between keys are in `validate`.

The tables are for the keys of `defaults`; the specs of objectives, backbones and data sets add to them.
"""

import re
from collections.abc import Iterator

from yacs.config import CfgNode

from maskfeat.registry import (
    ABOVE_0_TO_1,
    BELOW_1,
    SHARE,
    BackboneSpec,
    DatasetSpec,
    ObjectiveSpec,
    Range,
    Rules,
    holder,
    load,
    lookup,
)

_RANDAUGMENT = re.compile(r"rand(-[a-z]+[0-9.]*)*|ra_\d+_\d+")
_INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest")

CHOICES: dict[str, tuple[object, ...]] = {
    "LOG.TRACKERS": ("tensorboard", "csv", "wandb", "mlflow", "trackio"),
    "DIST_BACKEND": ("nccl", "gloo"),
    "DATA_LOADER.IMAGE_BACKEND": ("pil", "simplejpeg"),
    "TRAIN.PARALLEL": ("ddp", "fsdp"),
    "TRAIN.CHECKPOINT_FORMAT": ("gathered", "sharded"),
    "TRAIN.CHECKPOINT_TYPE": ("pytorch",),
    "TEST.CHECKPOINT_TYPE": ("pytorch",),
    "TEST.NUM_SPATIAL_CROPS": (1, 3),
    "DATA.FORMAT": ("auto", "folder", "tar", "parquet"),
    "DATA.DECODING_BACKEND": ("pyav", "torchvision", "torchcodec"),
    "DATA.TEST_INTERPOLATION": _INTERPOLATIONS,
    "AUG.INTERPOLATION": _INTERPOLATIONS,
    "AUG.RE_MODE": ("pixel", "rand", "const"),
    "AUG.RE_SPLIT": (False,),
    "MODEL.HEAD_ACT": ("softmax",),
    "SOLVER.OPTIMIZING_METHOD": ("sgd", "adamw"),
    "SOLVER.LR_POLICY": ("cosine", "steps_with_relative_lrs"),
    # Not read here. With another value the same YAML would train or test another model elsewhere.
    "DATA.COLOR_RND_GRAYSCALE": (0.0,),
    "DATA.DUMMY_LOAD": (False,),
    "DATA.ENSEMBLE_METHOD": ("sum",),
    "DATA.IN22K_TRAINVAL": (False,),
    "DATA.IN22k_VAL_IN1K": ("",),
    "DATA.INV_UNIFORM_SAMPLE": (False,),
    "DATA.LOADER_CHUNK_SIZE": (0,),
    "DATA.REVERSE_INPUT_CHANNEL": (False,),
    "DATA.SKIP_ROWS": (0,),
    "DATA.SSL_COLOR_JITTER": (False,),
    "DATA.SSL_MOCOV2_AUG": (False,),
    "DATA.TIME_DIFF_PROB": (0.0,),
    "DATA.TRAIN_CROP_NUM_SPATIAL": (1,),
    "DATA.TRAIN_CROP_NUM_TEMPORAL": (1,),
    "DATA.TRAIN_JITTER_FPS": (0.0,),
    "DATA.TRAIN_JITTER_MOTION_SHIFT": (False,),
    "DETECTION.ENABLE": (False,),
    "MODEL.DETACH_FINAL_FC": (False,),
    "MODEL.FP16_ALLREDUCE": (False,),
    "MODEL.FROZEN_BN": (False,),
    "MULTIGRID.LONG_CYCLE": (False,),
    "MULTIGRID.SHORT_CYCLE": (False,),
    "SOLVER.LARS_ON": (False,),
    "TRAIN.CHECKPOINT_IN_INIT": (False,),
}
"""The values that a key, or each item of its list, may have. A choice of one is a feature of PySlowFast that is not
supported here: where the key changes results there, no other value is accepted, whether the key is read here or not."""


_CLIP = Range(0, 1e6, above=True, note=" (None = no clipping)")
_UNIT = "; pixels are in [0, 1] here: values of pixels in 0 .. 255 must be divided by 255"
_COUNT_MAX = 1_000_000
_SIDE_MAX = 16_384
_RATE_MAX = 10.0
_WEEK = 7 * 24 * 60.0

# Both bounds of every number. The upper ones are far above what a run uses, and catch a wrong unit or a digit too many.
RANGES: dict[str, Range] = {
    "RNG_SEED": Range(0, 2**32 - 1),
    "SHARD_ID": Range(0, 99_999),
    "NUM_SHARDS": Range(1, 100_000),
    **dict.fromkeys(("NUM_GPUS", "DATA_LOADER.NUM_WORKERS"), Range(0, 1024)),
    **dict.fromkeys(("TRAIN.EVAL_PERIOD", "TRAIN.KEEP_CHECKPOINTS", "TRAIN.MICRO_BATCH_SIZE"), Range(0, _COUNT_MAX)),
    "VIS.PERIOD": Range(0, _COUNT_MAX),
    "VIS.SAMPLES": Range(1, 100),
    **dict.fromkeys(("LOG_PERIOD", "TRAIN.MAX_SKIPPED_STEPS", "TRAIN.CHECKPOINT_PERIOD"), Range(1, _COUNT_MAX)),
    **dict.fromkeys(("HANG_MINUTES", "TRAIN.CHECKPOINT_MINUTES"), Range(0, _WEEK)),
    **dict.fromkeys(("TRAIN.BATCH_SIZE", "TEST.BATCH_SIZE", "SOLVER.MAX_EPOCH"), Range(1, _COUNT_MAX)),
    "TRAIN.EMA": BELOW_1,
    **dict.fromkeys(("TEST.NUM_ENSEMBLE_VIEWS", "TEST.NUM_TEMPORAL_CLIPS", "DATA.TARGET_FPS"), Range(1, 1000)),
    **dict.fromkeys(("DATA.NUM_FRAMES", "DATA.SAMPLING_RATE"), Range(1, 10_000)),
    **dict.fromkeys(("DATA.TRAIN_CROP_SIZE", "DATA.TEST_CROP_SIZE", "DATA.TRAIN_JITTER_SCALES"), Range(1, _SIDE_MAX)),
    "DATA.TEST_SHORT_SIDE": Range(0, _SIDE_MAX),
    "DATA.MEAN": Range(0, 1, too_high=_UNIT),
    "DATA.STD": Range(0.01, 1, too_high=_UNIT),
    "DATA.TRAIN_JITTER_SCALES_RELATIVE": ABOVE_0_TO_1,
    "DATA.TRAIN_JITTER_ASPECT_RELATIVE": Range(0.05, 20),
    "DATA.IN_VAL_CROP_RATIO": Range(0.1, 1),
    "DATA.MAX_BAD_FRACTION": SHARE,
    **dict.fromkeys(("AUG.NUM_SAMPLE", "AUG.REPEATS", "AUG.RE_COUNT", "AUG.MASK_WINDOW_SIZE"), Range(1, 1000)),
    **dict.fromkeys(("AUG.RE_PROB", "AUG.MASK_RATIO"), SHARE),
    "AUG.COLOR_JITTER": Range(0, 2),
    "AUG.MAX_MASK_PATCHES_PER_BLOCK": Range(1, _COUNT_MAX),
    "MODEL.DROPOUT_RATE": BELOW_1,
    "MODEL.NUM_CLASSES": Range(1, _COUNT_MAX),
    **dict.fromkeys(("SOLVER.BASE_LR", "SOLVER.COSINE_END_LR", "SOLVER.WARMUP_START_LR"), Range(0, _RATE_MAX)),
    **dict.fromkeys(("SOLVER.WARMUP_EPOCHS", "SOLVER.STEPS"), Range(0, _COUNT_MAX)),
    "SOLVER.LRS": Range(0, 100),
    "SOLVER.WEIGHT_DECAY": SHARE,
    **dict.fromkeys(("SOLVER.MOMENTUM", "SOLVER.BETAS"), BELOW_1),
    "SOLVER.DAMPENING": SHARE,
    "SOLVER.LAYER_DECAY": ABOVE_0_TO_1,
    **dict.fromkeys(("SOLVER.CLIP_GRAD_VAL", "SOLVER.CLIP_GRAD_L2NORM"), _CLIP),
}
"""The range of a number, or of every number of a list."""

LENGTHS: dict[str, tuple[int, ...]] = {
    "DATA.MEAN": (3,),
    "DATA.STD": (3,),
    "DATA.TRAIN_JITTER_SCALES": (2,),
    "DATA.TRAIN_JITTER_SCALES_RELATIVE": (0, 2),
    "DATA.TRAIN_JITTER_ASPECT_RELATIVE": (0, 2),
    "AUG.MASK_WINDOW_SIZE": (3,),
    "SOLVER.BETAS": (2,),
}

_ASCENDING = (
    "DATA.TRAIN_JITTER_SCALES",
    "DATA.TRAIN_JITTER_SCALES_RELATIVE",
    "DATA.TRAIN_JITTER_ASPECT_RELATIVE",
)


def check_single_keys(cfg: CfgNode, rules: Rules) -> Iterator[str]:
    """Yield one message for each invalid value: key, given value, expected values."""
    yield from _choices(cfg, rules)
    for key, length in rules.lengths.items():
        value = lookup(cfg, key)
        if isinstance(value, list | tuple) and len(value) not in length:
            expected = " or ".join(str(n) for n in length)
            yield f"{key} must have {expected} numbers; given {value!r}"
    for key, bounds in rules.ranges.items():
        value = lookup(cfg, key)
        numbers = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if not all(bounds.holds(number) for number in numbers):
            hint = bounds.too_high if any(number > bounds.high for number in numbers) else ""
            yield f"{key} must be {bounds.words}; given {value!r}{hint}"
    for key in _ASCENDING:
        value = lookup(cfg, key)
        if isinstance(value, list) and value != sorted(value):
            yield f"{key} must be [low, high]; given {value!r}"


_SPECS = {
    "MODEL.ARCH": BackboneSpec,
    "MODEL.MODEL_NAME": ObjectiveSpec,
    "TRAIN.DATASET": DatasetSpec,
    "TEST.DATASET": DatasetSpec,
}


def _advice(key: str, value: object) -> str:
    """Return which module has what a key names, where PLUGINS lacks it."""
    module = holder(_SPECS[key], str(value).lower() if key.endswith("DATASET") else str(value)) if key in _SPECS else ""
    return f"; PLUGINS must name {module}, which has it" if module else ""


def _choices(cfg: CfgNode, rules: Rules) -> Iterator[str]:
    for key, allowed in rules.choices.items():
        value = lookup(cfg, key)
        each = value if isinstance(value, list) else [] if value is None else [value]
        if all(one in allowed and isinstance(one, bool) == isinstance(allowed[0], bool) for one in each):
            continue
        if len(allowed) == 1:
            yield f"{key} {value!r} is not supported here; the only value is {allowed[0]!r}"
        else:
            yield f"{key} must be one of {', '.join(repr(a) for a in allowed)}; given {value!r}{_advice(key, value)}"
    datasets = load(cfg.PLUGINS).datasets
    for section in ("TRAIN", "TEST"):
        if cfg[section].DATASET.lower() not in datasets:
            key, value = f"{section}.DATASET", cfg[section].DATASET
            yield f"{key} must be one of {', '.join(datasets)}; given {value!r}{_advice(key, value)}"
    if cfg.DATA.INPUT_CHANNEL_NUM != [3]:
        yield f"DATA.INPUT_CHANNEL_NUM must be [3] (one pathway, RGB); given {cfg.DATA.INPUT_CHANNEL_NUM!r}"
    if cfg.AUG.AA_TYPE and not _RANDAUGMENT.fullmatch(cfg.AUG.AA_TYPE):
        yield (
            "AUG.AA_TYPE must be '' or a RandAugment policy such as 'rand-m9-mstd0.5-inc1' (timm's) or 'ra_6_10' "
            f"(torchvision's); given {cfg.AUG.AA_TYPE!r}"
        )
    if not cfg.DATA.PATH_LABEL_SEPARATOR:
        yield "DATA.PATH_LABEL_SEPARATOR must be at least one character; given ''"
    if not cfg.OUTPUT_DIR:
        yield "OUTPUT_DIR must name a folder; given ''"
    for key in ("OUTPUT_DIR", "TENSORBOARD.LOG_DIR", "TEST.SAVE_RESULTS_PATH"):
        if "://" in lookup(cfg, key):
            yield f"{key} must be a path in a file system, a run writes nowhere else; given {lookup(cfg, key)!r}"
    if any(mark in cfg.TASK for mark in "/\\\0"):
        yield f"TASK becomes part of file names and must not contain a slash; given {cfg.TASK!r}"
