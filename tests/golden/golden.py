"""Rebuilds the inputs and weights behind the golden values (the recipe stands in the golden files' README)."""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from maskfeat.batch import Batch
from maskfeat.build import build_mask_sampler, build_objective
from maskfeat.config import load_config
from maskfeat.engine.trainer import CPU, Trainer
from maskfeat.objectives.base import Objective
from maskfeat.optim.schedule import lr_at_epoch, set_lr

REPO = Path(__file__).resolve().parents[2]


def salted_draw(name: str, shape: tuple[int, ...], salt: int) -> np.ndarray:
    """Normal numbers (std 0.02) from a generator seeded by a released name."""
    draw = np.random.RandomState((zlib.crc32(name.encode()) + salt) % 2**32)
    return np.asarray(draw.standard_normal(shape) * 0.02, dtype=np.float32)


def salted_state(shapes: Mapping[str, tuple[int, ...]], salt: int) -> dict[str, Tensor]:
    """Weights drawn from a generator seeded by each released name; `hogs.*` are constants and left out."""
    state = {}
    for name, shape in shapes.items():
        if name.startswith("hogs."):
            continue
        value = salted_draw(name, shape, salt)
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


def load_golden(name: str) -> Any:
    """One of the compact copies beside this file."""
    with gzip.open(Path(__file__).with_name(f"{name}.json.gz"), "rt") as file:
        return json.load(file)


def recipe(name: str, opts: Sequence[str] = ()) -> CfgNode:
    """The resolved config of a recipe."""
    return load_config(REPO / "configs" / "masked_ssl" / f"{name}.yaml", opts)


def follow(
    run: dict[str, Any],
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    first: int,
    precision: str = "off",
    micro_batch: int = 0,
    device: torch.device = CPU,
) -> list[dict[str, float]]:
    """Steps `first` to 7 of a golden trajectory through the training loop's own step; what each logged.

    Args:
        objective: on `device`.
    """
    cfg = recipe(run["config"], run["opts"])
    trainer = Trainer(
        objective,
        optimizer,
        lambda epoch: lr_at_epoch(cfg, epoch),
        device=device,
        clip_norm=cfg.SOLVER.CLIP_GRAD_L2NORM,
        precision=precision,
        micro_batch=micro_batch,
    )
    logged = []
    for step in range(first, 8):
        set_lr(optimizer, trainer.lr(step))
        batch = golden_batch(cfg, run["seed"] * 1000 + step, run["batch"])
        trainer.train_step(batch.to(device))
        logged.append({**trainer.metrics.read(), "lr": trainer.lr(step)})
    return logged


def final_norm(objective: Objective) -> float:
    """L2 norm of all parameters together."""
    total: float = sum(p.detach().double().square().sum().item() for p in objective.parameters())
    return total**0.5
