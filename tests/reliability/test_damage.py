"""Promises 2 and 3: damaged checkpoints are noticed, the last good one used; a failing disk loses nothing."""

import builtins
import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskfeat.checkpoint import files as checkpoint
from maskfeat.checkpoint.files import Position, checkpoint_path, latest_checkpoint, save_checkpoint, verify_checkpoint
from maskfeat.checkpoint.reading import read_checkpoint
from maskfeat.distributed.preemption import PREEMPTED
from tests.reliability.harness import FINE_TUNING, PRETRAINING, Forks, arguments, digest, wait_until
from tests.reliability.scale import note, size
from tests.worker import json_stats


def content(number: int) -> dict[str, Any]:
    """What training saves, in small."""
    torch.manual_seed(number)
    weights = {f"blocks.{i}.weight": torch.randn(24, 24) for i in range(4)}
    state = {i: {"exp_avg": torch.randn(24, 24), "step": torch.tensor(float(number))} for i in range(4)}
    return {
        "epoch": number,
        "model_state": weights,
        "optimizer_state": {"state": state, "param_groups": [{"lr": 1e-3, "params": [0, 1, 2, 3]}]},
        "cfg": "MODEL:\n  MODEL_NAME: MViT\n",
    }


def test_every_damage_is_found(tmp_path: Path) -> None:
    good, newest = (checkpoint_path(tmp_path, "", Position(epochs)) for epochs in (1, 2))
    for number, path in enumerate((good, newest)):
        save_checkpoint(path, content(number))
    whole = newest.read_bytes()
    rng = random.Random(0)
    flips, cuts = size(60, 1000), size(20, 200)
    found, silent = 0, 0
    for trial in range(flips + cuts):
        damaged = bytearray(whole)
        if trial < flips:
            bit = rng.randrange(8 * len(whole))
            damaged[bit // 8] ^= 1 << bit % 8
        else:
            del damaged[rng.randrange(len(whole)) :]
        newest.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            verify_checkpoint(newest)
        found += latest_checkpoint(tmp_path, "", "MViT") == good
        try:  # what one has without a checksum
            torch.load(newest, weights_only=True)
            silent += 1
        except Exception:
            pass
    assert found == flips + cuts
    note(2, f"{found} of {flips + cuts} damages found ({flips} flipped bits, {cuts} truncations), last good one used; "
         f"{silent} of them torch.load would have taken")  # fmt: skip


@pytest.mark.slow
def test_a_run_goes_back(forks: Forks, image_data: Path, tmp_path: Path) -> None:
    """The whole program: the newest checkpoint is damaged, the run goes on from the one before, to the same bits."""
    argv = arguments(PRETRAINING, image_data, tmp_path)
    log = tmp_path / "log"
    assert forks.run(argv, log) == 0
    expected = digest(tmp_path, "pt")
    last = checkpoint_path(tmp_path, "pt", Position(3))
    damaged = bytearray(last.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    last.write_bytes(damaged)
    assert forks.run(argv, log) == 0
    said = log.read_text()
    assert f"CHECKPOINT PASSED OVER: {last} is damaged" in said and "GOING BACK to" in said
    assert digest(tmp_path, "pt") == expected
    verify_checkpoint(last)


class Failing:
    """The file system's calls, of which the n-th, or the one that would write the n-th byte, fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: int, after_bytes: int | None, call: str) -> None:
        self.error, self.left, self.failed = error, after_bytes, ""
        if after_bytes is not None:
            monkeypatch.setattr(builtins, "open", self._open)
        for name in ("fsync", "replace"):
            if call.startswith(name):
                monkeypatch.setattr(checkpoint.os, name, self._failing(getattr(os, name), int(call[len(name) :]), name))

    def _fail(self, what: str) -> None:
        self.failed = what
        raise OSError(self.error, os.strerror(self.error))

    def _failing(self, call: Any, number: int, name: str) -> Any:
        calls = 0

        def replaced(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return self._fail(name) if calls == number else call(*args)

        return replaced

    def _open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = _open(path, mode, *args, **kwargs)
        if "w" not in mode:
            return file
        write = file.write

        def limited(data: Any) -> int:
            assert self.left is not None
            length = memoryview(data).nbytes
            if length > self.left:
                write(memoryview(data).cast("B")[: self.left])
                self.left = 0
                self._fail("write")
            self.left -= length
            return write(data)

        return _Wrapped(file, limited)


_open = open


class _Wrapped:
    """A file whose `write` is another one."""

    def __init__(self, file: Any, write: Any) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_Wrapped":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["full", "failing"])
def test_a_failing_disk(error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves fail at random bytes, in fsync and in rename, over a file of the same name and beside older ones."""
    older, path = (checkpoint_path(tmp_path, "", Position(epochs)) for epochs in (1, 2))
    save_checkpoint(older, content(1))
    save_checkpoint(path, content(2))
    length = path.stat().st_size
    rng = random.Random(error)
    trials, where = size(25, 50), {}
    for trial in range(trials):
        call = ("", "", "", "fsync1", "fsync2", "fsync3", "replace1", "replace2")[trial % 8]
        with monkeypatch.context() as patch:
            disk = Failing(patch, error, None if call else rng.randrange(length + 90), call)
            target = (path, checkpoint_path(tmp_path, "", Position(3)))[(trial + trial // 8) % 2]
            with pytest.raises(OSError, match=f"could not write the checkpoint {target}.*{os.strerror(error)}"):
                save_checkpoint(target, content(3))
        where[disk.failed] = where.get(disk.failed, 0) + 1
        assert not list(path.parent.glob(".*")), "something half-written is left"
        found = latest_checkpoint(tmp_path, "", "MViT")
        assert found in (path, target) and read_checkpoint(found)["epoch"] in (2, 3)
        verify_checkpoint(older)
        if disk.failed == "write" or call in ("fsync1", "fsync2", "replace1"):  # before the new one was in its place
            assert found == path and read_checkpoint(path)["epoch"] == 2
        save_checkpoint(path, content(2))
        for left in path.parent.glob(f"{checkpoint_path(tmp_path, '', Position(3)).name}*"):
            left.unlink()
    assert set(where) == {"write", "fsync", "replace"}
    note(3, f"{os.strerror(error)}: {trials} of {trials} saves failed cleanly, the last checkpoint intact ({where})")


def test_a_run_on_a_full_disk_goes_on(forks: Forks, image_data: Path, tmp_path: Path) -> None:
    """Checkpoints that cannot be written are reported; the last one must be, or the run fails."""
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    assert forks.run(arguments(PRETRAINING, image_data, tmp_path), tmp_path / "log") == 2
    said = (tmp_path / "log").read_text()
    assert said.count("NOT SAVED, training continues: ") == 2 and "error: " in said
    assert str(checkpoint_path(tmp_path, "pt", Position(3))) in said


@pytest.mark.slow
def test_nothing_beside_checkpoints_ends_a_run_on_a_full_disk(forks: Forks, image_data: Path, tmp_path: Path) -> None:
    """Logs, event files, records and lists: said once, and written again where there is room."""
    data, out, screen = tmp_path / "data", tmp_path / "out", tmp_path / "screen"
    shutil.copytree(image_data, data)
    many = ["SOLVER.MAX_EPOCH", "100000", "TRAIN.CHECKPOINT_PERIOD", "1", "TRAIN.KEEP_CHECKPOINTS", "1"]
    argv = arguments(PRETRAINING, data, out, *many, "TENSORBOARD.ENABLE", "True", "DATA.MAX_BAD_FRACTION", "0.5")
    run = forks.start([*argv, "TRAIN.EVAL_PERIOD", "1"], screen)

    def epochs() -> int:
        return len(json_stats(out, "val_epoch")) if (out / "stdout.log").exists() else 0

    wait_until(lambda: epochs() >= 2, 240, "two epochs")
    for path in sorted((data / "train").rglob("*.jpg"))[:2]:
        path.write_bytes(b"broken")
    whole = resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    time.sleep(5)
    assert sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) <= size, "the disk is full"
    before = epochs()
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, whole)
    wait_until(lambda: epochs() >= before + 100 or not run.is_there, 240, "more epochs")
    run.kill(signal.SIGTERM)
    assert run.wait() == PREEMPTED, screen.read_text()
    said = (out / "stdout.log").read_text()
    assert "NOT SAVED, training continues: " in said and "before the last one are missing" in said
    assert "Traceback" not in said + screen.read_text()
    assert len((out / "bad_samples.jsonl").read_text().splitlines()) == 2
    assert json.loads((out / "checkpoints" / "pt_validation.json").read_text())["epochs"] >= before + 100
    events = EventAccumulator(str(out / "tensorboard" / "pt"))
    events.Reload()
    shown = [event.step for event in events.Scalars("val_epoch/loss")]
    assert shown == sorted(set(shown)) and len(shown) >= 100
    assert not list(out.rglob("*.partial"))
    assert forks.run([*argv, "SOLVER.MAX_EPOCH", str(events.Scalars("val_epoch/loss")[-1].step + 2)], screen) == 0


def test_results_that_cannot_be_written(forks: Forks, image_data: Path, tmp_path: Path) -> None:
    """The score is there, also that of the average."""
    argv = arguments(
        FINE_TUNING, image_data, tmp_path, "SOLVER.MAX_EPOCH", "1", "TRAIN.EMA", "0.5", "TEST.ENABLE", "True"
    )
    (tmp_path / "file").touch()
    assert forks.run([*argv, "TEST.SAVE_RESULTS_PATH", "file/results.json"], tmp_path / "log") == 2
    said = (tmp_path / "log").read_text()
    assert said.index("test: top1") < said.index("test of averaged weights: top1") < said.index("error: ")
    assert f"error: {tmp_path}/file/results_1x1.json cannot be written; the scores are in the log" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-40],
        lambda text: text[: len(text) // 2] + b"\0" * 300,
        lambda text: b"\xff\xfe\0" + text,
        lambda text: b"",
        lambda text: b'json_stats: {"epochs": Infinity}\n5\n[]\n{"index": Infinity, "split": "train"}\n',
    ],
)
def test_damaged_logs_and_records_stop_no_run(damage: Any, forks: Forks, image_data: Path, tmp_path: Path) -> None:
    """Those that the disk cut short, and whatever else."""
    opts = ["TRAIN.EVAL_PERIOD", "1", "DATA.MAX_BAD_FRACTION", "0.5"]
    argv = arguments(PRETRAINING, image_data, tmp_path, *opts)
    assert forks.run([*argv, "SOLVER.MAX_EPOCH", "1"], tmp_path / "log") == 0
    (tmp_path / "bad_samples.jsonl").write_text('{"split": "train", "index": 0, "path": "a", "cause": "b"}\n')
    records = [
        "stdout.log",
        "bad_samples.jsonl",
        "checkpoints/pt_validation.json",
        "config.yaml",
        "config_given.yaml",
        "run.lock",
    ]
    for name in records:
        (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    assert forks.run(argv, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert "after epoch 1" in (tmp_path / "stdout.log").read_text(errors="replace")
    assert [entry["epoch"] for entry in json_stats(tmp_path, "val_epoch")][-2:] == ["2/3", "3/3"]
