"""What a run starts from: weights, optimizer, average and position."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from yacs.config import CfgNode

from maskfeat.build import build_objective
from maskfeat.checkpoint.files import (
    AVERAGE,
    SHARDED,
    Position,
    given_or_latest_checkpoint,
    latest_checkpoint,
    open_checkpoint,
    read_verified_checkpoint,
)
from maskfeat.checkpoint.reading import model_state, trained_model
from maskfeat.checkpoint.sharded import load_training
from maskfeat.checkpoint.weights import LoadReport, clean_names
from maskfeat.distributed.collectives import run_on_main
from maskfeat.objectives.base import Objective
from maskfeat.optim.ema import ModelEma
from maskfeat.optim.optimizers import load_optimizer_state

logger = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """What training changes, and a checkpoint therefore holds; `average` is None without TRAIN.EMA."""

    objective: Objective
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    average: ModelEma | None = None


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


@dataclass
class Start:
    """What a run starts from; found before anything is built for a device, taken over in two parts.

    Attributes:
        path: of the checkpoint; "" = nothing.
        content: of it.
        resumes: whether optimizer, average and position are taken as well; otherwise the weights alone.
        averaged: take the file's average of the weights.
    """

    path: Path | str = ""
    content: dict[str, Any] = field(default_factory=dict)
    resumes: bool = False
    averaged: bool = False

    def is_of(self, cfg: CfgNode) -> bool:
        """Whether it is a checkpoint that this very run wrote."""
        return self.resumes and Path(self.path).parent == Path(cfg.OUTPUT_DIR) / "checkpoints"

    def load_weights(self, cfg: CfgNode, objective: Objective) -> None:
        """Give `objective` the weights.

        Raises:
            ValueError: where they are not those of this model.
        """
        if not self.path:
            return
        if not self.resumes:
            _load_weights(cfg, objective, str(self.path), self.content, AVERAGE if self.averaged else None)
            return
        report = objective.load_released_state(model_state(self.content))
        changed = [*report.resized, *report.dropped]
        if changed:
            raise ValueError(
                f"{self.path} is of another model than this run ({len(changed)} parameters differ, such as "
                f"{changed[0]}): set the crop, frames and MVIT keys back, or start anew in another OUTPUT_DIR"
            )

    def restore(self, training: TrainingState, steps: int, samples_per_step: int) -> Position:
        """Take over optimizer, average and position; the position to go on from.

        Args:
            steps: of an epoch of this run.
            samples_per_step: of this run, on all processes together.
        """
        if not self.resumes:
            return Position()
        content = self.content
        try:
            if Path(self.path).suffix == SHARDED:
                load_training(self.path, training.objective, training.optimizer)
            else:
                load_optimizer_state(training.optimizer, content["optimizer_state"])
            if training.scaler.is_enabled() and "scaler_state" in content:
                training.scaler.load_state_dict(content["scaler_state"])
            if training.average is not None:
                average = content.get(AVERAGE)
                training.average.objective.load_released_state(
                    training.objective.released_state() if average is None else average
                )
                training.average.resume()
            position = Position(int(content["epoch"]) + 1, int(content.get("step", 0)))
        except KeyError as error:
            raise ValueError(
                f"{self.path} has no {error}: only its weights can be used, TRAIN.CHECKPOINT_EPOCH_RESET True"
            ) from error
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        if position.step:
            position = self._in_these_steps(position, steps, samples_per_step)
        logger.info("resumed from %s, after %s", self.path, position)
        return position

    def _in_these_steps(self, position: Position, steps: int, samples_per_step: int) -> Position:
        """The same place in the epoch where a step has another number of samples than when it was saved."""
        before = int(self.content.get("samples_per_step", samples_per_step))
        samples = position.step * before
        step = min(samples // samples_per_step, steps)
        if before != samples_per_step:
            logger.warning(
                "a step was %d samples and is %d now: epoch %d goes on with step %d, which shows %d samples again",
                before,
                samples_per_step,
                position.epochs + 1,
                step + 1,
                samples - step * samples_per_step,
            )
        return Position(position.epochs, step)


def find_start(cfg: CfgNode) -> Start:
    """What a run starts from, the same on every rank.

    A checkpoint of this very run in OUTPUT_DIR comes first (TRAIN.AUTO_RESUME), then TRAIN.CHECKPOINT_FILE_PATH:
    weights alone with TRAIN.CHECKPOINT_EPOCH_RESET, with TRAIN.CHECKPOINT_AVERAGE (their average) or where another
    objective wrote it, everything otherwise.
    """
    name = cfg.MODEL.MODEL_NAME
    found = run_on_main(lambda: latest_checkpoint(cfg.OUTPUT_DIR, cfg.TASK, name))
    if found is not None:
        if cfg.TRAIN.AUTO_RESUME:
            return Start(found, open_checkpoint(found), resumes=True)
        logger.warning("%s is there, but TRAIN.AUTO_RESUME is False: it will be overwritten in time", found)
    given = cfg.TRAIN.CHECKPOINT_FILE_PATH
    if not given:
        return Start()
    content = read_verified_checkpoint(given)
    averaged = cfg.TRAIN.CHECKPOINT_AVERAGE
    if averaged and AVERAGE not in content:
        raise ValueError(f"{given} has no average of the weights ({AVERAGE}): set TRAIN.CHECKPOINT_AVERAGE False")
    resumes = not cfg.TRAIN.CHECKPOINT_EPOCH_RESET and not averaged and trained_model(content) == name
    return Start(given, content, resumes, averaged)


def load_for_testing(cfg: CfgNode, device: torch.device) -> dict[str, Objective]:
    """TEST.CHECKPOINT_FILE_PATH, else the last checkpoint of OUTPUT_DIR, else TRAIN.CHECKPOINT_FILE_PATH.

    Returns:
        objectives on `device`: "" = the weights, and with TRAIN.EMA "ema" = their average, where the file has one.
    """
    found = given_or_latest_checkpoint(cfg.TEST.CHECKPOINT_FILE_PATH, cfg.OUTPUT_DIR, cfg.TASK, cfg.MODEL.MODEL_NAME)
    if found is None and cfg.TRAIN.CHECKPOINT_FILE_PATH:
        found = cfg.TRAIN.CHECKPOINT_FILE_PATH, read_verified_checkpoint(cfg.TRAIN.CHECKPOINT_FILE_PATH)
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
