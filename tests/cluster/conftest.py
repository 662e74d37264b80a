"""A real Slurm of two nodes, or a skipped test; under MASKFEAT_SLURM=1 a failing one."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.small import REPO

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
ENV["PYTHONPATH"] = os.pathsep.join([str(REPO), *filter(None, [ENV.get("PYTHONPATH")])])


def _missing() -> str:
    if shutil.which("sinfo") is None:
        return "Slurm is not installed"
    done = subprocess.run(["sinfo", "-h", "-o", "%D %T"], capture_output=True, text=True)
    nodes = sum(int(number) for number in re.findall(r"^(\d+) (?:idle|mixed|allocated|completing)", done.stdout, re.M))
    return "" if nodes >= 2 else f"no Slurm of two nodes runs here: {done.stdout}{done.stderr}"


@pytest.fixture(scope="session", autouse=True)
def slurm() -> None:
    """Two nodes that take jobs."""
    missing = _missing()
    if missing and os.environ.get("MASKFEAT_SLURM") == "1":
        pytest.fail(missing)
    if missing:
        pytest.skip(f"{missing} (MASKFEAT_SLURM=1 makes this a failure)")


class Cluster:
    """Calls Slurm's programs; ends what it started."""

    def __init__(self) -> None:
        self.jobs: list[str] = []

    def srun(self, *options: str) -> list[str]:
        """The start of a command that runs what follows on both nodes, which share the cores of this machine."""
        return ["srun", "-N2", "--overcommit", "--kill-on-bad-exit=1", *options]

    def submit(self, options: Sequence[str], script: Sequence[str], log: Path) -> str:
        """Queue a script with its arguments from the root of the repository; the job's number."""
        command = ["sbatch", "--parsable", f"--output={log}", *options, *script]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=ENV)
        assert done.returncode == 0, done.stderr
        return self.watch(done.stdout.strip())

    def watch(self, job: str) -> str:
        self.jobs.append(job)
        return job

    def shown(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        done = subprocess.run(["scontrol", "show", "job", job, "-o"], capture_output=True, text=True, check=True)
        return dict(re.findall(r"(\w+)=(\S*)", done.stdout))

    def until(self, job: str, true: Callable[[dict[str, str]], object], seconds: float, log: Path) -> dict[str, str]:
        """Wait until what Slurm says of a job is as wanted."""
        deadline = time.monotonic() + seconds
        while not true(shown := self.shown(job)):
            said = log.read_text(errors="replace") if log.is_file() else "(no log)"
            assert time.monotonic() < deadline, f"not within {seconds} s: {shown['JobState']}\n{said[-3000:]}"
            time.sleep(0.05)
        return shown

    def ended(self, job: str, log: Path, seconds: float = 480) -> tuple[str, str]:
        """Wait for its end: its state and exit code ("0:0")."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        shown = self.until(job, lambda shown: shown["JobState"] in over, seconds, log)
        return shown["JobState"], shown["ExitCode"]


@pytest.fixture
def cluster() -> "Cluster":  # type: ignore[misc]
    cluster = Cluster()
    yield cluster  # type: ignore[misc]
    for job in cluster.jobs:
        subprocess.run(["scancel", "--full", "--signal=KILL", job], capture_output=True)
        subprocess.run(["scancel", job], capture_output=True)
