"""The values that a single key may have: choices, ranges, lengths. Checks between keys are in `validate`.

The tables are for the keys of `defaults`; the specs of objectives, backbones and data sets add to them.
"""

import re
from collections.abc import Iterator
from typing import Any

from yacs.config import CfgNode

from maskfeat.registry import ABOVE_0_TO_1, AT_LEAST_0, AT_LEAST_1, BELOW_1, POSITIVE, SHARE, Range, Rules, load

_RANDAUGMENT = re.compile(r"rand(-[a-z]+[0-9.]*)*|ra_\d+_\d+")
_INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest")

CHOICES: dict[str, tuple[object, ...]] = {
    "DIST_BACKEND": ("nccl", "gloo"),
    "DATA_LOADER.IMAGE_BACKEND": ("pil", "torchvision"),
    "TRAIN.PARALLEL": ("ddp", "fsdp"),
    "TRAIN.CHECKPOINT_FORMAT": ("gathered", "sharded"),
    "TRAIN.CHECKPOINT_TYPE": ("pytorch",),
    "TEST.CHECKPOINT_TYPE": ("pytorch",),
    "TEST.NUM_SPATIAL_CROPS": (1, 3),
    "DATA.DECODING_BACKEND": ("pyav", "torchvision", "torchcodec"),
    "DATA.TEST_INTERPOLATION": _INTERPOLATIONS,
    "AUG.INTERPOLATION": _INTERPOLATIONS,
    "AUG.RE_MODE": ("pixel", "rand", "const"),
    "AUG.RE_SPLIT": (False,),
    "MODEL.HEAD_ACT": ("softmax",),
    "SOLVER.OPTIMIZING_METHOD": ("sgd", "adamw"),
    "SOLVER.LR_POLICY": ("cosine", "steps_with_relative_lrs"),
    # Without effect here, but the same YAML would train another model elsewhere if they were True.
    "SOLVER.LARS_ON": (False,),
}
"""The values that a key may have. A choice of one is a feature of PySlowFast that is not supported here."""


_POSITIVE_OR_NONE = Range("above 0 (None = no clipping)", lambda v: v > 0)

RANGES: dict[str, Range] = {
    **dict.fromkeys(("RNG_SEED", "NUM_GPUS", "SHARD_ID", "DATA_LOADER.NUM_WORKERS"), AT_LEAST_0),
    **dict.fromkeys(("NUM_SHARDS", "LOG_PERIOD", "TRAIN.MAX_SKIPPED_STEPS"), AT_LEAST_1),
    **dict.fromkeys(("TRAIN.EVAL_PERIOD", "TRAIN.MICRO_BATCH_SIZE", "DATA.TEST_SHORT_SIDE"), AT_LEAST_0),
    **dict.fromkeys(("HANG_MINUTES", "TRAIN.CHECKPOINT_MINUTES", "TRAIN.KEEP_CHECKPOINTS"), AT_LEAST_0),
    "TRAIN.EMA": BELOW_1,
    **dict.fromkeys(("TRAIN.BATCH_SIZE", "TEST.BATCH_SIZE", "TRAIN.CHECKPOINT_PERIOD"), AT_LEAST_1),
    **dict.fromkeys(("TEST.NUM_ENSEMBLE_VIEWS", "TEST.NUM_TEMPORAL_CLIPS"), AT_LEAST_1),
    **dict.fromkeys(("DATA.NUM_FRAMES", "DATA.SAMPLING_RATE", "DATA.TARGET_FPS"), AT_LEAST_1),
    **dict.fromkeys(("DATA.TRAIN_CROP_SIZE", "DATA.TEST_CROP_SIZE", "DATA.TRAIN_JITTER_SCALES"), AT_LEAST_1),
    **dict.fromkeys(("DATA.STD", "DATA.TRAIN_JITTER_ASPECT_RELATIVE"), POSITIVE),
    "DATA.TRAIN_JITTER_SCALES_RELATIVE": ABOVE_0_TO_1,
    "DATA.MAX_BAD_FRACTION": SHARE,
    **dict.fromkeys(("AUG.NUM_SAMPLE", "AUG.REPEATS", "AUG.RE_COUNT", "AUG.MASK_WINDOW_SIZE"), AT_LEAST_1),
    **dict.fromkeys(("AUG.RE_PROB", "AUG.MASK_RATIO"), SHARE),
    "AUG.COLOR_JITTER": AT_LEAST_0,
    "AUG.MAX_MASK_PATCHES_PER_BLOCK": AT_LEAST_1,
    "MODEL.DROPOUT_RATE": BELOW_1,
    "MODEL.NUM_CLASSES": AT_LEAST_1,
    **dict.fromkeys(("SOLVER.BASE_LR", "SOLVER.COSINE_END_LR", "SOLVER.WARMUP_START_LR"), AT_LEAST_0),
    **dict.fromkeys(("SOLVER.WARMUP_EPOCHS", "SOLVER.WEIGHT_DECAY", "SOLVER.LRS", "SOLVER.STEPS"), AT_LEAST_0),
    **dict.fromkeys(("SOLVER.MOMENTUM", "SOLVER.BETAS"), BELOW_1),
    "SOLVER.DAMPENING": SHARE,
    "SOLVER.LAYER_DECAY": ABOVE_0_TO_1,
    "SOLVER.MAX_EPOCH": AT_LEAST_1,
    **dict.fromkeys(("SOLVER.CLIP_GRAD_VAL", "SOLVER.CLIP_GRAD_L2NORM"), _POSITIVE_OR_NONE),
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


def lookup(cfg: CfgNode, key: str) -> Any:
    """Return the value of a full key; None for an inert key that was not given."""
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, CfgNode) or part not in node:
            return None
        node = node[part]
    return node


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
            yield f"{key} must be {bounds.words}; given {value!r}"
    for key in _ASCENDING:
        value = lookup(cfg, key)
        if isinstance(value, list) and value != sorted(value):
            yield f"{key} must be [low, high]; given {value!r}"


def _choices(cfg: CfgNode, rules: Rules) -> Iterator[str]:
    for key, allowed in rules.choices.items():
        value = lookup(cfg, key)
        if value is None or (value in allowed and isinstance(value, bool) == isinstance(allowed[0], bool)):
            continue
        if len(allowed) == 1:
            yield f"{key} {value!r} is not supported here; the only value is {allowed[0]!r}"
        else:
            yield f"{key} must be one of {', '.join(repr(a) for a in allowed)}; given {value!r}"
    datasets = load(cfg.PLUGINS).datasets
    for section in ("TRAIN", "TEST"):
        if cfg[section].DATASET.lower() not in datasets:
            yield f"{section}.DATASET must be one of {', '.join(datasets)}; given {cfg[section].DATASET!r}"
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
    if any(mark in cfg.TASK for mark in "/\\\0"):
        yield f"TASK becomes part of file names and must not contain a slash; given {cfg.TASK!r}"
