"""The trainer: what is trained, how one step is made, and how far training has come."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from yacs.config import CfgNode

from maskfeat.batch import Batch
from maskfeat.build import build_objective, build_optimizer
from maskfeat.checkpoint.files import AVERAGE, Position
from maskfeat.checkpoint.weights import list_problems, not_finite
from maskfeat.distributed.collectives import all_gather_object, all_reduce_sum
from maskfeat.distributed.fsdp import full_optimizer_state_dict, full_state_dict
from maskfeat.distributed.world import World
from maskfeat.engine.metrics_log import MetricWindow
from maskfeat.engine.parallelize import (
    apply_activation_checkpointing,
    apply_compile,
    apply_ddp,
    apply_fsdp,
    autocast,
    gradient_sync,
)
from maskfeat.engine.rng import seed_everything
from maskfeat.errors import NotFinite
from maskfeat.models.layers import unfuse_attention
from maskfeat.objectives.base import Objective
from maskfeat.optim.ema import ModelEma
from maskfeat.optim.optimizers import clip_gradients, load_optimizer_state
from maskfeat.optim.schedule import lr_at_epoch, set_lr
from maskfeat.optim.skipped_steps import BatchNormGuard, SkippedStepCounter, skip_step_if

CPU = torch.device("cpu")


class Trainer:
    """An objective in training. It knows nothing about the pre-training method.

    Args:
        objective: on `device`, sharded by `apply_fsdp` or whole.
        optimizer: of the objective's parameters, with fused kernels.
        lr: the learning rate at a fractional epoch.
        device: where steps are computed.
        world: this process and how many there are.
        max_epoch: epochs of the whole training.
        seed: of everything sampled on the device, together with step and rank.
        precision: "off", "bf16" or "fp16" for the forward pass; losses and targets are float32.
        clip_norm: clip the norm of the whole gradient to this; None = no.
        clip_value: clip every entry of the gradient to this; None = no.
        micro_batch: samples per forward pass of a process; 0 = all.
        ema: moving average of the weights, updated after every step; None = none.

    Attributes:
        model: `objective`, wrapped in DistributedDataParallel where there are several processes.
        scaler: loss scaling for fp16; disabled otherwise.
        metrics: loss, metrics and gradient norm of the steps since they were last read, on the device.
        skipped: how many steps in a row were skipped because their loss or gradient was not finite.
        position: epochs that are done, and steps of the current one.
        samples_per_step: of all processes; tells where a checkpoint lies in its epoch if the batch size changes.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer,
        lr: Callable[[float], float],
        *,
        device: torch.device = CPU,
        world: World | None = None,
        max_epoch: int = 1,
        seed: int = 0,
        precision: str = "off",
        clip_norm: float | None = None,
        clip_value: float | None = None,
        micro_batch: int = 0,
        ema: ModelEma[Objective] | None = None,
    ) -> None:
        self.objective, self.optimizer, self.lr, self.ema = objective, optimizer, lr, ema
        self.device, self.world = device, world or World()
        self.max_epoch, self.seed, self.precision = max_epoch, seed, precision
        self.clip_norm, self.clip_value, self.micro_batch = clip_norm, clip_value, micro_batch
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.metrics, self.skipped = MetricWindow(), SkippedStepCounter(device)
        self._batch_norms = BatchNormGuard(objective)
        self.model: nn.Module = apply_ddp(objective, self.world, static=not micro_batch)
        self.position, self.samples_per_step = Position(), 0

    def begin_step(self, steps_per_epoch: int) -> float:
        """Set the learning rate of the next step and seed what it samples, so that a resumed run repeats it.

        Returns:
            the learning rate.
        """
        epoch, step = self.position.epochs, self.position.step
        lr = self.lr(epoch + step / steps_per_epoch)
        set_lr(self.optimizer, lr)
        seed_everything(self.seed, epoch * steps_per_epoch + step, self.world.rank)
        return lr

    def train_step(self, batch: Batch) -> None:
        """Make one optimization step on this rank's share of a batch, in micro-batches.

        Each loss is a mean over its own terms. Weighting it by its number of terms over that of the whole step (all
        ranks, all micro-batches) makes the gradient that of the mean over the step. A step whose gradient is not finite
        is skipped, on all ranks since all have the same gradient, and counted. A loss that is not finite makes the
        gradient NaN.

        Args:
            batch: on the trainer's device.
        """
        parts = self.objective.prepare(batch).split(self.micro_batch)
        weights = [self.objective.weight(part) for part in parts]
        total = all_reduce_sum(torch.stack(weights).sum()).clamp(min=1)
        self.optimizer.zero_grad(set_to_none=True)
        outputs = []
        for part, weight in zip(parts, weights, strict=True):
            with gradient_sync(self.model, last=part is parts[-1]):
                with autocast(self.device, self.precision):
                    out = self.model(part)
                share = torch.where(out.loss.isfinite(), weight * self.world.size / total, torch.nan)
                self.scaler.scale(out.loss * share).backward()
            outputs.append((weight, out))
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.model.parameters(), self.clip_norm, self.clip_value)
        finite = torch.isfinite(norm)
        skipped = (~finite).float()
        with skip_step_if(skipped, self.optimizer):
            self.optimizer.step()
        self.scaler.update()
        self._batch_norms.restore(skipped)
        if self.ema is not None:
            self.ema.update(skipped)
        self.skipped.count(skipped)
        clipped = (norm > self.clip_norm).float() if self.clip_norm else torch.zeros_like(norm)
        for weight, out in outputs:
            values = {"loss": out.loss, **out.metrics, "grad_norm": norm, "clipped": clipped}
            shown = {name: torch.where(finite, value.detach().float(), 0.0) for name, value in values.items()}
            self.metrics.add(weight * finite, shown, counts={"skipped": skipped / len(outputs)})

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a shard of the parameters (FSDP2)."""
        return isinstance(self.objective, FSDPModule)

    def check_finite(self) -> None:
        """Check that weights, buffers, their average and the optimizer's state are finite; collective.

        Raises:
            NotFinite: on every rank, naming them.
        """
        tensors = list(self.objective.released_state().items())
        if self.ema is not None:
            tensors += [(f"{AVERAGE}: {name}", value) for name, value in self.ema.module.released_state().items()]
        for name, parameter in self.objective.named_parameters():
            for slot, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors.append((f"{slot} of {self.objective.released_name(name)}", value))
        names = list(dict.fromkeys(name for found in all_gather_object(not_finite(tensors)) for name in found))
        if names:
            raise NotFinite(
                f"{len(names)} weights, or states of the optimizer, are not finite (NaN or infinite) at "
                f"{self.position}:\n  {list_problems(names, 6)}"
            )

    def state_dict(self, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return what a checkpoint file holds, full tensors on the CPU; collective. Ranks other than 0, which write no
        file, get only a part of it.

        Args:
            extra: more to store, such as the config.
        """
        keep = self.world.is_main
        content: dict[str, Any] = {
            "model_state": full_state_dict(self.objective.released_state(), keep),
            "optimizer_state": full_optimizer_state_dict(self.optimizer, keep),
        }
        if self.ema is not None:
            content[AVERAGE] = full_state_dict(self.ema.module.released_state(), keep)
        return {**content, **self.plain_state(extra)}

    def plain_state(self, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the part of the state that is not made of tensors; `extra` as in `state_dict`."""
        content: dict[str, Any] = {"epoch": self.position.epochs - 1, **(extra or {})}
        if self.position.step:
            content.update(step=self.position.step, samples_per_step=self.samples_per_step)
        if self.scaler.is_enabled():
            content["scaler_state"] = self.scaler.state_dict()
        return content

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Load optimizer, loss scale, average and position. The weights are loaded before the trainer is built, see
        `CheckpointSource.load_weights`, because the optimizer of a sharded objective refers to its shards.

        Raises:
            KeyError: the checkpoint lacks a part of the state.
            UserError: the state belongs to another model or to other parameter groups.
        """
        load_optimizer_state(self.optimizer, content["optimizer_state"])
        if self.ema is not None:
            average = content.get(AVERAGE)
            self.ema.module.load_released_state(self.objective.released_state() if average is None else average)
            self.ema.resume()
        self.load_plain_state(content)

    def load_plain_state(self, content: Mapping[str, Any]) -> None:
        """Load what `plain_state` returns; KeyError where the position is missing."""
        if self.scaler.is_enabled() and "scaler_state" in content:
            self.scaler.load_state_dict(content["scaler_state"])
        self.position = Position(int(content["epoch"]) + 1, int(content.get("step", 0)))


def precision_of(section: CfgNode) -> str:
    """Return MIXED_PRECISION of TRAIN or TEST as "off", "bf16" or "fp16" (True is fp16, as in PySlowFast)."""
    return {False: "off", True: "fp16"}.get(section.MIXED_PRECISION, section.MIXED_PRECISION)


def build_trainer(
    cfg: CfgNode, device: torch.device, world: World | None = None, objective: Objective | None = None
) -> Trainer:
    """Build a trainer from a config.

    Args:
        objective: with its weights loaded, on the CPU; None = a new one.
    """
    world = world or World()
    objective = objective or build_objective(cfg)
    sharded = cfg.TRAIN.PARALLEL == "fsdp"
    if sharded:  # before the optimizer, which refers to the shards
        _transform(cfg, objective, device)
        apply_fsdp(objective, world, device)
    elif any(parameter.device != device for parameter in objective.parameters()):  # fake ones cannot be moved
        objective.to(device)
    optimizer = build_optimizer(cfg, objective)
    ema = ModelEma(objective, cfg.TRAIN.EMA) if cfg.TRAIN.EMA else None
    if not sharded:  # after ModelEma has copied the objective
        _transform(cfg, objective, device)
    return Trainer(
        objective,
        optimizer,
        lambda epoch: lr_at_epoch(cfg, epoch),
        device=device,
        world=world,
        max_epoch=cfg.SOLVER.MAX_EPOCH,
        seed=cfg.RNG_SEED,
        precision=precision_of(cfg.TRAIN),
        clip_norm=cfg.SOLVER.CLIP_GRAD_L2NORM,
        clip_value=cfg.SOLVER.CLIP_GRAD_VAL,
        micro_batch=cfg.TRAIN.MICRO_BATCH_SIZE,
        ema=ema,
    )


def _transform(cfg: CfgNode, objective: Objective, device: torch.device) -> None:
    if device.type == "cpu" and precision_of(cfg.TRAIN) == "bf16":
        unfuse_attention(objective)
    if cfg.MODEL.ACT_CHECKPOINT:
        apply_activation_checkpointing(objective, light=cfg.MODEL.ACT_CHECKPOINT == "light")
    if cfg.TRAIN.COMPILE:
        apply_compile(objective, device)
