"""Process control: signal handlers, ending with the parent process, exiting at once."""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

READER_GONE = 128 + signal.SIGPIPE
"""Exit code of a command whose output nobody reads any more, such as before `| head -1`: that of other programs."""

_PR_SET_PDEATHSIG = 1  # option of prctl(2)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, even by SIGKILL. Linux only; no effect elsewhere."""
    if sys.platform != "linux":
        return
    parent = multiprocessing.parent_process()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent.pid:
        os.kill(os.getpid(), signal.SIGKILL)  # the parent died before the call, as it may while this process imports


def exit_now(code: int) -> NoReturn:
    """Exit at once with an exit code; child processes that called `die_with_parent` die as well.

    A normal exit of Python tears down all modules first, which takes seconds on busy cores, and joins child processes.
    """
    logging.shutdown()
    flush_output()
    os._exit(code)


def flush_output() -> None:
    """Flush standard output and error; what a full disk or a closed pipe does not take is dropped."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or Python's exit fails on it, with 120


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run `main` and exit with the code it returns, or print the traceback and exit with 1 if it raises.

    A failed program exits at once, because other ranks wait for it. So does one with threads that did not end: what a
    tracker does at a normal exit may wait for a network that is not there.
    """
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    if code or any(thread.daemon for thread in threading.enumerate()):
        exit_now(code)
    flush_output()
    sys.exit(0)


@contextmanager
def signal_handler(
    numbers: Iterable[int], handler: Callable[[int, FrameType | None], object] | signal.Handlers
) -> Iterator[None]:
    """Handle signals with `handler` inside the block. No effect outside the main thread, which alone can do so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 inside the block; they are delivered after it.

    A process started inside the block begins with them blocked.
    """
    blocked = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def leave_signals_to_parent() -> None:
    """Make a helper process, such as a data worker, end only with its parent or when its parent terminates it.

    Schedulers send signals to whole process groups, but the parent still needs its helpers to finish the step and save
    a checkpoint. SIGTERM is therefore obeyed only if the parent sent it; SIGINT, SIGUSR1 and SIGUSR2 are ignored.
    To be called first in a process that was started inside `signals_blocked`.
    """
    die_with_parent()
    for ignored in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    blocked = set()
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where SIGTERM from anyone ends the process
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parents_sigterm, args=(os.getppid(),), daemon=True).start()
        blocked = {signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _exit_on_parents_sigterm(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os.kill(os.getpid(), signal.SIGKILL)
