"""Checkpoint files: PySlowFast's format and naming, written atomically.

OUTPUT_DIR/checkpoints/[TASK_]checkpoint_epoch_00010.pyth holds `epoch` (counted from 0; the name counts from 1),
`model_state` (released names), `optimizer_state`, `cfg` (YAML text), `scaler_state` under fp16, and `ema_state` with
TRAIN.EMA.
"""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from maskfeat.weight_files import read_checkpoint, trained_model

logger = logging.getLogger(__name__)

AVERAGE = "ema_state"
"""Where a checkpoint keeps the average of the weights (TRAIN.EMA)."""


def checkpoint_path(output_dir: str | Path, task: str, epoch: int) -> Path:
    """Where the checkpoint after `epoch` (counted from 0) of a run lies."""
    name = f"checkpoint_epoch_{epoch + 1:05d}.pyth"
    return Path(output_dir) / "checkpoints" / (f"{task}_{name}" if task else name)


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint so that `path` holds either all of it or what it held before.

    Raises:
        OSError: where the disk is full or fails; the message names the file, and nothing half-written is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save reports a short write as a RuntimeError
        partial.unlink(missing_ok=True)
        raise OSError(f"could not write the checkpoint {path}: {error}") from error


def find_checkpoints(output_dir: str | Path, task: str) -> list[Path]:
    """Checkpoints of this task in OUTPUT_DIR, oldest first; those of other tasks are left out."""
    prefix = re.escape(f"{task}_" if task else "")
    pattern = re.compile(rf"{prefix}checkpoint_epoch_(\d+)\.pyth")
    folder = Path(output_dir) / "checkpoints"
    found = [path for path in folder.glob("*.pyth") if pattern.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.stem.rsplit("_", 1)[1]))


def last_checkpoint(output_dir: str | Path, task: str, model_name: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint from which this run may go on, and its content.

    Raises:
        ValueError: where checkpoints under this run's names were written by another model (pre-training and
            fine-tuning with the same TASK and OUTPUT_DIR): going on would mix or overwrite them.
    """
    found = find_checkpoints(output_dir, task)
    if not found:
        return None
    path = found[-1]
    content = read_checkpoint(path)
    wrote = trained_model(content)
    if wrote not in (None, model_name):
        raise ValueError(
            f"{path} was written by MODEL.MODEL_NAME {wrote}, this run trains {model_name}: "
            "give it an OUTPUT_DIR or a TASK of its own"
        )
    return path, content


def given_or_last(
    given: str, output_dir: str | Path, task: str, model_name: str
) -> tuple[Path | str, dict[str, Any]] | None:
    """The checkpoint that a key names, or else the newest of this run, and its content; None where there is neither."""
    return (given, read_checkpoint(given)) if given else last_checkpoint(output_dir, task, model_name)
