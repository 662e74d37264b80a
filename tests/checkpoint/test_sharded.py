"""Sharded checkpoints of one process: whole or not there, damage is found, nothing in them runs or leads outside."""

import hashlib
import os
import pickle
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from maskfeat.checkpoint import atomic
from maskfeat.checkpoint import sharded as sharded_checkpoint
from maskfeat.checkpoint.sharded import full_tensors, load_sharded, read_sharded_plain, save_sharded, verify
from maskfeat.checkpoint.sharded_files import METADATA, PLAIN, SUMS
from maskfeat.errors import UserError, UserFileError

PLAIN_VALUES = {"epoch": 3, "cfg": "MODEL:\n  MODEL_NAME: MViT\n", "scale": 65536.0}


def tensors() -> dict[str, torch.Tensor]:
    return {
        "model.a": torch.arange(24.0).view(4, 6),
        "model.count": torch.tensor(7),
        "optim.a.exp_avg": torch.randn(4, 6).to(torch.bfloat16),
        "optim.a.step": torch.tensor(2.0),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint_epoch_00004.dcp"
    save_sharded(path, tensors(), PLAIN_VALUES).wait()
    return path


def test_round_trip(folder: Path) -> None:
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing temporary is left"
    assert sorted(os.listdir(folder)) == [METADATA, SUMS, "__0_0.distcp", PLAIN]
    assert read_sharded_plain(folder) == PLAIN_VALUES
    torch.manual_seed(0)
    wanted, filled = tensors(), {name: torch.zeros_like(value) for name, value in tensors().items()}
    torch.manual_seed(0)
    save_sharded(folder, tensors(), PLAIN_VALUES).wait()
    load_sharded(folder, filled)
    for name, value in wanted.items():
        assert filled[name].dtype == value.dtype and torch.equal(filled[name], value)
    full = full_tensors(folder)
    assert list(full) == ["a", "count"] and torch.equal(full["a"], wanted["model.a"])
    assert list(full_tensors(folder, "optim.")) == ["a.exp_avg", "a.step"]


def test_sums_are_sha256sums(folder: Path) -> None:
    lines = (folder / SUMS).read_text().splitlines()
    assert sorted(lines) == sorted(  # by their sums, which a file of metadata has anew each time
        f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}" for p in folder.iterdir() if p.name != SUMS
    )


def test_tensors_may_change_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    write = dcp.FileSystemWriter.write_data

    def held_up(*given: Any) -> Any:
        assert go_on.wait(60)
        return write(*given)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", held_up)
    given = tensors()
    handle = save_sharded(tmp_path / "a.dcp", given, {})
    for value in given.values():
        value.zero_()
    assert not handle.done() and not (tmp_path / "a.dcp").exists()
    following: list[Any] = []
    second = threading.Thread(target=lambda: following.append(save_sharded(tmp_path / "b.dcp", given, {})))
    second.start()
    second.join(0.2)
    assert not following and not list(tmp_path.glob(".b*")), "one at a time"
    go_on.set()
    handle.wait()
    second.join()
    following[0].wait()
    assert torch.equal(full_tensors(tmp_path / "a.dcp")["a"], tensors()["model.a"])
    assert not full_tensors(tmp_path / "b.dcp")["a"].any()


