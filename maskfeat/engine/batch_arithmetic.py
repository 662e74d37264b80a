"""Samples per step and learning rate of a run, and the overrides that keep those of the recipe on other hardware.

Pure functions of configs. "The recipe" is the YAML as it stands, without overrides, with its own NUM_GPUS and
NUM_SHARDS. Samples are counted as the model sees them: AUG.NUM_SAMPLE views of a sample count as that many samples.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from yacs.config import CfgNode

from maskfeat.config import load_config
from maskfeat.errors import UserError
from maskfeat.optim.schedule import lr_at_epoch
from maskfeat.text import count

FEW_STEPS = 10
"""Steps of the recipe that an epoch must have at least for its rates to say anything about another set."""

_SAME = 1e-9  # relative tolerance for learning rates that were rounded in YAMLs and overrides


@dataclass(frozen=True)
class StepSize:
    """How many samples an optimization step has, and how they are distributed.

    Attributes:
        machines: NUM_SHARDS.
        processes: per machine.
        batch: TRAIN.BATCH_SIZE, per machine.
        views: per sample.
        micro: TRAIN.MICRO_BATCH_SIZE; 0 = all at once.
    """

    machines: int
    processes: int
    batch: int
    views: int
    micro: int

    @property
    def samples(self) -> int:
        """Samples per step on all machines."""
        return self.machines * self.batch * self.views

    @property
    def share(self) -> int:
        """Samples per step of one process."""
        return self.batch // self.processes * self.views

    @property
    def forward(self) -> int:
        """Samples per forward pass of one process, at most: what its memory has to hold."""
        return min(self.micro or self.share, self.share)

    @property
    def smallest(self) -> int:
        """Samples of the smallest forward pass of one process: the rest that full micro-batches leave, or all."""
        return self.share % self.forward or self.forward


def check_batch_norm(step: StepSize, positions: int) -> None:
    """Check that batch norm has more than one value a channel in every forward pass of training.

    Args:
        step: of the run. The last batch of an epoch is not smaller: what does not fill one is left out.
        positions: of one sample in the last feature map.

    Raises:
        UserError: it has one value, of which there is no variance.
    """
    if step.smallest * positions > 1:
        return
    process = f"a process has {count(step.share, 'sample')} a step (TRAIN.BATCH_SIZE {step.batch}, NUM_GPUS)"
    if step.forward < step.share:
        process += f" in micro-batches of {step.micro}, the last of which has 1"
        micro = min(n for n in range(2, step.share + 1) if step.share % n != 1)
        mend = f"set TRAIN.MICRO_BATCH_SIZE {micro}" if step.share > 2 else "set TRAIN.MICRO_BATCH_SIZE 0"
    else:
        mend = f"set TRAIN.BATCH_SIZE {2 * step.processes} or more, or fewer NUM_GPUS"
    raise UserError(
        f"batch norm needs more than one value a channel in training, but {process}, and the last feature map of a "
        f"sample is 1 x 1: {mend}, or a larger DATA.TRAIN_CROP_SIZE"
    )


def step_size(cfg: CfgNode, processes: int | None = None) -> StepSize:
    """Return the step size of a config; `processes` per machine where they differ from NUM_GPUS (torchrun)."""
    views = cfg.AUG.NUM_SAMPLE if cfg.AUG.ENABLE else 1
    processes = processes or max(cfg.NUM_GPUS, 1)
    return StepSize(cfg.NUM_SHARDS, processes, cfg.TRAIN.BATCH_SIZE, views, cfg.TRAIN.MICRO_BATCH_SIZE)


def load_recipe(path: str | Path) -> CfgNode | None:
    """Load the YAML without overrides; None where there is none, or where it is not valid without them."""
    if not path:
        return None
    logger = logging.getLogger("maskfeat.config")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its warnings were logged when the run's own config was loaded
    try:
        return load_config(path)
    except UserError:
        return None
    finally:
        logger.setLevel(level)


def _number(value: float) -> str:
    return f"{value:.10g}"


def _scale(cfg: CfgNode) -> int:
    """Return the factor on the learning rates of a config."""
    return int(cfg.NUM_SHARDS) if cfg.SOLVER.BASE_LR_SCALE_NUM_SHARDS else 1


def _rate_keys(cfg: CfgNode) -> list[str]:
    """Return the learning rate keys that have an effect."""
    keys = ["BASE_LR"]
    if cfg.SOLVER.WARMUP_EPOCHS > 0:
        keys.append("WARMUP_START_LR")
    if cfg.SOLVER.LR_POLICY == "cosine":
        keys.append("COSINE_END_LR")
    return keys


def rate_overrides(cfg: CfgNode, recipe: CfgNode, factor: float = 1.0) -> list[str]:
    """Return the overrides that give `cfg` `factor` times the learning rates of `recipe`; [] where it has them."""
    overrides = []
    for key in _rate_keys(cfg):
        wanted = factor * recipe.SOLVER[key] * _scale(recipe) / _scale(cfg)
        if not math.isclose(cfg.SOLVER[key], wanted, rel_tol=_SAME):
            overrides += [f"SOLVER.{key}", _number(wanted)]
    return overrides


def batch_overrides(step: StepSize, recipe: StepSize) -> list[str] | None:
    """Return the overrides that give a step the recipe's samples, in forward passes no larger than the recipe's.

    Returns:
        [] where it has them already; None where these processes cannot share the recipe's samples evenly.
    """
    batch, left = divmod(recipe.samples, step.machines * step.views)
    if left or batch % step.processes:
        return None
    overrides = [] if batch == step.batch else ["TRAIN.BATCH_SIZE", str(batch)]
    share = batch // step.processes * step.views
    passes = math.ceil(share / recipe.forward)
    micro = 0 if passes == 1 else math.ceil(share / passes)
    if min(step.micro or share, share) != (micro or share):
        overrides += ["TRAIN.MICRO_BATCH_SIZE", str(micro)]
    return overrides


def describe(cfg: CfgNode, step: StepSize, steps: int) -> str:
    """Describe samples per step, learning rate, warm-up and length in one line; `steps` per epoch."""
    kind = "process" if cfg.NUM_GPUS == 0 or cfg.DIST_BACKEND == "gloo" else "GPU"
    per_process = step.batch // step.processes
    processes = f"{step.processes} {kind}{'' if step.processes == 1 else 'es' if kind == 'process' else 's'}"
    parts = [processes, str(per_process), *([f"{step.views} views"] if step.views > 1 else [])]
    if step.machines > 1:
        parts.append(f"{step.machines} machines")
    line = f"{' x '.join(parts)} = {step.samples} samples a step"
    passes = math.ceil(step.share / step.forward)
    if passes > 1:
        line += f" (accumulated over {passes} micro-batches of {step.forward})"
    rate = _number(cfg.SOLVER.BASE_LR)
    if _scale(cfg) > 1:
        total = _number(cfg.SOLVER.BASE_LR * _scale(cfg))
        rate += f" x {step.machines} machines (SOLVER.BASE_LR_SCALE_NUM_SHARDS) = {total}"
    line += f"; learning rate {rate}"
    if cfg.SOLVER.WARMUP_EPOCHS:
        line += f", warm-up from {_number(lr_at_epoch(cfg, 0.0))} over {cfg.SOLVER.WARMUP_EPOCHS:g} epochs"
    return f"{line}; {count(cfg.SOLVER.MAX_EPOCH, 'epoch')} of {count(steps, 'step')}"


def compare(cfg: CfgNode, step: StepSize, recipe: CfgNode, name: str, steps: int | None = None) -> Iterator[str]:
    """Yield lines on how a run differs from its recipe, and on the overrides that restore it; none where it does not.

    A larger forward pass alone counts as a difference unless TRAIN.MICRO_BATCH_SIZE was set.

    Args:
        cfg, step: of the run.
        recipe: the config of the recipe.
        name: of the recipe, for the lines.
        steps: of the run's epochs. Where an epoch has fewer than `FEW_STEPS` steps of the recipe, no overrides are
            suggested. None = it has more.
    """
    theirs = step_size(recipe)
    rates = rate_overrides(cfg, recipe)
    differs = step.samples != theirs.samples
    if not (differs or rates or (step.forward > theirs.forward and not step.micro)):
        return
    was = [f"{theirs.samples} samples a step at learning rate {_number(recipe.SOLVER.BASE_LR * _scale(recipe))}"]
    now = [f"{step.samples} at {_number(cfg.SOLVER.BASE_LR * _scale(cfg))}"]
    if step.forward > theirs.forward:
        was.append(f"{theirs.forward} at once in a process")
        now.append(str(step.forward))
    line = f"{name} as it stands: {', '.join(was)}; this run: {', '.join(now)}"
    samples = None if steps is None else steps * step.samples
    if samples is not None and samples < FEW_STEPS * theirs.samples:
        yield (
            f"{line}. An epoch has {samples} samples here, too few for steps of {theirs.samples}: neither the recipe's "
            "step nor its rates, scaled or not, are meant for this set; try some SOLVER.BASE_LR and SOLVER.MAX_EPOCH"
        )
        return
    batch = batch_overrides(step, theirs)
    if batch is None:
        ranks = f"{step.machines} x {step.processes} processes"
        yield f"{line}. {theirs.samples} samples cannot be shared evenly by {ranks}"
    elif batch or rates:
        yield f"{line}. The same step as the recipe's: {' '.join([*batch, *rates])}"
    if not differs:
        return
    scaled = rate_overrides(cfg, recipe, step.samples / theirs.samples)
    if scaled:
        yield (
            f"or {step.samples} samples a step with rates scaled in proportion (Goyal et al., 2017): {' '.join(scaled)}"
        )
    else:
        yield f"the rates of this run are the recipe's in proportion to {step.samples} samples (Goyal et al., 2017)"
