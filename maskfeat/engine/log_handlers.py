"""Handlers of the logging module that lose no line to an encoding, and stop no run where a line cannot be written."""

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from maskfeat.file_io import is_cut_short

logger = logging.getLogger(__name__)

ESCAPED = "backslashreplace"
"""What becomes of characters that an encoding lacks, or of the bytes of a file name that is no text: \\xe9, \\udcff."""


class WarnOnce:
    """What a run writes and can do without: a failure is a warning, once until it works again."""

    def __init__(self) -> None:
        self._failed = False

    @contextmanager
    def writing(self, path: Path, warning: str) -> Iterator[None]:
        """Turn an OSError of the block into a warning; `warning` has a %s for the path, then one for the cause."""
        try:
            yield
            self._failed = False
        except OSError as error:
            if not self._failed:
                logger.warning(warning, path, error.strerror or error)
            self._failed = True


class _Patient(logging.StreamHandler):
    """A handler whose lines may be lost, on a full disk or in a pipe that nobody reads, while work goes on.

    Standard error says so once. Where lines can be written again, one of them says that some are missing.
    """

    what = "standard output"
    _lost, _failed = 0, False

    def emit(self, record: logging.LogRecord) -> None:
        self._failed = False
        super().emit(record)
        if self._lost and not self._failed:
            lost, self._lost = self._lost, 0
            text = f"up to {lost} lines before the last one are missing: they could not be written"
            super().emit(logging.LogRecord(__name__, logging.WARNING, "", 0, text, None, None))

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._failed, self._lost = True, self._lost + 1
        if self._lost == 1:
            text = f"{self.what} cannot be written ({error.strerror or error}): lines are left out until it can\n"
            with suppress(OSError):
                os.write(2, text.encode(errors=ESCAPED))


class LogFile(_Patient, logging.FileHandler):
    """Append to a file, as UTF-8.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        logging.FileHandler.__init__(self, path, encoding="utf-8", errors=ESCAPED)
        self.what = str(path)
        with suppress(OSError):
            if is_cut_short(path) and self.stream is not None:
                self.stream.write("\n")


def screen_handler() -> "logging.StreamHandler[TextIO]":
    """Return a handler that writes to standard output."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=ESCAPED)
    return _Patient(sys.stdout)
