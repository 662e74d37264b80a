"""Runs of the program that are killed, stopped and started again, each in a process of its own.

A `Forks` server imports the program once and forks a process for every run, so that a run begins within a tenth of a
second: `python -m tests.reliability.harness` is what it starts.
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.processes import renew_thread_pool
from maskfeat.checkpoint.files import find_checkpoints
from maskfeat.checkpoint.reading import read_checkpoint
from tests.small import RECIPES, VIT_FT, VIT_PT, images

REPO = Path(__file__).resolve().parents[2]
_END = "\n"  # the line that ends the server
# Everything that a resumed run has to find again: optimizer, an average, drop path, mixup, augmentation.
PRETRAINING = [
    "--cfg", str(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml"), *VIT_PT, "SOLVER.MAX_EPOCH", "3",
    "MVIT.DROPPATH_RATE", "0.2", "TRAIN.EMA", "0.9", "TEST.ENABLE", "False", "TRAIN.EVAL_PERIOD", "0", "TASK", "pt",
]  # fmt: skip
FINE_TUNING = [
    "--cfg", str(RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml"), *VIT_FT, "SOLVER.MAX_EPOCH", "3",
    "TRAIN.CHECKPOINT_FILE_PATH", "", "TEST.ENABLE", "False", "TRAIN.EVAL_PERIOD", "2", "TASK", "ft",
]  # fmt: skip


def arguments(recipe: Sequence[str], data: Path, output: Path, *opts: str) -> list[str]:
    """The command line of a run."""
    return [*recipe, *images(data), "OUTPUT_DIR", str(output), *opts]


class Run:
    """A process that the server forked.

    Attributes:
        pid: of the process, which leads a process group of its own.
    """

    def __init__(self, server: "subprocess.Popen[str]") -> None:
        self._server = server
        assert server.stdout is not None
        self.pid = int(server.stdout.readline())

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def is_there(self) -> bool:
        """Whether it has not ended yet."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def wait(self) -> int:
        """The exit code; that of a signal is negative."""
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())


class Forks:
    """Starts runs, one at a time."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.harness"],
            cwd=REPO,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, argv: Sequence[str], log: Path) -> Run:
        """A process that runs the program; it appends what it says to `log`."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps([list(argv), str(log)]) + "\n")
        self._server.stdin.flush()
        return Run(self._server)

    def run(self, argv: Sequence[str], log: Path) -> int:
        """Run it to the end; the exit code."""
        return self.start(argv, log).wait()

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        # Not by closing alone: a data worker of this process may hold the pipe open as well.
        self._server.stdin.write(_END)
        self._server.stdin.close()
        self._server.wait(60)


def digest(output: Path, task: str) -> str:
    """SHA-256 of everything that the last checkpoint of a run holds but its config: bits, not bytes of the file."""
    content = read_checkpoint(find_checkpoints(output, task)[-1])
    content.pop("cfg")
    total = hashlib.sha256()

    def add(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                add(value[key], f"{name}/{key}")
        elif isinstance(value, list | tuple):
            for place, item in enumerate(value):
                add(item, f"{name}/{place}")
        elif isinstance(value, torch.Tensor):
            total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            total.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            total.update(f"{name} {value!r}".encode())

    add(content, "")
    return total.hexdigest()


def await_partial(output: Path, run: Run, number: int) -> bool:
    """Wait until the `number`-th checkpoint (from 1) is being written; False where the run ends before it."""
    folder, seen, there, end = output / "checkpoints", 0, False, time.monotonic() + 60
    while run.is_there and time.monotonic() < end:
        try:
            now = any(name.endswith(".pyth.partial") for name in os.listdir(folder))
        except FileNotFoundError:
            now = False
        seen += now and not there
        if now and seen >= number:
            return True
        there = now
        time.sleep(0.0002)
    return False


def wait_until(condition: Any, seconds: float, what: str) -> None:
    """Look fifty times a second.

    Raises:
        AssertionError: where it does not come true in time.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def _serve() -> None:
    """Fork a run for every line of standard input, [arguments, log], up to an empty one; print its process number, then
    its exit code."""
    from maskfeat.engine.run import main

    torch.set_num_threads(1)
    for line in iter(sys.stdin.readline, _END):
        if not line:
            break  # whoever started it has died
        argv, log = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setsid()
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(out, stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            renew_thread_pool()
            try:
                code = main(argv)
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 99
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
