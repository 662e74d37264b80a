"""Learning rate schedules: pure functions of the config."""

import math

from torch.optim import Optimizer
from yacs.config import CfgNode


def _after_warmup(cfg: CfgNode, epoch: float) -> float:
    solver = cfg.SOLVER
    if solver.LR_POLICY == "cosine":
        # Half a cosine (Loshchilov and Hutter, ICLR 2017) from BASE_LR to COSINE_END_LR.
        offset = solver.WARMUP_EPOCHS if solver.COSINE_AFTER_WARMUP else 0.0
        turn = math.pi * (epoch - offset) / (solver.MAX_EPOCH - offset)
        return solver.COSINE_END_LR + (solver.BASE_LR - solver.COSINE_END_LR) * (math.cos(turn) + 1.0) * 0.5
    passed = [i for i, start in enumerate(solver.STEPS) if epoch >= start]
    return solver.LRS[passed[-1]] * solver.BASE_LR if passed else solver.BASE_LR


def lr_at_epoch(cfg: CfgNode, epoch: float) -> float:
    """Return the learning rate at a fractional epoch, counted from 0.

    Linear warm-up from WARMUP_START_LR to the policy's value at WARMUP_EPOCHS, then the policy. With
    SOLVER.WARMUP_TO_BASE_LR the warm-up aims at BASE_LR instead, as timm's cosine schedule does. With
    SOLVER.BASE_LR_SCALE_NUM_SHARDS every rate is multiplied by NUM_SHARDS (machines), since TRAIN.BATCH_SIZE is per
    machine. With SOLVER.LR_PER_EPOCH a whole epoch has the rate of its first step.
    """
    solver = cfg.SOLVER
    if solver.LR_PER_EPOCH:
        epoch = float(math.floor(epoch))
    lr = _after_warmup(cfg, epoch)
    if epoch < solver.WARMUP_EPOCHS:
        target = solver.BASE_LR if solver.WARMUP_TO_BASE_LR else _after_warmup(cfg, solver.WARMUP_EPOCHS)
        lr = solver.WARMUP_START_LR + (target - solver.WARMUP_START_LR) * epoch / solver.WARMUP_EPOCHS
    return lr * (cfg.NUM_SHARDS if solver.BASE_LR_SCALE_NUM_SHARDS else 1)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group to `lr` times its "layer_decay"."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("layer_decay", 1.0)
