"""How a process is tied to the one that started it, and which signals it heeds."""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

_SET_SIGNAL_ON_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG of prctl(2)


def die_with_parent() -> None:
    """Have this process killed at once when the one that started it is gone. Linux only; elsewhere without effect."""
    if sys.platform != "linux":
        return
    parent = multiprocessing.parent_process()
    started_it = os.getppid()
    ctypes.CDLL(None).prctl(_SET_SIGNAL_ON_PARENTS_DEATH, signal.SIGKILL, 0, 0, 0)
    if parent is not None and parent.pid == started_it and os.getppid() != started_it:
        os.kill(os.getpid(), signal.SIGKILL)  # it was gone before the kernel was asked


def exit_now(code: int) -> NoReturn:
    """End at once with an exit code; the processes that this one started die with it.

    Python would first take all modules apart, which takes seconds where cores are shared, and wait for processes.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run `main` and end with its exit code; 1 after a traceback. After a failure, which others wait for, at once."""
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    if code:
        exit_now(code)
    sys.exit(0)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Signals that ask for an end wait until the block is left; a process started in it begins with them blocked."""
    asking = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, asking)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent() -> None:
    """For a process that works for its parent, started in `signals_blocked`: it ends with it, and when it says so.

    Schedulers signal whole process groups, while the parent still needs what this process makes in order to come to a
    good end. SIGTERM therefore counts from the parent alone; SIGINT, SIGUSR1 and SIGUSR2 are ignored.
    """
    die_with_parent()
    for ignored in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    heeded = set()
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where SIGTERM keeps its meaning
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_on_parents_word, args=(os.getppid(),), daemon=True).start()
        heeded = {signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_SETMASK, heeded)


def _end_on_parents_word(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os.kill(os.getpid(), signal.SIGKILL)
