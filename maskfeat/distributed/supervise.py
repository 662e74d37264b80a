"""Start the processes of one node with torch.multiprocessing, and end all of them when one fails.

Starting is `torch.multiprocessing.start_processes`. Waiting is done here and not by `ProcessContext.join`, which counts
exit code PREEMPTED as a failure, reports whichever process it sees first, although that one may only have lost its
connection to the one that failed, and ends the others with SIGTERM: ranks take that for the scheduler's request to
save and exit, and pass it on to the other nodes.
"""

import logging
import os
import re
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from torch.multiprocessing import ProcessContext, get_context, start_processes

from maskfeat.distributed.preemption import INTERRUPTED, PREEMPTED, STOP_SIGNALS, STOPPED, heeding_ctrl_c
from maskfeat.distributed.processes import die_with_parent, exit_now, signal_handler

logger = logging.getLogger(__name__)

GRACE_PERIOD = 2.0
"""Seconds that the others have to exit after one process failed: they often fail for the same reason and log it."""

GRACE_PERIOD_AFTER_KILL = 0.5
"""Seconds that the others have to exit after one process was killed by a signal."""

_WELL = (0, PREEMPTED, INTERRUPTED, STOPPED)  # exit codes that are no failure

_CONNECTION_LOST = re.compile(r"Connection (closed|reset) by peer")
"""Found in the traceback of a rank whose peer is gone."""

_HINTS: dict[int, str] = {
    signal.SIGKILL: ", from outside; running out of memory is a common cause: see the system's log, and lower "
    "DATA_LOADER.NUM_WORKERS or the batch",
    signal.SIGBUS: "; too little shared memory is a common cause: see DATA_LOADER.NUM_WORKERS",
}


def run_processes(job: Callable[..., int], args: tuple[Any, ...], count: int, first_rank: int = 0) -> int:
    """Run `job(index, *args)` in `count` spawned processes and wait for them.

    SIGTERM, SIGUSR1, SIGUSR2 and a first Ctrl-C are forwarded to the processes; a second Ctrl-C kills them.

    Args:
        job: A function at the top level of a module; takes the index of the process on this node, returns an exit code.
        args: Further arguments, picklable.
        count: Number of processes.
        first_rank: Rank of process 0, for messages.

    Returns:
        0 if all processes succeeded; PREEMPTED, INTERRUPTED or STOPPED if some of them exited with it and none failed;
        PREEMPTED if a forwarded signal killed one that had no handler for it yet; otherwise the exit code of the
        process that failed first, 128 + n if signal n killed it.
    """
    processes: list[BaseProcess] = []
    received: list[int] = []

    def forward(number: int, _: FrameType | None = None) -> None:
        received.append(number)
        _send_signal(processes, number)

    readers, writers = zip(*(get_context("spawn").Pipe(duplex=False) for _ in range(count)), strict=True)
    with signal_handler((*STOP_SIGNALS, signal.SIGUSR2), forward), heeding_ctrl_c(forward, announce=True):
        try:
            resource_tracker.ensure_running()  # here: some versions of Python unblock SIGINT when they start it
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited, see `heeding_ctrl_c`
            try:
                context = start_processes(_run, (job, args, writers), count, join=False)
                processes.extend(context.processes)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for number in list(received):  # those that came while the processes were being started
                _send_signal(processes, number)
            exited = _wait(context)
        finally:  # also after a second Ctrl-C
            _send_signal(processes, signal.SIGKILL)
            for process in processes:
                process.join()
    for index, process in enumerate(processes):
        process.name = f"rank {first_rank + index}"
    return _exit_code([processes[index] for index in exited], received, [readers[index] for index in exited])


def _run(index: int, job: Callable[..., int], args: tuple[Any, ...], writers: Sequence[Connection]) -> None:
    """Run the job in a spawned process and exit with its exit code."""
    die_with_parent()
    try:
        code = job(index, *args)
    except Exception:
        # That of PyTorch's data loader raises whenever a data worker ends, and what it interrupted here would be lost.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        writers[index].send_bytes(traceback.format_exc().encode()[-32_000:])  # less than a pipe holds: never blocks
        # Exit here, while the traceback keeps everything alive: tearing it down may wait for processes that are gone.
        exit_now(1)
    exit_now(code)


def _send_signal(processes: Sequence[BaseProcess], number: int) -> None:
    for process in processes:
        if process.exitcode is None and process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)


def _wait(context: ProcessContext) -> list[int]:
    """Wait until every process has exited, or until the grace period after the first failure is over.

    Returns:
        Indices of the processes that exited by then, in that order.
    """
    exited: list[int] = []
    deadline: float | None = None
    while context.sentinels:
        ready = wait(context.sentinels, None if deadline is None else max(deadline - time.monotonic(), 0))
        if not ready:
            break
        for sentinel in ready:
            index = context.sentinels.pop(sentinel)
            process = context.processes[index]
            process.join()
            exited.append(index)
            if deadline is None and process.exitcode not in _WELL:
                deadline = time.monotonic() + (GRACE_PERIOD if process.exitcode > 0 else GRACE_PERIOD_AFTER_KILL)
    return exited


def _exit_code(exited: Sequence[BaseProcess], received: Sequence[int], readers: Sequence[Connection]) -> int:
    """Return the exit code of all, as `run_processes` describes it; log the failure that caused the others."""
    codes = [process.exitcode or 0 for process in exited]
    if any(-code in STOP_SIGNALS and -code in received for code in codes):
        return PREEMPTED
    failed = [index for index, code in enumerate(codes) if code not in _WELL]
    if not failed:
        return max(codes)
    traces = {index: _traceback(readers[index]) for index in failed}
    # A process that was killed comes before those that lost their connection to it, whichever exited first. NCCL aborts
    # those that wait for one that failed.
    first = min(
        failed,
        key=lambda i: (codes[i] > 0 or codes[i] == -signal.SIGABRT, bool(_CONNECTION_LOST.search(traces[i]))),
    )
    _log_failure(exited[first], traces[first])
    return codes[first] if codes[first] > 0 else 128 - codes[first]


def _traceback(reader: Connection) -> str:
    """Return the traceback that a process sent; "" if it sent none."""
    return reader.recv_bytes().decode(errors="replace") if reader.poll() else ""


def _log_failure(process: BaseProcess, trace: str) -> None:
    name, code = f"{process.name} (process {process.pid})", process.exitcode or 0
    if trace:
        logger.error("%s failed:\n%s", name, trace)
    elif code < 0:
        signal_name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        logger.error("%s was killed by %s%s", name, signal_name, _HINTS.get(-code, ""))
    else:
        logger.error("%s exited with code %d: see its message above", name, code)
