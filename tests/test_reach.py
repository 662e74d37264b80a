"""Every key of the config reaches what is built from it: with another value, something of it is another one.

What is built is an objective with its trainer, the loaders of all splits, and the learning rates. Two keys that were
exchanged with one another would pass; a key that is not handed on, or is handed on in another one's place, does not.
"""

import functools
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from yacs.config import CfgNode

from maskfeat.build import build_loader, build_objective
from maskfeat.config import load_config
from maskfeat.config.schema import schema
from maskfeat.engine.trainer import build_trainer
from maskfeat.errors import UserError
from maskfeat.registry import lookup, objective_spec
from tests.small import MFM_PT, MFM_RECIPES, MVIT_FT, MVIT_PT, R50_FT, RECIPES, VIT_FT, VIT_PT, clips, images

SGD = ["SOLVER.OPTIMIZING_METHOD", "sgd", "SOLVER.WARMUP_EPOCHS", "1", "SOLVER.MAX_EPOCH", "4"]

OF_A_RUN = {
    *("TASK", "OUTPUT_DIR", "PLUGINS", "NUM_GPUS", "SHARD_ID", "DIST_BACKEND", "HANG_MINUTES", "TRAIN.ENABLE"),
    *("TEST.ENABLE", "TRAIN.TF32", "TRAIN.CUDNN_BENCHMARK", "TRAIN.PARALLEL", "TRAIN.MAX_SKIPPED_STEPS"),
    *("TRAIN.EVAL_PERIOD", "TRAIN.AUTO_RESUME", "TRAIN.KEEP_CHECKPOINTS", "TRAIN.KEEP_BEST", "TEST.MIXED_PRECISION"),
    *("TEST.NUM_TEMPORAL_CLIPS", "TEST.SAVE_RESULTS_PATH", "TEST.CHECKPOINT_FILE_PATH", "DATA_LOADER.PIN_MEMORY"),
    *("LOG_PERIOD", "LOG_MODEL_INFO", "LOG.TRACKERS", "LOG.REPORT", "TENSORBOARD.ENABLE", "TENSORBOARD.LOG_DIR"),
    *("VIS.PERIOD", "VIS.SAMPLES"),
    *(
        f"TRAIN.CHECKPOINT_{name}"
        for name in (
            *("PERIOD", "MINUTES", "FORMAT", "FILE_PATH", "INFLATE", "EPOCH_RESET", "AVERAGE", "CLEAR_NAME_PATTERN"),
            "ALLOW",
        )
    ),
}
"""Read where a run is set up, logged, saved, resumed or tested: whole runs test these."""
CHOOSING = {"MODEL.ARCH", "MODEL.MODEL_NAME", "TRAIN.DATASET", "TEST.DATASET", "DATA.SOURCES", "MVIT.PATCH_2D"}
"""With another value, other keys have to change as well."""
ONE_VALUE = {
    *("TRAIN.CHECKPOINT_TYPE", "TEST.CHECKPOINT_TYPE", "DATA.INPUT_CHANNEL_NUM", "AUG.RE_SPLIT", "AUG.GEN_MASK_LOADER"),
    *("MODEL.HEAD_ACT", "SOLVER.GAMMA", "MASK.ENABLE", "MASK.PRETRAIN_DEPTH", "MASK.HEAD_TYPE", "MASK.PRED_HOG"),
    *("MASK.MAE_ON", "MASK.MAE_RND_MASK", "MASK.PER_FRAME_MASKING"),
    *(f"MVIT.{name}" for name in ("MODE", "POOL_FIRST", "LAYER_SCALE_INIT_VALUE", "NORM", "NORM_STEM")),
    *("MVIT.DIM_MUL_IN_ATT", "MVIT.SEPARATE_QKV"),
}
"""Where the model is given, only one value is taken, or none has an effect."""

VALUES = {
    "AUG.AA_TYPE": ["rand-m3", "ra_3_10"],
    "AUG.MASK_WINDOW_SIZE": ["[1, 4, 4]", "[2, 4, 4]"],
    "MODEL.ACT_CHECKPOINT": ["True"],
    "MVIT.DIM_MUL": ["[[1, 4.0]]"],
    "MVIT.HEAD_MUL": ["[]"],
    "SOLVER.LR_POLICY": ["steps_with_relative_lrs"],
    "SOLVER.STEPS": ["[0, 2]"],
    "SOLVER.LRS": ["[1, 0.5]"],
    "SOLVER.MOMENTUM": ["0.3"],
    "SOLVER.DAMPENING": ["0.4"],
    "NUM_SHARDS": ["2"],
}
"""Values to try of keys for which the usual ones do not do."""
WITH = {
    "SOLVER.LR_POLICY": ["SOLVER.STEPS", "[0]", "SOLVER.LRS", "[1]"],
    "SOLVER.STEPS": ["SOLVER.LR_POLICY", "steps_with_relative_lrs", "SOLVER.LRS", "[1, 0.1]", "SOLVER.STEPS", "[0, 3]"],
    "SOLVER.LRS": ["SOLVER.LR_POLICY", "steps_with_relative_lrs", "SOLVER.STEPS", "[0, 3]", "SOLVER.LRS", "[1, 0.1]"],
    "SOLVER.BASE_LR_SCALE_NUM_SHARDS": ["NUM_SHARDS", "2"],
    "SOLVER.DAMPENING": ["SOLVER.NESTEROV", "False"],
    "MVIT.SEP_POS_EMBED": ["MVIT.USE_ABS_POS", "True"],
    "SOLVER.COSINE_AFTER_WARMUP": ["SOLVER.WARMUP_EPOCHS", "1"],
    "SOLVER.WARMUP_TO_BASE_LR": ["SOLVER.COSINE_AFTER_WARMUP", "False", *SGD[2:]],
}
"""Overrides beside which a key has an effect."""

