"""Checkpoint files: names, atomic writes, refusal of what is damaged or could run."""

import errno
import hashlib
import io
import os
import pickle
import re
import stat
import subprocess
from argparse import Namespace
from collections import OrderedDict
from http.client import IncompleteRead
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from yacs.config import CfgNode

from maskfeat.checkpoint import download, reading
from maskfeat.checkpoint import files as checkpoint
from maskfeat.checkpoint.files import (
    Position,
    checkpoint_path,
    find_checkpoints,
    given_or_latest_checkpoint,
    latest_checkpoint,
    prune_checkpoints,
    read_verified_checkpoint,
    save_checkpoint,
    set_aside_others,
    verify_checkpoint,
)
from maskfeat.checkpoint.reading import model_state, read_checkpoint, trained_model
from maskfeat.errors import UserError

CONTENT = {"epoch": 3, "model_state": {"a": torch.arange(5.0)}, "cfg": "MODEL:\n  MODEL_NAME: MViT\n"}


def test_published_names(tmp_path: Path) -> None:
    assert checkpoint_path("out", "ssl", Position(10)) == Path("out/checkpoints/ssl_checkpoint_epoch_00010.pyth")
    assert checkpoint_path("out", "", Position(1600)).name == "checkpoint_epoch_01600.pyth"
    for task, epochs, step in (
        ("", 2, 0),
        ("", 11, 0),
        ("", 10, 123),
        ("", 10, 0),
        ("ssl", 31, 0),
        ("ssl_eval", 99, 0),
    ):
        save_checkpoint(checkpoint_path(tmp_path, task, Position(epochs, step)), CONTENT)
    assert [p.name for p in find_checkpoints(tmp_path, "")] == [
        "checkpoint_epoch_00002.pyth",
        "checkpoint_epoch_00010.pyth",
        "checkpoint_epoch_00010_step_000123.pyth",
        "checkpoint_epoch_00011.pyth",
    ]
    assert [p.name for p in find_checkpoints(tmp_path, "ssl")] == ["ssl_checkpoint_epoch_00031.pyth"]
    assert find_checkpoints(tmp_path / "nowhere", "") == []


