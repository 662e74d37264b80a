"""Paths with a scheme: resolved by the handler that was registered for it, refused where there is none."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from iopath.common.file_io import PathHandler, PathManager

from maskfeat import file_io
from maskfeat.build import build_loader
from maskfeat.checkpoint.files import read_verified_checkpoint
from maskfeat.checkpoint.reading import read_checkpoint
from maskfeat.config import load_config, save_config
from maskfeat.data.datasets.sample_list import read_sample_list
from maskfeat.file_io import local_path


class Box(PathHandler):
    """box://name is a file of a folder, as a store of objects would fetch it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.asked = folder, list[str]()

    def _get_supported_prefixes(self) -> list[str]:
        return ["box://"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self.asked.append(path)
        return str(self.folder / path.removeprefix("box://"))


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Box]:
    manager, handler = PathManager(), Box(tmp_path / "box")
    handler.folder.mkdir()
    manager.register_handler(handler)
    monkeypatch.setattr(file_io, "path_manager", manager)
    yield handler


def test_local_paths_stay_as_they_are(box: Box) -> None:
    for path in ("a.pyth", "/a/../b.csv", "~/c.yaml", "", "c:/d", "a b://c", "ftp:/x"):
        assert local_path(path) == path
    assert local_path(Path("a/b")) == "a/b" and not box.asked


def test_a_registered_scheme_is_resolved(box: Box) -> None:
    assert local_path("box://a/b.pyth") == str(box.folder / "a/b.pyth") and box.asked == ["box://a/b.pyth"]


@pytest.mark.parametrize("path", ["s3://bucket/a.pyth", "gs://a", "file:///etc/passwd", "BOX://a", "box+x://a"])
def test_a_scheme_without_a_handler_is_named(box: Box, path: str, tmp_path: Path) -> None:
    scheme = path.split(":", 1)[0].replace("+", r"\+")
    message = rf"{scheme}://.* cannot be read: no handler is registered for {scheme}://.*register_handler"
    for read in (local_path, read_checkpoint, load_config, read_sample_list):
        with pytest.raises(ValueError, match=message):
            read(path)
    assert not box.asked


def test_without_plugins_there_is_no_handler() -> None:
    for scheme in ("http", "https", "s3", "file", "ftp"):
        with pytest.raises(ValueError, match=f"no handler is registered for {scheme}://"):
            local_path(f"{scheme}://127.0.0.1:9/a.yaml")


def test_checkpoints(box: Box) -> None:
    torch.save({"model_state": {"a": torch.arange(3.0)}}, box.folder / "a.pyth")
    for read in (read_checkpoint, read_verified_checkpoint):
        assert torch.equal(read("box://a.pyth")["model_state"]["a"], torch.arange(3.0))
    with pytest.raises(ValueError, match="there is no checkpoint at box://b.pyth"):
        read_checkpoint("box://b.pyth")
    (box.folder / "c.pyth").write_bytes(b"nothing that a checkpoint holds")
    with pytest.raises(ValueError, match="box://c.pyth is not loaded"):
        read_checkpoint("box://c.pyth")


def test_configs(box: Box, tmp_path: Path) -> None:
    (box.folder / "base.yaml").write_text("SOLVER:\n  BASE_LR: 0.25\n")
    (box.folder / "run.yaml").write_text("_BASE_: base.yaml\nRNG_SEED: 7\n")
    cfg = load_config("box://run.yaml", ["NUM_GPUS", "0"])
    assert (cfg.RNG_SEED, cfg.SOLVER.BASE_LR, cfg.NUM_GPUS) == (7, 0.25, 0)
    save_config("box://run.yaml", ["NUM_GPUS", "0"], cfg, tmp_path / "out")
    given = (tmp_path / "out" / "config_given.yaml").read_text()
    assert given.startswith("_BASE_: base.yaml\nRNG_SEED: 7\n") and "NUM_GPUS" in given


def test_lists_of_videos(box: Box) -> None:
    (box.folder / "val.csv").write_text("a.mp4 3\nb.mp4 1\n")
    assert read_sample_list("box://val.csv", " ", "/data") == [("/data/a.mp4", 3), ("/data/b.mp4", 1)]
    with pytest.raises(ValueError, match="box://none.csv cannot be read .no such file."):
        read_sample_list("box://none.csv")
    recipe = Path(__file__).resolve().parents[1] / "configs" / "quickstart" / "clips_ft.yaml"
    (box.folder / "b.mp4").write_bytes(b"one of them is there")
    prefix = str(box.folder)
    cfg = load_config(recipe, ["NUM_GPUS", "0", "DATA.PATH_TO_DATA_DIR", "box://", "DATA.PATH_PREFIX", prefix])
    box.asked.clear()
    assert list(build_loader(cfg, "val").labels) == [3, 1]
    assert box.asked == ["box://val.csv"]


def test_videos_themselves_stay_local(box: Box) -> None:
    (box.folder / "val.csv").write_text("box://a.mp4 3\n")
    with pytest.raises(ValueError, match="'box://a.mp4' is not a local file"):
        read_sample_list("box://val.csv")
