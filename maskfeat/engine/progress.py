"""Progress of a training: speed, share of time spent waiting for data, time left, and the lines that report them."""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from maskfeat.engine.metrics_log import MetricsLog
from maskfeat.engine.trainer import Trainer
from maskfeat.progress import LiveLine
from maskfeat.text import duration

logger = logging.getLogger(__name__)


class ProgressMeter:
    """Measure the speed of a training loop and write its progress lines.

    Args:
        metrics_log: where lines are written.
        trainer: what is trained; its position says where the loop begins.
        steps: of an epoch.
        period: steps between two lines, also across the ends of epochs.
    """

    def __init__(self, metrics_log: MetricsLog, trainer: Trainer, steps: int, period: int) -> None:
        self.metrics_log, self.trainer, self.steps, self.period = metrics_log, trainer, steps, period
        position = trainer.position
        self.first = position.epochs * steps + position.step
        self.done, self.todo = 0, trainer.max_epoch * steps - self.first
        self.started = time.perf_counter()
        self.line, self.loss = LiveLine("training", self.todo), ""
        self.warned = False
        self._begin_window()
        self.start_waiting()

    def _begin_window(self) -> None:
        self.since, self.since_step = time.perf_counter(), self.done
        self.waited, self.samples = 0.0, 0

    def start_waiting(self) -> None:
        """The loop waits for a batch from now on."""
        self.asked = time.perf_counter()

    def fetched(self, samples: int) -> None:
        """A batch has arrived; `samples` of all ranks."""
        self.waited += time.perf_counter() - self.asked
        self.samples += samples
        self.done += 1
        self.line.show(self.done - 1, self._state)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent in this block (saving, validation) out of speed and time left."""
        stopped = time.perf_counter()
        yield
        spent = time.perf_counter() - stopped
        self.since += spent
        self.started += spent

    @property
    def is_due(self) -> bool:
        """Whether a line is due: every `period` steps, and after the last step."""
        return self.done - self.since_step >= self.period or self.done == self.todo

    def write(self, lr: float) -> None:
        """Read the trainer's metrics, which synchronizes with the device, and write their line.

        Args:
            lr: learning rate of the last step.
        """
        trainer, epoch, step = self.trainer, self.trainer.position.epochs, self.trainer.position.step
        values = trainer.metrics.read()
        now = time.perf_counter()
        spent, steps = now - self.since, self.done - self.since_step
        stats = {
            "epoch": f"{epoch + 1}/{trainer.max_epoch}",
            "iter": f"{step}/{self.steps}",
            "dt": spent / steps,
            "dt_data": self.waited / steps,
            **values,
            "lr": lr,
            "samples_per_second": self.samples / spent,
            "eta": self._eta(now),
        }
        if trainer.device.type == "cuda":
            stats["gpu_mem"] = f"{torch.cuda.max_memory_allocated(trainer.device) / 2**30:.2f}G"
        line = self._line(stats, values, spent)
        self.metrics_log.write("train_iter", line, stats, epoch * self.steps + step - 1)
        if trainer.world.is_main and math.isnan(values["loss"]) and not values["skipped"] and not self.warned:
            logger.warning("the loss is nan because nothing was hidden, so nothing is learned: see AUG.MASK_RATIO")
            self.warned = True
        self._begin_window()

    def _eta(self, now: float) -> str:
        return duration((now - self.started) / self.done * (self.todo - self.done))

    def _state(self) -> str:
        """What the live line says. The loss is that of the last line of the log: to read it, the device must wait."""
        now, epoch, step = time.perf_counter(), *divmod(self.first + self.done - 1, self.steps)
        return (
            f"epoch {epoch + 1}/{self.trainer.max_epoch}  step {step + 1}/{self.steps}  eta {self._eta(now)}{self.loss}"
            f"  {self.waited / (now - self.since):.0%} waiting for data"
        )

    def _line(self, stats: Mapping[str, Any], values: Mapping[str, float], spent: float) -> str:
        """The readable line."""
        extra = [f"{k} {v:.4g}" for k, v in values.items() if k not in ("loss", "grad_norm", "clipped", "skipped")]
        beside = f" ({', '.join(extra)})" if extra else ""
        self.loss = f"  loss {values['loss']:.4g}{beside}"
        skipped = f", {values['skipped']:.0f} steps skipped" if values["skipped"] else ""
        memory = f"  mem {stats['gpu_mem']}" if "gpu_mem" in stats else ""
        return (
            f"epoch {stats['epoch']}  step {stats['iter']}{self.loss}  lr {stats['lr']:.3e}  "
            f"grad norm {values['grad_norm']:.3g}, {values['clipped']:.0%} clipped{skipped}  "
            f"{stats['samples_per_second']:.4g} samples/s, {self.waited / spent:.0%} waiting for data  "
            f"eta {stats['eta']}{memory}"
        )
