"""Checkpoint files in PySlowFast's format and naming: atomic writes, checksums, lookup and pruning.

OUTPUT_DIR/checkpoints/[TASK_]checkpoint_epoch_00010.pyth holds `epoch` (counted from 0; the name counts from 1),
`model_state` (released names), `optimizer_state`, `cfg` (YAML text), `scaler_state` with fp16, `ema_state` with
TRAIN.EMA, and `classes` where a classifier was trained on class folders: their names, by the numbers of the classes. A
checkpoint within an epoch, checkpoint_epoch_00010_step_000123.pyth, was saved 123 steps after the tenth epoch; it also
holds `step` (123) and `samples_per_step`. Each has a file NAME.sha256 beside it for `sha256sum -c`.
With TRAIN.CHECKPOINT_FORMAT sharded a checkpoint is a folder NAME.dcp, see `sharded`.
"""

import contextlib
import hashlib
import io
import logging
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from maskfeat.checkpoint import sharded
from maskfeat.checkpoint.atomic import fsync_dir, fsync_file, sha256, write_and_fsync
from maskfeat.checkpoint.reading import read_checkpoint, trained_model
from maskfeat.checkpoint.sharded_files import verify
from maskfeat.distributed.collectives import run_on_main
from maskfeat.errors import UserError, UserFileError

logger = logging.getLogger(__name__)

AVERAGE = "ema_state"
"""Key of the exponential moving average of the weights (TRAIN.EMA) in a checkpoint."""
WHOLE, SHARDED = ".pyth", sharded.SUFFIX
SUPERSEDED = "superseded"
"""Folder in OUTPUT_DIR/checkpoints for those of a course of the run that was given up."""
_NEWEST_KEPT = 2  # with TRAIN.KEEP_CHECKPOINTS 0: these are kept even if they were saved within an epoch


@dataclass(frozen=True, order=True)
class Position:
    """Progress of a run: completed epochs, and completed steps of the next one."""

    epochs: int = 0
    step: int = 0

    def __str__(self) -> str:
        return f"epoch {self.epochs}, step {self.step}" if self.step else f"epoch {self.epochs}"


def checkpoint_path(output_dir: str | Path, task: str, position: Position, suffix: str = WHOLE) -> Path:
    """Return the path of the checkpoint at `position`; `suffix` is WHOLE for a file and SHARDED for a folder."""
    within = f"_step_{position.step:06d}" if position.step else ""
    return named_by_task(output_dir, task, f"checkpoint_epoch_{position.epochs:05d}{within}{suffix}")


def named_by_task(output_dir: str | Path, task: str, name: str) -> Path:
    """Return the path of a file of a task among its checkpoints."""
    return Path(output_dir) / "checkpoints" / (f"{task}_{name}" if task else name)


def _position_of(path: Path, task: str) -> Position | None:
    """Return the position that a checkpoint's name gives; None for other files and other tasks."""
    prefix = re.escape(f"{task}_" if task else "")
    found = re.fullmatch(rf"{prefix}checkpoint_epoch_(\d+)(?:_step_(\d+))?(?:{WHOLE}|{SHARDED})", path.name)
    return None if found is None else Position(int(found[1]), int(found[2] or 0))


def _with_positions(output_dir: str | Path, task: str) -> list[tuple[Position, Path]]:
    """Return position and path of each checkpoint of this task in OUTPUT_DIR, oldest first."""
    found = [(_position_of(path, task), path) for path in (Path(output_dir) / "checkpoints").glob("*")]
    return sorted((position, path) for position, path in found if position is not None)


def find_checkpoints(output_dir: str | Path, task: str) -> list[Path]:
    """Return the checkpoints of this task in OUTPUT_DIR, oldest first; those of other tasks are left out."""
    return [path for _, path in _with_positions(output_dir, task)]


class _HashingWriter(io.RawIOBase):
    """Write sequentially to a file and compute the SHA-256 of what is passed to it."""

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


def checksum_path(path: Path) -> Path:
    """Return where the checksum of a file is."""
    return path.with_name(f"{path.name}.sha256")


