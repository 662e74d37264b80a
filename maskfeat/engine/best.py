"""The checkpoint of a run's best validation, kept under a name of its own (TRAIN.KEEP_BEST)."""

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from yacs.config import CfgNode

from maskfeat.checkpoint.atomic import fsync_file, replace_folder, sha256
from maskfeat.checkpoint.files import SHARDED, WHOLE, checksum_path, named_by_task, publish, temporary_path
from maskfeat.file_io import replace_text
from maskfeat.report.run_log import direction

logger = logging.getLogger(__name__)

METRICS = ("ema_mAP", "mAP", "ema_top1", "top1", "ema_loss", "loss")
"""What validations are compared by: the first of these that they have."""


class BestCheckpoint:
    """OUTPUT_DIR/checkpoints/[TASK_]best.pyth, or best.dcp in shards, and best.json, which says what it is.

    The file is another name of a checkpoint (a hard link), which stays when that is deleted; where the file system has
    no such links it is a copy. Only the main process uses this.

    Args:
        cfg: OUTPUT_DIR and TASK.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._stem = named_by_task(cfg.OUTPUT_DIR, cfg.TASK, "best")
        self._record = self.path(".json")

    def path(self, suffix: str) -> Path:
        """Return where it is kept; `suffix` as of the checkpoint."""
        return self._stem.with_name(self._stem.name + suffix)

    def forget(self) -> None:
        """Forget what an earlier run in this folder found; its file stays until another one is kept."""
        with suppress(OSError):
            self._record.unlink(missing_ok=True)

    def is_beaten(self, values: Mapping[str, float]) -> bool:
        """Return whether a validation is better than that of what is kept, or the first."""
        metric = _metric(values)
        if metric is None or not math.isfinite(values[metric]):
            return False
        earlier = self._earlier(metric)
        return earlier is None or direction(metric) * (values[metric] - earlier) > 0

    def keep(self, checkpoint: Path, epochs: int, values: Mapping[str, float]) -> None:
        """Keep a checkpoint in place of what is kept.

        Args:
            epochs: that were trained.
            values: what its validation found.

        Raises:
            OSError, ValueError: it cannot be kept, or its checksum is damaged; what was kept before is unchanged, or
                gone where the disk failed in between.
        """
        metric = _metric(values)
        assert metric is not None
        value, kept = values[metric], self.path(checkpoint.suffix)
        _link_folder(checkpoint, kept) if checkpoint.is_dir() else _link_file(checkpoint, kept)
        other = self.path(WHOLE if checkpoint.suffix == SHARDED else SHARDED)  # of before a change of the format
        shutil.rmtree(other) if other.is_dir() else other.unlink(missing_ok=True)
        replace_text(self._record, json.dumps({"epochs": epochs, "metric": metric, "value": value}) + "\n")
        logger.info("best %s so far, %.5g: %s is kept as %s", metric, value, checkpoint.name, kept)

    def _earlier(self, metric: str) -> float | None:
        """The value of what is kept; None where nothing is, or by another metric."""
        if not any(self.path(suffix).exists() for suffix in (WHOLE, SHARDED)):
            return None
        try:
            found = json.loads(self._record.read_text(encoding="utf-8"))
            return float(found["value"]) if found["metric"] == metric else None
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None


def _metric(values: Mapping[str, float]) -> str | None:
    return next((name for name in METRICS if name in values), None)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # no hard links here, or too many of this file; a copy says what else is wrong
        shutil.copyfile(source, target)
        with target.open("rb+") as file:
            fsync_file(file)


def _link_file(checkpoint: Path, kept: Path) -> None:
    """Give a checkpoint, and its checksum, a second name, in place of what has it."""
    partial, sums = temporary_path(kept), temporary_path(checksum_path(kept))
    try:
        partial.unlink(missing_ok=True)
        _link(checkpoint, partial)
        beside = checksum_path(checkpoint)
        digest = beside.read_text(encoding="ascii").partition(" ")[0] if beside.exists() else sha256(checkpoint)
        publish(partial, digest, kept)
    finally:
        for path in (partial, sums):
            path.unlink(missing_ok=True)


def _link_folder(checkpoint: Path, kept: Path) -> None:
    """Give the files of a sharded checkpoint a second name, in a folder in place of `kept`."""
    partial = temporary_path(kept)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        for path in checkpoint.iterdir():
            _link(path, partial / path.name)
        replace_folder(partial, kept)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
