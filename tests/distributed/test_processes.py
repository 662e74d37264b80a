"""Processes are tied to the one that started them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.reliability.harness import wait_until
from tests.small import REPO

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")

# The parent starts a process that waits before it ties itself to it, as one does that still imports, and is killed.
PARENT = """
import multiprocessing, os, signal, sys, time
from maskfeat.distributed.processes import die_with_parent

def child(folder, killed_first):
    open(os.path.join(folder, "started"), "w").write(str(os.getpid()))
    if killed_first:
        while not os.path.exists(os.path.join(folder, "killed")):
            time.sleep(0.02)
    die_with_parent()
    open(os.path.join(folder, "tied"), "w").close()
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.get_context("fork").Process(target=child, args=(sys.argv[1], sys.argv[2] == "first")).start()
    time.sleep(60)
"""


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("killed", ["first", "later"])
def test_a_child_dies_with_its_parent(tmp_path: Path, killed: str) -> None:
    """Also where the parent is killed before the child has tied itself to it."""
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), killed], env=environment)
    started, tied = tmp_path / "started", tmp_path / "tied"
    wait_until(lambda: started.exists() and started.read_text() and (killed == "first" or tied.exists()), 60, "a child")
    pid = int(started.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait(30)
    (tmp_path / "killed").touch()
    end = time.monotonic() + 30
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    alive = is_alive(pid)
    if alive:
        os.kill(pid, signal.SIGKILL)
    assert not alive
    assert tied.exists() == (killed == "later")


def test_a_thread_that_does_not_end_holds_up_no_exit(tmp_path: Path) -> None:
    """At a normal exit, a library may wait for its thread."""
    program = tmp_path / "program.py"
    program.write_text(
        "import atexit, threading\n"
        "from maskfeat.distributed.processes import run_program\n"
        "thread = threading.Thread(target=threading.Event().wait, daemon=True)\n"
        "thread.start()\n"
        "atexit.register(thread.join)\n"
        "run_program(lambda: print('done') or 0)\n"
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "done\n"


def test_a_process_without_a_parent_of_ours_lives(tmp_path: Path) -> None:
    """The main process of a program is started by a shell, and may outlive it."""
    assert multiprocessing.parent_process() is None
    code = "from maskfeat.distributed.processes import die_with_parent; die_with_parent(); print('alive')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True
    )
    assert done.stdout == "alive\n"
