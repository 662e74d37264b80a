"""The training loop: fetch, accumulate, clip, step, log, save. It knows nothing of what is learned."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from maskfeat.batch import Batch
from maskfeat.data.loader import BatchLoader
from maskfeat.distributed.collectives import all_reduce_sum
from maskfeat.distributed.world import World
from maskfeat.engine.metrics_log import MetricsLog, MetricWindow, format_eta
from maskfeat.engine.parallelize import autocast, gradient_sync
from maskfeat.engine.rng import seed_everything
from maskfeat.objectives.base import Objective
from maskfeat.optim.ema import SkippedStepCounter
from maskfeat.optim.optimizers import clip_gradients
from maskfeat.optim.schedule import set_lr


@dataclass(frozen=True)
class Settings:
    """How to train; see the config keys of the same names.

    Attributes:
        lr: learning rate at a fractional epoch.
        precision: "off", "bf16" or "fp16": of the forward pass; losses and targets are float32.
        micro_batch: samples of a process in one forward pass; 0 = all.
        max_skipped: steps in a row whose gradient may not be finite before the run stops.
    """

    max_epoch: int
    lr: Callable[[float], float]
    seed: int
    clip_norm: float | None = None
    clip_value: float | None = None
    precision: str = "off"
    micro_batch: int = 0
    log_period: int = 10
    max_skipped: int = 20


def optimisation_step(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    batch: Batch,
    settings: Settings,
    window: MetricWindow,
    world: World,
) -> None:
    """One step on this rank's share of a batch, in micro-batches.

    Every loss is a mean over its own terms; weighing each by its terms over those of the whole step (all ranks, all
    micro-batches) makes the gradient that of the mean over the step.

    Args:
        model: `objective`, perhaps wrapped for several processes.
        window: takes loss, metrics, the gradient norm before clipping and whether it was clipped, of steps that were
            made; and counts those that were skipped because their gradient was not finite (on every rank, since all
            have the same gradient; the optimizer's state stays as it was).
    """
    parts = objective.prepare(batch).split(settings.micro_batch)
    weights = [objective.weight(part) for part in parts]
    total = all_reduce_sum(torch.stack(weights).sum()).clamp(min=1)
    optimizer.zero_grad(set_to_none=True)
    outputs = []
    for part, weight in zip(parts, weights, strict=True):
        with gradient_sync(model, last=part is parts[-1]):
            with autocast(batch.clip.device, settings.precision):
                out = model(part)
            scaler.scale(out.loss * (weight * world.size / total)).backward()
        outputs.append((weight, out))
    scaler.unscale_(optimizer)
    norm = clip_gradients(model.parameters(), settings.clip_norm, settings.clip_value)
    finite = torch.isfinite(norm)
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    else:
        # What a GradScaler tells a fused optimizer: without a stop for the device, a step that must not count.
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    clipped = (norm > settings.clip_norm).float() if settings.clip_norm else torch.zeros_like(norm)
    for weight, out in outputs:
        values = {"loss": out.loss, **out.metrics, "grad_norm": norm, "clipped": clipped}
        shown = {name: torch.where(finite, value.detach().float(), 0.0) for name, value in values.items()}
        window.add(weight * finite, shown, counts={"skipped": (~finite).float() / len(outputs)})


class Progress:
    """Times a run and writes its lines."""

    def __init__(
        self, logbook: MetricsLog, steps: int, settings: Settings, done_before: int, lost: SkippedStepCounter
    ) -> None:
        self.logbook, self.steps, self.settings, self.lost = logbook, steps, settings, lost
        self.done, self.todo = 0, settings.max_epoch * steps - done_before
        self.started = time.perf_counter()
        self.begin_window()

    def begin_window(self) -> None:
        """Times from here."""
        self.since, self.since_step = time.perf_counter(), self.done
        self.waited, self.samples = 0.0, 0

    def fetched(self, seconds: float, samples: int) -> None:
        """Note the wait for one batch and its size over all ranks."""
        self.waited += seconds
        self.samples += samples
        self.done += 1

    def leave_out(self, seconds: float) -> None:
        """Time that went into saving and validation: it counts for neither speed nor ETA."""
        self.since += seconds
        self.started += seconds

    @property
    def is_due(self) -> bool:
        """Whether a line is due: every LOG_PERIOD steps, over the borders of epochs, and after the last step."""
        return self.done - self.since_step >= self.settings.log_period or self.done == self.todo

    def write(self, epoch: int, step: int, lr: float, window: MetricWindow, device: torch.device) -> None:
        """Read the window and write its line.

        Raises:
            FloatingPointError: where as many steps in a row were skipped as TRAIN.MAX_SKIPPED_STEPS says.
        """
        values = window.read()
        now = time.perf_counter()
        spent, steps = now - self.since, self.done - self.since_step
        left = (now - self.started) / self.done * (self.todo - self.done)
        stats = {
            "epoch": f"{epoch + 1}/{self.settings.max_epoch}",
            "iter": f"{step + 1}/{self.steps}",
            "dt": spent / steps,
            "dt_data": self.waited / steps,
            **values,
            "lr": lr,
            "samples_per_second": self.samples / spent,
            "eta": format_eta(left),
        }
        if device.type == "cuda":
            stats["gpu_mem"] = f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f}G"
        self.logbook.write("train_iter", self._line(stats, values, spent), stats, epoch * self.steps + step)
        lost, ago = self.lost.read()
        if lost >= self.settings.max_skipped:
            epoch, step = divmod(epoch * self.steps + step - ago, self.steps)
            raise FloatingPointError(
                f"{lost} steps in a row, from epoch {epoch + 1}, step {step + 1} on, had gradients that are not finite "
                f"and were skipped (TRAIN.MAX_SKIPPED_STEPS {self.settings.max_skipped}): try a lower SOLVER.BASE_LR, "
                "SOLVER.CLIP_GRAD_L2NORM, or TRAIN.MIXED_PRECISION bf16"
            )
        self.begin_window()

    def _line(self, stats: Mapping[str, Any], values: Mapping[str, float], spent: float) -> str:
        """The line for people."""
        extra = [f"{k} {v:.4g}" for k, v in values.items() if k not in ("loss", "grad_norm", "clipped", "skipped")]
        beside = f" ({', '.join(extra)})" if extra else ""
        skipped = f", {values['skipped']:.0f} steps skipped" if values["skipped"] else ""
        memory = f"  mem {stats['gpu_mem']}" if "gpu_mem" in stats else ""
        return (
            f"epoch {stats['epoch']}  step {stats['iter']}  loss {values['loss']:.4g}{beside}  lr {stats['lr']:.3e}  "
            f"grad norm {values['grad_norm']:.3g}, {values['clipped']:.0%} clipped{skipped}  "
            f"{stats['samples_per_second']:.4g} samples/s, {self.waited / spent:.0%} waiting for data  "
            f"eta {stats['eta']}{memory}"
        )


def train(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    loader: BatchLoader,
    settings: Settings,
    *,
    start: tuple[int, int],
    device: torch.device,
    world: World,
    logbook: MetricsLog,
    beat: Callable[[str], None],
    after_step: Callable[[int, int], None],
    after_epoch: Callable[[int], None],
) -> None:
    """Train from `start` on: an epoch, counted from 0, and how many of its steps are done already.

    `beat` is told what is being done. `after_step(epoch, steps done in it)` saves where that is due, and may end the
    training by raising; `after_epoch(epoch)` saves and evaluates.
    """
    steps = len(loader)
    first_epoch, first_step = start
    progress = Progress(logbook, steps, settings, first_epoch * steps + first_step, SkippedStepCounter(optimizer))
    window = MetricWindow()
    for epoch in range(first_epoch, settings.max_epoch):
        model.train()
        loader.set_epoch(epoch)
        begin = first_step if epoch == first_epoch else 0
        loader.set_start(begin)
        asked = time.perf_counter()
        for step, batch in enumerate(loader, start=begin):
            progress.fetched(time.perf_counter() - asked, len(batch) * world.size)
            beat(f"epoch {epoch + 1}, step {step + 1}")
            lr = settings.lr(epoch + step / steps)
            set_lr(optimizer, lr)
            seed_everything(settings.seed, epoch * steps + step, world.rank)
            batch = batch.to(device, non_blocking=True)
            optimisation_step(model, objective, optimizer, scaler, batch, settings, window, world)
            if progress.is_due:
                progress.write(epoch, step, lr, window, device)
            after_step(epoch, step + 1)
            beat(f"epoch {epoch + 1}, waiting for data after step {step + 1}")
            asked = time.perf_counter()
        stopped = time.perf_counter()
        after_epoch(epoch)
        progress.leave_out(time.perf_counter() - stopped)
