"""Event files of TensorBoard that a full disk neither damages nor stops."""

import io
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from maskfeat.engine.log_handlers import WarnOnce


class EventFile:
    """Scalars and images over steps, for TensorBoard.

    Records are made by TensorBoard and PyTorch, and written here, in one piece and at once: `SummaryWriter` writes in a
    thread of its own, which ends with a traceback where the disk is full and leaves half a record, behind which
    TensorBoard reads nothing. Here that half is cut off, and the next record follows when there is room.

    Args:
        folder: created when needed, like the file in it, with the first record.
        first_step: points of earlier files in this folder from this step on are hidden: they are written again.
    """

    def __init__(self, folder: Path, first_step: int | None = None) -> None:
        # Slow to import, and only one process of a run needs it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]

        self._folder, self._once = folder, WarnOnce()
        self._file: BinaryIO | None = None
        self._path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._head: list[Any] = [Event(wall_time=time.time(), file_version="brain.Event:2")]
        if first_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._head.append(Event(wall_time=time.time(), step=first_step, session_log=start))

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars by name. Where that fails, a warning says so, once until it works again."""
        from torch.utils.tensorboard.summary import scalar

        self._add([scalar(name, value) for name, value in values.items()], step)

    def add_picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Write an image (H, W, 3), failing as `add` does."""
        from torch.utils.tensorboard.summary import image

        self._add([image(name, pixels, dataformats="HWC")], step)

    def _add(self, summaries: list[Any], step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        now = time.time()
        events = [Event(wall_time=now, step=step, summary=summary) for summary in summaries]
        with self._once.writing(self._path, "%s cannot be written (%s): TensorBoard will lack points"):
            self._write([*self._head, *events])
            self._head = []

    def _write(self, events: list[Any]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        records = io.BytesIO()
        for event in events:
            RecordWriter(records).write(event.SerializeToString())
        end = self._file.seek(0, os.SEEK_END)
        if self._file.write(records.getvalue()) < records.tell():
            self._file.truncate(end)
            raise OSError(0, "there is room for a part of a record only")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
