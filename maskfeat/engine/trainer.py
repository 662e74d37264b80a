"""One training as a config says: what it starts from, its loop, checkpoints and validation."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from yacs.config import CfgNode

from maskfeat.build import build_backbone, build_loader, build_objective, build_optimizer
from maskfeat.checkpoint.files import Position
from maskfeat.config import save_config
from maskfeat.data.loader import BatchLoader
from maskfeat.distributed.collectives import FlagExchange, broadcast_buffers, run_on_main
from maskfeat.distributed.fsdp import gather_into
from maskfeat.distributed.hang_watchdog import HangWatchdog
from maskfeat.distributed.preemption import Preempted, StopRequest
from maskfeat.distributed.world import World
from maskfeat.engine.batch_arithmetic import compare, describe, load_recipe, step_size
from maskfeat.engine.evaluate import validate
from maskfeat.engine.flops import cost_table, module_costs
from maskfeat.engine.loop import Settings, train
from maskfeat.engine.metrics_log import MetricsLog, read_json_stats
from maskfeat.engine.parallelize import apply_activation_checkpointing, apply_compile, apply_ddp, apply_fsdp
from maskfeat.engine.resume import TrainingState, find_start
from maskfeat.engine.rng import seed_everything
from maskfeat.engine.saver import Saver
from maskfeat.objectives.base import Objective
from maskfeat.optim.ema import ModelEma, restore_statistics_of_skipped_steps
from maskfeat.optim.schedule import lr_at_epoch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CommandLine:
    """The command line of a run: the YAML's path and the overrides."""

    path: str
    opts: tuple[str, ...]


def precision_of(cfg: CfgNode) -> str:
    """TRAIN.MIXED_PRECISION as "off", "bf16" or "fp16" (True is fp16, as in PySlowFast)."""
    return {False: "off", True: "fp16"}.get(cfg.TRAIN.MIXED_PRECISION, cfg.TRAIN.MIXED_PRECISION)


def _is_due(cfg: CfgNode, objective: Objective, epoch: int) -> bool:
    """Whether to validate after `epoch`: every TRAIN.EVAL_PERIOD epochs, and after the last one (of pre-training only
    where the period is not longer than the run); 0 = never.
    """
    period, last = cfg.TRAIN.EVAL_PERIOD, cfg.SOLVER.MAX_EPOCH
    if period == 0:
        return False
    return (epoch + 1) % period == 0 or (epoch + 1 == last and (objective.classifies or period <= last))


def _announce(
    cfg: CfgNode, given: CommandLine, objective: Objective, device: torch.device, world: World, steps: int
) -> None:
    count = sum(p.numel() for p in objective.parameters())
    if cfg.LOG_MODEL_INFO:
        with torch.device("meta"):
            twin = build_backbone(cfg)
        for line in ("The backbone, for one view:", *cost_table(module_costs(twin))):
            logger.info(line)
    logger.info(
        "%s, %.2f M parameters, on %d x %s, %s precision",
        type(objective).__name__,
        count / 1e6,
        world.size,
        torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        {"off": "fp32"}.get(precision_of(cfg), precision_of(cfg)),
    )
    step, recipe = step_size(cfg, world.local_size), load_recipe(given.path)
    differences = () if recipe is None else compare(cfg, step, recipe, Path(given.path).name)
    for line in (describe(cfg, step, steps), *differences):
        logger.info(line)


def training_state(
    cfg: CfgNode, device: torch.device, objective: Objective | None = None, world: World | None = None
) -> TrainingState:
    """What a run trains, on its device: `objective`, which has its weights already, or a fresh one."""
    objective = objective or build_objective(cfg)
    if cfg.TRAIN.PARALLEL == "fsdp":  # before the optimizer, whose parameters are the pieces
        _transform(cfg, objective, device)
        apply_fsdp(objective, world or World(), device)
    else:
        objective.to(device)
    optimizer = build_optimizer(cfg, objective)
    scaler = torch.amp.GradScaler(device.type, enabled=precision_of(cfg) == "fp16")
    restore_statistics_of_skipped_steps(objective, optimizer)
    average = ModelEma(objective, optimizer, cfg.TRAIN.EMA) if cfg.TRAIN.EMA else None
    if cfg.TRAIN.PARALLEL != "fsdp":  # after the average, which copies the objective
        _transform(cfg, objective, device)
    return TrainingState(objective, optimizer, scaler, average)


def _transform(cfg: CfgNode, objective: Objective, device: torch.device) -> None:
    if cfg.MODEL.ACT_CHECKPOINT:
        apply_activation_checkpointing(objective, light=cfg.MODEL.ACT_CHECKPOINT == "light")
    if cfg.TRAIN.COMPILE:
        apply_compile(objective, device)


def settings_of(cfg: CfgNode) -> Settings:
    """How the loop trains."""
    return Settings(
        max_epoch=cfg.SOLVER.MAX_EPOCH,
        lr=lambda epoch: lr_at_epoch(cfg, epoch),
        seed=cfg.RNG_SEED,
        clip_norm=cfg.SOLVER.CLIP_GRAD_L2NORM,
        clip_value=cfg.SOLVER.CLIP_GRAD_VAL,
        precision=precision_of(cfg),
        micro_batch=cfg.TRAIN.MICRO_BATCH_SIZE,
        log_period=cfg.LOG_PERIOD,
        max_skipped=cfg.TRAIN.MAX_SKIPPED_STEPS,
    )