def test_failed_write_keeps_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for module, name in (
        (sharded_checkpoint, "write_and_fsync"),
        (atomic, "fsync_dir"),
        (sharded_checkpoint, "sha256"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(OSError, match=r"checkpoint_epoch_00004\.dcp: .*No space left"):
                save_sharded(folder, tensors(), {"epoch": 9}).wait()
        verify(folder)
        assert read_sharded_plain(folder)["epoch"] == 3
        assert os.listdir(folder.parent) == [folder.name]
    # An error that nobody waited for comes up with the next call.
    with monkeypatch.context() as patch:
        patch.setattr(sharded_checkpoint, "write_and_fsync", full)
        handle = save_sharded(folder, tensors(), {})
        while not handle.done():
            pass
    with pytest.raises(OSError, match="No space left"):
        save_sharded(folder.with_name("next.dcp"), tensors(), {})
    save_sharded(folder.with_name("next.dcp"), tensors(), {}).wait()
    with pytest.raises(ValueError):
        save_sharded(folder, tensors(), {"loss": float("nan")})
    (folder.parent / "file").write_text("")
    with pytest.raises(OSError, match=r"file/a\.dcp"):
        save_sharded(folder.parent / "file" / "a.dcp", tensors(), {})


def test_every_damage_is_found(folder: Path) -> None:
    draw = random.Random(0)
    files = sorted(folder.iterdir())
    for number in range(400):
        path = files[number % len(files)]
        whole = path.read_bytes()
        if number % 5:
            place, bit = draw.randrange(len(whole)), draw.randrange(8)
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        else:
            path.write_bytes(whole[: draw.randrange(len(whole))])
        with pytest.raises(ValueError, match=r"checkpoint_epoch_00004\.dcp"):
            verify(folder)
        path.write_bytes(whole)
    verify(folder)
    for path in files:
        whole = path.read_bytes()
        path.unlink()
        for read in (verify, full_tensors, lambda f: load_sharded(f, tensors())):
            with pytest.raises(ValueError, match=f"{path.name}"):
                read(folder)
        path.write_bytes(whole)
    (folder / "__0_0.distcp").rename(folder.parent / "elsewhere")
    (folder / "__0_0.distcp").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(ValueError, match="__0_0.distcp is missing"):
        verify(folder)


def change(folder: Path, name: str, content: bytes) -> None:
    """Put other content into a file, and its sum into the list: what a stranger would do."""
    (folder / name).write_bytes(content)
    names = [path.name for path in folder.iterdir() if path.name != SUMS]
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    verify(folder)


class _Gadget:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch gadget_ran",)


def _leads_outside(metadata: Metadata) -> None:
    for place in metadata.storage_data.values():
        place.relative_path = "../outside"


def _holds_bytes(metadata: Metadata) -> None:
    metadata.state_dict_metadata["model.a"] = BytesStorageMetadata()


def _is_transformed(metadata: Metadata) -> None:
    for place in metadata.storage_data.values():
        place.transform_descriptors = ["zstd"]


def _is_large(metadata: Metadata) -> None:
    metadata.state_dict_metadata["model.a"].size = torch.Size([1 << 50])


def _is_negative(metadata: Metadata) -> None:
    metadata.state_dict_metadata["model.a"].size = torch.Size([-(1 << 50), 1])


def _holds_a_gadget(metadata: Metadata) -> None:
    metadata.planner_data = _Gadget()


ATTACKS: list[Callable[[Metadata], None]] = [
    _leads_outside, _holds_bytes, _is_transformed, _is_large, _is_negative, _holds_a_gadget,
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_nothing_runs_and_nothing_leads_outside(
    folder: Path, monkeypatch: pytest.MonkeyPatch, attack: Callable[[Metadata], None]
) -> None:
    monkeypatch.chdir(folder.parent)
    metadata = pickle.loads((folder / METADATA).read_bytes())
    attack(metadata)
    change(folder, METADATA, pickle.dumps(metadata))
    for read in (full_tensors, lambda f: load_sharded(f, tensors())):
        with pytest.raises(ValueError, match=f"{METADATA}.*not loaded"):
            read(folder)
    assert not (folder.parent / "gadget_ran").exists()


def test_other_pickles_run_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for content in (
        pickle.dumps(_Gadget()),
        pickle.dumps([1]),
        pickle.dumps(print),
        b"",
        b"\x80\x05.",
        b"cos\nsystem\n",
    ):
        change(folder, METADATA, content)
        with pytest.raises(ValueError, match="not loaded"):
            full_tensors(folder)
    assert not (folder.parent / "gadget_ran").exists()


def test_what_file_servers_and_desktops_leave_is_no_damage(folder: Path) -> None:
    for name in (".nfs00000000deadbeef00000001", ".DS_Store", "._model"):
        (folder / name).touch()
    (folder / "@eaDir").mkdir()
    verify(folder)
    assert full_tensors(folder)
    (folder / "more.distcp").touch()
    with pytest.raises(UserError, match=r"more\.distcp is not listed"):
        verify(folder)


@pytest.mark.parametrize("content", [b"{", b"[" * 200_000, b"\xff", b"[]"])
def test_plain_values_that_are_none(folder: Path, content: bytes) -> None:
    change(folder, PLAIN, content)
    with pytest.raises(UserError, match=PLAIN):
        read_sharded_plain(folder)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"\x80\x04})" + b"".join(b"\x94h%c\x86" % n for n in range(40)) + b"K\x01s.", "nested|values"),
        (b"\x80\x04})" + b"\x85" * 1_000_000 + b"K\x01s.", "nested more than 64 deep"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "names its value 2147483647"),
        (b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"x.", "damaged"),
        (b"\x80\x04}" + b"0" * 5 + b".", "damaged"),
    ],
    ids=["exponential", "deep", "memo", "bytearray", "empty stack"],
)
def test_pickles_that_would_never_end(folder: Path, content: bytes, cause: str) -> None:
    change(folder, METADATA, content)
    began = time.process_time()
    with pytest.raises(ValueError, match=f"not loaded: .*({cause})"):
        full_tensors(folder)
    assert time.process_time() - began < 10


