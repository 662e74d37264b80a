"""Being asked to stop: schedulers send SIGTERM or SIGUSR1 before they take a machine away."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PREEMPTED = 75
"""Exit code of a run that was asked to stop and saved where it was: EX_TEMPFAIL of sysexits.h, "try again"."""

_SIGNALS = (signal.SIGTERM, *(getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name)))


class Preempted(Exception):
    """Raised between two steps once the state is saved: the process ends with PREEMPTED."""


class StopRequest:
    """Whether this process, or another one of the run, was asked to stop.

    Attributes:
        reason: the signal's name; "" as long as nobody asked.
    """

    def __init__(self) -> None:
        self.reason = ""

    def __bool__(self) -> bool:
        return bool(self.reason)

    def ask(self, reason: str) -> None:
        """Ask to stop; the first reason stays."""
        self.reason = self.reason or reason

    def check(self) -> None:
        """For work that needs no saving, such as validation.

        Raises:
            Preempted: where somebody asked.
        """
        if self.reason:
            raise Preempted(self.reason)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM and SIGUSR1 ask to stop, in this block. Only a process's main thread can listen."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, _: FrameType | None) -> None:
            self.ask(signal.Signals(number).name)

        before = {number: signal.signal(number, note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
