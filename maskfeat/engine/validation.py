"""Validation during training: after which epochs, on which weights, and which was the last."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from yacs.config import CfgNode

from maskfeat.checkpoint.files import named_by_task
from maskfeat.data.loader import BatchLoader
from maskfeat.distributed.collectives import broadcast_buffers, run_on_main
from maskfeat.distributed.fsdp import gather_into
from maskfeat.engine.evaluate import Heartbeat, validate
from maskfeat.engine.log_handlers import WarnOnce
from maskfeat.engine.metrics_log import MetricsLog
from maskfeat.engine.trainer import Trainer
from maskfeat.file_io import replace_text
from maskfeat.objectives.base import Objective


def validation_record(cfg: CfgNode) -> Path:
    """Return the file beside the checkpoints that holds the last validation of a run: epochs done, and values."""
    return named_by_task(cfg.OUTPUT_DIR, cfg.TASK, "validation.json")


def validation_epochs(cfg: CfgNode, classifies: bool) -> list[int]:
    """Return the epochs, counted from 0, after which to validate: every TRAIN.EVAL_PERIOD epochs, and after the last
    one (of pre-training only where the period is not longer than the run). A period of 0 means never.
    """
    period, last = cfg.TRAIN.EVAL_PERIOD, cfg.SOLVER.MAX_EPOCH
    epochs = {epoch - 1 for epoch in range(period, last + 1, period)} if period else set()
    if period and (classifies or period <= last):
        epochs.add(last - 1)
    return sorted(epochs)


def objectives_to_evaluate(trainer: Trainer, new: Callable[[], Objective]) -> dict[str, Objective]:
    """Return the objectives to evaluate, the same on every rank; collective.

    Args:
        new: makes an objective on the device. Where parameters are sharded it receives all of them, since ranks
            evaluate different numbers of batches, and a sharded module would wait for all ranks in each.

    Returns:
        "" = the weights, "ema" = their moving average, where there is one.
    """
    if trainer.is_sharded:
        return {"": gather_into(trainer.objective, new())}
    objectives = {"": trainer.objective} if trainer.ema is None else {"": trainer.objective, "ema": trainer.ema.module}
    for objective in objectives.values():
        broadcast_buffers(objective)
    return objectives


class Validator:
    """Validate after some of the epochs.

    Args:
        trainer: what is validated.
        loader: of the validation set; None where there is nothing to do.
        epochs: counted from 0, after which to validate.
        new: see `objectives_to_evaluate`.
        precision: of the forward pass, "off", "bf16" or "fp16".
        metrics_log: where results are written.
        record: file of the last validation, by which a resumed run knows whether one was interrupted.
        heartbeat: receives the status at every step; it may raise `Preempted`.
        keep: receives what a validation found, on every rank, before it counts as done.
    """

    def __init__(
        self,
        trainer: Trainer,
        loader: BatchLoader | None,
        epochs: list[int],
        new: Callable[[], Objective],
        precision: str,
        metrics_log: MetricsLog,
        record: Path,
        heartbeat: Heartbeat,
        keep: Callable[[dict[str, float]], None],
    ) -> None:
        assert loader is not None or not epochs
        self._trainer, self._loader, self._epochs, self._new = trainer, loader, set(epochs), new
        self._precision, self._metrics_log, self._record, self._heartbeat = precision, metrics_log, record, heartbeat
        self._keep, self._once = keep, WarnOnce()

    def is_due(self, epoch: int) -> bool:
        """Return whether to validate after `epoch`, counted from 0."""
        return epoch in self._epochs

    def has_run(self, epoch: int) -> bool:
        """Return whether the last validation that was completed in this folder is that after `epoch`, or a later one;
        the same on every rank.
        """
        return run_on_main(self._last) > epoch

    def objectives(self) -> dict[str, Objective]:
        """Return what is validated now, see `objectives_to_evaluate`; collective."""
        return objectives_to_evaluate(self._trainer, self._new)

    def forget(self) -> None:
        """Forget the validations of an earlier run in this folder."""
        if self._trainer.world.is_main:
            with suppress(OSError):  # a folder that cannot be written is reported where a checkpoint is saved
                self._record.unlink(missing_ok=True)

    def run(self, epoch: int) -> None:
        """Validate the weights, and their average where there is one, and write a line; collective."""
        assert self._loader is not None
        trainer, values = self._trainer, {}
        for name, objective in self.objectives().items():
            found = validate(objective, self._loader, trainer.device, self._precision, self._heartbeat)
            values.update({f"{name}_{key}" if name else key: value for key, value in found.items()})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        stats = {"epoch": f"{epoch + 1}/{trainer.max_epoch}", **values}
        self._metrics_log.write("val_epoch", f"validation after epoch {epoch + 1}: {shown}", stats, epoch)
        self._keep(values)
        if trainer.world.is_main:
            self._remember({"epochs": epoch + 1, **values})

    def _last(self) -> int:
        """Epochs that were done at the last validation; 0 where there is no readable record."""
        try:
            return int(json.loads(self._record.read_text(encoding="utf-8"))["epochs"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return 0

    def _remember(self, values: dict[str, float]) -> None:
        with self._once.writing(self._record, "%s was not written (%s): a run that resumes here validates again"):
            self._record.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self._record, json.dumps(values) + "\n")