def test_a_gadget_among_the_tensors_runs_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    metadata = pickle.loads((folder / METADATA).read_bytes())
    path = folder / "__0_0.distcp"
    torch.save(_Gadget(), path)
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, path.stat().st_size
    change(folder, METADATA, pickle.dumps(metadata))
    with pytest.raises(ValueError, match="cannot be read"):
        full_tensors(folder)
    assert not (folder.parent / "gadget_ran").exists()


def test_other_models_are_refused(folder: Path) -> None:
    given = tensors()
    wrong = {**given, "model.a": torch.zeros(6, 4), "model.count": torch.zeros(()), "model.b": torch.zeros(1)}
    del wrong["optim.a.step"]
    with pytest.raises(ValueError, match="of another model") as caught:
        load_sharded(folder, wrong)
    for words in ("model.b is not in", "optim.a.step is in", "model.a is", "model.count is"):
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="SHA256SUMS is missing"):
        verify(folder.parent / "nowhere.dcp")
    change(folder, PLAIN, b"[1]")
    with pytest.raises(ValueError, match=r"plain\.json holds a list"):
        read_sharded_plain(folder)
    change(folder, PLAIN, b"{")
    with pytest.raises(ValueError):
        read_sharded_plain(folder)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group, of this process alone: what several ranks do."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_a_user_can_mend_is_said_as_that_on_all_ranks(folder: Path, group: None) -> None:
    """And what is a fault of the program keeps its traceback."""
    with pytest.raises(UserError, match="^rank 0: .* is of another model"):
        load_sharded(folder, {**tensors(), "model.b": torch.zeros(1)})
    (folder / "__0_0.distcp").write_bytes(b"cut")
    with pytest.raises(UserError, match="^rank 0: .*__0_0.distcp"):
        load_sharded(folder, tensors())

    def fail() -> None:
        raise ValueError("not meant for users")

    with pytest.raises(ValueError, match="^rank 0: not meant for users") as caught:
        sharded_checkpoint._on_all_ranks(fail, None)
    assert not isinstance(caught.value, UserError)
    with pytest.raises(UserFileError, match="could not write the checkpoint"):
        save_sharded(folder / PLAIN / "below.dcp", tensors(), {})
