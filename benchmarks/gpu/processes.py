"""Processes for parts: forked from one that has imported everything, or started from nothing where that is not safe.

Importing takes several seconds, many parts take less. The process that forks never uses CUDA; that a fork of it can is
tried before it is relied on.
"""

import json
import logging
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from maskfeat.distributed.processes import die_with_parent

logger = logging.getLogger(__name__)

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "gpu_check.py"
_READY = "ready"
_PATIENCE = 90.0  # seconds to import everything and to try CUDA in a fork


class Process(Protocol):
    """What of `subprocess.Popen` is used here."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


def start(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Process:
    """Start the program anew, as leader of a process group; what it says goes to `log`."""
    with open(log, "wb") as said:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )


class Fork:
    """A process that a `Server` forked, as leader of a process group."""

    def __init__(self, server: "subprocess.Popen[str]") -> None:
        assert server.stdout is not None
        self._answers = server.stdout
        line = self._answers.readline()
        if not line:
            raise BrokenPipeError("the process that forks is gone")
        self.pid = int(line)
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code (that of a signal is negative), or None while it runs."""
        if self._code is None and select.select([self._answers], [], [], 0)[0]:
            self.wait()
        return self._code

    def wait(self) -> int:
        """Wait for its end; return the exit code."""
        if self._code is None:
            self._code = int(self._answers.readline() or -signal.SIGKILL)
        return self._code


class Server:
    """The process that imports a table of parts and forks; one fork at a time.

    Args:
        table: module of the parts.
        cuda: whether forks are to use CUDA.
        log: what it says besides.
    """

    def __init__(self, table: str, cuda: bool, log: Path) -> None:
        with open(log, "wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, str(SCRIPT), "--serve", "--table", table, "--device", "cuda" if cuda else "cpu"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                # Whether there is CUDA is asked of the driver's management library, which leaves CUDA untouched.
                env={**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._commands = self._process.stdin
        answers = select.select([self._process.stdout], [], [], _PATIENCE)[0]  # CUDA may hang in the trial fork
        self.usable = bool(answers) and self._process.stdout.readline().strip() == _READY
        if not self.usable:
            logger.info("forked processes cannot be used here (%s): each part imports everything anew", log)

    def start(self, arguments: Sequence[str], log: Path) -> Process:
        """Run the program in a fork.

        Raises:
            BrokenPipeError: this process is gone.
        """
        self._commands.write(json.dumps([list(arguments), str(log)]) + "\n")
        self._commands.flush()
        return Fork(self._process)

    def close(self) -> None:
        """End it."""
        with suppress(BrokenPipeError):
            self._commands.close()
        self._process.kill()
        self._process.wait()


def serve(main: Callable[[Sequence[str]], int], cuda: bool) -> int:
    """Fork a call of `main` for every line of standard input, [arguments, log]; print its process id and exit code."""
    die_with_parent()
    if cuda and (torch.cuda.is_initialized() or _forked(_use_cuda, Path(os.devnull), lambda pid: None) != 0):
        return 1
    print(_READY, flush=True)
    for line in sys.stdin:
        arguments, log = json.loads(line)
        print(_forked(partial(main, arguments), Path(log), lambda pid: print(pid, flush=True)), flush=True)
    return 0


def _use_cuda() -> int:
    return int(torch.ones(2, device="cuda").sum().item() != 2)


def renew_thread_pool() -> None:
    """Make torch's pool of threads anew: the first thing to do in a fork, in its only thread.

    The first call of `set_num_threads` in a fork replaces a pool whose threads exist in the parent alone. Two threads
    that come first together, as those of autograd do when they start, see none in between and end the process
    ("pool INTERNAL ASSERT FAILED", torch 2.14).
    """
    torch.set_num_threads(torch.get_num_threads())


def _forked(job: Callable[[], int], log: Path, began: Callable[[int], None]) -> int:
    """Run a job in a forked process and return its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            nothing = os.open(os.devnull, os.O_RDONLY)
            for ours, theirs in ((0, nothing), (1, said), (2, said)):
                os.dup2(theirs, ours)
            renew_thread_pool()
            code = job()
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    began(child)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _family(pid: int) -> list[int]:
    """Return a process and all below it (Linux), also those that lead process groups of their own."""
    below: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            below.setdefault(parent, []).append(int(stat.parent.name))
    family = [pid]
    for one in family:  # grows on the way
        family.extend(below.get(one, []))
    return family


def end_family(process: Process) -> int:
    """Kill a process, its process group and everything that it started; return its exit code."""
    family = _family(process.pid)[1:]
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return process.wait()
