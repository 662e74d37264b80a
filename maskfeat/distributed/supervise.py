"""Processes of one machine, started and watched by a parent that does nothing else.

One that dies ends the others within seconds, signals that ask for an end are passed on, and nobody is left behind.
"""

import logging
import multiprocessing
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple

from maskfeat.distributed.preemption import PREEMPTED
from maskfeat.distributed.processes import die_with_parent, exit_now

logger = logging.getLogger(__name__)

GRACE = 2.0
"""Seconds that the others have to end by themselves when one has failed: they often fail of the same, and say so."""

GRACE_AFTER_KILL = 0.5
"""Likewise when one was killed, of which they can know nothing."""

ENDING = (signal.SIGTERM, signal.SIGUSR1)
PASSED_ON = (*ENDING, signal.SIGUSR2)

MISSED = re.compile(r"Connection (closed|reset) by peer")
"""What a rank says when another is gone."""

HINTS: dict[int, str] = {
    signal.SIGKILL: ", from outside; out of memory is a common cause: see the system's log, and lower "
    "DATA_LOADER.NUM_WORKERS or the batch",
    signal.SIGBUS: "; too little shared memory is a common cause: see DATA_LOADER.NUM_WORKERS",
}


class Child(NamedTuple):
    """A process, its rank, and where the traceback of what ended it comes in."""

    rank: int
    process: SpawnProcess
    said: Connection


def _run(job: Callable[..., int], index: int, args: tuple[Any, ...], tell: Connection) -> None:
    """What each process does."""
    die_with_parent()
    try:
        code = job(index, *args)
    except Exception:
        tell.send_bytes(traceback.format_exc().encode()[-32_000:])  # less than a pipe holds: never waits
        # From here, where nothing that it holds is tidied up yet: that may wait for processes that are no more.
        exit_now(1)
    exit_now(code)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A process started in this block never heeds Ctrl-C, from its first instruction on: its parent ends it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what becomes of a signal
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _start(job: Callable[..., int], args: tuple[Any, ...], count: int, first_rank: int) -> Iterator[Child]:
    context = multiprocessing.get_context("spawn")
    for index in range(count):
        said, tell = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(job, index, args, tell), name=f"rank {first_rank + index}")
        with _interrupts_ignored():
            process.start()
        tell.close()
        yield Child(first_rank + index, process, said)


def _signal_all(children: Sequence[Child], number: int) -> None:
    for child in children:
        if child.process.pid is not None:
            with suppress(ProcessLookupError):  # it has ended by itself
                os.kill(child.process.pid, number)


class Supervisor:
    """Starts processes and waits for them; one use.

    Attributes:
        asked: signals that asked this process for an end, and were passed on.
    """

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.running: list[Child] = []

    def run(self, job: Callable[..., int], args: tuple[Any, ...], count: int, first_rank: int = 0) -> int:
        """Run `job(index, *args)`, which returns an exit code, in `count` processes.

        Returns:
            0 where all ended well; PREEMPTED where the others ended so, or died of a signal that was passed on before
            they could heed it; otherwise the code of the first that failed, 128 + n where signal n killed it.
        """
        with self._passing_on():
            try:
                for child in _start(job, args, count, first_rank):
                    self.running.append(child)
                    for number in self.asked:
                        _signal_all([child], number)
                return self._wait()
            finally:  # also where Ctrl-C interrupts the waiting
                _signal_all(self.running, signal.SIGKILL)
                for child in self.running:
                    child.process.join()

    @contextmanager
    def _passing_on(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._pass_on) for number in PASSED_ON}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: object) -> None:
        self.asked.append(number)
        _signal_all(self.running, number)

    def _wait(self) -> int:
        ended: list[Child] = []
        deadline: float | None = None  # until when the others may end by themselves
        while self.running:
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            ready = wait([child.process.sentinel for child in self.running], left)
            if not ready:
                break  # whoever still runs is killed
            for child in [child for child in self.running if child.process.sentinel in ready]:
                child.process.join()
                self.running.remove(child)
                ended.append(child)
                if deadline is None and child.process.exitcode not in (0, PREEMPTED):
                    deadline = time.monotonic() + (GRACE if (child.process.exitcode or 0) > 0 else GRACE_AFTER_KILL)
        if any(self._was_asked(child) for child in ended):
            return PREEMPTED
        failed = [child for child in ended if child.process.exitcode not in (0, PREEMPTED)]
        return _report(failed) if failed else max(child.process.exitcode or 0 for child in ended)

    def _was_asked(self, child: Child) -> bool:
        """Whether a signal killed it that was passed on before it could heed it."""
        number = -(child.process.exitcode or 0)
        return number in ENDING and number in self.asked


def _report(failed: Sequence[Child]) -> int:
    """Say which of them failed first, and of what; returns its exit code, as a shell says it."""
    said = [_said(child) for child in failed]

    def order(number: int) -> tuple[bool, bool, int]:
        """One that was killed comes before those that then missed it, whoever was seen first."""
        return (failed[number].process.exitcode or 0) > 0, bool(MISSED.search(said[number])), number

    first = min(range(len(failed)), key=order)
    child, code = failed[first], failed[first].process.exitcode or 0
    who = f"rank {child.rank} (process {child.process.pid})"
    if said[first]:
        logger.error("%s failed:\n%s", who, said[first])
    elif code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        logger.error("%s was killed by %s%s", who, name, HINTS.get(-code, ""))
    else:
        logger.error("%s ended with code %d: what it said stands above", who, code)
    return code if code > 0 else 128 - code


def _said(child: Child) -> str:
    """The traceback that a child sent; "" where it sent none."""
    if child.said.poll():
        with suppress(EOFError):
            return child.said.recv_bytes().decode(errors="replace")
    return ""
