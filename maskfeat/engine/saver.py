"""When a run is saved, what its checkpoints hold, and which of them are kept."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from yacs.config import CfgNode

from maskfeat.checkpoint.files import (
    SHARDED,
    WHOLE,
    Position,
    checkpoint_path,
    prune_checkpoints,
    save_checkpoint,
    set_aside_others,
)
from maskfeat.checkpoint.reading import CLASSES
from maskfeat.checkpoint.sharded import SaveHandle, save_sharded, training_tensors
from maskfeat.config import dump_config
from maskfeat.distributed.collectives import new_cpu_group, run_on_main
from maskfeat.distributed.preemption import Preempted
from maskfeat.engine.best import BestCheckpoint
from maskfeat.engine.trainer import Trainer
from maskfeat.errors import NotFinite, UserFileError

logger = logging.getLogger(__name__)


class Saver:
    """Write the checkpoints of a run. Every rank calls its methods, in the same order.

    Used as a context manager, it waits for a checkpoint that is still being written when the run is preempted, or ends
    because losses or weights are not finite.

    Args:
        cfg: TRAIN.CHECKPOINT_*, TRAIN.KEEP_CHECKPOINTS, TRAIN.KEEP_BEST, OUTPUT_DIR and TASK.
        trainer: what is saved.
        classes: names of a classifier's classes, by which a test numbers them; None = not known.
        saved: whether OUTPUT_DIR has a checkpoint of the trainer's position now.
    """

    def __init__(
        self, cfg: CfgNode, trainer: Trainer, classes: Sequence[str] | None = None, saved: bool = False
    ) -> None:
        self._cfg, self._trainer = cfg, trainer
        self._classes = {} if classes is None else {CLASSES: list(classes)}
        self._saved = trainer.position if saved else None
        self._at = time.monotonic()
        self._count = 0  # calls of `save`, the same on every rank
        self._sharded = cfg.TRAIN.CHECKPOINT_FORMAT == "sharded"
        self._suffix = SHARDED if self._sharded else WHOLE
        self._group = new_cpu_group() if self._sharded else None
        self._pending: tuple[Position, SaveHandle] | None = None
        self._best = BestCheckpoint(cfg)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, Preempted | NotFinite):  # which all ranks meet
            self.finish()

    @property
    def is_due(self) -> bool:
        """Whether TRAIN.CHECKPOINT_MINUTES have passed since the last checkpoint."""
        minutes = self._cfg.TRAIN.CHECKPOINT_MINUTES
        return bool(minutes) and time.monotonic() - self._at >= 60 * minutes

    @property
    def asks_for(self) -> int:
        """Number of the checkpoint that is due now by this rank's clock, from 1; 0 = none. The ranks exchange it."""
        return self._count + 1 if self.is_due else 0

    def owes(self, number: int) -> bool:
        """Whether the checkpoint of this number, which a rank asked for a step ago, has not been saved since."""
        return number > self._count

    def is_epoch_due(self, epoch: int) -> bool:
        """Whether to save after `epoch`, counted from 0: every TRAIN.CHECKPOINT_PERIOD epochs and after the last."""
        return (epoch + 1) % self._cfg.TRAIN.CHECKPOINT_PERIOD == 0 or epoch + 1 == self._trainer.max_epoch

    def save(self, must: bool = False) -> None:
        """Save, unless that has just been done at this position. A sharded checkpoint may still be written afterwards.

        An earlier one that could not be written is reported, and the state of now is saved all the same.

        Args:
            must: whether the run ends here. Otherwise a full disk is reported, and training continues: there may be
                room before the next checkpoint.

        Raises:
            UserFileError: on every rank, where the checkpoint must be saved and could not be.
            NotFinite: on every rank; weights that are not finite are not saved, and earlier checkpoints stay.
        """
        self._at, self._count = time.monotonic(), self._count + 1
        self._settle()
        try:
            if self._trainer.position != self._saved:
                self._begin(self._trainer.position)
            if must:
                self.finish()
        except UserFileError as error:
            if must:
                raise
            logger.error("NOT SAVED, training continues: %s", error)

    def poll(self) -> None:
        """Report a sharded checkpoint that has been written meanwhile; never waits."""
        if self._pending is not None and self._pending[1].done():
            self._settle()

    def _settle(self) -> None:
        """Wait for a sharded checkpoint that is being written, and report it where it could not be."""
        try:
            self.finish()
        except UserFileError as error:
            logger.error("NOT SAVED: %s", error)

    def finish(self) -> None:
        """Wait for a sharded checkpoint that is being written.

        Raises:
            UserFileError: it could not be written.
        """
        if self._pending is not None:
            (position, handle), self._pending = self._pending, None
            handle.wait()
            self._end(position)

    def keep_if_best(self, values: Mapping[str, float]) -> None:
        """With TRAIN.KEEP_BEST, keep the checkpoint of now under a name of its own if no validation before was as good.

        Args:
            values: what a validation of the weights of now found; those of the main process count.
        """
        if self._cfg.TRAIN.KEEP_BEST and run_on_main(lambda: self._best.is_beaten(values)):
            self._settle()
            run_on_main(lambda: self._keep(values))

    def _keep(self, values: Mapping[str, float]) -> None:
        position = self._trainer.position
        epochs = position.epochs + bool(position.step)
        other = WHOLE if self._sharded else SHARDED  # of a run that resumes in another format
        found = [path for end in (self._suffix, other) if (path := self._path(position, end)).exists()]
        if position != self._saved or not found:
            logger.error("NOT KEPT: the checkpoint after epoch %d could not be written", epochs)
            return
        try:
            self._best.keep(found[0], epochs, values)
        except (OSError, ValueError) as error:
            logger.error("NOT KEPT: %s cannot be kept as the best one: %s", found[0], error)

    def forget_best(self) -> None:
        """Forget what was the best of an earlier run in this folder."""
        if self._trainer.world.is_main:
            self._best.forget()

    def _path(self, position: Position, suffix: str = "") -> Path:
        return checkpoint_path(self._cfg.OUTPUT_DIR, self._cfg.TASK, position, suffix or self._suffix)

    def _begin(self, position: Position) -> None:
        trainer, config = self._trainer, {"cfg": dump_config(self._cfg), **self._classes}
        try:
            trainer.check_finite()
        except NotFinite as error:
            raise NotFinite(
                f"{error}\nNothing was saved, and earlier checkpoints stay: try a lower SOLVER.BASE_LR, "
                "SOLVER.CLIP_GRAD_L2NORM, or TRAIN.MIXED_PRECISION bf16"
            ) from error
        if self._sharded:
            tensors = training_tensors(trainer.objective, trainer.optimizer)
            handle = save_sharded(self._path(position), tensors, trainer.plain_state(config), self._group)
            self._pending = position, handle
            return
        content = trainer.state_dict(config)
        run_on_main(lambda: save_checkpoint(self._path(position), content))
        self._end(position)

    def _end(self, position: Position) -> None:
        self._saved = position
        cfg = self._cfg
        if self._trainer.world.is_main:
            logger.info("saved %s", self._path(position))
            try:
                aside = set_aside_others(self._path(position), cfg.TASK)
                if aside is not None:
                    logger.warning(
                        "checkpoints of another course of this run, which come after it, are now in %s: delete them if "
                        "they are not wanted",
                        aside,
                    )
                prune_checkpoints(cfg.OUTPUT_DIR, cfg.TASK, position, cfg.TRAIN.KEEP_CHECKPOINTS)
            except OSError as error:
                logger.warning("an old checkpoint was not deleted or moved: %s", error)
