"""Small jobs for the tests of process supervision.

    python -m tests.distributed.supervised JOB FOLDER [SECONDS]    two processes that run a job under run_processes
    python -m tests.distributed.supervised parent FOLDER           a process with a forked worker, as a data loader has

They write their process ids and their progress to FOLDER, one file each. SECONDS replaces both grace periods.
"""

import logging
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType

from maskfeat.distributed import supervise
from maskfeat.distributed.preemption import INTERRUPTED, PREEMPTED, StopRequest
from maskfeat.distributed.processes import leave_signals_to_parent, run_program, signals_blocked


def await_file(path: Path) -> str:
    """Its text, once it is there."""
    while not path.is_file():
        time.sleep(0.005)
    return path.read_text()


def tell(path: Path, text: object) -> None:
    """Write a file that is there at once, or not at all."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(str(text))
    partial.replace(path)


def enter(index: int, folder: Path) -> None:
    """Say who this is, and wait for the other one."""
    tell(folder / f"rank {index}", os.getpid())
    await_file(folder / f"rank {1 - index}")


def well(index: int, folder: Path) -> int:
    enter(index, folder)
    return 0


def one_ends_with_7(index: int, folder: Path) -> int:
    enter(index, folder)
    if index == 0:
        time.sleep(600)
    return 7


def one_fails(index: int, folder: Path) -> int:
    enter(index, folder)
    if index == 0:
        time.sleep(600)
    raise KeyError("no such key")


def one_is_hit_again(index: int, folder: Path) -> int:
    """By what PyTorch's data loader raises when a data worker ends, while its first error is being reported."""

    def hit(number: int, _: FrameType | None) -> None:
        raise RuntimeError("a data worker has ended")

    def report() -> str:
        os.kill(os.getpid(), signal.SIGCHLD)
        return written()

    signal.signal(signal.SIGCHLD, hit)
    written, traceback.format_exc = traceback.format_exc, report
    return one_fails(index, folder)


def both_fail(index: int, folder: Path) -> int:
    """Rank 0, which only misses the other one, is there with its complaint first."""
    enter(index, folder)
    if index == 0:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:29500")
    time.sleep(0.2)
    raise ValueError("the cause")


def one_fails_and_one_is_aborted(index: int, folder: Path) -> int:
    """As NCCL does with those that wait for one that has failed."""
    enter(index, folder)
    if index == 1:
        raise KeyError("no such key")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGABRT)
    return 0


def one_is_killed(index: int, folder: Path) -> int:
    enter(index, folder)
    if index == 0:
        time.sleep(600)
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def one_is_terminated(index: int, folder: Path) -> int:
    """By somebody who does not ask the launcher."""
    enter(index, folder)
    if index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(600)
    return 0


def one_is_stopped(index: int, folder: Path) -> int:
    """SIGSTOP: it can heed nothing but SIGKILL."""
    enter(index, folder)
    if index == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    return 7


def preempted(index: int, folder: Path) -> int:
    enter(index, folder)
    return PREEMPTED


def one_is_preempted(index: int, folder: Path) -> int:
    """The other one had done all its work already."""
    enter(index, folder)
    return PREEMPTED if index else 0


def heeds(index: int, folder: Path) -> int:
    """Ends well where it is asked."""
    stop = StopRequest()
    with stop.listening():
        enter(index, folder)
        while not stop:
            time.sleep(0.005)
        tell(folder / f"heard {index}", stop.reason)
    return INTERRUPTED if stop.reason == "SIGINT" else PREEMPTED


def heeds_late(index: int, folder: Path) -> int:
    """As one that still imports when it is asked."""
    enter(index, folder)
    await_file(folder / "go on")
    stop = StopRequest()
    with stop.listening():
        tell(folder / f"heard {index}", stop.reason)
        enter(index, folder)
    return INTERRUPTED if stop.reason == "SIGINT" else 0


def one_fails_while_one_listens(index: int, folder: Path) -> int:
    """Nobody asked for a stop: the other one must not hear of one."""
    if index == 0:
        return heeds(index, folder)
    return one_fails(index, folder)


def does_not_heed(index: int, folder: Path) -> int:
    """Dies of the signal: it has no handler yet."""
    enter(index, folder)
    time.sleep(600)
    return 0


def notes_usr2(index: int, folder: Path) -> int:
    """SIGUSR2 asks for no end."""

    def note(number: int, _: FrameType | None) -> None:
        tell(folder / f"heard {index}", signal.Signals(number).name)

    signal.signal(signal.SIGUSR2, note)
    enter(index, folder)
    await_file(folder / f"heard {index}")
    return 0


def parent(folder: Path) -> int:
    """Ends its worker by SIGTERM when it is told to; 0 where that killed it."""
    with signals_blocked():
        worker = multiprocessing.get_context("fork").Process(target=_worker, args=(folder,))
        worker.start()
    await_file(folder / "end it")
    worker.terminate()
    worker.join()
    return 0 if worker.exitcode == -signal.SIGKILL else 1


def _worker(folder: Path) -> None:
    tell(folder / "worker", os.getpid())
    await_file(folder / "go on")
    leave_signals_to_parent()
    beats = 0
    while True:
        beats += 1
        tell(folder / "beats", beats)
        time.sleep(0.005)


if __name__ == "__main__":
    # As at a terminal: a job that a shell starts in the background begins with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.basicConfig(format="%(message)s")
    job, place = globals()[sys.argv[1]], Path(sys.argv[2])
    if job is parent:
        sys.exit(parent(place))
    if len(sys.argv) > 3:
        supervise.GRACE_PERIOD = supervise.GRACE_PERIOD_AFTER_KILL = float(sys.argv[3])
    run_program(lambda: supervise.run_processes(job, (place,), 2))
