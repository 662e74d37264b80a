"""Checkpoint files: PySlowFast's format and naming, written atomically with a checksum beside them, the newest kept.

OUTPUT_DIR/checkpoints/[TASK_]checkpoint_epoch_00010.pyth holds `epoch` (counted from 0; the name counts from 1),
`model_state` (released names), `optimizer_state`, `cfg` (YAML text), `scaler_state` under fp16, and `ema_state` with
TRAIN.EMA. A checkpoint within an epoch, checkpoint_epoch_00010_step_000123.pyth, was made 123 steps after the tenth
epoch; it also holds `step` (123) and `samples_per_step`. Beside each lies NAME.sha256, as `sha256sum -c` reads it.
With TRAIN.CHECKPOINT_FORMAT sharded it is a folder NAME.dcp, see `sharded_checkpoint`.
"""

import contextlib
import hashlib
import io
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from maskfeat.checkpoint import sharded as sharded_checkpoint
from maskfeat.checkpoint.atomic import fsync_dir, fsync_file, sha256, write_and_fsync
from maskfeat.checkpoint.reading import read_checkpoint, trained_model
from maskfeat.checkpoint.sharded_files import verify

logger = logging.getLogger(__name__)

AVERAGE = "ema_state"
"""Where a checkpoint keeps the average of the weights (TRAIN.EMA)."""
WHOLE, SHARDED = ".pyth", sharded_checkpoint.SUFFIX
_SPARE = 2  # checkpoints within epochs that stay where TRAIN.KEEP_CHECKPOINTS is 0


@dataclass(frozen=True, order=True)
class Position:
    """How far a run has come: whole epochs, and steps of the next one."""

    epochs: int = 0
    step: int = 0

    def __str__(self) -> str:
        return f"epoch {self.epochs}, step {self.step}" if self.step else f"epoch {self.epochs}"


def checkpoint_path(output_dir: str | Path, task: str, position: Position, suffix: str = WHOLE) -> Path:
    """Where the checkpoint of a run at `position` lies; `suffix` SHARDED for a folder."""
    within = f"_step_{position.step:06d}" if position.step else ""
    name = f"checkpoint_epoch_{position.epochs:05d}{within}{suffix}"
    return Path(output_dir) / "checkpoints" / (f"{task}_{name}" if task else name)


def _position_of(path: Path, task: str) -> Position | None:
    """What the name of a checkpoint says; None for other files, those of other tasks among them."""
    prefix = re.escape(f"{task}_" if task else "")
    found = re.fullmatch(rf"{prefix}checkpoint_epoch_(\d+)(?:_step_(\d+))?(?:{WHOLE}|{SHARDED})", path.name)
    return None if found is None else Position(int(found[1]), int(found[2] or 0))


def _placed(output_dir: str | Path, task: str) -> list[tuple[Position, Path]]:
    """Checkpoints of this task in OUTPUT_DIR and where in the run they were made, oldest first."""
    found = [(_position_of(path, task), path) for path in (Path(output_dir) / "checkpoints").glob("*")]
    return sorted((at, path) for at, path in found if at is not None)


def find_checkpoints(output_dir: str | Path, task: str) -> list[Path]:
    """Checkpoints of this task in OUTPUT_DIR, oldest first; those of other tasks are left out."""
    return [path for _, path in _placed(output_dir, task)]


class _Hashed(io.RawIOBase):
    """A file that is written from front to back, and the SHA-256 of what was meant to be written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        written = self._file.write(data)
        if written != memoryview(data).nbytes:
            raise OSError(f"{written} of {memoryview(data).nbytes} bytes were written")
        return written

    def flush(self) -> None:
        self._file.flush()


def _sum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint and its checksum so that `path` holds either all of it or what it held before.

    Whenever the process or the machine ends, what lies at `path` can be read: the checksum is never that of another
    content. (In the moment between the two renames it is missing; see `verify_checkpoint`.)

    Raises:
        OSError: where the disk is full or fails; the message names the file, and nothing half-written is left.
    """
    partial, total = _partial(path), _sum_path(path)
    partial_total = _partial(total)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            hashed = _Hashed(file)
            torch.save(dict(content), hashed)  # type: ignore[arg-type]
            fsync_file(file)
        write_and_fsync(partial_total, f"{hashed.digest.hexdigest()}  {path.name}\n".encode())
        total.unlink(missing_ok=True)
        os.replace(partial, path)
        os.replace(partial_total, total)
        fsync_dir(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a failed write as a RuntimeError
        for left in (partial, partial_total):
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"could not write the checkpoint {path}: {cause}") from error


