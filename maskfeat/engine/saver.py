"""When a run is saved, what its checkpoints hold, and which of them stay."""

import logging
import time
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from maskfeat.checkpoint.files import (
    AVERAGE,
    SHARDED,
    WHOLE,
    Position,
    checkpoint_path,
    prune_checkpoints,
    save_checkpoint,
)
from maskfeat.checkpoint.sharded import SaveHandle, save_sharded, training_tensors
from maskfeat.config import dump_config
from maskfeat.distributed.collectives import new_cpu_group, run_on_main
from maskfeat.distributed.fsdp import full_optimizer_state_dict, full_state_dict
from maskfeat.distributed.world import World
from maskfeat.engine.resume import TrainingState

logger = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of a run. Every rank calls its methods, in the same places.

    Args:
        training: what is saved.
        samples_per_step: of all processes together; by it a place in an epoch can be found again with other batches.
        start: where the run begins or goes on: that needs no saving.
    """

    def __init__(
        self, cfg: CfgNode, training: TrainingState, world: World, samples_per_step: int, start: Position
    ) -> None:
        self._cfg, self._training, self._world, self._samples = cfg, training, world, samples_per_step
        self._saved, self._at = start, time.monotonic()
        self._sharded = cfg.TRAIN.CHECKPOINT_FORMAT == "sharded"
        self._suffix = SHARDED if self._sharded else WHOLE
        self._group = new_cpu_group() if self._sharded else None
        self._under_way: tuple[Position, SaveHandle] | None = None

    @property
    def is_due(self) -> bool:
        """Whether TRAIN.CHECKPOINT_MINUTES have passed since the last checkpoint."""
        minutes = self._cfg.TRAIN.CHECKPOINT_MINUTES
        return bool(minutes) and time.monotonic() - self._at >= 60 * minutes

    def save(self, position: Position, must: bool = False) -> None:
        """Save at `position`, unless that has just been done. A sharded checkpoint may be written on afterwards.

        Args:
            must: whether the run ends here. Otherwise a full disk is reported, and the run goes on: somebody may make
                room before the next checkpoint.

        Raises:
            OSError: on every rank, where it must be saved and could not.
        """
        self._at = time.monotonic()
        try:
            self.finish()
            if position != self._saved:
                self._begin(position)
            if must:
                self.finish()
        except OSError as error:
            if must:
                raise
            logger.error("NOT SAVED, training goes on: %s", error)

    def look_after(self) -> None:
        """To be called now and then: report a checkpoint that has been written meanwhile. It waits for nobody."""
        if self._under_way is not None and self._under_way[1].done():
            try:
                self.finish()
            except OSError as error:
                logger.error("NOT SAVED, training goes on: %s", error)

    def _path(self, position: Position) -> Path:
        return checkpoint_path(self._cfg.OUTPUT_DIR, self._cfg.TASK, position, self._suffix)

    def _begin(self, position: Position) -> None:
        cfg = self._cfg
        plain: dict[str, Any] = {"epoch": position.epochs - 1, "cfg": dump_config(cfg)}
        if position.step:
            plain.update(step=position.step, samples_per_step=self._samples)
        if self._training.scaler.is_enabled():
            plain["scaler_state"] = self._training.scaler.state_dict()
        if self._sharded:
            tensors = training_tensors(self._training.objective, self._training.optimizer)
            self._under_way = position, save_sharded(self._path(position), tensors, plain, self._group)
            return
        content = {**self._gathered(), **plain}
        run_on_main(lambda: save_checkpoint(self._path(position), content))
        self._end(position)

    def finish(self) -> None:
        """Wait for a sharded checkpoint that is being written.

        Raises:
            OSError: where it could not be.
        """
        if self._under_way is not None:
            (position, handle), self._under_way = self._under_way, None
            handle.wait()
            self._end(position)

    def _end(self, position: Position) -> None:
        self._saved = position
        cfg = self._cfg
        if self._world.is_main:
            logger.info("saved %s", self._path(position))
            prune_checkpoints(cfg.OUTPUT_DIR, cfg.TASK, position, cfg.TRAIN.KEEP_CHECKPOINTS)

    def _gathered(self) -> dict[str, Any]:
        """What training changes; on other ranks than the first only a part of it."""
        training, keep = self._training, self._world.is_main
        content: dict[str, Any] = {
            "model_state": full_state_dict(training.objective.released_state(), keep),
            "optimizer_state": full_optimizer_state_dict(training.optimizer, keep),
        }
        if training.average is not None:
            content[AVERAGE] = full_state_dict(training.average.objective.released_state(), keep)
        return content