def test_round_trip(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, "", Position(4))
    save_checkpoint(path, CONTENT)
    content = read_checkpoint(path)
    assert content["epoch"] == 3 and (content["model_state"]["a"] == torch.arange(5.0)).all()
    assert trained_model(content) == "MViT"
    assert sorted(os.listdir(path.parent)) == [path.name, f"{path.name}.sha256"], "nothing temporary is left"
    checked = subprocess.run(
        ["sha256sum", "-c", f"{path.name}.sha256"], cwd=path.parent, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked


def test_other_models_are_not_resumed(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path, "", "MViT") is None
    save_checkpoint(checkpoint_path(tmp_path, "", Position(4)), CONTENT)
    assert latest_checkpoint(tmp_path, "", "MViT") == checkpoint_path(tmp_path, "", Position(4))
    assert latest_checkpoint(tmp_path, "ssl", "MaskMViT") is None
    with pytest.raises(ValueError, match="OUTPUT_DIR or a TASK"):
        latest_checkpoint(tmp_path, "", "MaskMViT")


def test_failed_write_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint_path(tmp_path, "", Position(1))
    save_checkpoint(path, CONTENT)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(OSError, match="checkpoint_epoch_00001.pyth.*No space left"):
        save_checkpoint(path, {"epoch": 99})
    monkeypatch.undo()
    assert read_checkpoint(path)["epoch"] == 3
    assert sorted(os.listdir(path.parent)) == [path.name, f"{path.name}.sha256"]
    verify_checkpoint(path)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_file_systems_that_flush_no_folders(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They refuse the call, as some network and FUSE mounts do: the file is there. A disk that fails is an error."""
    path = checkpoint_path(tmp_path, "", Position(1))
    flush = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    if number == errno.EIO:
        with pytest.raises(OSError, match="could not write the checkpoint"):
            save_checkpoint(path, CONTENT)
        return
    save_checkpoint(path, CONTENT)
    verify_checkpoint(path)
    assert read_checkpoint(path)["epoch"] == 3


class _Gadget:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch gadget_ran",)


def test_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state": {"a": _Gadget()}}, tmp_path / "gadget.pyth")
    (tmp_path / "bare.pyth").write_bytes(pickle.dumps(_Gadget()))
    for name in ("gadget.pyth", "bare.pyth"):
        with pytest.raises(ValueError, match="not loaded|not a readable"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "gadget_ran").exists()


def test_options_of_other_scripts_are_read(tmp_path: Path) -> None:
    """torchvision's scripts save an argparse.Namespace beside the weights, others a yacs config."""
    options = Namespace(lr=0.1, sizes=[160, 224], nested=Namespace(name="r50"))
    state = {"conv1.weight": torch.arange(3.0)}
    content = {"model": state, "optimizer": {}, "lr_scheduler": {}, "epoch": 9, "args": options, "scaler": None}
    torch.save({**content, "config": CfgNode({"A": {"B": 1}})}, tmp_path / "model.pth")
    read = read_checkpoint(tmp_path / "model.pth")
    assert torch.equal(model_state(read)["conv1.weight"], state["conv1.weight"])
    assert read["args"] == options and read["config"]["A"]["B"] == 1

    options.gadget = _Gadget()
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="not loaded"):
        read_checkpoint(tmp_path / "model.pth")


def test_weights_by_torchvisions_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    cached = tmp_path / "hub" / "checkpoints" / weights.url.rsplit("/", 1)[1]
    cached.parent.mkdir(parents=True)
    torch.save({"conv1.weight": torch.arange(3.0)}, cached)
    assert torch.equal(model_state(read_checkpoint(str(weights)))["conv1.weight"], torch.arange(3.0))

    # A file of one's own may be called like that.
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": torch.arange(4.0)}, tmp_path / "R50_Weights.pth")
    assert len(model_state(read_checkpoint("R50_Weights.pth"))["conv1.weight"]) == 4

    cached.write_bytes(pickle.dumps(_Gadget()))
    with pytest.raises(ValueError, match="ResNet18_Weights.IMAGENET1K_V1"):
        read_checkpoint(str(weights))
    assert not (tmp_path / "gadget_ran").exists()

    cached.unlink()
    monkeypatch.setattr(download, "_opener", _no_network)
    with pytest.raises(ValueError, match="ResNet18_Weights.IMAGENET1K_V1: https.* could not be fetched.*no route"):
        read_checkpoint(str(weights))
    for name in ("ResNet18_Weights.IMAGENET1K_V9", "Resnet18_Weights.IMAGENET1K_V1"):
        with pytest.raises(ValueError, match=f"knows no weights {name}: see TRAIN.CHECKPOINT_FILE_PATH"):
            read_checkpoint(name)


@pytest.mark.parametrize("right", [True, False])
def test_weights_of_torchvision_are_compared_with_their_hash(
    right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.BytesIO()
    torch.save({"conv1.weight": torch.arange(3.0)}, out)
    digest = hashlib.sha256(out.getvalue()).hexdigest()[:8] if right else "5c106cde"
    weights = Namespace(url=f"https://example.org/resnet18-{digest}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(reading, "get_weight", lambda name: weights)
    monkeypatch.setattr(download, "_download", lambda url, path, beat: path.write_bytes(out.getvalue()))
    if right:
        assert len(model_state(read_checkpoint("ResNet18_Weights.IMAGENET1K_V1"))["conv1.weight"]) == 3
        return
    with pytest.raises(UserError, match=r"^ResNet18_Weights.IMAGENET1K_V1: .* is damaged or not the file that"):
        read_checkpoint("ResNet18_Weights.IMAGENET1K_V1")


@pytest.mark.parametrize(
    "error",
    [ConnectionResetError(104, "Connection reset by peer"), IncompleteRead(b"half"), URLError("no route to host")],
    ids=lambda error: type(error).__name__,
)
def test_weights_of_torchvision_that_do_not_arrive(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(download, "_opener", lambda: Namespace(open=fail))
    said = re.escape(str(getattr(error, "reason", error)))
    with pytest.raises(UserError, match=rf"^ResNet18.*: https.* could not be fetched: {said}"):
        read_checkpoint("ResNet18_Weights.IMAGENET1K_V1")


def _no_network(*_: object, **__: object) -> None:
    raise URLError("no route to host")


def test_damaged_and_missing(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, "", Position(1))
    save_checkpoint(path, CONTENT)
    whole = path.read_bytes()
    for keep in (0, 10, len(whole) // 2):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match="checkpoint_epoch_00001"):
            read_checkpoint(path)
    for read in (read_checkpoint, lambda path: given_or_latest_checkpoint(str(path), tmp_path, "", "MViT")):
        with pytest.raises(UserError, match=r"none.pyth: see TRAIN.CHECKPOINT_FILE_PATH, .* TEST.CHECKPOINT_FILE_PATH"):
            read(tmp_path / "none.pyth")
    torch.save([1, 2], tmp_path / "list.pyth")
    with pytest.raises(ValueError, match="expected a dict"):
        read_checkpoint(tmp_path / "list.pyth")


@pytest.mark.parametrize("path", [".", "/", ".."])
def test_folders_are_no_checkpoints(path: str) -> None:
    with pytest.raises(UserError, match="is not a readable checkpoint"):
        read_verified_checkpoint(path)


def test_where_parameters_lie() -> None:
    state = OrderedDict(a=torch.zeros(1))
    for content in ({"model_state": state}, {"model": state}, {"state_dict": state}, state):
        assert model_state(content) == state
    with pytest.raises(ValueError, match="no parameters"):
        model_state({"epoch": 1})


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_without_its_checksum(tmp_path: Path) -> None:
    """A process that ends between the two renames leaves a whole checkpoint without one; PyTorch's own then serve."""
    path = checkpoint_path(tmp_path, "", Position(1))
    save_checkpoint(path, CONTENT)
    path.with_name(f"{path.name}.sha256").unlink()
    verify_checkpoint(path)
    where = path.read_bytes().index(torch.arange(5.0).numpy().tobytes())
    flip_bit(path, 8 * where + 77)
    assert torch.equal(read_checkpoint(path)["model_state"]["a"], torch.arange(5.0)) is False, "PyTorch sees nothing"
    with pytest.raises(ValueError, match="damaged"):
        verify_checkpoint(path)


def test_bits_of_a_directory_are_damage_without_its_checksum(tmp_path: Path) -> None:
    """Whatever they make of the file: an encrypted one, a compressed one, or one of another length. Of its marks and
    names every bit is; dates and the like may be anything."""
    path = checkpoint_path(tmp_path, "", Position(1))
    save_checkpoint(path, {"model_state": {}})
    path.with_name(f"{path.name}.sha256").unlink()
    content = path.read_bytes()
    start, found = content.index(b"PK\1\2"), set()
    for bit in range(8 * start, 8 * len(content)):
        flip_bit(path, bit)
        try:
            verify_checkpoint(path)
        except UserError as error:
            assert f"{path} is damaged: " in str(error)
            found.add(bit // 8)
        path.write_bytes(content)
    for needed in (b"PK\1\2", b"PK\5\6", b"/data.pkl", b"/version"):
        at = content.index(needed, start)
        assert set(range(at, at + len(needed))) <= found, needed


def test_damaged_ones_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [checkpoint_path(tmp_path, "", Position(1, step)) for step in (0, 7, 9)]
    for path in paths:
        save_checkpoint(path, CONTENT)
    flip_bit(paths[2], 1234)
    assert latest_checkpoint(tmp_path, "", "MViT") == paths[1]
    assert (
        f"CHECKPOINT PASSED OVER: {paths[2]} is damaged" in caplog.text and f"GOING BACK to {paths[1]}" in caplog.text
    )
    with pytest.raises(ValueError, match="its SHA-256 differs from the one in"):
        read_verified_checkpoint(paths[2])
    for path in paths[:2]:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="all 3 checkpoints of this run in"):
        latest_checkpoint(tmp_path, "", "MViT")


def test_checkpoints_of_another_course_are_set_aside(tmp_path: Path) -> None:
    """A run that has gone back, or changed the number of samples of a step, would resume from them."""
    for at in ((1, 0), (2, 0), (2, 9), (3, 0)):
        save_checkpoint(checkpoint_path(tmp_path, "", Position(*at)), CONTENT)
    other_task = checkpoint_path(tmp_path, "ft", Position(9))
    save_checkpoint(other_task, CONTENT)
    sharded = checkpoint_path(tmp_path, "", Position(2, 4), ".dcp")
    (sharded / "__0_0.distcp").mkdir(parents=True)
    for again in (1, 2):
        saved = checkpoint_path(tmp_path, "", Position(2, 4))
        save_checkpoint(saved, CONTENT)
        folder = set_aside_others(saved, "")
        assert folder is not None and folder.name == ("superseded" if again == 1 else "superseded_2")
        moved = ["checkpoint_epoch_00002_step_000009.pyth", "checkpoint_epoch_00003.pyth"]
        names = sorted(path.name for path in folder.iterdir())
        first = ["checkpoint_epoch_00002_step_000004.dcp"] if again == 1 else []
        assert names == sorted([*first, *moved, *(f"{name}.sha256" for name in moved)])
        for name in moved:
            verify_checkpoint(folder / name)
        assert latest_checkpoint(tmp_path, "", "MViT") == saved and len(find_checkpoints(tmp_path, "")) == 3
        assert set_aside_others(saved, "") is None, "once"
        for at in ((2, 9), (3, 0)):
            save_checkpoint(checkpoint_path(tmp_path, "", Position(*at)), CONTENT)
    assert other_task.exists()


@pytest.mark.parametrize(
    "keep, left",
    [
        (0, [(1, 0), (2, 0), (2, 9), (3, 0), (4, 0)]),
        (1, [(3, 0), (4, 0)]),
        (2, [(2, 9), (3, 0), (4, 0)]),
        (9, [(1, 0), (1, 5), (2, 0), (2, 9), (3, 0), (4, 0)]),
    ],
)
def test_the_newest_are_kept(keep: int, left: list[tuple[int, int]], tmp_path: Path) -> None:
    """Those after the one that was saved are not touched here."""
    for at in ((1, 0), (1, 5), (2, 0), (2, 9), (3, 0), (4, 0)):
        save_checkpoint(checkpoint_path(tmp_path, "", Position(*at)), CONTENT)
    other = checkpoint_path(tmp_path, "ft", Position(1))
    save_checkpoint(other, CONTENT)
    killed = other.with_name(".checkpoint_epoch_00001.pyth.partial")
    killed.write_bytes(b"half")
    prune_checkpoints(tmp_path, "", Position(3), keep)
    assert find_checkpoints(tmp_path, "") == [checkpoint_path(tmp_path, "", Position(*at)) for at in left]
    assert other.exists() and not killed.exists()
    assert len(list(other.parent.glob("*.sha256"))) == len(left) + 1
