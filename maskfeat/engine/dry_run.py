"""What a run would do, found out without starting it: `--dry-run` of `maskfeat train`. Nothing is written."""

import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from yacs.config import CfgNode

from maskfeat.build import build_backbone, build_loader, build_objective
from maskfeat.checkpoint.reading import trained_classes
from maskfeat.config.show import differences, plain
from maskfeat.data.datasets.base import NoValidation
from maskfeat.data.datasets.classes import check_same_classes, describe_split, missing_classes
from maskfeat.data.loader import BatchLoader
from maskfeat.distributed.launch import check_devices
from maskfeat.distributed.world import World, choose_device
from maskfeat.engine.batch_arithmetic import StepSize, check_batch_norm, compare, describe, load_recipe, step_size
from maskfeat.engine.flops import cost_table, module_costs
from maskfeat.engine.memory import StepMemory, estimate_step_memory
from maskfeat.engine.oom import explain_oom
from maskfeat.engine.owner import owner_of
from maskfeat.engine.provenance import machine
from maskfeat.engine.resume import CheckpointSource, find_source, find_tested, load_to_evaluate
from maskfeat.engine.rng import seed_everything
from maskfeat.engine.setup import CommandLine
from maskfeat.engine.trainer import Trainer, build_trainer
from maskfeat.engine.validation import validation_epochs
from maskfeat.errors import UserError
from maskfeat.objectives.base import Objective
from maskfeat.optim.schedule import lr_at_epoch
from maskfeat.registry import backbone_spec, dataset_spec
from maskfeat.text import count, duration

logger = logging.getLogger(__name__)

STEPS = 5
"""Steps that are timed, after a first one."""
_PATIENCE = 120.0
"""Seconds after which no further step is begun."""
_MOST_KEYS = 200
_COLUMNS, _LEVELS = 60, "▁▂▃▄▅▆▇█"


