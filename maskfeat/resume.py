"""What a run starts from and what it leaves behind: weights, optimizer, average and epoch."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from yacs.config import CfgNode

from maskfeat.build import build_objective
from maskfeat.checkpoint import AVERAGE, checkpoint_path, given_or_last, last_checkpoint, save_checkpoint
from maskfeat.config import dump_config
from maskfeat.objectives.base import Objective
from maskfeat.optim import load_optimizer_state
from maskfeat.step_hooks import WeightAverage
from maskfeat.weight_files import model_state, read_checkpoint, trained_model
from maskfeat.weights import LoadReport, clean_names

logger = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """What training changes, and a checkpoint therefore holds; `average` is None without TRAIN.EMA."""

    objective: Objective
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None = None


def _load_weights(
    cfg: CfgNode, objective: Objective, path: str, content: dict[str, Any], key: str | None = None
) -> LoadReport:
    """Load the weights of a file as TRAIN.CHECKPOINT_* say; `key` as in `model_state`."""
    state = clean_names(model_state(content, key), cfg.TRAIN.CHECKPOINT_CLEAR_NAME_PATTERN)
    try:
        average = cfg.TRAIN.CHECKPOINT_INFLATE == "average"
        report = objective.load_released_state(state, cfg.TRAIN.CHECKPOINT_ALLOW, average)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    logger.info("%s from %s\n%s", "averaged weights" if key else "weights", path, report.table())
    return report


def _resume(training: TrainingState, path: Path, content: dict[str, Any]) -> int:
    """Take over weights, optimizer, average and epoch; returns the epoch to start with."""
    report = training.objective.load_released_state(model_state(content))
    changed = [*report.resized, *report.dropped]
    if changed:
        raise ValueError(
            f"{path} is of another model than this run ({len(changed)} parameters differ, such as {changed[0]}): set "
            "the crop, frames and MVIT keys back, or start anew in another OUTPUT_DIR"
        )
    try:
        load_optimizer_state(training.optimizer, content["optimizer_state"])
        if training.scaler.is_enabled() and "scaler_state" in content:
            training.scaler.load_state_dict(content["scaler_state"])
        if training.average is not None:
            training.average.begin_with(content.get(AVERAGE))
        epoch = int(content["epoch"]) + 1
    except KeyError as error:
        raise ValueError(
            f"{path} has no {error}: only its weights can be used, TRAIN.CHECKPOINT_EPOCH_RESET True"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    logger.info("resumed from %s, after epoch %d", path, epoch)
    return epoch


def start_training(cfg: CfgNode, training: TrainingState) -> int:
    """Weights (and, on resuming, everything else) to start from; returns the first epoch, counted from 0.

    A checkpoint of this very run in OUTPUT_DIR comes first (TRAIN.AUTO_RESUME), then TRAIN.CHECKPOINT_FILE_PATH:
    weights alone with TRAIN.CHECKPOINT_EPOCH_RESET, with TRAIN.CHECKPOINT_AVERAGE (their average) or where another
    objective wrote it, everything otherwise.
    """
    name = cfg.MODEL.MODEL_NAME
    found = last_checkpoint(cfg.OUTPUT_DIR, cfg.TASK, name)
    if found is not None:
        if cfg.TRAIN.AUTO_RESUME:
            return _resume(training, *found)
        logger.warning("%s is there, but TRAIN.AUTO_RESUME is False: it will be overwritten in time", found[0])
    given = cfg.TRAIN.CHECKPOINT_FILE_PATH
    if not given:
        return 0
    content = read_checkpoint(given)
    averaged = cfg.TRAIN.CHECKPOINT_AVERAGE
    if averaged and AVERAGE not in content:
        raise ValueError(f"{given} has no average of the weights ({AVERAGE}): set TRAIN.CHECKPOINT_AVERAGE False")
    if not cfg.TRAIN.CHECKPOINT_EPOCH_RESET and not averaged and trained_model(content) == name:
        return _resume(training, Path(given), content)
    _load_weights(cfg, training.objective, given, content, AVERAGE if averaged else None)
    return 0


def save_training(cfg: CfgNode, training: TrainingState, epoch: int) -> None:
    """Write the checkpoint after `epoch`, counted from 0."""
    content = {
        "epoch": epoch,
        "model_state": training.objective.released_state(),
        "optimizer_state": training.optimizer.state_dict(),
        "cfg": dump_config(cfg),
    }
    if training.scaler.is_enabled():
        content["scaler_state"] = training.scaler.state_dict()
    if training.average is not None:
        content[AVERAGE] = training.average.objective.released_state()
    path = checkpoint_path(cfg.OUTPUT_DIR, cfg.TASK, epoch)
    save_checkpoint(path, content)
    logger.info("saved %s", path)


def load_for_testing(cfg: CfgNode, device: torch.device) -> dict[str, Objective]:
    """TEST.CHECKPOINT_FILE_PATH, else the last checkpoint of OUTPUT_DIR, else TRAIN.CHECKPOINT_FILE_PATH.

    Returns:
        objectives on `device`: "" = the weights, and with TRAIN.EMA "ema" = their average, where the file has one.
    """
    found = given_or_last(cfg.TEST.CHECKPOINT_FILE_PATH, cfg.OUTPUT_DIR, cfg.TASK, cfg.MODEL.MODEL_NAME)
    if found is None and cfg.TRAIN.CHECKPOINT_FILE_PATH:
        found = cfg.TRAIN.CHECKPOINT_FILE_PATH, read_checkpoint(cfg.TRAIN.CHECKPOINT_FILE_PATH)
    if found is None:
        raise ValueError(
            f"nothing to test: OUTPUT_DIR {cfg.OUTPUT_DIR} has no checkpoint of this run, and neither "
            "TEST.CHECKPOINT_FILE_PATH nor TRAIN.CHECKPOINT_FILE_PATH is given"
        )
    path, content = found
    averaged = bool(cfg.TRAIN.EMA) and AVERAGE in content
    objectives = {}
    for name, key in {"": None, **({"ema": AVERAGE} if averaged else {})}.items():
        objective = build_objective(cfg)
        report = _load_weights(cfg, objective, str(path), content, key)
        if report.fresh and not cfg.TRAIN.CHECKPOINT_ALLOW:
            raise ValueError(
                f"{path} has no classifier ({', '.join(report.fresh)}): a pre-trained checkpoint is fine-tuned "
                "before it is tested; see TEST.CHECKPOINT_FILE_PATH"
            )
        objectives[name] = objective.to(device)
    return objectives