def verify_checkpoint(path: Path) -> None:
    """See that a checkpoint is what was written: by the checksum beside it, or else by those inside of it.

    PyTorch's own reader compares none, so that flipped bits would become weights.

    Raises:
        ValueError: where it is not.
    """
    try:
        if path.is_dir():
            return verify(path)
        total = _sum_path(path)
        if total.exists():
            words = total.read_text(encoding="ascii").split()
            if not words or words[0] != sha256(path):
                raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {total.name}")
            return
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise ValueError(f"{path} is damaged: {broken} in it is not what was written")
    except (OSError, UnicodeDecodeError, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def prune_checkpoints(output_dir: str | Path, task: str, newest: Position, keep: int) -> None:
    """Delete the checkpoints of a run that are older than its newest ones.

    Args:
        newest: of the one just saved. Later ones are of another course of the run, and stay.
        keep: how many stay; 0 = those at the end of epochs all stay, and of the newest two one within an epoch.
    """
    past = [(at, path) for at, path in _placed(output_dir, task) if at <= newest]
    for at, path in past[: -(keep or _SPARE)]:
        if keep or at.step:
            _delete(path)
            _delete(_sum_path(path))
    for path in (Path(output_dir) / "checkpoints").glob(".*"):  # of a process that was killed
        name = re.fullmatch(r"\.(.+?)(?:\.sha256)?\.(?:partial|old)", path.name)
        if name is not None and _position_of(path.with_name(name[1]), task):
            _delete(path)


def _delete(path: Path) -> None:
    """A file, or a folder with what is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def read_verified_checkpoint(given: str | Path) -> dict[str, Any]:
    """`open_checkpoint`, once the checksum beside the file, where there is one, has been compared."""
    if _sum_path(Path(given)).exists():
        verify_checkpoint(Path(given))
    return open_checkpoint(given)


def open_checkpoint(given: str | Path) -> dict[str, Any]:
    """What a checkpoint holds, its tensors whole and on the CPU; of a sharded one no `optimizer_state`.

    Raises:
        ValueError: as `weight_files.read_checkpoint` and `sharded_checkpoint.full_tensors`.
    """
    if Path(given).suffix == SHARDED and Path(given).is_dir():
        return {
            **sharded_checkpoint.read_sharded_plain(given),
            "model_state": sharded_checkpoint.full_tensors(given),
        }
    return read_checkpoint(given)


def latest_checkpoint(output_dir: str | Path, task: str, model_name: str) -> Path | None:
    """The newest checkpoint from which this run may go on: damaged ones are named and passed over.

    Raises:
        ValueError: where there are some and all are damaged; and where checkpoints under this run's names were
            written by another model (pre-training and fine-tuning with the same TASK and OUTPUT_DIR): going on
            would mix or overwrite them.
    """
    found = find_checkpoints(output_dir, task)
    for path in reversed(found):
        try:
            verify_checkpoint(path)
            wrote = trained_model(open_checkpoint(path))
        except ValueError as error:
            logger.error("CHECKPOINT PASSED OVER: %s", error)
            continue
        if wrote not in (None, model_name):
            raise ValueError(
                f"{path} was written by MODEL.MODEL_NAME {wrote}, this run trains {model_name}: "
                "give it an OUTPUT_DIR or a TASK of its own"
            )
        if path != found[-1]:
            logger.error("GOING BACK to %s, the last checkpoint that is whole", path)
        return path
    if found:
        raise ValueError(
            f"all {len(found)} checkpoints of this run in {found[0].parent} are damaged: bring one back from a copy, "
            "or start anew in another OUTPUT_DIR"
        )
    return None


def given_or_latest_checkpoint(
    given: str, output_dir: str | Path, task: str, model_name: str
) -> tuple[Path | str, dict[str, Any]] | None:
    """The checkpoint that a key names, or else the newest of this run, and its content; None where there is neither."""
    if given:
        return given, read_verified_checkpoint(given)
    found = latest_checkpoint(output_dir, task, model_name)
    return None if found is None else (found, open_checkpoint(found))