@dataclass
class DryRun:
    """The parts of a run that are there so far, and what would keep it from starting.

    Args:
        cfg: the config of the run.
        command_line: of the run.
        steps: that are timed; 0 = none is computed.
    """

    cfg: CfgNode
    command_line: CommandLine
    steps: int = STEPS
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.local = max(self.cfg.NUM_GPUS, 1)
        self.world = World(0, self.local * self.cfg.NUM_SHARDS, 0, self.local)
        # What the loaders find out about bad files is not written into OUTPUT_DIR, nor is a model sharded or compiled.
        self.trial = self.cfg.clone()
        self.trial.defrost()
        self.trial.TRAIN.COMPILE, self.trial.TRAIN.PARALLEL = False, "ddp"

    @contextmanager
    def part(self, title: str) -> Iterator[None]:
        """A part of the report, whose errors that a user can mend are problems of the run."""
        logger.info("\n%s", title)
        try:
            yield
        except UserError as error:
            self.problems.append(str(error))
            logger.error("  problem: %s", error)

    def run(self) -> int:
        """Report on the run; 0 where it would start, else 1."""
        cfg = self.cfg
        self.config()
        with self.part("Machine"):
            logger.info("  %s", machine())
            check_devices(cfg.NUM_GPUS, cfg.DIST_BACKEND)
        self.folder()
        with tempfile.TemporaryDirectory() as scratch:
            self.trial.OUTPUT_DIR = scratch
            objective = self.model()
            loaders = self.data(objective)
            source = self.weights(objective, loaders)
            if cfg.TRAIN.ENABLE:
                train = loaders.get("train")
                self.schedule(train)
                memory = self.memory(objective)
                self.training(objective, source, train, memory)
        if self.problems:
            listed = "\n".join(f"  {problem}" for problem in self.problems)
            logger.error("\nThe run would not start: %s\n%s", count(len(self.problems), "problem"), listed)
            return 1
        logger.info("\nThe run would start.")
        return 0

    # ---------------------------------------------------------------------- what is given

    def config(self) -> None:
        """The keys that differ from the recipe."""
        recipe = load_recipe(self.command_line.path)
        if recipe is None:
            return
        found = differences(self.cfg, recipe)
        logger.info(
            "Config %s, with %s changed", self.command_line.path, count(len(found), "key") if found else "no key"
        )
        for key, (value, before) in list(found.items())[:_MOST_KEYS]:
            logger.info("  %s %s (the recipe's: %s)", key, plain(value), plain(before))
        logger.info("What differs from the defaults: --print-config diff")

    def folder(self) -> None:
        """OUTPUT_DIR, which is not made: whether it can be, and who uses it."""
        with self.part("OUTPUT_DIR"):
            folder = Path(self.cfg.OUTPUT_DIR)
            there = _existing(folder)
            logger.info("  %s%s", folder, "" if there == folder else f", to be made in {there}")
            if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
                raise UserError(f"OUTPUT_DIR {folder} cannot be made or written, because of {there}")
            owner = owner_of(folder) if self.cfg.TRAIN.ENABLE else ""
            if owner:
                raise UserError(f"OUTPUT_DIR {folder} is in use by another run ({owner}): give another OUTPUT_DIR")

    def model(self) -> Objective:
        """The model and its cost, module by module."""
        with torch.device("meta"):
            twin = build_backbone(self.cfg)
        logger.info("\nModel: the backbone, for one view")
        for line in cost_table(module_costs(twin)):
            logger.info("  %s", line)
        seed_everything(self.cfg.RNG_SEED)
        objective = build_objective(self.trial)
        numbers = sum(parameter.numel() for parameter in objective.parameters())
        logger.info("  %s: %s parameters in all", type(objective).__name__, f"{numbers:,}")
        return objective

    # ---------------------------------------------------------------------- data and weights

    def data(self, objective: Objective) -> dict[str, BatchLoader]:
        """The samples of each split that the run would read."""
        cfg, loaders = self.cfg, dict[str, BatchLoader]()
        classifies = objective.classifies
        splits = ["train"] if cfg.TRAIN.ENABLE else []
        splits += ["val"] if splits and validation_epochs(cfg, classifies) else []
        splits += ["test"] if cfg.TEST.ENABLE else []
        for split in splits:
            with self.part(f"Data: {split}"):
                clips = dataset_spec(cfg, "TEST").test_views(cfg)[0][0] if split == "test" else None
                classes = loaders["train"].classes if "train" in loaders else self._classes_of_tested()
                device = self.device if split == "train" else None
                try:
                    loader = build_loader(self.trial, split, self.world, clips, device, classes=classes)
                except NoValidation as error:
                    logger.info("  nothing is validated, TRAIN.EVAL_PERIOD has no effect: %s", error)
                    continue
                loaders[split] = loader
                logger.info(
                    "  %s", describe_split(split, loader.dataset, cfg.MODEL.NUM_CLASSES if classifies else None)
                )
                warning = missing_classes(split, loader.dataset, cfg.MODEL.NUM_CLASSES) if classifies else ""
                if warning and split == "train":
                    logger.warning("  %s", warning)
        return loaders

    def _classes_of_tested(self) -> list[str] | None:
        """Names of the classes of the checkpoint that is tested, where the run does not train."""
        if not self.cfg.TRAIN.ENABLE:
            with suppress(UserError):  # which "Weights" says
                return trained_classes(self._tested[1])
        return None

    @cached_property
    def _tested(self) -> tuple[str, dict[str, Any]]:
        return find_tested(self.cfg)

    @property
    def device(self) -> torch.device:
        """Where a step would be computed; the CPU where this machine has no GPU."""
        return choose_device(self.cfg.NUM_GPUS, 0)

    def weights(self, objective: Objective, loaders: dict[str, BatchLoader]) -> CheckpointSource:
        """What would be loaded, resized, left as it is and dropped, from which file."""
        source = CheckpointSource()
        with self.part("Weights"):
            if not self.cfg.TRAIN.ENABLE:
                path, content = self._tested
                if "test" in loaders:
                    check_same_classes(path, trained_classes(content), loaders["test"].dataset)
                load_to_evaluate(self.cfg, objective, path, content)
                return source
            source = find_source(self.cfg)
            if not source.path:
                logger.info("  none: training starts from random weights")
            if "train" in loaders:
                source.check_classes(loaders["train"].dataset)
            source.load_weights(self.cfg, objective)
        return source

    # ---------------------------------------------------------------------- training

    def schedule(self, loader: BatchLoader | None) -> None:
        """Samples a step, learning rate over the epochs, and how both differ from the recipe's."""
        cfg = self.cfg
        step, recipe = step_size(cfg), load_recipe(self.command_line.path)
        with self.part("Schedule"):
            steps = None if loader is None else len(loader)
            if steps is not None:
                logger.info("  %s", describe(cfg, step, steps))
            if recipe is not None:
                for line in compare(cfg, step, recipe, Path(self.command_line.path).name, steps):
                    logger.info("  %s", line)
            logger.info("  learning rate: %s", rate_curve(cfg))

    def memory(self, objective: Objective) -> StepMemory | None:
        """Memory of a step in one process, and room for checkpoints."""
        cfg, step = self.cfg, step_size(self.cfg)
        with self.part("Memory and disk"):
            if any(isinstance(module, _BatchNorm) for module in objective.modules()):
                check_batch_norm(step, math.prod(objective.backbone.grid))
            memory = estimate_step_memory(cfg, step.share, self.device)
            parts = {name: value for name, value in memory._asdict().items() if name != "total"}
            listed = ", ".join(f"{name} {_size(value)}" for name, value in parts.items())
            logger.info("  a step of one process, estimated: %s (%s)", _size(memory.total), listed)
            self._disk(memory.parameters + memory.optimizer)
            self._check_memory(memory, step)
            return memory
        return None

    def _check_memory(self, memory: StepMemory, step: StepSize) -> None:
        if self.device.type == "cuda":
            there, needed, what = torch.cuda.mem_get_info(self.device)[0], memory.total, "the GPU"
            if self.cfg.TRAIN.PARALLEL == "fsdp":  # at least: parts of it are gathered for a while
                needed -= (memory.parameters + memory.optimizer) * (self.world.size - 1) // self.world.size
        elif self.cfg.NUM_GPUS and self.cfg.DIST_BACKEND != "gloo":
            return  # the run is for another machine
        else:
            there, needed, what = _free_memory(), memory.total * self.local, "this machine"
        logger.info("  free on %s: %s", what, _size(there) if there else "not known")
        if there and needed > there:
            recompute = "MODEL.ACT_CHECKPOINT True, " if backbone_spec(self.cfg).act_checkpoint else ""
            raise UserError(
                f"a step takes about {_size(needed)}, and {what} has {_size(there)} free: set TRAIN.MICRO_BATCH_SIZE "
                f"{max(step.forward // 2, 1)} or less, {recompute}or a smaller TRAIN.BATCH_SIZE"
            )

    def _disk(self, checkpoint: int) -> None:
        cfg = self.cfg.TRAIN
        files = math.ceil(self.cfg.SOLVER.MAX_EPOCH / cfg.CHECKPOINT_PERIOD)
        files = min(files, cfg.KEEP_CHECKPOINTS) if cfg.KEEP_CHECKPOINTS else files
        files += bool(cfg.KEEP_BEST and cfg.KEEP_CHECKPOINTS)  # otherwise it is one of them
        total = checkpoint * (files + 1)  # a new one is there before an old one is deleted
        free = shutil.disk_usage(_existing(Path(self.cfg.OUTPUT_DIR))).free
        logger.info(
            "  %s of about %s: %s on disk, of %s free",
            count(files, "checkpoint"),
            _size(checkpoint),
            _size(total),
            _size(free),
        )
        if checkpoint > free:
            raise UserError(
                f"a checkpoint takes {_size(checkpoint)}, and {_size(free)} is free: give another OUTPUT_DIR"
            )
        if total > free:
            logger.warning("  not all of them would find room: see TRAIN.KEEP_CHECKPOINTS and TRAIN.CHECKPOINT_PERIOD")

    def training(
        self, objective: Objective, source: CheckpointSource, loader: BatchLoader | None, memory: StepMemory | None
    ) -> None:
        """The optimizer's groups, the state that is restored, and some real steps of one process."""
        with self.part("Optimizer"):
            trainer = build_trainer(self.trial, self.device, World(), objective)
            for line in group_table(trainer.optimizer):
                logger.info("  %s", line)
            if loader is not None:
                source.restore(trainer, len(loader), loader.batch_size * self.world.size)
        if self.problems or memory is None or loader is None or not self.steps:
            logger.info("\nNo step was computed%s.", ", because of the problems" if self.problems else "")
            return
        with self.part(f"{count(self.steps, 'step')} of one process, after a first one"):
            try:
                self._time(trainer, loader)
            except (RuntimeError, MemoryError, OSError) as error:
                text = explain_oom(error, self.cfg, self.local)
                if text is None:
                    raise
                raise UserError(text) from error

    def _time(self, trainer: Trainer, loader: BatchLoader) -> None:
        """Compute real steps, on real data, and say how long an epoch and the run would take."""
        position, total = trainer.position, trainer.max_epoch * len(loader)
        done = min(position.epochs, trainer.max_epoch - 1), position.step if position.step < len(loader) else 0
        loader.set_epoch(done[0])
        loader.set_start(done[1])
        trainer.model.train()
        waited, began, taken = 0.0, time.perf_counter(), 0
        first = asked = began
        for batch in loader:
            now = time.perf_counter()
            waited += now - asked
            trainer.begin_step(len(loader))
            trainer.train_step(batch.to(trainer.device))
            if trainer.device.type == "cuda":
                torch.cuda.synchronize()
            asked, taken = time.perf_counter(), taken + 1
            if taken == 1:  # with the start of workers and kernels
                first, waited = asked, 0.0
            if taken > self.steps or asked - began > _PATIENCE:
                break
        timed = max(taken - 1, 1)
        seconds = (asked - (first if taken > 1 else began)) / timed
        plainly = self.cfg.TRAIN.COMPILE or self.cfg.TRAIN.PARALLEL != "ddp" or self.world.size > 1
        logger.info(
            "  %.3g s a step, %.0f %% of it waiting for data%s",
            seconds,
            100 * waited / timed / seconds,
            "; in one process, neither compiled nor sharded" if plainly else "",
        )
        left = total - position.epochs * len(loader) - position.step
        epoch, whole = duration(seconds * len(loader)), duration(seconds * max(left, 0))
        logger.info("  an epoch: %s, what is left of the run: %s (validation and tests not counted)", epoch, whole)
        if trainer.device.type == "cuda":
            logger.info("  memory of the GPU, measured: %s", _size(torch.cuda.max_memory_allocated(trainer.device)))