def _trained(cfg: CfgNode, training: TrainingState, device: torch.device) -> dict[str, Objective]:
    """What is evaluated, the same on every rank: "" = the weights, "ema" = their average, where there is one."""
    if cfg.TRAIN.PARALLEL == "fsdp":
        return {"": gather_into(training.objective, build_objective(cfg).to(device))}
    average = {} if training.average is None else {"ema": training.average.objective}
    objectives = {"": training.objective, **average}
    for objective in objectives.values():
        broadcast_buffers(objective)
    return objectives


class _Checks:
    """What happens between two steps and between two epochs: saving, validation, and stopping where that is asked for.

    Args:
        steps: of an epoch.
        due: the epochs, counted from 0, after which `validates` is called with their number.
    """

    def __init__(
        self,
        cfg: CfgNode,
        saver: Saver,
        watch: HangWatchdog,
        stop: StopRequest,
        steps: int,
        due: Collection[int],
        validates: Callable[[int], None],
    ) -> None:
        self._cfg, self._saver, self._watch, self._stop = cfg, saver, watch, stop
        self._steps, self._due, self._validates = steps, due, validates
        self._agreement = FlagExchange()

    def after_step(self, epoch: int, step: int) -> None:
        """Save where that is due or the run is to stop; every rank finds the same.

        Raises:
            Preempted: once it is saved.
        """
        self._watch.beat(f"epoch {epoch + 1}, done with step {step}")
        self._saver.look_after()
        stops, is_due = self._agreement.exchange(bool(self._stop), self._saver.is_due)
        if stops or is_due:
            # At the end of an epoch this says that its checkpoint and validation are still to be made.
            self._saver.save(Position(epoch, step), must=stops)
        if stops:
            raise Preempted(self._stop.reason or "a signal to another process")

    def after_epoch(self, epoch: int) -> None:
        """Save and validate where that is due."""
        cfg, last = self._cfg, epoch + 1 == self._cfg.SOLVER.MAX_EPOCH
        if (epoch + 1) % cfg.TRAIN.CHECKPOINT_PERIOD == 0 or last:
            self._saver.save(Position(epoch + 1), must=last)
        elif epoch in self._due:
            self._saver.save(Position(epoch, self._steps))  # so that a validation can be broken off
        if epoch in self._due:
            self._validates(epoch)


def run_training(
    cfg: CfgNode,
    given: CommandLine,
    world: World,
    device: torch.device,
    logbook: MetricsLog,
    watch: HangWatchdog,
    stop: StopRequest,
) -> dict[str, Objective]:
    """Train as configured; returns the trained objectives, on `device`, as `_trained` names them.

    Raises:
        Preempted: where `stop` was asked for, once the state is saved.
    """
    seed_everything(cfg.RNG_SEED)
    objective = build_objective(cfg)
    loader = build_loader(cfg, "train", world, device=device)
    _announce(cfg, given, objective, device, world, len(loader))
    max_epoch = cfg.SOLVER.MAX_EPOCH
    due = [epoch for epoch in range(max_epoch) if _is_due(cfg, objective, epoch)]
    val_loader = build_loader(cfg, "val", world, device=device) if due else None
    start = find_start(cfg)
    start.load_weights(cfg, objective)
    training = training_state(cfg, device, objective, world)
    samples_per_step = loader.batch_size * world.size
    position = start.restore(training, len(loader), samples_per_step)
    if world.is_main:
        # Not earlier: a run that is refused leaves the folder of another one as it was.
        save_config(given.path, given.opts, cfg, cfg.OUTPUT_DIR)
    model = apply_ddp(objective, world, static=not cfg.TRAIN.MICRO_BATCH_SIZE)
    saver = Saver(cfg, training, world, samples_per_step, position)

    def validates(epoch: int) -> None:
        assert val_loader is not None
        _validate(cfg, _trained(cfg, training, device), val_loader, device, logbook, epoch, watch)

    checks = _Checks(cfg, saver, watch, stop, len(loader), due, validates)
    if not position.step and start.is_of(cfg) and position.epochs - 1 in due and not _validated(cfg, position.epochs):
        validates(position.epochs - 1)  # it was broken off
    if position.epochs >= max_epoch:
        logger.info("nothing left to train: SOLVER.MAX_EPOCH is %d", max_epoch)
    try:
        train(
            model,
            objective,
            training.optimizer,
            training.scaler,
            loader,
            settings_of(cfg),
            start=(position.epochs, position.step),
            device=device,
            world=world,
            logbook=logbook,
            beat=watch.beat,
            after_step=checks.after_step,
            after_epoch=checks.after_epoch,
        )
    except Preempted:  # perhaps in a validation, while a checkpoint is still being written
        saver.finish()
        raise
    return _trained(cfg, training, device)


def _validated(cfg: CfgNode, epochs: int) -> bool:
    """Whether the run's log has the validation after so many epochs; the same on every rank."""
    name, log = f"{epochs}/{cfg.SOLVER.MAX_EPOCH}", Path(cfg.OUTPUT_DIR) / "stdout.log"
    return run_on_main(lambda: any(entry["epoch"] == name for entry in read_json_stats(log, "val_epoch")))


def _validate(
    cfg: CfgNode,
    objectives: Mapping[str, Objective],
    loader: BatchLoader,
    device: torch.device,
    logbook: MetricsLog,
    epoch: int,
    watch: HangWatchdog,
) -> None:
    values = {}
    for name, objective in objectives.items():
        found = validate(objective, loader, device, precision_of(cfg), watch.proceed)
        values.update({f"{name}_{key}" if name else key: value for key, value in found.items()})
    shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    stats = {"epoch": f"{epoch + 1}/{cfg.SOLVER.MAX_EPOCH}", **values}
    logbook.write("val_epoch", f"validation after epoch {epoch + 1}: {shown}", stats, epoch)
