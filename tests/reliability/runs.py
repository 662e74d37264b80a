"""Real runs of tools/run_net.py in a session of their own, so that whoever is left behind can be found."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.harness import descendants, wait_until
from tests.small import RECIPES, REPO, VIT_PT, images

PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def arguments(data: Path, output_dir: Path, *more: str) -> list[str]:
    """Those of a run of a tiny model that would take hours."""
    endless = ["SOLVER.MAX_EPOCH", "100000", "TRAIN.CHECKPOINT_PERIOD", "100000", "DATA_LOADER.NUM_WORKERS", "2"]
    recipe = str(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml")
    return ["--cfg", recipe, *VIT_PT, *images(data), *endless, "OUTPUT_DIR", str(output_dir), *more]


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    session: int
    state: str
    command: str


def processes() -> list[Process]:
    """All processes of this machine, but for those that have ended and wait to be collected."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # "pid (name) state ppid pgrp session ...": the name may hold anything.
            state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in "ZX":
            found.append(Process(int(folder.name), int(parent), int(session), state, command))
    return found


def children_of(pid: int) -> list[Process]:
    return sorted((process for process in processes() if process.parent == pid), key=lambda process: process.pid)


class Running:
    """A run that has made its first steps.

    Args:
        command: what starts it.
        output_dir: its OUTPUT_DIR.
        ranks: how many processes train.
    """

    def __init__(self, command: Sequence[str], output_dir: Path, ranks: int = 2) -> None:
        output_dir.mkdir(parents=True)
        self.screen = output_dir / "screen.txt"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
        with self.screen.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=env, cwd=REPO, start_new_session=True
            )
        self.ranks: list[int] = []
        self.workers: dict[int, list[int]] = {}
        self.family: set[int] = set()
        try:
            wait_until(lambda: "step 3/" in self.said() or self.process.poll() is not None, 120, "three steps")
            assert self.process.poll() is None, self.said()
            wait_until(lambda: self._look(ranks), 20, "all processes are there")
        except BaseException:
            self.clean_up()
            raise

    def _look(self, ranks: int) -> bool:
        """Find the ranks, in their order: those processes that have data workers."""
        self.family = {self.process.pid, *descendants(self.process.pid)}  # torchrun gives its processes own sessions
        self.workers = {
            pid: [child.pid for child in children_of(pid) if "resource_tracker" not in child.command]
            for pid in sorted(self.family)
            if pid != self.process.pid or ranks == 1
        }
        self.workers = {pid: found for pid, found in self.workers.items() if found}
        self.ranks = list(self.workers)
        return len(self.ranks) == ranks

    def left(self) -> list[Process]:
        """Whoever still runs of it."""
        return [one for one in processes() if one.session == self.process.pid or one.pid in self.family]

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
        for one in self.left():
            try:
                os.kill(one.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


def ranks_named(text: str) -> list[int]:
    """Which ranks the launcher said to have failed, in its order."""
    return [int(rank) for rank in re.findall(r"rank (\d+) \(process \d+\) (?:was|failed|ended)", text)]
