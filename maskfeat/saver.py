"""When a run is saved, what its checkpoints hold, and which of them stay."""

import logging
import time
from typing import Any

from yacs.config import CfgNode

from maskfeat.checkpoint import AVERAGE, Position, checkpoint_path, prune_checkpoints, save_checkpoint
from maskfeat.config import dump_config
from maskfeat.distributed import on_first_rank
from maskfeat.resume import TrainingState

logger = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of a run. Every rank calls `save`, rank 0 writes.

    Args:
        training: what is saved.
        samples_per_step: of all processes together; by it a place in an epoch can be found again with other batches.
        start: where the run begins or goes on: that needs no saving.
    """

    def __init__(self, cfg: CfgNode, training: TrainingState, samples_per_step: int, start: Position) -> None:
        self._cfg, self._training, self._samples = cfg, training, samples_per_step
        self._saved, self._at = start, time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether TRAIN.CHECKPOINT_MINUTES have passed since the last checkpoint."""
        minutes = self._cfg.TRAIN.CHECKPOINT_MINUTES
        return bool(minutes) and time.monotonic() - self._at >= 60 * minutes

    def save(self, position: Position, must: bool = False) -> None:
        """Save at `position`, unless that has just been done.

        Args:
            must: whether the run ends here. Otherwise a full disk is reported, and the run goes on: somebody may make
                room before the next checkpoint.

        Raises:
            OSError: on every rank, where it must be saved and could not.
        """
        self._at = time.monotonic()
        if position == self._saved:
            return
        try:
            on_first_rank(lambda: self._write(position))
        except OSError as error:
            if must:
                raise
            logger.error("NOT SAVED, training goes on: %s", error)
            return
        self._saved = position

    def _write(self, position: Position) -> None:
        cfg = self._cfg
        path = checkpoint_path(cfg.OUTPUT_DIR, cfg.TASK, position)
        save_checkpoint(path, self._content(position))
        logger.info("saved %s", path)
        prune_checkpoints(cfg.OUTPUT_DIR, cfg.TASK, position, cfg.TRAIN.KEEP_CHECKPOINTS)

    def _content(self, position: Position) -> dict[str, Any]:
        training = self._training
        content = {
            "epoch": position.epochs - 1,
            "model_state": training.objective.released_state(),
            "optimizer_state": training.optimizer.state_dict(),
            "cfg": dump_config(self._cfg),
        }
        if position.step:
            content.update(step=position.step, samples_per_step=self._samples)
        if training.scaler.is_enabled():
            content["scaler_state"] = training.scaler.state_dict()
        if training.average is not None:
            content[AVERAGE] = training.average.objective.released_state()
        return content
