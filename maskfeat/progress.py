"""How far work is: in a live line on the terminal, below the log, or in lines of the log now and then, where standard
error is a file.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from maskfeat.text import duration

logger = logging.getLogger(__name__)

_SECONDS = 0.25
"""Between two drawings."""
_LOG_SECONDS = 10.0
"""Between two lines of the log."""


class _Bar(tqdm):
    monitor_interval = 0  # no thread of tqdm's


_Bar.set_lock(threading.RLock())  # tqdm's own is one between processes


class _Above:
    """The terminal, for a log handler: what is written goes above the live lines."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        with _Bar.external_write_mode(self.stream):
            self.stream.write(text)
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _handlers(names: Sequence[str | None] = ("maskfeat", None)) -> list["logging.StreamHandler[Any]"]:
    """Those of these loggers that write to a screen, a pipe or the like; None = the root."""
    found = [handler for name in names for handler in logging.getLogger(name).handlers]
    return [h for h in found if isinstance(h, logging.StreamHandler) and not isinstance(h, logging.FileHandler)]


def _is_wanted() -> bool:
    """Whether there is a terminal, and a log of this process that says more than warnings."""
    package = logging.getLogger("maskfeat")
    if sys.stderr is None or not sys.stderr.isatty() or not package.isEnabledFor(logging.INFO):
        return False
    return any(handler.level <= logging.INFO for handler in _handlers(["maskfeat", None][: 1 + package.propagate]))


class LiveLine:
    """Such a line, while work goes on. Lines that begin while there is one are below it.

    Args:
        what: is done; the line begins with it.
        total: how many there are to do.

    Attributes:
        is_shown: whether there is one.
    """

    _open: "list[LiveLine]" = []

    def __init__(self, what: str, total: int) -> None:
        self.is_shown = _is_wanted() and total > 0
        self._drawn = 0.0
        if not self.is_shown:
            return
        for handler in _handlers():
            if handler.stream.isatty() and not isinstance(handler.stream, _Above):
                handler.setStream(_Above(handler.stream))
        bar = "{desc}: {percentage:3.0f} %|{bar:16}| {unit}"
        self._bar = _Bar(
            desc=what, total=total, file=sys.stderr, leave=False, dynamic_ncols=True, bar_format=bar, unit=""
        )
        self._open.append(self)

    def show(self, done: int, text: Callable[[], str]) -> None:
        """Draw it, a few times a second at most.

        Args:
            done: so many of them.
            text: makes what stands behind the bar.
        """
        now = time.monotonic()
        if self.is_shown and now - self._drawn >= _SECONDS:
            self._drawn, self._bar.n, self._bar.unit = now, done, text()
            self._bar.refresh()

    def close(self) -> None:
        """Take it away."""
        if not self.is_shown:
            return
        self.is_shown = False
        self._bar.close()
        self._open.remove(self)
        if not self._open:
            for handler in _handlers():
                if isinstance(handler.stream, _Above):
                    handler.setStream(handler.stream.stream)


def _forget() -> None:
    """In a forked process, such as a data worker, there is no line, and no lock that another thread holds."""
    _Bar.set_lock(threading.RLock())
    for line in LiveLine._open:
        _Bar._instances.discard(line._bar)


os.register_at_fork(after_in_child=_forget)


def close_lines() -> None:
    """Take all of them away, such as after an error."""
    for line in LiveLine._open[:]:
        line.close()


class Progress:
    """Say how far work is, how fast, and how long it will take.

    Args:
        what: is counted, such as "images".
        total: how many there are to do.
        every: seconds between two lines of the log.
    """

    def __init__(self, what: str, total: int, every: float | None = None) -> None:
        self.what, self.total, self.done = what, total, 0
        self._every = _LOG_SECONDS if every is None else every
        self._started = self._said = time.perf_counter()
        self._line = LiveLine(what, total)

    def step(self, number: int = 1) -> None:
        """Note that `number` more are done."""
        self.done += number
        if self._line.is_shown:
            self._line.show(self.done, lambda: f"{self.done} of {self.total}, {self._speed()}")
            if self.done >= self.total:
                self._line.close()
        elif time.perf_counter() - self._said >= self._every:
            self._said = time.perf_counter()
            share = self.done / self.total
            logger.info("%d of %d %s (%.0f %%), %s", self.done, self.total, self.what, 100 * share, self._speed())

    def _speed(self) -> str:
        rate = self.done / (time.perf_counter() - self._started)
        return f"{rate:.4g}/s, eta {duration((self.total - self.done) / rate)}"
