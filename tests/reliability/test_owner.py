"""One run at a time writes into an OUTPUT_DIR, and whoever comes after a killed one need not wait for long."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from maskfeat.distributed.preemption import PREEMPTED
from maskfeat.engine import owner
from maskfeat.engine.owner import LOCK, owned
from maskfeat.errors import UserFileError
from tests.reliability.harness import FINE_TUNING, PRETRAINING, REPO, Forks, arguments, wait_until
from tests.reliability.runs import ENDLESS

HOLD = """
import os, sys, time
from pathlib import Path
from maskfeat.engine.owner import owned
with owned(Path(sys.argv[1])):
    if os.fork() == 0:  # a data worker: it outlives its parent for a while, and closes what it has inherited
        os.closerange(3, 100)
        time.sleep(float(sys.argv[2]))
        os._exit(0)
    print("owned", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_run(folder: Path, outlived: float = 0.0) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that owns a folder."""
    command = [sys.executable, "-c", HOLD, str(folder), str(outlived)]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None and process.stdout.readline() == b"owned\n"
        yield process
        process.kill()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_second_run_is_refused(forks: Forks, image_data: Path, tmp_path: Path) -> None:
    """Also one of another task, and it changes nothing; a test may be run meanwhile."""
    out = tmp_path / "out"
    argv = arguments(FINE_TUNING, image_data, out, "SOLVER.MAX_EPOCH", "1")
    assert forks.run(argv, tmp_path / "log") == 0
    with another_run(out) as process:
        before = content(out)
        for number, recipe in enumerate((PRETRAINING, FINE_TUNING)):
            log = tmp_path / f"log {number}"
            assert forks.run(arguments(recipe, image_data, out), log) == 2
            said = log.read_text()
            who = f"({socket.gethostname()}, process {process.pid}, since "
            assert f"error: OUTPUT_DIR {out} is in use by another run {who}" in said, said
            assert "give another OUTPUT_DIR" in said and "Traceback" not in said
            assert content(out) == before, "a run that is refused changes nothing"
        assert forks.run([*argv, "TRAIN.ENABLE", "False", "TEST.ENABLE", "True"], tmp_path / "test") == 0
        assert (out / "test_results_1x1.json").exists()
    assert forks.run(argv, tmp_path / "log") == 0


@pytest.mark.slow
def test_a_run_owns_its_folder_to_its_end(forks: Forks, image_data: Path, tmp_path: Path) -> None:
    """With data workers, which come and go; and a successor of a killed run begins at once."""
    argv = arguments(PRETRAINING, image_data, tmp_path, *ENDLESS, "DATA_LOADER.NUM_WORKERS", "1")
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, PREEMPTED)):
        log = tmp_path / f"log {code}"
        run = forks.start(argv, log)
        wait_until(lambda log=log: log.exists() and "epoch 3/" in log.read_text(), 240, "two epochs")
        probe = [sys.executable, "-c", "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | 4)"]
        assert b"BlockingIOError" in subprocess.run([*probe, str(tmp_path / LOCK)], capture_output=True).stderr
        run.kill(number)
        assert run.wait() == code
        assert "in use" not in log.read_text()


@pytest.mark.parametrize("outlived", [0.0, 30.0])
def test_the_lock_dies_with_its_process(outlived: float, tmp_path: Path) -> None:
    """Not with those that it forked."""
    with another_run(tmp_path, outlived) as process:
        process.kill()
        process.wait()
        began = time.monotonic()
        with owned(tmp_path):
            assert time.monotonic() - began < 2
            assert f"process {os.getpid()}, since" in (tmp_path / LOCK).read_text()


def test_a_job_of_slurm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number, with which it can be cancelled."""
    monkeypatch.setattr(owner, "WAIT", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with another_run(tmp_path) as process:
        who = rf"process {process.pid}, since [-\d]+ [:\d]+, Slurm job 4711\)"
        with pytest.raises(UserFileError, match=who), owned(tmp_path):
            pass


@pytest.mark.slow
def test_one_that_is_about_to_end_is_waited_for(tmp_path: Path) -> None:
    with another_run(tmp_path) as process:
        os.kill(process.pid, signal.SIGSTOP)  # it ends while the other one waits
        subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {process.pid}"])
        with owned(tmp_path):
            pass


@pytest.mark.slow
def test_a_machine_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock is waited for as long as a file server may keep it; that of a process here is gone with it."""
    monkeypatch.setattr(owner, "WAIT", 0.0)
    monkeypatch.setattr(owner, "WAIT_FOR_A_MACHINE", 0.5)
    with another_run(tmp_path):
        (tmp_path / LOCK).write_text("")
        since = "process 4, since 2026-01-01 00:00:00\n"
        here = f"{socket.gethostname()}, {since}"
        for text, gone in ((f"node7, {since}", True), ("\xff\0", True), ("", True), (here, False)):
            os.truncate(tmp_path / LOCK, 0)
            (tmp_path / LOCK).write_text(text, encoding="latin-1")
            began = time.monotonic()
            with pytest.raises(UserFileError, match="in use by another run") as raised, owned(tmp_path):
                pass
            assert (time.monotonic() - began >= 0.5) == gone
            assert (f"If that machine is gone, delete {tmp_path / LOCK}" in str(raised.value)) == gone


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(owner.fcntl, "lockf", refuse)
    with owned(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / LOCK).read_text()
    assert caplog.text.count("cannot be locked") == 1


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserFileError, match="OUTPUT_DIR .* cannot be written"), owned(tmp_path / "file" / "below"):
        pass