def temporary_path(path: Path) -> Path:
    """Return where a file is written before it gets its name."""
    return path.with_name(f".{path.name}.partial")


def publish(draft: Path, digest: str, path: Path) -> None:
    """Give a complete file its name, and a checksum: between the two renames there is none, never that of another file.

    Args:
        digest: its SHA-256 in hexadecimal.

    Raises:
        OSError: the disk is full or fails; `temporary_path` of the checksum may be left behind.
    """
    checksum = checksum_path(path)
    write_and_fsync(temporary_path(checksum), f"{digest}  {path.name}\n".encode())
    checksum.unlink(missing_ok=True)
    os.replace(draft, path)
    os.replace(temporary_path(checksum), checksum)
    fsync_dir(path.parent)


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint and its checksum atomically: `path` holds either the new content or what it held before.

    Whenever the process is killed or the power fails, the file at `path` can be read, and a checksum beside it belongs
    to it. (Between the two renames there is no checksum; see `verify_checkpoint`.)

    Raises:
        UserFileError: if the disk is full or fails; the message names the file, and no partial file is left behind.
    """
    partial = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            hashed = _HashingWriter(file)
            torch.save(dict(content), hashed)  # type: ignore[arg-type]
            fsync_file(file)
        publish(partial, hashed.digest.hexdigest(), path)
    except (OSError, RuntimeError) as error:  # torch.save reports a failed write as a RuntimeError
        for leftover in (partial, temporary_path(checksum_path(path))):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserFileError(f"could not write the checkpoint {path}: {cause}") from error


def verify_checkpoint(path: Path) -> None:
    """Verify that a checkpoint is unchanged since it was written: by the checksum beside it, or else by the CRC-32 of
    each member of the archive.

    PyTorch's reader compares neither, so flipped bits would silently become weights.

    Raises:
        UserError: if it is damaged.
    """
    try:
        if path.is_dir():
            return verify(path)
        checksum = checksum_path(path)
        if checksum.exists():
            words = checksum.read_text(encoding="ascii").split()
            if not words or words[0] != sha256(path):
                raise UserError(f"{path} is damaged: its SHA-256 differs from the one in {checksum.name}")
            return
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise UserError(f"{path} is damaged: {broken} in it fails its CRC-32 check")
    except UserError:
        raise
    # What zipfile raises on damaged files; RuntimeError also for what takes itself for encrypted.
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def prune_checkpoints(output_dir: str | Path, task: str, newest: Position, keep: int) -> None:
    """Delete old checkpoints of a run, and temporary files of processes that were killed.

    Args:
        newest: position of the checkpoint just saved; those at later positions are kept, see `set_aside_others`.
        keep: how many to keep; 0 = all at the end of an epoch, and those within an epoch among the newest two.
    """
    past = [(position, path) for position, path in _with_positions(output_dir, task) if position <= newest]
    for position, path in past[: -(keep or _NEWEST_KEPT)]:
        if keep or position.step:
            _delete(path)
            _delete(checksum_path(path))
    for path in (Path(output_dir) / "checkpoints").glob(".*"):
        name = re.fullmatch(r"\.(.+?)(?:\.sha256)?\.(?:partial|old)", path.name)
        if name is not None and _position_of(path.with_name(name[1]), task):
            _delete(path)


def set_aside_others(saved: Path, task: str) -> Path | None:
    """Move the checkpoints of another course of this task out of the way of the one just saved.

    These are at later positions, where a run has gone back or started over, or at the same one in the other format. A
    run that resumed would go on from them.

    Returns:
        the folder in which they are now; None = there were none.

    Raises:
        OSError: one cannot be moved.
    """
    position = _position_of(saved, task)
    assert position is not None
    others = [
        path for at, path in _with_positions(saved.parent.parent, task) if at >= position and path.name != saved.name
    ]
    if not others:
        return None
    folder, number = saved.parent / SUPERSEDED, 1
    while any((folder / path.name).exists() for path in others):
        number += 1
        folder = saved.parent / f"{SUPERSEDED}_{number}"
    folder.mkdir(exist_ok=True)
    for path in others:
        for moved in (checksum_path(path), path):
            if moved.exists():
                os.rename(moved, folder / moved.name)
    return folder


def _delete(path: Path) -> None:
    """Delete a file, or a folder and its content, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def read_verified_checkpoint(given: str | Path) -> dict[str, Any]:
    """Load a checkpoint with `open_checkpoint` after verifying it, if it has a checksum beside it."""
    if Path(given).name and checksum_path(Path(given)).exists():  # "/" and "." have no name
        verify_checkpoint(Path(given))
    return open_checkpoint(given)


