"""From a config to a training that is ready to run: checkpoint, data, trainer, and the lines that announce it."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from yacs.config import CfgNode

from maskfeat.build import build_backbone, build_loader, build_objective
from maskfeat.config import save_config
from maskfeat.data.datasets.base import NoValidation
from maskfeat.data.datasets.classes import describe_split, missing_classes
from maskfeat.data.loader import BatchLoader
from maskfeat.engine.agreement import check_same_samples
from maskfeat.engine.batch_arithmetic import check_batch_norm, compare, describe, load_recipe, step_size
from maskfeat.engine.flops import cost_table, module_costs
from maskfeat.engine.pictures import Pictures
from maskfeat.engine.resume import find_source
from maskfeat.engine.rng import seed_everything
from maskfeat.engine.saver import Saver
from maskfeat.engine.session import Session
from maskfeat.engine.trainer import Trainer, build_trainer, precision_of
from maskfeat.engine.validation import Validator, validation_epochs, validation_record
from maskfeat.objectives.base import Objective

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CommandLine:
    """The command line of a run: the YAML's path and the overrides."""

    path: str
    opts: tuple[str, ...]


class Training(NamedTuple):
    """A training that is ready to run."""

    trainer: Trainer
    loader: BatchLoader
    saver: Saver
    validator: Validator
    pictures: Pictures


def prepare_training(cfg: CfgNode, command_line: CommandLine, session: Session) -> Training:
    """Build a training from a config, restored from its last checkpoint where there is one; collective.

    Raises:
        UserError: data, checkpoint or config cannot be used.
        Preempted: the run was asked to stop during a validation that is repeated.
    """
    world, device = session.world, session.device
    # First: what changed since a checkpoint was written explains what comes then.
    source = find_source(cfg, session.watchdog.beat)
    seed_everything(cfg.RNG_SEED)
    objective = build_objective(cfg)
    if any(isinstance(module, _BatchNorm) for module in objective.modules()):
        check_batch_norm(step_size(cfg, world.local_size), math.prod(objective.backbone.grid))
    loader = build_loader(cfg, "train", world, device=device)
    check_same_samples("train", loader)
    _announce(cfg, command_line, objective, session, len(loader))
    source.check_classes(loader.dataset)
    epochs, val_loader = validation_epochs(cfg, objective.classifies), None
    try:
        if epochs:
            val_loader = build_loader(cfg, "val", world, device=device, classes=loader.classes)
    except NoValidation as error:
        epochs = []
        logger.info("nothing is validated, TRAIN.EVAL_PERIOD has no effect: %s", error)
    check_same_samples("val", val_loader)
    announce_data(cfg, objective.classifies, {"train": loader} | ({"val": val_loader} if val_loader else {}))
    warning = missing_classes("train", loader.dataset, cfg.MODEL.NUM_CLASSES) if objective.classifies else ""
    if warning and world.is_main:
        logger.warning(warning)
    source.load_weights(cfg, objective)
    trainer = build_trainer(cfg, device, world, objective)
    as_saved = source.restore(trainer, len(loader), loader.batch_size * world.size)
    session.metrics_log.begin(trainer.position.epochs * len(loader) + trainer.position.step)
    if world.is_main:
        # Not earlier: a run that is refused leaves the folder of another one as it was.
        save_config(command_line.path, command_line.opts, cfg, cfg.OUTPUT_DIR)
    classes = loader.classes if objective.classifies else None
    saver = Saver(cfg, trainer, classes, saved=as_saved and source.is_of(cfg))
    validator = Validator(
        trainer,
        val_loader,
        epochs,
        lambda: build_objective(cfg).to(device),
        precision_of(cfg.TEST),
        session.metrics_log,
        validation_record(cfg),
        session.watchdog.proceed,
        saver.keep_if_best,
    )
    pictures = _pictures(cfg, trainer, val_loader, validator, session)
    epoch = trainer.position.epochs - 1  # the last one that is done
    if not source.is_of(cfg):
        validator.forget()
        saver.forget_best()
    elif not trainer.position.step and validator.is_due(epoch) and not validator.has_run(epoch):
        validator.run(epoch)  # it was interrupted
    if trainer.position.epochs >= trainer.max_epoch:
        logger.info("nothing left to train: %s is done, SOLVER.MAX_EPOCH is %d", trainer.position, trainer.max_epoch)
    return Training(trainer, loader, saver, validator, pictures)


def _pictures(
    cfg: CfgNode, trainer: Trainer, val_loader: BatchLoader | None, validator: Validator, session: Session
) -> Pictures:
    """Pictures of predictions, where there are any: of the validation set, or else of the training set, plain."""
    loader = val_loader
    if trainer.objective.classifies or not cfg.VIS.PERIOD:
        loader = None
    elif loader is None:
        loader = build_loader(cfg, "train", session.world, device=session.device, plain=True)
    return Pictures(cfg, trainer, loader, validator.objectives, session.metrics_log)


def announce_data(cfg: CfgNode, classifies: bool, loaders: Mapping[str, BatchLoader]) -> None:
    """Log what each split holds."""
    for split, loader in loaders.items():
        logger.info(describe_split(split, loader.dataset, cfg.MODEL.NUM_CLASSES if classifies else None))


def _announce(cfg: CfgNode, command_line: CommandLine, objective: Objective, session: Session, steps: int) -> None:
    """Log model, device, precision, samples per step and learning rate, and how they differ from the recipe's."""
    world, device = session.world, session.device
    count = sum(p.numel() for p in objective.parameters())
    if cfg.LOG_MODEL_INFO:
        with torch.device("meta"):
            twin = build_backbone(cfg)
        for line in ("The backbone, for one view:", *cost_table(module_costs(twin))):
            logger.info(line)
    logger.info(
        "%s, %.2f M parameters, on %d x %s, %s precision (evaluation: %s)",
        type(objective).__name__,
        count / 1e6,
        world.size,
        torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        *({"off": "fp32"}.get(kind, kind) for kind in (precision_of(cfg.TRAIN), precision_of(cfg.TEST))),
    )
    step, recipe = step_size(cfg, world.local_size), load_recipe(command_line.path)
    differences = () if recipe is None else compare(cfg, step, recipe, Path(command_line.path).name, steps)
    for line in (describe(cfg, step, steps), *differences):
        logger.info(line)
