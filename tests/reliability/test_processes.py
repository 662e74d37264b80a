"""Promise 6: a hung process is named, with stacks. Promise 8: the number of processes may change within a run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from maskfeat.checkpoint.files import find_checkpoints
from maskfeat.checkpoint.reading import read_checkpoint
from maskfeat.distributed.preemption import PREEMPTED
from tests.reliability.harness import PRETRAINING, REPO, arguments, wait_until
from tests.reliability.runs import START, descendants, start
from tests.reliability.scale import note, size
from tests.worker import json_stats

TRAINER = [sys.executable, str(REPO / "tests" / "reliability" / "trainer.py")]
TWO = ("NUM_GPUS", "2", "DIST_BACKEND", "gloo", "SOLVER.MAX_EPOCH", "1000", "HANG_MINUTES", "0.1")  # six seconds


def ranks_of(process: "subprocess.Popen[bytes]", log: Path) -> list[int]:
    """The processes of ranks 0 and 1 once both train."""
    wait_until(lambda: "step 3/" in log.read_text() or process.poll() is not None, START, "third step")
    time.sleep(2)  # a few beats
    assert process.poll() is None, log.read_text()
    spawned = [one.pid for one in descendants(process.pid) if "spawn_main" in one.command]
    assert len(spawned) == 2
    return spawned


def stack_of(rank: int, said: str) -> str:
    """What a report gives as the stack of that rank; ranks with the same stack share one."""
    shared = re.findall(r"^stack of rank ([\d, ]+):\n((?:  .*\n)+)", said, re.MULTILINE)
    found = [stack for ranks, stack in shared if str(rank) in ranks.split(", ")]
    assert len(found) == 1, said
    return found[0]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("who", [1, 0])
def test_a_stopped_process_is_named(who: int, image_data: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    argv = arguments(PRETRAINING, image_data, tmp_path, *TWO)
    process = start([*TRAINER, *argv], log)
    try:
        pid = ranks_of(process, log)[who]
        os.kill(pid, signal.SIGSTOP)
        stopped = time.monotonic()
        wait_until(lambda: "HANG: no progress" in log.read_text(), 60, "report")
        named = time.monotonic() - stopped
        assert process.wait(30) not in (0, PREEMPTED)
        ended = time.monotonic() - stopped
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    said = log.read_text()
    assert re.search(rf"not answering: rank {who} \(.*, process {pid}; silent for \d+ s, last epoch \d+", said), said
    assert "loop.py" in stack_of(who, said)
    assert "most recent call first" in said, "the stacks of the one that reports"
    assert named < 6 + 10
    note(6, f"SIGSTOP of rank {who}: named after {named:.1f} s (HANG_MINUTES 6 s), all ended after {ended:.1f} s")


@pytest.mark.slow
@pytest.mark.alone
def test_a_sleeping_process_is_named(image_data: Path, tmp_path: Path) -> None:
    """It goes on beating, and does nothing."""
    log = tmp_path / "log"
    argv = arguments(PRETRAINING, image_data, tmp_path, *TWO)
    process = start([*TRAINER, *argv], log, HANG_AT="1,4")
    try:
        assert process.wait(START + 60) not in (0, PREEMPTED)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    said = log.read_text()
    assert "behind the others: rank 1 (" in said and "fall_asleep" in stack_of(1, said), said


@pytest.mark.slow
def test_stopped_in_a_validation(image_data: Path, tmp_path: Path) -> None:
    """One of two processes is asked to stop, where ranks are not in step and a checkpoint in pieces is being written.

    Nothing is lost, and the validation is made up for.
    """
    opts = ["SOLVER.MAX_EPOCH", "3", "TRAIN.EMA", "0.0", "TRAIN.EVAL_PERIOD", "1", "TRAIN.PARALLEL", "fsdp"]
    opts += ["TRAIN.CHECKPOINT_FORMAT", "sharded"]
    argv = arguments(PRETRAINING, image_data, tmp_path, *TWO[:4], *opts)
    log = tmp_path / "log"
    assert start([*TRAINER, *argv], log, STOP_AFTER="2").wait(START) == PREEMPTED, log.read_text()
    assert [entry["epoch"] for entry in json_stats(tmp_path, "val_epoch")] == ["1/3"]
    assert find_checkpoints(tmp_path, "pt")[-1].name == "pt_checkpoint_epoch_00002.dcp"
    assert start([*TRAINER, *argv], log).wait(START) == 0, log.read_text()
    assert [entry["epoch"] for entry in json_stats(tmp_path, "val_epoch")] == ["1/3", "2/3", "3/3"]
    assert len(json_stats(tmp_path, "train_iter")) == 15, "every step once"


@pytest.mark.slow
def test_the_number_of_processes_changes(image_data: Path, tmp_path: Path) -> None:
    """1 -> 2 -> 4 processes within a run, each change in the middle of an epoch, against one process throughout."""
    epochs = str(size(4, 12))
    outputs = {name: tmp_path / name for name in ("alone", "growing")}
    for output in outputs.values():
        output.mkdir()
    common = ["SOLVER.MAX_EPOCH", epochs, "MVIT.DROPPATH_RATE", "0.0", "TRAIN.EMA", "0.0", "LOG_PERIOD", "1"]

    def go(name: str, processes: int) -> int:
        output = outputs[name]
        gpus = ["DIST_BACKEND", "gloo", "NUM_GPUS", str(processes if processes > 1 else 0)]
        argv = arguments(PRETRAINING, image_data, output, *common, *gpus)
        process = start([*TRAINER, *argv], output / "log", RECORD_TO=str(output))
        if name == "growing" and processes < 4:
            before = len(json_stats(output, "train_iter")) if (output / "stdout.log").exists() else 0
            enough = before + 2 + 5 * (int(epochs) // 4)
            wait_until(lambda: len(losses(output)) >= enough or process.poll() is not None, START, "some steps")
            os.kill(process.pid, signal.SIGTERM)
        return process.wait(300)

    assert go("alone", 1) == 0
    for processes, code in ((1, PREEMPTED), (2, PREEMPTED), (4, 0)):
        assert go("growing", processes) == code, (outputs["growing"] / "log").read_text()
    orders = {name: samples(output) for name, output in outputs.items()}
    assert orders["alone"] == orders["growing"]
    expected, found = (losses(outputs[name]) for name in ("alone", "growing"))
    assert len(expected) == len(found) == 5 * int(epochs)
    worst = max(abs(a - b) / a for a, b in zip(expected, found, strict=True))
    states = [read_checkpoint(find_checkpoints(output, "pt")[-1])["model_state"] for output in outputs.values()]
    apart = max(float((states[0][name] - states[1][name]).abs().max()) for name in states[0])
    note(
        8,
        f"1 -> 2 -> 4 processes: same order, losses within {worst:.1e} of one process's, weights within {apart:.1e}",
    )
    assert worst < 1e-6
    assert torch.tensor(apart) < 1e-5


def losses(output: Path) -> list[float]:
    """Of every step."""
    return (
        [float(entry["loss"]) for entry in json_stats(output, "train_iter")] if (output / "stdout.log").exists() else []
    )


def samples(output: Path) -> dict[tuple[int, int], list[int]]:
    """The samples of every step, of all ranks in their order."""
    shares: dict[tuple[int, int], dict[int, list[int]]] = {}
    for path in sorted(output.glob("rank_*.jsonl")):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            shares.setdefault((entry["epoch"], entry["step"]), {})[entry["rank"]] = entry["index"]
    return {at: [index for rank in sorted(of) for index in of[rank]] for at, of in shares.items()}