def open_checkpoint(given: str | Path) -> dict[str, Any]:
    """Load a checkpoint, with full tensors on the CPU. Of a sharded one, `optimizer_state` is left out.

    Raises:
        UserError: as `reading.read_checkpoint` and `sharded.full_tensors`.
    """
    if Path(given).suffix == SHARDED and Path(given).is_dir():
        return {
            **sharded.read_sharded_plain(given),
            "model_state": sharded.full_tensors(given),
        }
    return read_checkpoint(given)


def latest_checkpoint(output_dir: str | Path, task: str, model_name: str) -> Path | None:
    """Return the newest checkpoint that this run can resume from; None if there is none. Damaged ones are logged and
    passed over.

    Raises:
        UserError: if there are checkpoints and all are damaged; or if they have this run's names but were written by
            another model (pre-training and fine-tuning with the same TASK and OUTPUT_DIR), which this run would
            overwrite.
    """
    newest = _newest_intact(find_checkpoints(output_dir, task))
    if newest is None:
        return None
    path, content = newest
    written_by = trained_model(content)
    if written_by not in (None, model_name):
        raise UserError(
            f"{path} was written by MODEL.MODEL_NAME {written_by}, this run trains {model_name}: "
            "give it an OUTPUT_DIR or a TASK of its own"
        )
    return path


def _newest_intact(found: Sequence[Path]) -> tuple[Path, dict[str, Any]] | None:
    """Return the last of these checkpoints that is not damaged, and its content; None if there are none.

    Raises:
        UserError: all are damaged.
    """
    for path in reversed(found):
        try:
            verify_checkpoint(path)
            content = open_checkpoint(path)
        except UserError as error:
            logger.error("CHECKPOINT PASSED OVER: %s", error)
            continue
        if path != found[-1]:
            logger.error("GOING BACK to %s, the newest checkpoint that is not damaged", path)
        return path, content
    if found:
        raise UserError(
            f"all {len(found)} checkpoints of this run in {found[0].parent} are damaged: restore one from a backup, "
            "or start again in another OUTPUT_DIR"
        )
    return None


def latest_of_other_tasks(output_dir: str | Path, task: str, wanted: Callable[[dict[str, Any]], bool]) -> Path | None:
    """Return the newest intact checkpoint in OUTPUT_DIR of another task than `task` whose content is `wanted`.

    Raises:
        UserError: several tasks have one, or those of a task are all damaged.
    """
    names = [path.name for path in (Path(output_dir) / "checkpoints").glob("*checkpoint_epoch_*")]
    tasks = {name.rpartition("checkpoint_epoch_")[0].removesuffix("_") for name in names} - {task}
    found: list[Path] = []
    for other in sorted(tasks):
        newest = _newest_intact(find_checkpoints(output_dir, other))
        if newest is not None and wanted(newest[1]):
            found.append(newest[0])
    if len(found) > 1:
        raise UserError(
            f"weights to start from may be {' or '.join(map(str, found))}: name one as TRAIN.CHECKPOINT_FILE_PATH"
        )
    return found[0] if found else None


def given_or_latest_checkpoint(
    given: str, output_dir: str | Path, task: str, model_name: str
) -> tuple[Path | str, dict[str, Any]] | None:
    """Return path and content of the checkpoint that a key names, or else of the newest of this run; None if none.

    Collective: one process says which is the newest. A run that trains meanwhile, or a slow file system, may show
    another one to others.
    """
    if given:
        return given, read_verified_checkpoint(given)
    found = run_on_main(lambda: latest_checkpoint(output_dir, task, model_name))
    return None if found is None else (found, open_checkpoint(found))
