"""Real runs of the program in sessions of their own, and a look at the machine's processes: who is left behind?"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.harness import wait_until
from tests.small import REPO

TOOL = str(REPO / "tools" / "run_net.py")
PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

# A run that would take hours, and makes checkpoints at no time that a test could meet.
ENDLESS = ["SOLVER.MAX_EPOCH", "100000", "TRAIN.CHECKPOINT_PERIOD", "100000"]

START = 240
"""Seconds that a run may take to its first steps: other tests may have the cores."""


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    session: int
    began: int  # in ticks of the kernel
    command: str


def processes() -> list[Process]:
    """All processes of this machine, but for those that have ended and wait to be collected; the oldest first."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            # "pid (name) state ppid pgrp session ...", see proc(5): the name may hold anything.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            state, parent, session, began = fields[0], int(fields[1]), int(fields[3]), int(fields[19])
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if state not in "ZX":
                found.append(Process(int(folder.name), parent, session, began, command))
    return sorted(found, key=lambda process: (process.began, process.pid))


def descendants(pid: int) -> Iterator[Process]:
    """Processes that were started by a process, directly or not; each before those that it started."""
    found = processes()
    above = [pid]
    while above:
        children = [process for process in found if process.parent in above]
        yield from children
        above = [process.pid for process in children]


def start(command: Sequence[str], log: Path, **env: str) -> "subprocess.Popen[bytes]":
    """A process that leads a session and a process group of its own; it appends what it says to `log`."""
    env = {**os.environ, **env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    with log.open("ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, cwd=REPO, env=env, start_new_session=True)


class Running:
    """A run of two processes that has made its first steps, with at least one data worker each.

    Args:
        command: what starts it.
        folder: a new folder for what it says.

    Attributes:
        ranks: process of each rank.
        workers: data workers of each of these processes.
    """

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        folder.mkdir(parents=True)
        self.screen = folder / "screen.txt"
        self.ranks: list[int] = []
        self.workers: dict[int, list[int]] = {}
        self._family: set[tuple[int, int]] = set()  # torchrun gives its processes sessions of their own
        self.process = start(command, self.screen)
        try:
            wait_until(lambda: "step 3/" in self.said() or self.process.poll() is not None, START, "three steps")
            assert self.process.poll() is None, self.said()
            wait_until(self._look, START, "all processes are there")
        except BaseException:
            self.clean_up()
            raise

    def _look(self) -> bool:
        """Find the ranks, the oldest first: those processes that have data workers."""
        below = list(descendants(self.process.pid))
        self._family.update((one.pid, one.began) for one in below)  # numbers of processes are used again
        self.workers = {}
        for one in below:
            if one.parent != self.process.pid and "resource_tracker" not in one.command:
                self.workers.setdefault(one.parent, []).append(one.pid)
        self.ranks = [one.pid for one in below if one.pid in self.workers]
        return len(self.ranks) == 2

    def left(self) -> list[Process]:
        """Whoever still runs of it."""
        return [one for one in processes() if one.session == self.process.pid or (one.pid, one.began) in self._family]

    def said(self) -> str:
        return self.screen.read_text(errors="replace")

    def end(self, limit: float = 60) -> tuple[int, float]:
        """Wait for its end: exit code, and seconds until its last process was gone."""
        began = time.monotonic()
        code = self.process.wait(limit)
        wait_until(lambda: not self.left(), limit, "nobody is left behind")
        return code, time.monotonic() - began

    def clean_up(self) -> None:
        """Kill what is left of it."""
        if self.process.poll() is None:
            self._look()
        for one in self.left():
            with suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)
        self.process.wait()


def ranks_named(text: str) -> list[int]:
    """Which ranks the launcher said to have failed, in its order."""
    return [int(rank) for rank in re.findall(r"rank (\d+) \(process \d+\) (?:was|failed|exited)", text)]
