"""Preemption: schedulers send SIGTERM or SIGUSR1 before they reclaim a node."""

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from maskfeat.distributed.processes import signal_handler

logger = logging.getLogger(__name__)

PREEMPTED = 75
"""Exit code of a run that was asked to stop and saved its state: EX_TEMPFAIL of sysexits.h, "try again"."""

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a run that was stopped by Ctrl-C: whoever stops it by hand does not want it to be queued again."""

STOPPED = 128 + signal.SIGTERM
"""Exit code of a run that was asked to stop and would start anew (TRAIN.AUTO_RESUME False): it is not queued again."""

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
    def listening(self, announce: bool = False) -> Iterator[None]:
        """Take SIGTERM, SIGUSR1 and a first Ctrl-C as requests to stop inside the block. No effect outside the main
        thread; `announce` as in `heeding_ctrl_c`.
        """

        def handle(number: int, _: FrameType | None = None) -> None:
            self.ask(signal.Signals(number).name)

        with signal_handler(STOP_SIGNALS, handle), heeding_ctrl_c(handle, announce):
            yield


@contextmanager
def heeding_ctrl_c(first: Callable[[int], object], announce: bool) -> Iterator[None]:
    """Call `first` at the first SIGINT inside the block; a later one raises KeyboardInterrupt.

    Within a second they count as one: a terminal signals every process of its group, and launchers pass it on. A
    process that another one supervises (`supervise.run_processes`) leaves the later ones to that one, and one that
    ignores SIGINT, as shells start jobs in the background, goes on ignoring it.

    Args:
        first: takes SIGINT.
        announce: whether to say on standard error what happens now.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    supervised = multiprocessing.parent_process() is not None
    came: list[float] = []

    def handle(number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if came and not supervised and now - came[0] > 1:
            raise KeyboardInterrupt
        if not came:
            came.append(now)
            if announce and not supervised:
                with suppress(OSError):
                    os.write(2, b"\nCtrl-C: saving after this step, then leaving; Ctrl-C again leaves at once\n")
            first(number)

    with signal_handler([signal.SIGINT], handle):
        # A supervised process starts with SIGINT blocked: one that came while it imported is delivered now.
        before = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def was_interrupted(error: BaseException | None) -> bool:
    """Whether an error is Ctrl-C, or was raised while one was handled, as that of a data worker which ends with it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def end_interrupted(error: BaseException, goes_on: bool = False) -> int:
    """Say in one line that Ctrl-C ended a command, and return INTERRUPTED.

    Args:
        error: that ended it.
        goes_on: whether the same command goes on where this one stopped.

    Raises:
        BaseException: `error`, where Ctrl-C is not its cause.
    """
    if not was_interrupted(error):
        raise error
    logger.error("interrupted%s", ": the same command goes on where it stopped" if goes_on else "")
    return INTERRUPTED