# -------------------------------------------------------------------------- texts


def rate_curve(cfg: CfgNode) -> str:
    """Return the learning rate over the epochs as a line of bars, with its first, highest and last value."""
    last = cfg.SOLVER.MAX_EPOCH
    epochs = [last * column / (_COLUMNS - 1) for column in range(_COLUMNS - 1)] + [last - 1e-6]
    rates = [lr_at_epoch(cfg, epoch) for epoch in epochs]
    most = max(rates) or 1.0
    bars = "".join(_LEVELS[min(int(rate / most * len(_LEVELS)), len(_LEVELS) - 1)] for rate in rates)
    top = epochs[rates.index(max(rates))]
    return f"{bars} from {rates[0]:.3g} to {max(rates):.3g} (epoch {top:.3g}) and {rates[-1]:.3g} (epoch {last})"


def group_table(optimizer: Optimizer) -> list[str]:
    """Return the lines of a table of the optimizer's parameter groups."""
    lines = [f"{'parameters':>12}{'tensors':>9}{'weight decay':>14}{'rate x':>10}"]
    for group in optimizer.param_groups:
        numbers = sum(parameter.numel() for parameter in group["params"])
        decay, factor = f"{group['weight_decay']:.4g}", f"{group.get('layer_decay', 1.0):.4g}"
        lines.append(f"{numbers:>12,}{len(group['params']):>9}{decay:>14}{factor:>10}")
    return [f"{type(optimizer).__name__}, {count(len(optimizer.param_groups), 'group')}", *lines]


def _size(number: float) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**28 else f"{number / 2**20:.1f} MiB"


def _existing(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _free_memory() -> int:
    """Return the bytes of this machine that can be taken; 0 = not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 0