PLAIN = (bool, int, float, str, bytes, Path, torch.dtype, torch.device, np.generic, type(None))


def described(value: Any, seen: dict[int, Any]) -> str:
    """All that an object is made of, as text; configs, which hold every key, are left out."""
    if isinstance(value, CfgNode | types.ModuleType | type | torch.Generator):
        return ""
    if isinstance(value, PLAIN):
        return repr(value)
    if id(value) in seen:
        return ""
    seen[id(value)] = value  # kept, so that nothing else takes its place in memory
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} {float(value.detach().double().sum())}"
    if isinstance(value, np.ndarray):
        return f"{value.shape} {value.dtype} {value.tolist()}"
    if isinstance(value, dict):
        parts = [f"{key if isinstance(key, str) else ''}={described(one, seen)}" for key, one in value.items()]
    elif isinstance(value, list | tuple | set | frozenset):
        parts = [described(one, seen) for one in value]
    elif isinstance(value, functools.partial):
        parts = [described(one, seen) for one in (value.func, value.args, value.keywords)]
    elif isinstance(value, types.MethodType):
        parts = [value.__qualname__, described(value.__self__, seen)]
    elif isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        parts = [value.__qualname__, described(cells, seen), described(value.__defaults__, seen)]
    else:
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        own = {name: getattr(value, name) for name in slots if hasattr(value, name)}
        parts = [type(value).__name__, described({**own, **getattr(value, "__dict__", {})}, seen)]
    return f"({', '.join(parts)})"


def built(cfg: CfgNode) -> str:
    torch.manual_seed(0)
    trainer = build_trainer(cfg, torch.device("cpu"), objective=build_objective(cfg))
    splits = ("train", "val", "test") if objective_spec(cfg).classifies else ("train", "val")
    rates = [trainer.lr(epoch) for epoch in np.linspace(0, cfg.SOLVER.MAX_EPOCH, 9)]
    return described([trainer, [build_loader(cfg, split) for split in splits], rates], {})


def values(key: str, value: Any) -> Iterator[str]:
    """Other values of a key, of which the config may refuse some."""
    rules = schema().rules
    kind = rules.kinds[key].removesuffix(" or None")
    if key in VALUES:
        yield from VALUES[key]
    elif key in rules.choices:
        yield from (str(choice) for choice in rules.choices[key] if choice != value)
    elif kind == "bool":
        yield str(not value)
    elif kind == "int":
        yield from map(str, (2, 16) if value is None else (value + 1, value * 2, value - 1, value + 4))
    elif kind in ("float", "number"):
        yield from map(str, (0.5, 2.0) if value is None else (value * 0.5, value + 0.1, value + 1.0))
    elif kind == "precision":
        yield "bf16"
    elif isinstance(value, list | tuple) and value:
        numbers = [one for one in value if isinstance(one, int | float)]
        yield str([one * 0.9 if isinstance(one, float) else one + 1 for one in numbers])
        yield str([one * 2 for one in numbers])
    elif kind.startswith("list"):
        yield from ("[0.5, 0.6]", "[0.5, 1.5]", "[[0, 1, 1, 1], [1, 1, 2, 2]]", "[0]", "[2, 2, 2]")
    else:
        yield "other"


@pytest.mark.slow
def test_every_key_reaches_what_is_built(image_data: Path, clip_data: Path) -> None:
    recipes = [
        (RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml", [*VIT_FT, *images(image_data)]),
        (RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", [*VIT_PT, *images(image_data)]),
        (RECIPES / "k400_MVITv2_S_16x4_FT.yaml", [*MVIT_FT, *clips(clip_data)]),
        (MFM_RECIPES / "in1k_R50_MFM_FT.yaml", [*R50_FT, *images(image_data), *SGD]),
        (MFM_RECIPES / "in1k_R50_MFM_PT.yaml", [*MFM_PT, *images(image_data)]),
        (RECIPES / "k400_MVITv2_S_16x4_MaskFeat_PT.yaml", [*MVIT_PT, *clips(clip_data)]),
    ]
    left = [key for key in schema().known if key not in OF_A_RUN | CHOOSING | ONE_VALUE]
    for path, opts in recipes:
        plain = built(load_config(path, opts))
        assert plain == built(load_config(path, opts)), "the same config gives the same"
        left = [key for key in left if not reaches(path, opts, key, plain)]
    assert not left


def reaches(path: Path, opts: list[str], key: str, plain: str) -> bool:
    """Whether a value of a key that this recipe accepts changes what is built, or is refused by it."""
    try:
        base = load_config(path, [*opts, *WITH.get(key, ())])
    except UserError:
        return False
    before = built(base) if key in WITH else plain
    for value in values(key, lookup(base, key)):
        try:
            cfg = load_config(path, [*opts, *WITH.get(key, ()), key, value])
        except UserError:
            continue
        try:
            if built(cfg) != before:
                return True
        except UserError:  # by what reads it, such as a data set that is not there
            return True
    return False
