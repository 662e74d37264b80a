"""The checkpoint to resume from, or whose weights to load."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from maskfeat.build import build_objective
from maskfeat.checkpoint.download import Beat, nobody
from maskfeat.checkpoint.files import (
    AVERAGE,
    SHARDED,
    Position,
    given_or_latest_checkpoint,
    latest_checkpoint,
    latest_of_other_tasks,
    open_checkpoint,
    read_verified_checkpoint,
)
from maskfeat.checkpoint.reading import model_state, prefetch, trained_classes, trained_model
from maskfeat.checkpoint.sharded import load_training
from maskfeat.checkpoint.weights import LoadReport, Misfit, clean_names
from maskfeat.data.datasets.classes import check_same_classes
from maskfeat.data.loader import LabelledSamples
from maskfeat.distributed.collectives import run_on_main
from maskfeat.engine.changes import RESIZABLE, Change, announce, built_differently, listed, seen_differently
from maskfeat.engine.trainer import Trainer
from maskfeat.errors import UserError, about
from maskfeat.objectives.base import Objective
from maskfeat.registry import load, objective_spec
from maskfeat.text import matches

logger = logging.getLogger(__name__)


def fit_weights(
    cfg: CfgNode, objective: Objective, path: str, content: dict[str, Any], key: str | None = None, tested: bool = False
) -> LoadReport:
    """Load the weights of a file as TRAIN.CHECKPOINT_* say; `key` as in `model_state`.

    Args:
        tested: whether they are for a test, for the log: others are what a training began with.
    """
    state = clean_names(model_state(content, key), cfg.TRAIN.CHECKPOINT_CLEAR_NAME_PATTERN)
    average = cfg.TRAIN.CHECKPOINT_INFLATE == "average"
    report = objective.load_released_state(state, cfg.TRAIN.CHECKPOINT_ALLOW, average)
    said = f"{'to evaluate: ' if tested else ''}{'averaged weights' if key else 'weights'}"
    logger.info("%s from %s\n%s", said, path, report.table())
    return report


def _load_to_train(
    cfg: CfgNode, objective: Objective, path: str, content: dict[str, Any], key: str | None = None
) -> None:
    """Load weights that training starts from, with TRAIN.CHECKPOINT_ALLOW; `key` as in `model_state`.

    Raises:
        UserError: they do not fit; names the keys of the file's own config that differ.
    """
    different = built_differently(content, cfg)
    try:
        fit_weights(cfg, objective, path, content, key)
    except Misfit as error:
        classifier = objective.released_name("head.projection.")
        if not _deciding(different) or all(problem.startswith(classifier) for problem in error.problems):
            raise UserError(f"{path}: {error}{_in_brackets(different)}") from error
        raise UserError(f"{path} does not fit: {_of_another_network(different)}\n({error.summary})") from error
    except UserError as error:
        raise about(path, error) from error
    if different:
        logger.info("the network of %s was another one: %s", path, listed(different))


def load_to_evaluate(
    cfg: CfgNode, objective: Objective, path: str, content: dict[str, Any], key: str | None = None
) -> LoadReport:
    """Load weights that are evaluated as they are; `key` as in `model_state`.

    TRAIN.CHECKPOINT_ALLOW may name what is left over in the file, and nothing of the model: no parameter stays random.

    Returns:
        what was done with each parameter.

    Raises:
        UserError: a parameter is missing or does not fit, or the file's own config is that of another network.
    """
    different = built_differently(content, cfg)
    try:
        report = fit_weights(cfg, objective, path, content, key, tested=True)
    except Misfit as error:
        why = f"{error.summary}{_in_brackets(different)}"
        if _deciding(different):
            why = _of_another_network(different, path)
        elif trained_model(content) not in (None, cfg.MODEL.MODEL_NAME):
            why = f"MODEL.MODEL_NAME was {trained_model(content)!r} and is {cfg.MODEL.MODEL_NAME!r}: {error.summary}"
        raise UserError(f"{path} cannot be evaluated: {why}") from error
    except UserError as error:
        raise about(path, error) from error
    parameters = {objective.released_name(name) for name, _ in objective.named_parameters()}
    constant = objective.load_rules(model_state(content, key)).fresh
    random = [name for name in report.fresh if name in parameters or not matches(name, constant)]
    if random:
        what = "classifier" if objective.classifies else "prediction head"
        advice = "a pre-trained checkpoint is fine-tuned before it is tested; " if objective.classifies else ""
        raise UserError(
            f"{path} has no {what} of this model{_in_brackets(different)}, it would be random ({', '.join(random)}): "
            f"{advice}see TEST.CHECKPOINT_FILE_PATH (TRAIN.CHECKPOINT_ALLOW is for training alone)"
        )
    if _deciding(different):
        raise UserError(f"{path} cannot be evaluated: {_of_another_network(different, path)}")
    seen = [] if key else seen_differently(content, cfg)
    if seen:
        logger.warning("%s was trained with other inputs than it is shown now: %s", path, listed(seen))
    return report


def _deciding(changes: Sequence[Change]) -> list[Change]:
    """Return the changes after which weights are not those of this network, however they are resized."""
    return [change for change in changes if change.key not in RESIZABLE]


def _in_brackets(changes: Sequence[Change]) -> str:
    return f" ({listed(changes)})" if changes else ""


def _of_another_network(changes: Sequence[Change], path: str = "") -> str:
    """Return which keys make the network another one than that of a checkpoint, and how to give its own."""
    config = Path(path).parent.parent / "config.yaml"
    whole = f", or the run's whole config: --cfg {config}" if path and config.exists() else ""
    return f"it is of another network: {listed(changes)}. Give the former values as overrides{whole}"


@dataclass
class CheckpointSource:
    """The checkpoint that a training begins with. It is found before anything is built on a device.

    Attributes:
        path: of the checkpoint; "" = none, train from scratch.
        content: of it.
        resumes: whether optimizer, average and position are restored as well; otherwise the weights alone.
        averaged: load the checkpoint's average of the weights.
    """

    path: Path | str = ""
    content: dict[str, Any] = field(default_factory=dict)
    resumes: bool = False
    averaged: bool = False

    def is_of(self, cfg: CfgNode) -> bool:
        """Return whether this very run wrote the checkpoint."""
        return self.resumes and Path(self.path).parent == Path(cfg.OUTPUT_DIR) / "checkpoints"

    def check_classes(self, dataset: LabelledSamples) -> None:
        """Check that a classifier goes on with the classes of `dataset`; raise UserError if they are others."""
        if self.resumes:
            check_same_classes(self.path, trained_classes(self.content), dataset)

    def load_weights(self, cfg: CfgNode, objective: Objective) -> None:
        """Load the weights into `objective`.

        Raises:
            UserError: they are those of another model.
        """
        if not self.path:
            return
        if not self.resumes:
            _load_to_train(cfg, objective, str(self.path), self.content, AVERAGE if self.averaged else None)
            return
        try:
            report = objective.load_released_state(model_state(self.content))
            changed = [f"{name} {shapes}" for name, shapes in report.resized.items()]
            changed += [f"{name} is not in this model" for name in report.dropped]
        except Misfit as error:
            changed = error.problems
        except UserError as error:
            raise about(self.path, error) from error
        if changed:
            raise UserError(
                f"{self.path} belongs to another model than this run ({len(changed)} parameters differ: {changed[0]}): "
                f"restore the keys of the model, or start a new run in another OUTPUT_DIR than {cfg.OUTPUT_DIR}"
            )

    def restore(self, trainer: Trainer, steps: int, samples_per_step: int) -> bool:
        """Restore optimizer, average and position of `trainer`, where this is a checkpoint to resume from.

        Args:
            steps: of an epoch of this run.
            samples_per_step: of this run, of all processes together.

        Returns:
            whether the position is that of the checkpoint, and not one step count translated into another.

        Raises:
            UserError: the checkpoint lacks a part of the state, or it belongs to another model.
        """
        if not self.resumes:
            return False
        try:
            if Path(self.path).suffix == SHARDED:
                load_training(self.path, trainer.objective, trainer.optimizer)
                trainer.load_plain_state(self.content)
            else:
                trainer.load_state_dict(self.content)
            trainer.check_finite()
        except KeyError as error:
            raise UserError(
                f"{self.path} has no {error}: only its weights can be used, as TRAIN.CHECKPOINT_FILE_PATH of a run in "
                "another OUTPUT_DIR, with TRAIN.CHECKPOINT_EPOCH_RESET True"
            ) from error
        except UserError as error:
            raise about(self.path, error) from error
        saved = trainer.position
        if saved.step:
            trainer.position = self._in_these_steps(saved, steps, samples_per_step)
        logger.info("resumed from %s, after %s", self.path, trainer.position)
        return trainer.position == saved

    def _in_these_steps(self, position: Position, steps: int, samples_per_step: int) -> Position:
        """Return the same place in the epoch where the number of samples per step has changed since it was saved."""
        before = int(self.content.get("samples_per_step", samples_per_step))
        samples = position.step * before
        step = min(samples // samples_per_step, steps)
        if before != samples_per_step:
            logger.warning(
                "a step had %d samples and has %d now: epoch %d continues with step %d, which repeats %d samples",
                before,
                samples_per_step,
                position.epochs + 1,
                step + 1,
                samples - step * samples_per_step,
            )
        return Position(position.epochs, step)


def find_source(cfg: CfgNode, beat: Beat = nobody) -> CheckpointSource:
    """Return the checkpoint that a training begins with, the same on every rank, and log how the config changed since.

    A checkpoint of this very run in OUTPUT_DIR comes first (TRAIN.AUTO_RESUME), then TRAIN.CHECKPOINT_FILE_PATH:
    weights alone with TRAIN.CHECKPOINT_EPOCH_RESET, with TRAIN.CHECKPOINT_AVERAGE (their average) or where another
    objective wrote it, everything otherwise. Fine-tuning without such a file starts from the newest pre-training
    checkpoint in OUTPUT_DIR, as in PySlowFast.

    Args:
        beat: of the watchdog, while weights are downloaded.

    Raises:
        UserError: it cannot be used with this config.
    """
    name = cfg.MODEL.MODEL_NAME
    found = run_on_main(lambda: latest_checkpoint(cfg.OUTPUT_DIR, cfg.TASK, name))
    if found is not None:
        if cfg.TRAIN.AUTO_RESUME:
            return _resumed(cfg, CheckpointSource(found, open_checkpoint(found), resumes=True))
        logger.warning(
            "%s is there, but TRAIN.AUTO_RESUME is False: this run starts over, and moves it away when it saves", found
        )
    given = cfg.TRAIN.CHECKPOINT_FILE_PATH or _pretrained(cfg)
    if not given:
        if objective_spec(cfg).classifies:
            logger.info("no TRAIN.CHECKPOINT_FILE_PATH is given: training starts from random weights")
        return CheckpointSource()
    prefetch(given, beat)
    content = read_verified_checkpoint(given)
    averaged = cfg.TRAIN.CHECKPOINT_AVERAGE
    if averaged and AVERAGE not in content:
        raise UserError(f"{given} has no average of the weights ({AVERAGE}): set TRAIN.CHECKPOINT_AVERAGE False")
    resumes = not cfg.TRAIN.CHECKPOINT_EPOCH_RESET and not averaged and trained_model(content) == name
    source = CheckpointSource(given, content, resumes, averaged)
    return _resumed(cfg, source) if resumes else source


def _resumed(cfg: CfgNode, source: CheckpointSource) -> CheckpointSource:
    """Log what changed since `source` was written, and return it."""
    finished = int(source.content.get("epoch", -1)) + 1 >= cfg.SOLVER.MAX_EPOCH
    announce(source.path, source.content, cfg, source.is_of(cfg), finished)
    return source


def _pretrained(cfg: CfgNode) -> Path | None:
    """Return the newest checkpoint of pre-training in OUTPUT_DIR, where this run classifies; as its config says."""
    objectives = load(cfg.PLUGINS).objectives

    def pretrains(content: dict[str, Any]) -> bool:
        spec = objectives.get(trained_model(content) or "")
        return spec is not None and not spec.classifies

    if not objective_spec(cfg).classifies:
        return None
    found = run_on_main(lambda: latest_of_other_tasks(cfg.OUTPUT_DIR, cfg.TASK, pretrains))
    if found is not None:
        logger.info(
            "no TRAIN.CHECKPOINT_FILE_PATH is given: training starts from %s, the newest checkpoint of pre-training in "
            "OUTPUT_DIR (from random weights in another OUTPUT_DIR)",
            found,
        )
    return found


def find_tested(cfg: CfgNode, beat: Beat = nobody) -> tuple[str, dict[str, Any]]:
    """Return path and content of what is tested: TEST.CHECKPOINT_FILE_PATH, else the last checkpoint of OUTPUT_DIR,
    else TRAIN.CHECKPOINT_FILE_PATH.

    Args:
        beat: of the watchdog, while weights are downloaded.

    Raises:
        UserError: there is none, it cannot be read, or those of this run are all damaged or of another model.
    """
    prefetch(cfg.TEST.CHECKPOINT_FILE_PATH, beat)
    found = given_or_latest_checkpoint(cfg.TEST.CHECKPOINT_FILE_PATH, cfg.OUTPUT_DIR, cfg.TASK, cfg.MODEL.MODEL_NAME)
    if found is None and cfg.TRAIN.CHECKPOINT_FILE_PATH:
        prefetch(cfg.TRAIN.CHECKPOINT_FILE_PATH, beat)
        found = cfg.TRAIN.CHECKPOINT_FILE_PATH, read_verified_checkpoint(cfg.TRAIN.CHECKPOINT_FILE_PATH)
        logger.warning(
            "OUTPUT_DIR %s has no checkpoint of this run: TRAIN.CHECKPOINT_FILE_PATH %s is tested",
            cfg.OUTPUT_DIR,
            found[0],
        )
    if found is None:
        raise UserError(
            f"nothing to test: OUTPUT_DIR {cfg.OUTPUT_DIR} has no checkpoint of this run, and neither "
            "TEST.CHECKPOINT_FILE_PATH nor TRAIN.CHECKPOINT_FILE_PATH is given"
        )
    return str(found[0]), found[1]


def load_for_testing(cfg: CfgNode, device: torch.device, path: str, content: dict[str, Any]) -> dict[str, Objective]:
    """Load what `find_tested` found.

    Returns:
        objectives on `device`: "" = the weights, and with TRAIN.EMA "ema" = their average, where the file has one.
    """
    averaged = bool(cfg.TRAIN.EMA) and AVERAGE in content
    objectives = {}
    for name, key in {"": None, **({"ema": AVERAGE} if averaged else {})}.items():
        objective = build_objective(cfg)
        load_to_evaluate(cfg, objective, path, content, key)
        objectives[name] = objective.to(device)
    return objectives
