"""One dead process ends the job within seconds, says which it was, and leaves nobody behind."""

import os
import signal
import statistics
import time
from pathlib import Path

import pytest

from maskfeat.checkpoint.files import find_checkpoints
from tests.reliability.harness import PRETRAINING, arguments
from tests.reliability.runs import ENDLESS, PYTHON, TOOL, TORCHRUN, Running, ranks_named
from tests.reliability.scale import note, size

pytestmark = [pytest.mark.slow, pytest.mark.alone]

LIMIT = 5.0
WITH_WORKERS = [*ENDLESS, "DATA_LOADER.NUM_WORKERS", "2"]
SPAWNED = [*WITH_WORKERS, "NUM_GPUS", "2", "DIST_BACKEND", "gloo"]


def load() -> str:
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


@pytest.mark.parametrize("victim", ["rank 1", "rank 0", "data worker", "parent"])
def test_spawned(victim: str, image_data: Path, tmp_path: Path) -> None:
    times = []
    for number in range(size(1, 20)):
        argv = arguments(PRETRAINING, image_data, tmp_path / f"out {number}", *SPAWNED)
        run = Running([*PYTHON, TOOL, *argv], tmp_path / str(number))
        try:
            pids = {
                "rank 0": run.ranks[0],
                "rank 1": run.ranks[1],
                "data worker": run.workers[run.ranks[1]][0],
                "parent": run.process.pid,
            }
            os.kill(pids[victim], signal.SIGKILL)
            code, seconds = run.end()
        finally:
            run.clean_up()
        said = run.said()
        if victim == "parent":
            assert code == -signal.SIGKILL
        elif victim == "data worker":
            assert code in (1, 2) and ranks_named(said) == [1], said
            assert "DataLoader worker" in said or "a data worker was killed" in said, said
        else:
            assert code == 128 + signal.SIGKILL, said
            assert f"{victim} (process {pids[victim]}) was killed by SIGKILL" in said
            assert ranks_named(said) == [int(victim[-1])]
        times.append(seconds)
        assert seconds < LIMIT, f"{seconds:.1f} s, {load()}\n{said}"
    note(5, f"spawned, {victim} killed: all gone after {max(times):.2f} s (median {statistics.median(times):.2f}), "
            f"{len(times)} of {len(times)} runs, {load()}")  # fmt: skip


def test_torchrun(image_data: Path, tmp_path: Path) -> None:
    """torchrun names the rank; what it killed dies with its data workers."""
    argv = arguments(PRETRAINING, image_data, tmp_path / "out", *WITH_WORKERS)
    run = Running([*TORCHRUN, TOOL, *argv], tmp_path / "screen")
    try:
        os.kill(run.ranks[1], signal.SIGKILL)
        code, seconds = run.end()
    finally:
        run.clean_up()
    said = run.said()
    assert code == 1 and "local_rank: 1" in said and "SIGKILL" in said, said
    # Its own exit is torchrun's affair: what matters is that the processes of the run are gone.
    note(5, f"torchrun, rank 1 killed: all gone after {seconds:.2f} s, {load()}")
    assert seconds < LIMIT, said


def test_interrupted(image_data: Path, tmp_path: Path) -> None:
    """Ctrl-C goes to the whole group: the state is saved, one line, and 130."""
    argv = arguments(PRETRAINING, image_data, tmp_path / "out", *SPAWNED)
    run = Running([*PYTHON, TOOL, *argv], tmp_path / "screen")
    try:
        os.killpg(run.process.pid, signal.SIGINT)
        code, seconds = run.end()
    finally:
        run.clean_up()
    said = run.said()
    note(5, f"spawned, Ctrl-C: all gone after {seconds:.2f} s, {load()}")
    assert code == 130 and seconds < LIMIT, said
    assert said.count("stopped on Ctrl-C") == 1 and "Traceback" not in said and "rank" not in said, said
    assert len(find_checkpoints(tmp_path / "out", "pt")) == 1


def test_interrupted_twice(image_data: Path, tmp_path: Path) -> None:
    """The second Ctrl-C leaves at once, here one that cannot finish its step."""
    argv = arguments(PRETRAINING, image_data, tmp_path / "out", *SPAWNED)
    run = Running([*PYTHON, TOOL, *argv], tmp_path / "screen")
    try:
        os.kill(run.ranks[1], signal.SIGSTOP)
        os.killpg(run.process.pid, signal.SIGINT)
        time.sleep(1.5)
        assert run.process.poll() is None
        os.killpg(run.process.pid, signal.SIGINT)
        code, seconds = run.end()
    finally:
        run.clean_up()
    said = run.said()
    assert code == 130 and seconds < LIMIT, said
    assert said.count("interrupted:") == 1 and "Traceback" not in said and "rank" not in said, said
    assert not find_checkpoints(tmp_path / "out", "pt")
