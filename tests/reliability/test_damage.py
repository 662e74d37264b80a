"""Promises 2 and 3: damaged checkpoints are noticed, the last good one used; a failing disk loses nothing."""

import builtins
import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from maskfeat.checkpoint import files as checkpoint
from maskfeat.checkpoint.files import Position, checkpoint_path, latest_checkpoint, save_checkpoint, verify_checkpoint
from maskfeat.checkpoint.reading import read_checkpoint
from tests.reliability.harness import PRETRAINING, Forks, arguments, digest
from tests.reliability.scale import note, size


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
            target = (path, checkpoint_path(tmp_path, "", Position(3)))[trial % 2]
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
