"""Preemption: schedulers send SIGTERM or SIGUSR1 before they reclaim a node."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from maskfeat.distributed.processes import signal_handler

PREEMPTED = 75
"""Exit code of a run that was asked to stop and saved its state: EX_TEMPFAIL of sysexits.h, "try again"."""

STOP_SIGNALS = (signal.SIGTERM, *(getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name)))


class Preempted(Exception):
    """Raised between two steps after the state was saved, so that the process exits with PREEMPTED."""


class StopRequest:
    """A request to stop the run, made by a signal to this process or passed on by another rank.

    Attributes:
        reason: Name of the signal; "" while there is no request.
    """

    def __init__(self) -> None:
        self.reason = ""

    def __bool__(self) -> bool:
        return bool(self.reason)

    def ask(self, reason: str) -> None:
        """Request a stop. Later requests do not change the reason."""
        self.reason = self.reason or reason

    def check(self) -> None:
        """Raise if a stop was requested. For work that has nothing to save, such as validation.

        Raises:
            Preempted: A stop was requested.
        """
        if self.reason:
            raise Preempted(self.reason)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM and SIGUSR1 as requests to stop inside the block. No effect outside the main thread."""

        def handle(number: int, _: FrameType | None) -> None:
            self.ask(signal.Signals(number).name)

        with signal_handler(STOP_SIGNALS, handle):
            yield
