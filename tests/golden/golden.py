"""Rebuilds the inputs and weights behind the golden values (the recipe stands in the golden files' README)."""

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from maskfeat.batch import Batch
from maskfeat.build import build_mask_sampler, build_objective
from maskfeat.objectives.base import Objective


def salted_state(shapes: Mapping[str, tuple[int, ...]], salt: int) -> dict[str, Tensor]:
    """Weights drawn from a generator seeded by each released name; `hogs.*` are constants and left out."""
    state = {}
    for name, shape in shapes.items():
        if name.startswith("hogs."):
            continue
        draw = np.random.RandomState((zlib.crc32(name.encode()) + salt) % 2**32)
        value = (draw.standard_normal(shape) * 0.02).astype(np.float32)
        if len(shape) == 1 and name.endswith("weight"):
            value = value + 1
        state[name] = torch.from_numpy(value.astype(np.float32))
    return state


def salted_objective(cfg: CfgNode, salt: int) -> Objective:
    """The config's objective with salted weights, in training mode."""
    objective = build_objective(cfg)
    shapes = {name: tuple(value.shape) for name, value in objective.released_state().items()}
    objective.load_released_state(salted_state(shapes, salt))
    return objective.train()


def golden_batch(cfg: CfgNode, seed: int, size: int) -> Batch:
    """Clip first, then masks (pre-training) or soft targets (fine-tuning), from one generator."""
    draw = np.random.RandomState(seed)
    side = cfg.DATA.TRAIN_CROP_SIZE
    frames = () if cfg.MVIT.PATCH_2D else (cfg.DATA.NUM_FRAMES,)
    clip = torch.from_numpy(draw.standard_normal((size, 3, *frames, side, side)).astype(np.float32))
    index = torch.arange(size)
    sampler = build_mask_sampler(cfg)
    if sampler is None:
        soft = draw.uniform(size=(size, cfg.MODEL.NUM_CLASSES))
        soft = soft / soft.sum(axis=1, keepdims=True)
        return Batch(clip, label=torch.from_numpy(soft.astype(np.float32)), index=index)
    grid = sampler(np.random.default_rng(0)).shape
    num = int(np.prod(grid))
    hidden = np.zeros((size, num), dtype=bool)
    for row in hidden:
        row[draw.permutation(num)[: round(num * cfg.AUG.MASK_RATIO)]] = True
    return Batch(clip, hidden=torch.from_numpy(hidden.reshape(size, *grid)), index=index)


def grad_norms(module: nn.Module, name_of: object = None) -> dict[str, float]:
    """L2 norm of every parameter's gradient in float64, by the module's own names."""
    return {n: float(p.grad.double().norm()) for n, p in module.named_parameters() if p.grad is not None}
